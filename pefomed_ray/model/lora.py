"""LoRA on the language model, and nothing else but the projector left to learn.

Adapters are put into the model where it stands, without PEFT's wrapper around it, so that names, `forward` and
`generate` stay the model's own; what is saved is what PEFT would save.
"""

import re
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pefomed_ray.artifacts.base import check_lora_targets
from pefomed_ray.artifacts.family import Family
from pefomed_ray.config.schema import LoraConfig
from pefomed_ray.errors import DataError
from pefomed_ray.model.base import Base

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What PEFT writes before each name."""


def attach_lora(base: Base, config: LoraConfig, *, train_projector: bool) -> None:
    """Freeze a base and put fresh adapters into its language model.

    Adapter weights and projector are float32 and the only ones that ask for gradients. Raises ConfigError where a
    target matches no linear layer of the language model.
    """
    names = check_lora_targets(base.path, config.target_modules)
    _inject(
        base,
        PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_targets(base.family, names),
            base_model_name_or_path=str(base.path),
        ),
    )
    make_trainable(base, train_projector=train_projector)


def load_lora(base: Base, directory: Path) -> None:
    """Freeze a base and put the adapter in `directory` into its language model.

    Raises DataError where its tensors are not those of its config.
    """
    _inject(base, PeftConfig.from_pretrained(str(directory)))
    tensors = {name.removeprefix(PEFT_PREFIX): value for name, value in load_file(directory / ADAPTER_FILE).items()}
    result = set_peft_model_state_dict(base.adapted, tensors)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise DataError(
            f"{str(directory / ADAPTER_FILE)!r} does not fit adapter_config.json and the base: it lacks {missing[:3]}, "
            f"and {result.unexpected_keys[:3]} have no place"
        )


def save_lora(base: Base, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write the adapter as PEFT does. `tensors`: full ones by their names in the model; all but the adapter's are left
    out."""
    root = f"{base.family.adapted}." if base.family.adapted else ""
    adapter = {name.removeprefix(root): value for name, value in tensors.items() if "lora_" in name}
    config = base.adapted.peft_config["default"]
    found = get_peft_model_state_dict(base.adapted, state_dict=adapter)
    save_file({PEFT_PREFIX + name: value.contiguous() for name, value in found.items()}, directory / ADAPTER_FILE)
    was, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(directory))
    config.inference_mode = was


def make_trainable(base: Base, *, train_projector: bool) -> None:
    """Let the adapter and, if asked, the projector learn, in float32 whatever the base is stored in."""
    for name, parameter in base.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    if train_projector:
        for part in base.family.projector:
            base.model.get_submodule(part).float().requires_grad_(True)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters."""
    counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in model.parameters()]
    return sum(trainable for trainable, _ in counts), sum(total for _, total in counts)


def _inject(base: Base, config: PeftConfig) -> None:
    base.model.requires_grad_(False)
    inject_adapter_in_model(config, base.adapted)
    base.model.requires_grad_(False)


def _targets(family: Family, names: list[str]) -> list[str] | str:
    """For PEFT: plain names where it sees nothing but the language model, else a pattern that keeps it there."""
    if family.adapted == family.language_model:
        return names
    return rf"{re.escape(family.language_model)}\..*\.({'|'.join(map(re.escape, names))})"
