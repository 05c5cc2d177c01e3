"""MIMIC-CXR-JPG (Johnson et al., 2019): 227,835 chest X-ray studies, 377,110 images, with MIMIC-CXR's reports.
Credentialed access: its licence class is `restricted`, whatever the layout. Three are read:

- PhysioNet's: `mimic-cxr-2.0.0-split.csv` and `files/p10/p10000032/s50414267/*.jpg`, with the reports of
  mimic-cxr-reports.zip, `s50414267.txt`, in the same folders or in `mimic-cxr-reports/files/`. A record is a study with
  all its images, those taken from the front (PA, AP) first where `mimic-cxr-2.0.0-metadata.csv` is there. Its answer is
  the section that `mimic_sections` prefers, named in `meta.section`; a study without a report has an empty one;
- R2Gen's `annotation.json` beside `images/p10/`, one image and its findings a row;
- PeFoMed's `{train,val,test}.json` beside `files/p10/`, which map an image to its reports, of which the first counts.

CSV files may be packed (`.csv.gz`). The group is the patient.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.mimic_sections import preferred_section
from pefomed_ray.data.corpora.r2gen import annotation_of, has_subjects, image_list
from pefomed_ray.data.corpora.reading import (
    Row,
    decode,
    folder_of,
    id_of,
    load_json,
    numbered,
    read_texts,
    rows_of,
    table_of,
    text_of,
)
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DataError

NAME = "mimic_cxr"
LICENCE: Literal["open", "restricted"] = "restricted"
LAYOUT = (
    "mimic-cxr-2.0.0-split.csv[.gz] and files/p10/ with images and reports; "
    "or annotation.json and images/p10/ (R2Gen); or train.json, val.json, test.json and files/p10/ (PeFoMed)"
)
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

SPLIT_TABLE = "mimic-cxr-2.0.0-split.csv"
VIEW_TABLE = "mimic-cxr-2.0.0-metadata.csv"
SPLIT_NAMES: dict[str, Split] = {"train": "train", "validate": "validation", "test": "test"}
REPORT_FOLDERS = ("mimic-cxr-reports/files", "files")
PEFOMED: dict[Split, str] = {"train": "train.json", "validation": "val.json", "test": "test.json"}
FRONTAL = ("PA", "AP")
SUBJECT = re.compile(r"p\d{8}")


@dataclass(frozen=True)
class _Study:
    id: str
    subject: str
    split: Split
    images: list[str]
    """Names without ending, in the order of the table."""

    @property
    def folder(self) -> str:
        return f"p{self.subject[:2]}/p{self.subject}/s{self.id}"


def detect(root: Folder) -> bool:
    """Any of the three layouts."""
    return bool(_layouts(root))


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of whichever layout is there. Raises DataError where there is more than one, or a table cannot be read."""
    layouts = _layouts(root)
    if len(layouts) != 1:
        raise DataError(f"{str(root)!r} holds MIMIC-CXR in several layouts ({', '.join(layouts)}); keep one of them")
    if layouts == ["PhysioNet"]:
        yield from _read_physionet(root)
    elif layouts == ["R2Gen"]:
        for split, rows in annotation_of(root).items():
            yield from rows_of(rows, split, partial(_r2gen_reference, split=split))
    else:
        yield from _read_pefomed(root)


def _layouts(root: Folder) -> list[str]:
    found = {
        "PhysioNet": _table(root, SPLIT_TABLE) is not None,
        "R2Gen": root.is_file("annotation.json") and has_subjects(root, "images"),
        "PeFoMed": all(root.is_file(name) for name in PEFOMED.values()) and has_subjects(root, "files"),
    }
    return [name for name, there in found.items() if there]


def _table(root: Folder, name: str) -> str | None:
    return next((found for found in (name, f"{name}.gz") if root.is_file(found)), None)


def _read_physionet(root: Folder) -> Iterator[Row]:
    studies = _studies(root)
    views = _views(root)
    folder = folder_of(root, *REPORT_FOLDERS)
    reports = read_texts(root, [f"{folder}/{study.folder}.txt" for study in studies])
    for study, (name, data) in zip(studies, reports, strict=True):
        yield _study_reference(study, name, decode(data or b""), views)


def _studies(root: Folder) -> list[_Study]:
    studies: dict[str, _Study] = {}
    for line, row in table_of(root, f"{_table(root, SPLIT_TABLE)}", ("dicom_id", "study_id", "subject_id", "split")):
        try:
            study = _Study(row["study_id"], row["subject_id"], SPLIT_NAMES[row["split"]], [])
            studies.setdefault(study.id, study).images.append(row["dicom_id"])
        except KeyError:
            raise DataError(
                f"{line} has no dicom_id, study_id, subject_id or known split; fetch the file again"
            ) from None
    return list(studies.values())


def _views(root: Folder) -> dict[str, str]:
    """From which side each image was taken, where the table that says so is there."""
    table = _table(root, VIEW_TABLE)
    if table is None:
        return {}
    rows = table_of(root, table, ("dicom_id", "ViewPosition"))
    return {row.get("dicom_id", ""): row.get("ViewPosition", "") for _, row in rows}


def _study_reference(study: _Study, line: str, report: str, views: dict[str, str]) -> Reference:
    images = sorted(study.images, key=lambda image: views.get(image) not in FRONTAL)
    section, answer = preferred_section(report)
    return Reference(
        id=f"s{study.id}",
        split=study.split,
        task="report",
        image_paths=tuple(f"files/{study.folder}/{image}.jpg" for image in images),
        question="",
        answer=answer,
        answer_type=None,
        question_type=None,
        group=f"p{study.subject}",
        line=line,
        meta={"section": section} | ({"views": [views.get(image, "") for image in images]} if views else {}),
    )


def _r2gen_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    images = tuple(f"images/{image}" for image in image_list(item))
    subject = f"p{text_of(item['subject_id'])}"
    return _image_reference(text_of(item["id"]), images, item["report"], subject, split, line)


def _read_pefomed(root: Folder) -> Iterator[Row]:
    for split, name in PEFOMED.items():
        reports = load_json(root, name)
        if not isinstance(reports, dict):
            raise DataError(f"{name!r} should map images to lists of reports, found {type(reports).__name__}")
        rows = numbered(list(reports.items()), name, split)
        yield from rows_of(rows, split, partial(_pefomed_reference, split=split))


def _pefomed_reference(item: tuple[str, Any], line: str, split: Split) -> Reference:
    image, reports = item
    subject = SUBJECT.search(image)
    if subject is None or not isinstance(reports, list):
        raise RowError("malformed_row")
    return _image_reference(id_of(image.rsplit("/", 1)[-1]), (f"files/{image}",), reports[0], subject[0], split, line)


def _image_reference(
    name: str, images: tuple[str, ...], report: Any, subject: str, split: Split, line: str
) -> Reference:
    return Reference(
        id=name,
        split=split,
        task="report",
        image_paths=images,
        question="",
        answer=text_of(report),
        answer_type=None,
        question_type=None,
        group=subject,
        line=line,
        meta={},
    )
