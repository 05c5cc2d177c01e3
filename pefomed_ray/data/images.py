"""Image files as they are found in a corpus: read from inside the corpus folder only, and checked before use.

The checks come in the order of their cost and danger: where the path leads, how large the file is, what its header
says, and only then whether it decodes. A 10 kB file can claim 81 megapixels; it is refused by its header.
What the checks cannot see: a bit flipped inside a JPEG's image data decodes without a word.
"""

import os
import threading
import warnings
from functools import lru_cache
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pefomed_ray.artifacts.folders import Folder, LocalFolder, open_folder
from pefomed_ray.data.inline import inline_file, read_inline
from pefomed_ray.data.reasons import RowError

FORMATS = ("JPEG", "PNG")
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 25_000_000
MAX_SIDE = 8192

MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
PADDING = b"\0 \t\r\n"  # what real files carry behind their last byte

# Our own limit on pixels is lower than Pillow's, and broken EXIF data counts as none. Silenced for good, since images
# are opened in several threads, which share one list of filters.
warnings.filterwarnings("ignore", module=r"PIL\.")

_PARQUET = threading.Lock()
"""Held while a Parquet file is read: an open one is used by one thread at a time."""


def read_image(root: Folder, image_path: str) -> bytes:
    """The encoded bytes of one image of a corpus, as they are found.

    `image_path` is relative to `root`. `data/train-0.parquet#12` is row 12 of a Parquet file whose column `image` is a
    struct with `bytes`, as Hugging Face writes them; `scan.dcm#3` is a file, of which frame 3 is meant (see
    `split_path`); `train.jsonl#120+4096` is base64 text inside a row (see `inline`). Raises RowError where the path
    leads outside `root`, where there is no such image, or where it is larger than 64 MiB.
    """
    if (inline := inline_file(image_path)) is not None:
        if inline[1] > MAX_FILE_BYTES:
            raise RowError("image_too_large")
        return read_inline(root, image_path)
    name, number = split_path(image_path)
    _check_name(name)
    if isinstance(root, LocalFolder):
        _check_inside(root, name)
    if name.endswith(".parquet") and number is not None:
        return _parquet_image(root, name, number)
    (entry,) = root.entries([name])
    if entry is None:
        raise RowError("missing_image")
    if entry.size > MAX_FILE_BYTES:
        raise RowError("image_too_large")
    try:
        return root.read_bytes(name)
    except FileNotFoundError:  # went missing after it was listed
        raise RowError("missing_image") from None


def split_path(image_path: str) -> tuple[str, int | None]:
    """The name of the file, and the row or frame that is meant: `("scan.dcm", 3)` of `scan.dcm#3`, else None."""
    if (inline := inline_file(image_path)) is not None:
        return inline[0], None
    name, _, number = image_path.rpartition("#")
    if number.isdecimal() and name.endswith((".parquet", ".dcm")):
        return name, int(number)
    return image_path, None


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
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RowError("image_too_large") from None
    except UnidentifiedImageError:
        raise RowError("corrupt_image" if not data or data.startswith(MAGIC) else "image_format") from None
    except Exception:  # as above: header parsers raise almost anything
        raise RowError("corrupt_image") from None


def _check_name(name: str) -> None:
    if not name or "\0" in name or os.path.isabs(name) or ".." in name.split("/"):
        raise RowError("path_escape")


def _check_inside(root: LocalFolder, name: str) -> None:
    """Raise RowError where links lead out of `root`, or nowhere."""
    real_root = os.path.realpath(root.path)
    real = os.path.realpath(os.path.join(root.path, name))
    if os.path.commonpath([real_root, real]) != real_root:
        raise RowError("symlink_escape")
    if not os.path.isfile(real):
        raise RowError("missing_image")


def _parquet_image(root: Folder, name: str, row: int) -> bytes:
    with _PARQUET:
        file = _parquet_file(root.url, name, _version(root, name))
        group, first = _row_group_of(file, row)
        data = _row_group(file, group)[row - first]["bytes"].as_py()
    if data is None:
        raise RowError("missing_image")
    if len(data) > MAX_FILE_BYTES:
        raise RowError("image_too_large")
    return data


def _version(root: Folder, name: str) -> str:
    (entry,) = root.entries([name])
    if entry is None:
        raise RowError("missing_image")
    return entry.version


@lru_cache(maxsize=16)
def _parquet_file(url: str, name: str, version: str) -> pq.ParquetFile:
    # `version` is here so that a file that was replaced is opened again.
    return pq.ParquetFile(open_folder(url).open(name))


def _row_group_of(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """Number of the row group that holds a row of the file, and the group's first row. Raises RowError."""
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    raise RowError("missing_image")


@lru_cache(maxsize=4)
def _row_group(file: pq.ParquetFile, group: int) -> pa.ChunkedArray:
    # Rows are asked for in shuffled order: what is kept is bounded, and a group is some ten MB.
    return file.read_row_group(group, columns=["image"]).column("image")
