"""IU X-ray, the chest X-ray studies that report generation is usually measured on, each with its findings; redactions
stand as `XXXX`. Two layouts are read:

- R2Gen's (Chen et al., 2020) `annotation.json`: 2,955 studies, two images and one report each;
- PeFoMed's `iu_xray_findings/{train,val,test}.json` of the same studies, one image a row.

R2Gen spreads MIMIC-CXR as an `annotation.json` too: see `mimic_cxr`. The whole of the corpus, without these splits, is
`open_i`.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.reading import Row, id_of, load_json, numbered, rows_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError

NAME = "iu_xray"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = "annotation.json and images/ (R2Gen); or train.json, val.json, test.json and images/CXR*/ (PeFoMed)"
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

KEYS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def detect(root: Folder) -> bool:
    """Either layout."""
    return _is_r2gen(root) or _is_pefomed(root)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the three splits. Raises DataError where both layouts are, or annotation.json is MIMIC-CXR's."""
    if _is_r2gen(root) and _is_pefomed(root):
        raise DataError(f"{str(root)!r} holds IU X-ray as annotation.json and as train.json; keep one of them")
    if _is_r2gen(root):
        splits = annotation_of(root)
        if any(isinstance(item, dict) and "subject_id" in item for rows in splits.values() for _, item in rows):
            raise DataError(
                "'annotation.json' has `subject_id`: it is MIMIC-CXR's, whose images/ has folders p10 to p19"
            )
        for split, rows in splits.items():
            yield from rows_of(rows, split, partial(_r2gen_reference, split=split))
    else:
        for split, key in KEYS.items():
            rows = numbered(load_json(root, f"{key}.json"), f"{key}.json", split)
            yield from rows_of(rows, split, partial(_pefomed_reference, split=split))


def annotation_of(root: Folder) -> dict[Split, list[tuple[str, Any]]]:
    """R2Gen's annotation.json, the splits that it names. Raises DataError."""
    annotation = load_json(root, "annotation.json")
    if not isinstance(annotation, dict):
        raise DataError("'annotation.json' should map train, val and test to lists of rows")
    return {
        split: numbered(annotation[key], f"annotation.json:{key}", split)
        for split, key in KEYS.items()
        if key in annotation
    }


def image_list(item: dict[str, Any]) -> list[str]:
    """The images of a row of annotation.json. Raises TypeError where it is no list, RowError where one is no name."""
    images = item["image_path"]
    if not isinstance(images, list):
        raise TypeError("image_path is a list")
    return [text_of(image) for image in images]


def has_subjects(root: Folder, folder: str) -> bool:
    """Whether a folder of images is MIMIC-CXR's: it holds folders p10 to p19."""
    return any(re.fullmatch(r"p1\d/", name) for name in root.names(folder))


def _is_r2gen(root: Folder) -> bool:
    return root.is_file("annotation.json") and root.is_dir("images") and not has_subjects(root, "images")


def _is_pefomed(root: Folder) -> bool:
    files = all(root.is_file(f"{key}.json") for key in KEYS.values())
    return files and any(name.startswith("CXR") for name in root.names("images"))


def _r2gen_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    return _reference(text_of(item["id"]), image_list(item), item["report"], split, line)


def _pefomed_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    image = item["image_path"]
    if not isinstance(image, str):
        raise TypeError("image_path is a string")
    return _reference(id_of(image), [image], item["report"], split, line)


def _reference(name: str, images: list[str], report: Any, split: Split, line: str) -> Reference:
    return Reference(
        id=name,
        split=split,
        task="report",
        image_paths=tuple(f"images/{image}" for image in images),
        question="",
        answer=text_of(report),
        answer_type=None,
        question_type=None,
        # "CXR2384_IM-0942": the part before the underscore is one patient's study.
        group=name.split("_")[0],
        line=line,
        meta={},
    )
