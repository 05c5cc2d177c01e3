"""Pixels: encoded bytes in, square uint8 tensors out; normalised on the device that runs the tower.

Letters: B batch, C channels (3, RGB), H and W pixels.
"""

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pefomed_ray.errors import DataError

MAX_PIXELS = 25_000_000
MAX_SIDE_PX = 8192
FORMATS = ("JPEG", "PNG")


@dataclass(frozen=True)
class ImageSpec:
    """How a base wants its images; stored beside its weights as `preprocessor_config.json`."""

    size_px: int
    """Side of the square the image is resized to, aspect not kept (as the published code does)."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """CLIP's statistics, which EVA-CLIP was trained with."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ImageSpec":
        """Inverse of `to_json`."""
        return cls(size_px=value["size_px"], mean=tuple(value["mean"]), std=tuple(value["std"]))


def decode_image(data: bytes) -> Image.Image:
    """An RGB image from JPEG or PNG bytes; 16-bit grey is scaled to 8 bits, not saturated to white.

    Raises DataError for any other format, more than one frame, more than 25 megapixels or a side over 8,192 px (both
    before any pixel is decoded), and for data that does not decode.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError(f"an image of {len(data)} bytes is not one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise DataError(f"an image of {width}x{height} px is over {MAX_PIXELS} pixels or {MAX_SIDE_PX} px a side")
    if getattr(image, "n_frames", 1) != 1:
        raise DataError("an image holds more than one frame; give one picture a file")
    try:
        if image.mode.startswith("I"):
            grey = np.asarray(image, dtype=np.float32)
            scale = 255.0 / max(float(grey.max()), 1.0)
            return Image.fromarray((grey * scale).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        raise DataError(f"an image of {len(data)} bytes does not decode: it is cut short or damaged") from None


def image_pixels(image: Image.Image, spec: ImageSpec) -> Tensor:
    """uint8 [C, H, W] with H = W = spec.size_px; bicubic with antialiasing, within 1 of Pillow's result."""
    pixels_HWC = torch.from_numpy(np.array(image))
    pixels_CHW = pixels_HWC.permute(2, 0, 1).contiguous()
    if pixels_CHW.shape[1:] == (spec.size_px, spec.size_px):
        return pixels_CHW
    size = (spec.size_px, spec.size_px)
    return F.interpolate(pixels_CHW[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]


def normalise(pixels_BCHW: Tensor, spec: ImageSpec) -> Tensor:
    """float32 [B, C, H, W] from uint8: scaled to [0, 1], then by the spec's mean and standard deviation."""
    device = pixels_BCHW.device
    mean_C11 = torch.tensor(spec.mean, device=device).view(3, 1, 1)
    std_C11 = torch.tensor(spec.std, device=device).view(3, 1, 1)
    return (pixels_BCHW.to(torch.float32) / 255.0 - mean_C11) / std_C11
