"""Down-sizing of encoded images, so that shards hold no more pixels than a model will look at."""

from io import BytesIO

from PIL import Image, ImageOps

from pefomed_ray.data.images import FORMATS
from pefomed_ray.data.reasons import RowError

# Bicubic, with Pillow's antialiasing: what the vision towers' own processors use. Lanczos is a little sharper but rings
# more: a halo beside a bone or a line of contrast medium can read as a finding.
FILTER = Image.Resampling.BICUBIC
JPEG_OPTIONS = {"quality": 95, "subsampling": "4:4:4"}
PNG_OPTIONS = {"compress_level": 6}
# The modes that Pillow filters as they are and that the container can hold; the others become RGB.
KEPT_MODES = {"JPEG": ("L", "RGB"), "PNG": ("L", "LA", "RGB", "RGBA", "I;16")}


def limit_side(data: bytes, max_side_px: int) -> bytes:
    """The image with its longest side at most `max_side_px`, aspect kept; the same bytes where it already fits.

    `data` is a JPEG or PNG that `images.check_image` passed. A down-sized image keeps its container (JPEG at quality
    95 without chroma subsampling, PNG lossless) and 16-bit grey its depth; palettes and CMYK become RGB, 1-bit images
    grey. The EXIF orientation is applied to the pixels, and no metadata is carried over. Same bytes in, same bytes out.

    Raises RowError("corrupt_image") where the pixels cannot be read.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        if max(image.size) <= max_side_px:
            return data
        return _encoded(_resized(image, max_side_px), str(image.format))
    except Exception:  # a decoder fed hostile bytes raises almost anything
        raise RowError("corrupt_image") from None


def _resized(image: Image.Image, max_side_px: int) -> Image.Image:
    kept = KEPT_MODES[str(image.format)]
    image.getexif()  # parsed now and kept by Pillow, since the bytes go
    image.info.clear()  # colour profile, comment, transparency, EXIF: Pillow would write them, or fail to
    image = ImageOps.exif_transpose(image)
    if image.mode not in kept:
        image = image.convert("L" if image.mode == "1" else "RGB")
    scale = max_side_px / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), FILTER)


def _encoded(image: Image.Image, container: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, container, **(JPEG_OPTIONS if container == "JPEG" else PNG_OPTIONS))
    return buffer.getvalue()
