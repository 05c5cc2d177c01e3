"""LoRA on the language model, and nothing else but the projector left to learn.

Adapters are put into the model where it stands, without PEFT's wrapper around it, so that names, `forward` and
`generate` stay the model's own; what is saved is what PEFT would save.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pefomed_ray.artifacts.base import check_lora_targets
from pefomed_ray.artifacts.family import Family
from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.config.schema import LoraConfig
from pefomed_ray.errors import DataError
from pefomed_ray.model.base import Base
from pefomed_ray.model.precision import hold_in_float32, number_of

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
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
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=_targets(base.family, names),
            base_model_name_or_path=str(base.path),
        ),
    )
    make_trainable(base, train_projector=train_projector)


def load_lora(base: Base, directory: Path) -> None:
    """Freeze a base and put the adapter in `directory` into its language model.

    Raises DataError where its tensors are not those of its config, or its config reaches past the language model.
    """
    _inject(base, PeftConfig.from_pretrained(str(directory)))
    within = f"{base.family.language_model}."
    reached = [name for name, module in base.model.named_modules() if isinstance(module, BaseTunerLayer)]
    if outside := [name for name in reached if not name.startswith(within)]:
        raise DataError(
            f"target_modules in {str(directory / 'adapter_config.json')!r} reach {outside[0]!r}; "
            f"an adapter is for the language model alone, {within}*"
        )
    tensors = {name.removeprefix(PEFT_PREFIX): value for name, value in load_file(directory / ADAPTER_FILE).items()}
    result = set_peft_model_state_dict(base.adapted, tensors)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise DataError(
            f"{str(directory / ADAPTER_FILE)!r} does not fit adapter_config.json and the base: it lacks {missing[:3]}, "
            f"and {result.unexpected_keys[:3]} have no place"
        )


@dataclass(frozen=True)
class PeftForm:
    """How PEFT would write the adapter in a base."""

    config: PeftConfig
    names: dict[str, str]
    """The name in the file, by the parameter's in the model."""


def peft_form(base: Base) -> PeftForm:
    """Of the adapter that is in the base now."""
    root = f"{base.family.adapted}." if base.family.adapted else ""
    adapter = {name.removeprefix(root): torch.empty(0) for name, _ in base.model.named_parameters() if "lora_" in name}
    found = get_peft_model_state_dict(base.adapted, state_dict=adapter)
    written = {id(value): name for name, value in found.items()}
    names = {root + name: PEFT_PREFIX + written[id(value)] for name, value in adapter.items()}
    return PeftForm(base.adapted.peft_config["default"], names)


def save_lora(form: PeftForm, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter as PEFT does. `tensors`: full ones by their names in the model; all but the adapter's are left
    out."""
    adapter = {form.names[name]: value.contiguous() for name, value in tensors.items() if name in form.names}
    save_file(adapter, directory / ADAPTER_FILE)
    was, form.config.inference_mode = form.config.inference_mode, True
    form.config.save_pretrained(str(directory))
    form.config.inference_mode = was
    # PEFT writes sets in an order that each process draws anew; the same adapter is to have the same digest.
    written = read_json(directory / CONFIG_FILE)
    write_json(directory / CONFIG_FILE, {k: sorted(v) if isinstance(v, list) else v for k, v in written.items()})


def make_trainable(base: Base, *, train_projector: bool) -> None:
    """Let the adapter and, if asked, the projector learn, in float32 whatever the base is held in."""
    for parameter in _adapter_parameters(base):
        parameter.requires_grad_(True)
    if train_projector:
        for module in projector_in_float32(base):
            module.requires_grad_(True)


def projector_in_float32(base: Base) -> list[nn.Module]:
    """The projector's modules, turned to float32: what is trained, or was, is held so."""
    parts = [base.model.get_submodule(name) for name in base.family.projector]
    modules = [module for part in parts for module in (part if isinstance(part, nn.ModuleList) else [part])]
    for module in modules:
        hold_in_float32(module)
    return modules


def what_learns(base: Base) -> dict[str, Any]:
    """How many `modules` of the language model have adapters, their names' last parts (`targets`), and how many of all
    `parameters` are `trainable_parameters`."""
    names = [name for name, module in base.model.named_modules() if isinstance(module, BaseTunerLayer)]
    trainable, total = parameter_counts(base.model)
    return {
        "language_model": base.family.language_model,
        "modules": len(names),
        "targets": sorted({name.rsplit(".", 1)[-1] for name in names}),
        "trainable_parameters": trainable,
        "parameters": total,
    }


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters."""
    parameters = list(model.parameters())
    return sum(number_of(p) for p in parameters if p.requires_grad), sum(map(number_of, parameters))


def _inject(base: Base, config: PeftConfig) -> None:
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # PEFT looks for them on the module that it sees
        setattr(base.adapted, mark, getattr(base.model, mark, False))
    inject_adapter_in_model(config, base.adapted)
    for parameter in _adapter_parameters(base):
        parameter.data = parameter.data.float()
    base.model.requires_grad_(False)
    base.model.train(base.model.training)  # new modules are in training mode whatever the model is in: they drop out


def _adapter_parameters(base: Base) -> list[nn.Parameter]:
    return [parameter for name, parameter in base.model.named_parameters() if "lora_" in name]


def _targets(family: Family, names: list[str]) -> list[str] | str:
    """For PEFT: plain names where it sees nothing but the language model, else a pattern that keeps it there."""
    if family.adapted == family.language_model:
        return names
    return rf"{re.escape(family.language_model)}\..*\.({'|'.join(map(re.escape, names))})"
