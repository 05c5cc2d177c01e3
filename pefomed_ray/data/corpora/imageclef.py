"""ImageCLEFmedical Caption 2022 and 2023: radiology figures of open-access articles with their captions. Two layouts:

- the organisers' `[uuid_]ImageCLEFmedCaption_2022_caption_prediction_{train,valid}.csv`, separated by TAB despite the
  name, in 2023 with `_labels` at its end; images in `train/` and `valid/`, or in the folders that the archives unpack
  to, `[uuid_]ImageCLEFmedCaption_2022_train_images/train/`;
- PeFoMed's `clef2022_{train,val}.json`, of whose image paths only the file's name counts.

Captions of the test images were never given out: there is no test split. From 2024 on the layout is ROCOv2's. Nothing
says which figures share an article: the group is the image.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.reading import Row, load_json, numbered, rows_of, table_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError

NAME = "imageclef"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = (
    "*caption_prediction_{train,valid}.csv (TAB separated) and {train,valid}/; "
    "or PeFoMed's clef2022_{train,val}.json and the images"
)
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

ORGANISERS: dict[Split, str] = {"train": "train", "validation": "valid"}
PEFOMED: dict[Split, str] = {"train": "clef2022_train.json", "validation": "clef2022_val.json"}


def detect(root: Folder) -> bool:
    """Either layout."""
    return _is_csv(root) or _is_json(root)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the splits that are there. Raises DataError where both layouts are, or two files of one split."""
    if _is_csv(root) and _is_json(root):
        raise DataError(f"{str(root)!r} holds ImageCLEF's captions as CSV and as JSON; keep one of them")
    for split, name in ORGANISERS.items():
        folder = _image_folder(root, name)
        if _is_json(root):
            yield from _read_json(root, split, folder)
        else:
            yield from _read_csv(root, split, folder)


def _is_csv(root: Folder) -> bool:
    return any(_tables(root, split) for split in ORGANISERS)


def _is_json(root: Folder) -> bool:
    return any(root.is_file(name) for name in PEFOMED.values())


def _tables(root: Folder, split: Split) -> list[str]:
    stem = f"*caption_prediction_{ORGANISERS[split]}"
    return [*root.matching("", f"{stem}.csv"), *root.matching("", f"{stem}_labels.csv")]


def _image_folder(root: Folder, name: str) -> str:
    """Where the images of the organisers' split `name` lie, with a slash at its end; "" for beside the captions."""
    unpacked = [found for found in root.names() if found.endswith(f"{name}_images/")]
    folders = [f"{name}/", *(f"{found}{name}/" for found in unpacked), *unpacked, "images/"]
    return next((folder for folder in folders if root.is_dir(folder)), "")


def _read_csv(root: Folder, split: Split, folder: str) -> Iterator[Row]:
    tables = _tables(root, split)
    if len(tables) > 1:
        raise DataError(f"split {split!r} has several captions files ({', '.join(tables)}); keep one of them")
    for table in tables:
        rows = table_of(root, table, ("ID", "caption"), delimiter="\t")
        yield from rows_of(rows, split, partial(_csv_reference, split=split, folder=folder))


def _csv_reference(item: dict[str, str], line: str, split: Split, folder: str) -> Reference:
    return _reference(item["ID"], item["caption"], f"{folder}{item['ID']}.jpg", split, line)


def _read_json(root: Folder, split: Split, folder: str) -> Iterator[Row]:
    name = PEFOMED[split]
    if root.is_file(name):
        rows = numbered(load_json(root, name), name, split)
        yield from rows_of(rows, split, partial(_json_reference, split=split, folder=folder))


def _json_reference(item: dict[str, Any], line: str, split: Split, folder: str) -> Reference:
    image = text_of(item["image"]).rsplit("/", 1)[-1]
    return _reference(image.rsplit(".", 1)[0], text_of(item["caption"]), f"{folder}{image}", split, line)


def _reference(name: str, caption: str, image: str, split: Split, line: str) -> Reference:
    return Reference(
        id=name,
        split=split,
        task="caption",
        image_paths=(image,),
        question="",
        answer=caption,
        answer_type=None,
        question_type=None,
        group=name,
        line=line,
        meta={},
    )
