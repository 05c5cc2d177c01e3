"""The page of `data check`: one HTML file without a second one, showing what kind of dirt is where.

Pictures of the rows in question are on it where the licence class of the corpus is `open`; texts of rows never are.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.artifacts.storage import write_bytes
from pefomed_ray.data.images import FORMATS
from pefomed_ray.data.intake import usable_image
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import ConfigError

THUMBNAIL_PX = 128


@dataclass(frozen=True)
class Tile:
    """A row in question."""

    id: str
    split: str
    line: str
    picture: str | None
    """`data:` URL of its first image."""
    instead: str
    """What stands there where there is no picture."""


def check_page_is_free(page: Path) -> None:
    """Raise ConfigError where the file exists, or has no folder to be written to."""
    if page.exists():
        raise ConfigError(f"{str(page)!r} already exists; name another page or remove it first")
    if not page.parent.is_dir():
        raise ConfigError(f"{str(page.parent)!r} is no folder to write a page to; make it first")


def write_page(
    page: Path,
    folder: Folder,
    found: Mapping[str, Any],
    rows: Mapping[str, Sequence[Reference | None]],
    options: DataOptions,
) -> None:
    """Write what `check` found, whole or not at all. `rows` are those of each finding's examples."""
    pictures = Pictures(folder, options) if found["licence"] == "open" else None
    tiles = {
        code: [_tile(example, row, pictures) for example, row in zip(finding["examples"], rows[code], strict=True)]
        for code, finding in found["findings"].items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("check.html.j2")
    write_bytes(page, template.render(found=found, corpus=str(folder), tiles=tiles).encode())


class Pictures:
    """Thumbnails of images that passed the checks."""

    def __init__(self, folder: Folder, options: DataOptions) -> None:
        self._folder = folder
        self._options = replace(options, max_side_px=THUMBNAIL_PX)

    def thumbnail(self, image_path: str) -> str:
        """`data:` URL of a JPEG of at most 128 px a side, without metadata. Raises RowError."""
        data, _ = usable_image(image_path, self._folder, self._options)
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
        if image.mode.startswith("I"):  # 16 bits: the brightest pixel becomes white
            values_HW = np.asarray(image)
            image = Image.fromarray((values_HW * (255 / max(values_HW.max(), 1))).astype(np.uint8))
        image = image.convert("RGB")
        image.info.clear()  # Pillow would write a comment anew
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tile(example: Mapping[str, str], row: Reference | None, pictures: Pictures | None) -> Tile:
    picture, instead = None, "no picture"
    if pictures and row and row.image_paths:
        try:
            picture = pictures.thumbnail(row.image_paths[0])
        except RowError as error:
            instead = error.reason.replace("_", " ")
    return Tile(example["id"], example["split"], example["line"], picture, instead)
