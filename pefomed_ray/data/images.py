"""Image files as they are found in a corpus: read from inside the corpus folder only, and checked before use.

The checks come in the order of their cost and danger: where the path leads, how large the file is, what its header
says, and only then whether it decodes. A 10 kB file can claim 81 megapixels; it is refused by its header.
What the checks cannot see: a bit flipped inside a JPEG's image data decodes without a word.
"""

import os
import warnings
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pefomed_ray.data.reasons import RowError

FORMATS = ("JPEG", "PNG")
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 25_000_000
MAX_SIDE = 8192

MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
PADDING = b"\0 \t\r\n"  # what real files carry behind their last byte


def read_image(root: Path, image_path: str) -> bytes:
    """The encoded bytes of one image of a corpus.

    `image_path` is relative to `root`. `data/train-0.parquet#12` is row 12 of a Parquet file whose column `image` is a
    struct with `bytes`, as Hugging Face writes them. Raises RowError where the path leads outside `root`, where there
    is no such image, or where it is larger than 64 MiB.
    """
    name, _, row = image_path.rpartition("#")
    if name.endswith(".parquet") and row.isdecimal():
        return _parquet_image(_inside(root, name), int(row))
    path = _inside(root, image_path)
    if os.path.getsize(path) > MAX_FILE_BYTES:
        raise RowError("image_too_large")
    return Path(path).read_bytes()


def check_image(data: bytes) -> None:
    """Raise RowError unless the bytes are one whole JPEG or PNG of at most 25 megapixels and 8192 pixels a side."""
    image = _open(data)
    if image.format not in FORMATS:
        raise RowError("image_format")  # MPO: Pillow opens it as JPEG, it holds several pictures
    if getattr(image, "n_frames", 1) != 1:
        raise RowError("image_frames")
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RowError("image_too_large")
    try:
        # A JPEG decoded at an eighth of its size is read to its end all the same; a PNG ignores this.
        image.draft("L", (1, 1))
        image.load()
    except Exception:  # a decoder fed hostile bytes raises almost anything
        raise RowError("corrupt_image") from None
    if not data.rstrip(PADDING).endswith(END_MARKERS[image.format]):
        raise RowError("trailing_bytes")


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RowError("image_too_large") from None
    except UnidentifiedImageError:
        raise RowError("corrupt_image" if not data or data.startswith(MAGIC) else "image_format") from None
    except Exception:  # as above: header parsers raise almost anything
        raise RowError("corrupt_image") from None


def _inside(root: Path, name: str) -> str:
    """The real path of a file below `root`. Raises RowError."""
    if not name or "\0" in name or os.path.isabs(name) or ".." in name.split("/"):
        raise RowError("path_escape")
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([real_root, real]) != real_root:
        raise RowError("symlink_escape")
    if not os.path.isfile(real):
        raise RowError("missing_image")
    return real


def _parquet_image(path: str, row: int) -> bytes:
    images = _parquet_column(path, os.path.getmtime(path))
    data = images[row]["bytes"].as_py() if row < len(images) else None
    if data is None:
        raise RowError("missing_image")
    if len(data) > MAX_FILE_BYTES:
        raise RowError("image_too_large")
    return data


@lru_cache(maxsize=1)
def _parquet_column(path: str, modified: float) -> pa.ChunkedArray:
    # One whole file is kept: rows are asked for in shuffled order, and these files are tens of MB. `modified` is here
    # so that a file that was replaced is read again.
    return pq.read_table(path, columns=["image"]).column("image")
