"""Open-i's Indiana University chest X-rays (Demner-Fushman et al., 2016), not R2Gen's selection of them (`iu_xray`):
3,955 reports, 7,470 images. Two layouts are read:

- the publisher's archives: `NLMCXR_reports/ecgen-radiology/N.xml` and `NLMCXR_png/`. 104 reports have no image and are
  quarantined (`no_image`), so `max_bad_fraction` has to be about 0.04;
- Kaggle's (raddar/chest-xrays-indiana-university) `indiana_reports.csv`, `indiana_projections.csv` and
  `images/images_normalized/`, where frontal views come first.

The answer is the findings; where a report has none (one in eight), it is the impression, and `meta.section` says so.
R2Gen and PeFoMed use reports with findings alone. Redactions stand as `XXXX`. There are no official splits; the group
is the report.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal
from xml.etree.ElementTree import Element, ParseError

from defusedxml.ElementTree import fromstring

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.corpora.reading import Row, folder_of, read_texts, rows_of, table_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DataError

NAME = "open_i"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = (
    "NLMCXR_reports/ecgen-radiology/*.xml and NLMCXR_png/; "
    "or Kaggle's indiana_reports.csv, indiana_projections.csv and images/images_normalized/"
)
OFFICIAL_SPLITS = False
OPTIONS: frozenset[str] = frozenset()

REPORT_FOLDERS = ("NLMCXR_reports/ecgen-radiology", "ecgen-radiology")
REPORTS = "indiana_reports.csv"
PROJECTIONS = "indiana_projections.csv"


def detect(root: Folder) -> bool:
    """Either layout."""
    return _is_xml(root) or _is_kaggle(root)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Every report, as `train`. Raises DataError where both layouts are, or a CSV file cannot be read."""
    if _is_xml(root) and _is_kaggle(root):
        raise DataError(f"{str(root)!r} holds Open-i's reports as XML and as CSV; keep one of them")
    yield from _read_xml(root) if _is_xml(root) else _read_kaggle(root)


def _is_xml(root: Folder) -> bool:
    return any(root.is_dir(folder) for folder in REPORT_FOLDERS)


def _is_kaggle(root: Folder) -> bool:
    return root.is_file(REPORTS) and root.is_file(PROJECTIONS)


def _read_xml(root: Folder) -> Iterator[Row]:
    names = root.matching(folder_of(root, *REPORT_FOLDERS), "*.xml")
    # The archive of the images has no folder of its own: unpacked in place it leaves them in the root.
    images = "NLMCXR_png/" if root.is_dir("NLMCXR_png") else ""
    in_order = sorted(names, key=lambda name: (len(name), name))  # 2.xml before 10.xml
    yield from rows_of(read_texts(root, in_order), "train", partial(_xml_reference, images=images))


def _xml_reference(data: bytes | None, line: str, images: str) -> Reference:
    try:
        report: Element = fromstring(data)  # refuses entities
    except ParseError:
        raise RowError("malformed_row") from None
    texts = {element.get("Label"): element.text or "" for element in report.iter("AbstractText")}
    # The <url> beside an image's id says .jpg, of a file that was never given out.
    paths = tuple(f"{images}{image.attrib['id']}.png" for image in report.iter("parentImage"))
    mesh = {key: [term.text or "" for term in report.iter(key)] for key in ("major", "automatic")}
    uid = next(report.iter("uId")).attrib["id"]
    return _reference(
        uid, texts["FINDINGS"], texts["IMPRESSION"], paths, mesh["major"], line, automatic=mesh["automatic"]
    )


def _read_kaggle(root: Folder) -> Iterator[Row]:
    folder = folder_of(root, "images/images_normalized", "images_normalized", "images")
    views: dict[str, list[tuple[bool, str]]] = {}
    for _, row in table_of(root, PROJECTIONS, ("uid", "filename", "projection")):
        view = (row.get("projection") != "Frontal", f"{folder}/{row.get('filename', '')}")
        views.setdefault(row.get("uid", ""), []).append(view)
    columns = ("uid", "MeSH", "findings", "impression")
    yield from rows_of(table_of(root, REPORTS, columns), "train", partial(_kaggle_reference, views=views))


def _kaggle_reference(item: dict[str, str], line: str, views: dict[str, list[tuple[bool, str]]]) -> Reference:
    in_order = sorted(views.get(item["uid"], []), key=lambda view: view[0])
    paths = tuple(path for _, path in in_order)
    mesh = item["MeSH"].split(";")
    return _reference(f"CXR{item['uid']}", item["findings"], item["impression"], paths, mesh, line)


def _reference(
    uid: str, findings: str, impression: str, images: tuple[str, ...], mesh: list[str], line: str, **meta: Any
) -> Reference:
    section = "findings" if findings.strip() else "impression"
    return Reference(
        id=uid,
        split="train",
        task="report",
        image_paths=images,
        question="",
        answer=findings if section == "findings" else impression,
        answer_type=None,
        question_type=None,
        group=uid,
        line=line,
        meta={"section": section, "impression": impression, "mesh": mesh} | meta,
    )
