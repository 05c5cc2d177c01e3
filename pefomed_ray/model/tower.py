"""The frozen tower alone: encoded images in, the features that the projector reads out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pefomed_ray.artifacts.base import VISION_TOWER, base_folder, weight_files
from pefomed_ray.model.pefomed import PefomedConfig, build_tower, tower_features
from pefomed_ray.rendering.images import normalise
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.templates import template_named


def open_tower(base: str, template: str, device: str) -> Callable[[Sequence[bytes]], Tensor]:
    """Load the tower of a base, not its language model: encoded images -> float32 [N, V, W] on the CPU.

    V visual tokens, W numbers the projector reads for one; the same as the whole model's `patch_features` of what the
    base's renderer makes of the images. Raises ConfigError where the folder is not a base, and from the tower DataError
    for an image that does not decode.
    """
    folder = base_folder(base)
    config = PefomedConfig.from_pretrained(folder)
    renderer = Renderer.open(folder, template_named(template))
    tower = build_tower(config.vision_config).float().eval()
    tower.load_state_dict(_weights(folder))
    tower.to(device)

    @torch.inference_mode()
    def features(images: Sequence[bytes]) -> Tensor:
        pixels_NCHW = normalise(renderer.pixels(images).to(device), renderer.image_spec)
        return tower_features(tower, pixels_NCHW, config.patches_per_token).cpu()

    return features


def _weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(VISION_TOWER)]  # noqa: SIM118 - not a mapping
            tensors |= {name.removeprefix(VISION_TOWER): file.get_tensor(name) for name in names}
    return tensors
