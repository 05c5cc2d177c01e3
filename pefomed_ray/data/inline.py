"""Images that the rows of a JSONL file carry themselves, as base64 in `data:` URLs.

A row refers to one by its place, `train.jsonl#<offset>+<length>`: the bytes of the file that are its base64 text. So
the driver keeps a few bytes for each image, and whoever needs one reads that part of the file alone.
"""

import base64
import binascii
import re

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.data.reasons import RowError

PLACE = re.compile(r"([a-z]+\.jsonl)#(\d{1,15})\+(\d{1,15})")


class InlineImages:
    """Gives images their places. Equal ones get the same, so that their rows stay together in the shards."""

    def __init__(self) -> None:
        self._place_of: dict[str, str] = {}
        """By the sha256 of the base64 text."""

    def place(self, url: str, name: str, offset: int, line: bytes) -> str:
        """Where in the file `name` the `data:` URL of one of its rows stands.

        `line` is the row as it stands in the file, from byte `offset` on. Raises RowError where the URL is not base64
        (corrupt_image), or the row spells it so that it cannot be found (malformed_row).
        """
        header, _, text = url.partition(",")
        if not header.lower().endswith(";base64") or not text.isascii():
            raise RowError("corrupt_image")
        payload = text.encode()
        digest = sha256_bytes(payload)
        if digest not in self._place_of:
            start, length = _find(payload, line)
            self._place_of[digest] = f"{name}#{offset + start}+{length}"
        return self._place_of[digest]


def inline_file(image_path: str) -> tuple[str, int] | None:
    """The file that holds the image at a place, and about how many bytes the image has; None for any other path."""
    match = PLACE.fullmatch(image_path)
    return None if match is None else (match[1], int(match[3]) * 3 // 4)


def read_inline(root: Folder, image_path: str) -> bytes:
    """The bytes of the image at a place, one that `inline_file` knows.

    Raises RowError where the file is gone (missing_image), or what stands there is not base64 (corrupt_image).
    """
    match = PLACE.fullmatch(image_path)
    if match is None:
        raise RowError("missing_image")
    name, start, length = match[1], int(match[2]), int(match[3])
    if not length:
        raise RowError("corrupt_image")
    try:
        return base64.b64decode(root.read_range(name, start, length).replace(rb"\/", b"/"), validate=True)
    except FileNotFoundError:
        raise RowError("missing_image") from None
    except binascii.Error:
        raise RowError("corrupt_image") from None


def _find(payload: bytes, line: bytes) -> tuple[int, int]:
    """Offset and length of the payload in a line of JSON. Some writers escape the slash, as PHP's does."""
    for spelling in (payload, payload.replace(b"/", rb"\/")):
        # From the comma to the closing quote: it may be the beginning of another image.
        found = line.find(b"," + spelling + b'"')
        if found >= 0:
            return found + 1, len(spelling)
    raise RowError("malformed_row")
