"""ROCOv2 (Rückert et al., 2024) and the ImageCLEFmedical Caption tasks from 2024 on: radiology figures of open-access
articles with their captions; CC BY-NC-SA 4.0, each image under its article's licence. Two layouts are read:

- the publisher's `train_captions.csv` with the header `ID,Caption`, and so on, images unpacked in `train/`, `train/` in
  `train_images/`, or `train_images/` itself. `train_concepts.csv` (`ID,CUIs`) and `license_information.csv`
  (`ID,PMCID,Attribution,Link`) are read where they are there; with the latter the group is the article, else the image;
- Hugging Face's Parquet files (eltorio/ROCOv2-radiology), whose group is the image.

ImageCLEF gives no captions for its test images; the split is then not there.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.reading import Row, folder_of, parquet_columns, parquet_rows, rows_of, table_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError

NAME = "rocov2"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = (
    "{train,valid,test}_captions.csv and {train,valid,test}/; "
    "or Hugging Face's data/{train,validation,test}-*.parquet with columns image, image_id, caption, cui"
)
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

PUBLISHER: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}
HUGGING_FACE: dict[Split, str] = {"train": "train", "validation": "validation", "test": "test"}
COLUMNS = ("image_id", "caption", "cui")


def detect(root: Folder) -> bool:
    """Either layout."""
    return _is_csv(root) or _is_parquet(root)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the splits that are there. Raises DataError where both layouts are."""
    if _is_csv(root) and _is_parquet(root):
        raise DataError(f"{str(root)!r} holds ROCOv2 as CSV and as Parquet; keep one of them")
    yield from _read_csv(root) if _is_csv(root) else _read_parquet(root)


def _is_csv(root: Folder) -> bool:
    return any(root.is_file(f"{name}_captions.csv") for name in PUBLISHER.values())


def _is_parquet(root: Folder) -> bool:
    files = [file for name in HUGGING_FACE.values() for file in root.matching("data", f"{name}-*.parquet")]
    return bool(files) and {"image", *COLUMNS} <= parquet_columns(root, files[0])


def _read_csv(root: Folder) -> Iterator[Row]:
    articles = _by_id(root, "license_information.csv", ("PMCID", "Attribution"))
    for split, name in PUBLISHER.items():
        file = f"{name}_captions.csv"
        if not root.is_file(file):
            continue
        folder = folder_of(root, name, f"{name}_images/{name}", f"{name}_images")
        concepts = _by_id(root, f"{name}_concepts.csv", ("CUIs",))
        make = partial(_csv_reference, split=split, folder=folder, concepts=concepts, articles=articles)
        yield from rows_of(table_of(root, file, ("ID", "Caption")), split, make)


def _by_id(root: Folder, name: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows of a table by their ID; nothing where there is no such table."""
    if not root.is_file(name):
        return {}
    rows = table_of(root, name, ("ID", *columns))
    return {row["ID"]: {column: row.get(column, "") for column in columns} for _, row in rows if "ID" in row}


def _csv_reference(
    item: dict[str, str],
    line: str,
    split: Split,
    folder: str,
    concepts: dict[str, dict[str, str]],
    articles: dict[str, dict[str, str]],
) -> Reference:
    name = item["ID"]
    meta: dict[str, Any] = {}
    if name in concepts:
        meta["cuis"] = [cui for cui in concepts[name]["CUIs"].split(";") if cui]
    article = articles.get(name, {})
    if article:
        meta |= {"article": article["PMCID"], "attribution": article["Attribution"]}
    group = article.get("PMCID") or name
    return _reference(name, item["Caption"], f"{folder}/{name}.jpg", group, meta, split, line)


def _read_parquet(root: Folder) -> Iterator[Row]:
    for split, name in HUGGING_FACE.items():
        for file in root.matching("data", f"{name}-*.parquet"):
            # The images are not read here: a row's image is named by its place.
            rows = ((f"{file}[{number}]", row) for number, row in enumerate(parquet_rows(root, file, COLUMNS)))
            yield from rows_of(rows, split, partial(_parquet_reference, split=split, file=file))


def _parquet_reference(item: dict[str, Any], line: str, split: Split, file: str) -> Reference:
    name = text_of(item["image_id"])
    number = line.removeprefix(f"{file}[").removesuffix("]")
    return _reference(name, text_of(item["caption"]), f"{file}#{number}", name, {"cuis": item["cui"]}, split, line)


def _reference(
    name: str, caption: str, image: str, group: str, meta: dict[str, Any], split: Split, line: str
) -> Reference:
    return Reference(
        id=name,
        split=split,
        task="caption",
        image_paths=(image,),
        question="",
        answer=caption,
        answer_type=None,
        question_type=None,
        group=group,
        line=line,
        meta=meta,
    )
