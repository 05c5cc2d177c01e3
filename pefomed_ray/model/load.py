"""Any model folder -> something that runs."""

from pathlib import Path

import torch

from pefomed_ray.artifacts.base import EMBEDDED
from pefomed_ray.artifacts.storage import local_path
from pefomed_ray.errors import ConfigError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle
from pefomed_ray.model.generate import Generator
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.model.processor import PefomedProcessor


def open_any(path: str | Path, template: str = "short") -> Base:
    """A base or a bundle. `template` is used for a base alone; a bundle carries its own."""
    if str(path) == EMBEDDED:
        return open_base(EMBEDDED, template)
    folder = local_path(path)
    if (folder / "bundle.json").is_file():
        return open_bundle(folder)[0]
    if not folder.is_dir():
        raise ConfigError(f"model {str(folder)!r} does not exist; give a base, a bundle or {EMBEDDED!r}")
    return open_base(str(folder), template)


def load_model(path: str | Path) -> tuple[PefomedForConditionalGeneration, PefomedProcessor]:
    """A base's or a bundle's model (float32, evaluation mode, on the CPU) and its processor.

    Raises ConfigError where there is none at `path`, DataError where a bundle's files do not match.
    """
    base = open_any(path)
    return base.model, PefomedProcessor(base.renderer)


def open_generator(path: str | Path, device: torch.device | str = "cpu") -> Generator:
    """A base or a bundle, ready to answer."""
    return Generator(open_any(path), device)
