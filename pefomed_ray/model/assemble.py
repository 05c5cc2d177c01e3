"""A `pefomed` base out of a vision tower, a causal language model, and a fresh projector between them.

The weights of both parts go to the base as they are stored, shard by shard; neither part is ever whole in memory. The
paper's parts are EVA-CLIP ViT-g (transformers' `Blip2VisionModel`) at 448 px and Llama-2-7b-chat (arXiv 2401.02797,
section 4.1).

Letters: P patches an image, D width of the tower, H width of the language model.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from pefomed_ray.artifacts.base import IMAGE_SPEC_FILE
from pefomed_ray.artifacts.storage import publishing, read_json, write_json
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model.parts import (
    MAX_SHARD_BYTES,
    SOURCES_FILE,
    Part,
    Stored,
    find_part,
    read_tensor,
    stored_tensors,
    write_weights,
)
from pefomed_ray.model.pefomed import (
    PefomedConfig,
    PefomedForConditionalGeneration,
    interpolate_position_embeddings,
)
from pefomed_ray.rendering.images import ImageSpec

IMAGE_TOKEN = "<image>"
PREFIX_IN_WHOLE_MODELS = "vision_model."
"""Before the tower's names in the checkpoint of a whole Blip-2 or CLIP, and in older ones of a CLIP tower alone."""
NOT_WEIGHTS = (".position_ids", ".rotary_emb.inv_freq")
"""Tables that older checkpoints store; the model computes them itself."""


