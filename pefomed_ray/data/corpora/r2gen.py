"""IU-Xray in the layout of R2Gen (Chen et al., 2020): 2,955 chest X-ray studies, two images and one report each.

The report is the FINDINGS section, redactions standing as `XXXX`. R2Gen spreads MIMIC-CXR in the same layout; that
corpus is restricted, is told by its `subject_id`, and is refused here.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.reading import Row, load_json, numbered, rows_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError

NAME = "iu_xray"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "annotation.json and images/ (R2Gen)"
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

KEYS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def detect(root: Folder) -> bool:
    """annotation.json beside images/."""
    return root.is_file("annotation.json") and root.is_dir("images")


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the splits that annotation.json names. Raises DataError where it is MIMIC-CXR's."""
    annotation = load_json(root, "annotation.json")
    if not isinstance(annotation, dict):
        raise DataError("'annotation.json' should map train, val and test to lists of rows")
    for split, key in KEYS.items():
        if key not in annotation:
            continue
        items = numbered(annotation[key], f"annotation.json:{key}", split)
        if any(isinstance(item, dict) and "subject_id" in item for _, item in items):
            raise DataError("'annotation.json' has `subject_id`: it is MIMIC-CXR's, which is not supported")
        yield from rows_of(items, split, partial(_reference, split=split))


def _reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    name = text_of(item["id"])
    images = item["image_path"]
    if not isinstance(images, list):
        raise TypeError("image_path is a list")
    return Reference(
        id=name,
        split=split,
        task="report",
        image_paths=tuple(f"images/{text_of(image)}" for image in images),
        question="",
        answer=text_of(item["report"]),
        answer_type=None,
        question_type=None,
        # "CXR2384_IM-0942": the part before the underscore is one patient's study.
        group=name.split("_")[0],
        line=line,
        meta={},
    )
