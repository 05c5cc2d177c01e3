"""Any model folder -> something that runs."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pefomed_ray.artifacts.base import EMBEDDED, family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.artifacts.storage import local_path, read_json
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle
from pefomed_ray.model.generate import Generator
from pefomed_ray.model.merge import MERGED_FILE
from pefomed_ray.model.processor import PefomedProcessor
from pefomed_ray.rendering.renderer import Renderer


def open_any(path: str | Path, template: str | None = None, device: torch.device | str = "cpu") -> Base:
    """A base, a merged model or a bundle. `template` is used for a base alone (default: `short` or `chat`) and for a
    merged model (default: the one it was trained under); a bundle has its own."""
    if str(path) == EMBEDDED:
        return open_base(EMBEDDED, template or "short", device=device)
    folder = local_path(path)
    if (folder / "bundle.json").is_file():
        return open_bundle(folder, device=device)[0]
    if not folder.is_dir():
        raise ConfigError(f"model {str(folder)!r} does not exist; give a base, a bundle or {EMBEDDED!r}")
    if template is None and (folder / MERGED_FILE).is_file():
        return _open_merged(folder, device)
    template = template or ("short" if family_of(folder).model_type == PEFOMED else "chat")
    return open_base(str(folder), template, device=device)


def _open_merged(folder: Path, device: torch.device | str) -> Base:
    said = read_json(folder / MERGED_FILE)
    base = open_base(str(folder), said["template"], device=device)
    if base.renderer.digest != said["template_digest"]:
        raise DataError(
            f"the model in {str(folder)!r} was trained with template {said['template']!r} of digest "
            f"{said['template_digest'][:16]}, but this version's is {base.renderer.digest[:16]}; train it again"
        )
    return base


def load_model(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """A base's or a bundle's model (in evaluation mode, on the CPU; float32, or what a bundle was trained in) and its
    processor: ours for a `pefomed` base, else the model's own.

    Raises ConfigError where there is none at `path`, DataError where a bundle's files or a template do not match.
    """
    base = open_any(path)
    renderer = base.renderer
    return base.model, PefomedProcessor(renderer) if isinstance(renderer, Renderer) else renderer.processor


def open_generator(path: str | Path, device: torch.device | str = "cpu", batch_size: int = 64) -> Generator:
    """A base or a bundle, ready to answer up to `batch_size` prompts at once."""
    return Generator(open_any(path, device=device), device, batch_size)