def assemble(
    vision: str,
    language_model: str,
    target: Path,
    *,
    image_size: int | None = None,
    patches_per_token: int = 4,
    seed: int = 42,
    projector: Mapping[str, Tensor] | None = None,
    sources: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Publish a base at `target`. Parts are folders or Hub ids (`owner/name`, `owner/name@revision`).

    `vision` holds a tower that gives a class token and a feature a patch (`Blip2VisionModel`, `CLIPVisionModel`), alone
    or inside a whole Blip-2 or CLIP. `image_size` is in px, by default the tower's own; position embeddings are
    interpolated to it. The projector is `nn.Linear`'s own float32 initialisation from `seed`, or the `weight` and
    `bias` given. `sources` are recorded as where all came from, in place of `vision` and `language_model`.

    Gives the base's folder, parameters by part, image size, visual tokens an image, ids of the special tokens, sources.
    Raises ConfigError where a part is not found or not of these kinds, or sizes do not fit, and DataError where a
    checkpoint's tensors are not those of its config.
    """
    tower, text = find_part(vision), find_part(language_model)
    text_config = _text_config(text)
    tokenizer, tokens = _tokenizer(text.folder, text_config)
    config = PefomedConfig(
        vision_config=_vision_config(tower, image_size),
        text_config=text_config,
        patches_per_token=patches_per_token,
        image_token_id=tokens["image"],
        architectures=[PefomedForConditionalGeneration.__name__],
        dtype=text_config.dtype,
    )
    _check_tower(config, tower)
    with torch.device("meta"):
        model = PefomedForConditionalGeneration(config)
    tensors = {
        **_tower_tensors(model.vision_tower, tower, config),
        **_projector(model.projector, seed, projector),
        **_language_model_tensors(model, text),
    }
    sources = sources or {
        "vision": {"source": tower.source, "revision": tower.revision},
        "language_model": {"source": text.source, "revision": text.revision},
        "projector": {"seed": seed},
    }
    vision_config: Any = config.vision_config
    with publishing(target) as folder:
        write_weights(tensors, folder, max_shard_bytes)
        config.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        if (text.folder / "tokenizer_config.json").is_file():
            shutil.copyfile(text.folder / "tokenizer_config.json", folder / "tokenizer_config.json")
        write_json(folder / IMAGE_SPEC_FILE, _image_spec(tower, vision_config.image_size).to_json())
        write_json(folder / SOURCES_FILE, sources)
    return {
        "base": str(target),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()},
        "image_size_px": vision_config.image_size,
        "visual_tokens": config.visual_tokens,
        "tokens": tokens,
        "sources": sources,
    }


def _config(part: Part) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(part.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{part.source!r} holds no model that transformers knows: {reason}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{part.source!r} holds quantised weights; give the 16-bit ones, and quantise when loading")
    config.name_or_path = ""
    return config


def _text_config(part: Part) -> PreTrainedConfig:
    config = _config(part)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config).get_submodule("model.layers")
    except (AttributeError, ValueError):
        raise ConfigError(
            f"{part.source!r} ({config.model_type}) is no causal language model with its decoder layers at "
            "`model.layers`, as Llama, Mistral, Qwen, Gemma and Phi have them"
        ) from None
    return config


def _vision_config(part: Part, image_size: int | None) -> PreTrainedConfig:
    """The tower's own config, alone or inside that of a whole model, at the image size asked for."""
    config: Any = _config(part)
    config = getattr(config, "vision_config", config)
    for name in ("hidden_size", "image_size", "patch_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ConfigError(f"{part.source!r} ({config.model_type}) is no vision tower: its config has no {name}")
    config.image_size = image_size or config.image_size
    if config.image_size % config.patch_size:
        raise ConfigError(f"image_size {config.image_size} is not a multiple of the tower's {config.patch_size} px")
    return config


def _check_tower(config: PefomedConfig, part: Part) -> None:
    """One picture through the tower without numbers: what comes out is what the model relies on."""
    vision: Any = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if patches % config.patches_per_token:
        raise ConfigError(f"{patches} patches an image cannot be joined by {config.patches_per_token}")
    wanted = (1, 1 + patches, vision.hidden_size)
    try:
        with torch.device("meta"):
            tower = AutoModel.from_config(vision)
            found = tuple(tower(torch.empty(1, 3, vision.image_size, vision.image_size)).last_hidden_state.shape)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{part.source!r} ({vision.model_type}) is no vision tower: {error}") from None
    if found != wanted:
        raise ConfigError(
            f"{part.source!r} ({vision.model_type}) gives features of shape {found} for one image; wanted is {wanted}: "
            "a class token, then one for each patch, as Blip2VisionModel and CLIPVisionModel give them"
        )


def _tower_tensors(tower: nn.Module, part: Part, config: PefomedConfig) -> dict[str, Stored | Tensor]:
    vision: Any = config.vision_config
    stored = stored_tensors(part.folder)
    inside = {name: value for name, value in stored.items() if name.startswith(PREFIX_IN_WHOLE_MODELS)}
    named = {name.removeprefix(PREFIX_IN_WHOLE_MODELS): value for name, value in (inside or stored).items()}
    found: dict[str, Stored | Tensor] = {**named}
    side = vision.image_size // vision.patch_size
    for name, value in named.items():
        if "position_embedding" in name and value.shape[-2] != 1 + side**2:
            found[name] = _interpolated(read_tensor(value), side, part)
    return _all_of(tower, found, "vision_tower.", part)


def _interpolated(positions: Tensor, side: int, part: Part) -> Tensor:
    """[1, 1 + P, D], or [1 + P, D] where an `nn.Embedding` holds them."""
    try:
        changed_1PD = interpolate_position_embeddings(positions.reshape(1, *positions.shape[-2:]), side)
    except ValueError as error:
        raise DataError(f"{part.source!r}: {error}") from None
    return changed_1PD.reshape(*positions.shape[:-2], *changed_1PD.shape[1:])


def _language_model_tensors(model: PefomedForConditionalGeneration, part: Part) -> dict[str, Stored | Tensor]:
    prefix = "language_model."
    tied = frozenset(name.removeprefix(prefix) for name in model._tied_weights_keys)
    stored = {name: value for name, value in stored_tensors(part.folder).items() if name not in tied}
    return _all_of(model.language_model, stored, prefix, part, tied)


def _all_of(
    module: nn.Module,
    found: dict[str, Stored | Tensor] | dict[str, Stored],
    prefix: str,
    part: Part,
    tied: frozenset[str] = frozenset(),
) -> dict[str, Stored | Tensor]:
    """Every tensor of the module under its name in the base; tied ones are saved once, under the other name.

    Raises DataError naming what is missing, has another shape, or has no place.
    """
    wanted = {name: value.shape for name, value in module.state_dict().items() if name not in tied}
    given = {name: value.shape for name, value in found.items() if not name.endswith(NOT_WEIGHTS)}
    for what, names in (
        ("lacks", wanted.keys() - given.keys()),
        ("has, with no place in the model its config describes,", given.keys() - wanted.keys()),
        ("has in another shape than its config says", {n for n in wanted & given.keys() if wanted[n] != given[n]}),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise DataError(f"{part.source!r} {what} {len(names)} tensors: {listed}{' ...' if len(names) > 3 else ''}")
    return {prefix + name: found[name] for name in wanted}


def _projector(empty: nn.Linear, seed: int, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = nn.Linear(empty.in_features, empty.out_features).state_dict()
    tensors = dict(given or fresh)
    shapes, wanted = ({name: list(value.shape) for name, value in state.items()} for state in (tensors, fresh))
    if shapes != wanted:
        raise DataError(f"the projector given does not join tower and language model: wanted {wanted}, found {shapes}")
    return {f"projector.{name}": tensor for name, tensor in tensors.items()}


def _tokenizer(folder: Path, text_config: Any) -> tuple[Tokenizer, dict[str, int]]:
    """The language model's tokenizer with an image token, and the ids that the base uses, written to `text_config`.

    The image token has no embedding, so its id may lie beyond the vocabulary. Where the model names no padding token it
    is the unknown token, else the end token: padding is masked. Without a beginning token, the end token stands for it,
    for it is what separates documents in pre-training. Raises ConfigError where there is no end token.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{str(folder)!r} has no tokenizer.json; transformers' `AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)` writes one of a tokenizer.model"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = _special_tokens(folder, tokenizer)
    size = text_config.vocab_size

    def first(*ids: Any) -> int | None:
        return next((i for i in ids if isinstance(i, int) and 0 <= i < size), None)

    ends = text_config.eos_token_id if isinstance(text_config.eos_token_id, list) else [text_config.eos_token_id]
    eos = first(named.get("eos") if named.get("eos") in ends else None, *ends, named.get("eos"))
    if eos is None:
        raise ConfigError(f"{str(folder)!r}: neither config.json nor the tokenizer names an end token (eos_token)")
    pad = first(text_config.pad_token_id, named.get("pad"), named.get("unk"), eos)
    bos = first(text_config.bos_token_id, named.get("bos"), eos)
    text_config.eos_token_id, text_config.pad_token_id, text_config.bos_token_id = eos, pad, bos
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image = tokenizer.token_to_id(IMAGE_TOKEN)
    return tokenizer, {"bos": bos, "eos": eos, "pad": pad, "image": image}  # type: ignore[dict-item]


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of the tokens that the tokenizer's own files call `bos`, `eos`, `pad` and `unk`."""
    found: dict[str, int | None] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json(folder / file_name) if (folder / file_name).is_file() else {}
        for role in ("bos", "eos", "pad", "unk"):
            token = values.get(f"{role}_token")
            token = token["content"] if isinstance(token, dict) else token
            if token is not None:
                found[role] = tokenizer.token_to_id(token)
    return found


def _image_spec(part: Part, size_px: int) -> ImageSpec:
    """Mean and standard deviation that the tower was trained with, where its folder says so; else CLIP's."""
    path = part.folder / IMAGE_SPEC_FILE
    values = read_json(path) if path.is_file() else {}
    if "image_mean" not in values or "image_std" not in values:
        return ImageSpec(size_px)
    return ImageSpec(size_px, tuple(values["image_mean"]), tuple(values["image_std"]))
