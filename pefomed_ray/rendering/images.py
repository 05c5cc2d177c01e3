"""Pixels: encoded bytes in, square uint8 tensors out; normalised on the device that runs the tower.

A plain JPEG (8-bit grey or colour) is decoded by `simplejpeg`: the libjpeg-turbo that Pillow uses too, without Pillow's
copies, so the same pixels in half to four fifths of the time. Pillow still reads every header, and decodes the rest:
PNG, CMYK, and each JPEG that is not flawless, so that what is refused does not depend on the faster decoder. A picture
is decoded in full, never at a fraction of its size (JPEG's `draft`): small findings are what these pictures are for.

Letters: B batch, C channels (3, RGB), H and W pixels.
"""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor
from torch.nn import functional as F

from pefomed_ray.errors import DataError

MAX_PIXELS = 25_000_000
MAX_SIDE_PX = 8192
FORMATS = ("JPEG", "PNG")

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels_HWC: pixels_HWC[:, ::-1],
    3: lambda pixels_HWC: pixels_HWC[::-1, ::-1],
    4: lambda pixels_HWC: pixels_HWC[::-1],
    5: lambda pixels_HWC: pixels_HWC.swapaxes(0, 1),
    6: lambda pixels_HWC: np.rot90(pixels_HWC, -1),
    7: lambda pixels_HWC: pixels_HWC[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels_HWC: np.rot90(pixels_HWC),
}
"""What turns a picture upright, by its EXIF orientation (CIPA DC-008, tag 274); 1 is upright already."""


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


def decode_pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB and upright, from JPEG or PNG bytes.

    A PNG of 16 bits is scaled so that its own largest value becomes 255, all channels alike: nothing saturates, and
    12-bit data in 16 bits (what detectors give) does not come out black. Transparency and colour profiles are ignored.

    Raises DataError for any other format, more than one frame, more than 25 megapixels or a side over 8,192 px (all
    before any pixel is decoded), and for data that does not decode.
    """
    image = _open(data)
    try:
        pixels_HWC = _decode(image, data)
    except Exception:  # a decoder fed hostile bytes raises almost anything
        raise DataError(f"an image of {len(data)} bytes does not decode: it is cut short or damaged") from None
    upright = _UPRIGHT.get(_orientation(image))
    return np.ascontiguousarray(upright(pixels_HWC)) if upright else pixels_HWC


def decode_image(data: bytes) -> Image.Image:
    """What `decode_pixels` gives, as Pillow's RGB image."""
    return Image.fromarray(decode_pixels(data))


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, by the header alone. Raises DataError as `decode_pixels` does for what it says."""
    return _open(data).size


def image_pixels(image: Image.Image | np.ndarray, spec: ImageSpec) -> Tensor:
    """uint8 [C, H, W] with H = W = spec.size_px of an RGB image, or of uint8 [H, W, 3]; bicubic with antialiasing.

    Within 1 level of Pillow's result, but for about one value in a million that is 2 off: torch's weights have 15
    bits, Pillow's 22.
    """
    size_px = spec.size_px
    pixels_HWC = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image))
    height, width = pixels_HWC.shape[:2]
    # Channels stay last: torch resizes that twice as fast as planes.
    pixels_1CHW = pixels_HWC.permute(2, 0, 1)[None]
    # Values are clamped between the two passes, so their order shows at hard edges: by up to 11 levels on real images.
    # Pillow 13 (python-pillow/Pillow#9549) starts with the height where it shrinks by over twice as much as the width.
    if height > size_px and height - size_px > 2 * (width - size_px):
        pixels_1CHW = _resize(pixels_1CHW, size_px, width)
    return _resize(pixels_1CHW, size_px, size_px)[0].contiguous()


def normalise(pixels_BCHW: Tensor, spec: ImageSpec) -> Tensor:
    """float32 [B, C, H, W] from uint8: scaled to [0, 1], then by the spec's mean and standard deviation."""
    device = pixels_BCHW.device
    mean_C11 = torch.tensor(spec.mean, device=device).view(3, 1, 1)
    std_C11 = torch.tensor(spec.std, device=device).view(3, 1, 1)
    return (pixels_BCHW / 255.0).sub_(mean_C11).div_(std_C11)


def _open(data: bytes) -> ImageFile.ImageFile:
    """The header, within all limits; no pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # as in `decode_pixels`
        raise DataError(f"an image of {len(data)} bytes is not one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise DataError(f"an image of {width}x{height} px is over {MAX_PIXELS} pixels or {MAX_SIDE_PX} px a side")
    if getattr(image, "n_frames", 1) != 1:
        raise DataError("an image holds more than one frame; give one picture a file")
    return image


def _decode(image: ImageFile.ImageFile, data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], as stored. Raises what decoders raise."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        # The buffer has the size that was checked: a second, larger size further on in the data cannot take more.
        buffer_HWC = np.empty((image.height, image.width, 3), np.uint8)
        try:
            return simplejpeg.decode_jpeg(data, "RGB", buffer=buffer_HWC)
        except ValueError:
            pass  # not flawless (strict is its default): Pillow decides
    raw_mode = str(image.tile[0].args) if image.format == "PNG" else ""
    if "16B" in raw_mode:
        return _eight_bits(_sixteen_bits(data, raw_mode))
    return np.array(image.convert("RGB"))


def _sixteen_bits(data: bytes, raw_mode: str) -> np.ndarray:
    """uint16 [H, W, 1 or 3] of a PNG; of all but grey Pillow keeps the high bytes only, so the low ones are asked for.

    `raw_mode` is Pillow's name for how the file stores a pixel.
    """
    if raw_mode == "I;16B":
        return _unpacked(data, raw_mode)[..., None]
    if raw_mode == "LA;16B":  # four bytes a pixel, as 8-bit RGBA has: high and low of grey, high and low of alpha
        high_low_HW4 = _unpacked(data, "RGBA").astype(np.uint16)
        return high_low_HW4[..., :1] << 8 | high_low_HW4[..., 1:2]
    high_HWC, low_HWC = _unpacked(data, raw_mode), _unpacked(data, raw_mode.replace("16B", "16L"))
    return (high_HWC[..., :3].astype(np.uint16) << 8) | low_HWC[..., :3]


def _unpacked(data: bytes, raw_mode: str) -> np.ndarray:
    """The stored bytes of a PNG, decompressed, as another raw mode of the same width reads them."""
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.tile = [image.tile[0]._replace(args=raw_mode)]
    return np.asarray(image)


def _eight_bits(values_HWC: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of uint16 values, grey or colour; the largest value becomes 255."""
    largest = max(int(values_HWC.max()), 1)
    levels = np.rint(np.arange(largest + 1) * (255 / largest)).astype(np.uint8)
    return np.broadcast_to(levels[values_HWC], (*values_HWC.shape[:2], 3)).copy()


def _orientation(image: Image.Image) -> int:
    """The picture's EXIF orientation; 1, upright, where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in `decode_pixels`
        return 1


def _resize(pixels_1CHW: Tensor, height: int, width: int) -> Tensor:
    if pixels_1CHW.shape[2:] == (height, width):
        return pixels_1CHW
    return F.interpolate(pixels_1CHW, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
