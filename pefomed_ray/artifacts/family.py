"""The kinds of base model that an adapter can be trained on, and where their parts are. Names only: no torch."""

from dataclasses import dataclass

from pefomed_ray.errors import ConfigError

PEFOMED = "pefomed"


@dataclass(frozen=True)
class Family:
    """Dotted names of a model's modules, as `named_modules` spells them in the class that `model_type` stands for."""

    model_type: str
    """`config.json`'s own word."""
    language_model: str
    """The only part that adapters go to. Its head may stand outside of it."""
    layers: str
    """The decoder layers, a ModuleList: what FSDP2 shards one by one."""
    projector: tuple[str, ...]
    """Everything between vision tower and language model: trained if asked."""
    vision: tuple[str, ...]
    """Frozen, always."""
    adapted: str = ""
    """The module whose names the saved adapter's keys count from: plain `peft` loads it there. Empty: the whole."""


def _family(
    model_type: str,
    projector: tuple[str, ...] = ("model.multi_modal_projector",),
    vision: str = "model.vision_tower",
    language_model: str = "model.language_model",
) -> Family:
    return Family(model_type, language_model, f"{language_model}.layers", projector, (vision,))


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            PEFOMED,
            language_model="language_model",
            layers="language_model.model.layers",
            projector=("projector",),
            vision=("vision_tower",),
            adapted="language_model",
        ),
        _family("llava"),
        _family("llava_onevision"),
        _family("qwen2_5_vl", ("model.visual.merger",), "model.visual"),
        _family("qwen3_vl", ("model.visual.merger", "model.visual.deepstack_merger_list"), "model.visual"),
        _family("gemma3"),
        _family("paligemma"),
        _family("idefics3", ("model.connector",), "model.vision_model", "model.text_model"),
        _family("smolvlm", ("model.connector",), "model.vision_model", "model.text_model"),
        _family("internvl"),
    )
}


def family_of_type(model_type: str, where: str) -> Family:
    """The family. Raises ConfigError, naming those there are; `where` says whose config it is."""
    if model_type not in FAMILIES:
        raise ConfigError(f"{where} holds a {model_type!r} model; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
