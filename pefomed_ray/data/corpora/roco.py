"""ROCO v1 (Pelka et al., 2018): radiology figures of open-access articles with their captions; licences by article.

The publisher's script downloads the images one by one from links of which many are dead: missing images are normal
here. They are quarantined and counted like any other fault, so `max_bad_fraction` usually has to be raised.
Only the `radiology` half of each split is read, not `non-radiology` (charts, photographs).

The script names an image by its ROCO id; an older one named it by article and file, as `licences.txt` does. Both are
found. `keywords.txt`, `cuis.txt`, `semtypes.txt` and `licences.txt` are read where they are there. The publisher split
by image: figures of one article, which is the group, stand in several splits.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.data.corpora.reading import Row, decode, lines_of, read_file, rows_of, table_of
from pefomed_ray.data.options import DataOptions

NAME = "roco"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "data/{train,validation,test}/radiology/ with captions.txt and images/"
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

LISTS = ("keywords", "cuis", "semtypes")


def detect(root: Folder) -> bool:
    """A captions.txt in the place of any split."""
    return any(root.is_file(_captions(split)) for split in SPLITS)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the splits that are there; a line is `ROCO_00001<TAB><SPACE>caption`."""
    for split in SPLITS:
        name = _captions(split)
        if not root.is_file(name):
            continue
        folder = f"data/{split}/radiology"
        images = set(root.names(f"{folder}/images"))
        about = _about(root, folder)
        make = partial(_reference, split=split, images=images, about=about)
        yield from rows_of(lines_of(root, name, split), split, make)


def _captions(split: str) -> str:
    return f"data/{split}/radiology/captions.txt"


def _about(root: Folder, folder: str) -> dict[str, dict[str, Any]]:
    """What the files beside captions.txt say of each id."""
    about: dict[str, dict[str, Any]] = {}
    if root.is_file(f"{folder}/licences.txt"):
        for _, row in table_of(root, f"{folder}/licences.txt", ("ROCO_ID", "PMC_ID", "CC")):
            about[row.get("ROCO_ID", "")] = {"file": row.get("PMC_ID", ""), "licence": row.get("CC", "")}
    for key in LISTS:
        if not root.is_file(f"{folder}/{key}.txt"):
            continue
        for line in decode(read_file(root, f"{folder}/{key}.txt")).split("\n"):
            name, *values = line.split("\t")
            about.setdefault(name, {})[key] = [value.strip() for value in values if value.strip()]
    return about


def _reference(item: Any, line: str, split: Split, images: set[str], about: dict[str, dict[str, Any]]) -> Reference:
    name, caption = decode(item).split("\t", 1)
    meta = about.get(name, {})
    file = meta.get("file", "")
    image = file if file in images else f"{name}.jpg"
    return Reference(
        id=name,
        split=split,
        task="caption",
        image_paths=(f"data/{split}/radiology/images/{image}",),
        question="",
        answer=caption.strip(),
        answer_type=None,
        question_type=None,
        # "PMC3970251_CRIONM2014-931546.003.jpg": the part before the underscore is the article.
        group=file.split("_")[0] or name,
        line=line,
        meta=meta,
    )
