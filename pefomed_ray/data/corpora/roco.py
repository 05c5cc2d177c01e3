"""ROCO v1 (Pelka et al., 2018): radiology figures of open-access articles with their captions; licences by article.

The publisher's script downloads the images one by one from links of which many are dead: missing images are normal
here. They are quarantined and counted like any other fault, so `max_bad_fraction` usually has to be raised.
Only the `radiology` half of each split is read, not `non-radiology` (charts, photographs).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.data.corpora.reading import Row, decode, lines_of, rows_of
from pefomed_ray.data.options import DataOptions

NAME = "roco"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "data/{train,validation,test}/radiology/ with captions.txt and images/"
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()


def detect(root: Folder) -> bool:
    """A captions.txt in the place of any split."""
    return any(root.is_file(_captions(split)) for split in SPLITS)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the splits that are there; a line is `ROCO_00001<TAB><SPACE>caption`."""
    for split in SPLITS:
        name = _captions(split)
        if not root.is_file(name):
            continue
        yield from rows_of(lines_of(root, name, split), split, partial(_reference, split=split))


def _captions(split: str) -> str:
    return f"data/{split}/radiology/captions.txt"


def _reference(item: Any, line: str, split: Split) -> Reference:
    name, caption = decode(item).split("\t", 1)
    return Reference(
        id=name,
        split=split,
        task="caption",
        image_paths=(f"data/{split}/radiology/images/{name}.jpg",),
        question="",
        answer=caption.strip(),
        answer_type=None,
        question_type=None,
        group=name,
        line=line,
        meta={},
    )
