"""ROCO v1 (Pelka et al., 2018): radiology figures of open-access articles with their captions; licences by article.

The publisher's script downloads the images one by one from links of which many are dead: missing images are normal
here. They are quarantined and counted like any other fault, so `max_bad_fraction` usually has to be raised.
Only the `radiology` half of each split is read, not `non-radiology` (charts, photographs).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.data.corpora.reading import Row, decode, lines_of, rows_of
from pefomed_ray.data.options import DataOptions

NAME = "roco"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "data/{train,validation,test}/radiology/ with captions.txt and images/"
OPTIONS: frozenset[str] = frozenset()


def detect(root: Path) -> bool:
    """A captions.txt in the place of any split."""
    return any(_captions(root, split).is_file() for split in SPLITS)


def read(root: Path, options: DataOptions) -> Iterator[Row]:
    """Rows of the splits that are there; a line is `ROCO_00001<TAB><SPACE>caption`."""
    for split in SPLITS:
        path = _captions(root, split)
        if not path.is_file():
            continue
        yield from rows_of(lines_of(path, root, split), split, partial(_reference, split=split))


def _captions(root: Path, split: str) -> Path:
    return root / "data" / split / "radiology" / "captions.txt"


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
