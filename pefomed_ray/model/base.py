"""Opening the frozen base: its model and what renders its input."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pefomed_ray.artifacts.base import base_folder
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.templates import template_named


@dataclass(frozen=True)
class Base:
    """A base opened: the model in float32 and evaluation mode, and what renders its input."""

    path: Path
    model: PefomedForConditionalGeneration
    renderer: Renderer


def open_base(path: str, template: str) -> Base:
    """Load a base in float32. Raises ConfigError where the folder is not a base or the template is not known."""
    folder = base_folder(path)
    model = PefomedForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return Base(folder, model.eval(), Renderer.open(folder, template_named(template)))
