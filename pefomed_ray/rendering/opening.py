"""A base's folder -> what renders its input."""

from pathlib import Path

from pefomed_ray.artifacts.family import PEFOMED, Family
from pefomed_ray.rendering.chat import ChatRenderer
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.templates import template_for

AnyRenderer = Renderer | ChatRenderer


def open_renderer(folder: Path, family: Family, template: str) -> AnyRenderer:
    """The renderer of the base in `folder`. Raises ConfigError as `template_for` and `ChatRenderer.open` do."""
    chosen = template_for(template, family)
    kind = Renderer if family.model_type == PEFOMED else ChatRenderer
    return kind.open(folder, chosen)
