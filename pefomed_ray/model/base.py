"""Opening the frozen base: its model and what renders its input."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

import pefomed_ray.model.pefomed  # noqa: F401 - registers the architecture
from pefomed_ray.artifacts.base import base_folder, check_not_quantised, family_of
from pefomed_ray.artifacts.family import Family
from pefomed_ray.config.schema import Precision
from pefomed_ray.model.precision import FLOAT32, check_precision, keep_unpacked, loading_arguments
from pefomed_ray.rendering.opening import AnyRenderer, open_renderer


@dataclass(frozen=True)
class Base:
    """A base opened: the model in evaluation mode, what renders its input, and the names of its parts."""

    path: Path
    model: PreTrainedModel
    renderer: AnyRenderer
    family: Family

    @property
    def adapted(self) -> nn.Module:
        """The module that PEFT sees: names in a saved adapter count from here."""
        return self.model.get_submodule(self.family.adapted)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The language model's."""
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def tower_blocks(self) -> list[nn.Module]:
        """The vision tower's: the longest list of modules in it that is not the projector's. Empty where it has none,
        or is gone because a feature cache stands in for it."""
        lists = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and f"{name}.".startswith(_within(self.family.vision))
            and not f"{name}.".startswith(_within(self.family.projector))
        ]
        return list(max(lists, key=len, default=[]))

    def recompute_layers(self) -> None:
        """Let layers be computed again in the backward pass rather than kept (gradient checkpointing).

        The library then asks for gradients of all inputs, the tower's patches among them, for the sake of a kind of
        checkpoint that is not used here: the whole frozen tower would be computed again, and gradients of it too.
        """
        model: Any = self.model
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()

    @property
    def context_tokens(self) -> int:
        """The longest text that the language model takes, prompt, images and answer together."""
        text_config: Any = self.model.config.get_text_config()
        return int(text_config.max_position_embeddings)


def open_base(path: str, template: str, precision: Precision = FLOAT32, device: torch.device | str = "cpu") -> Base:
    """Load a base onto a device. Raises ConfigError where the folder is not a base, the template is not for it, or the
    device cannot hold it in that precision."""
    device = torch.device(device)
    check_precision(precision, device)
    folder = base_folder(path)
    check_not_quantised(folder)
    family = family_of(folder)
    renderer = open_renderer(folder, family, template)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, **loading_arguments(precision, family, device)
    )
    if precision.quantization == "nf4":
        keep_unpacked(model)
    # Models bring their own taste in sampling (Qwen2.5-VL: a repetition penalty); here greedy means greedy.
    model.generation_config = GenerationConfig()
    return Base(folder, model.to(device).eval(), renderer, family)


def _within(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in modules)
