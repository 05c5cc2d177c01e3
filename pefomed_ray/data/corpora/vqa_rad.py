"""VQA-RAD (Lau et al., 2018): 2,248 questions about 315 radiology images; CC0. Three layouts of it are read:

- the publisher's OSF folder; test rows are those whose `phrase_type` starts with `test`;
- MEVF's and PeFoMed's `trainset.json` and `testset.json`, whose 1,267 `frame` rows are paraphrases of other rows;
- Hugging Face's Parquet files, lower-cased, which lack `qid` and `answer_type`. There a yes/no answer counts as closed
  and any other as open, which calls about 1 closed row in 12 open: scores by answer type do not compare with the
  other layouts.

There is no validation split, and every test image stands in train too: the publisher split by question.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.data.corpora.reading import (
    Row,
    answer_type_of,
    load_json,
    numbered,
    parquet_columns,
    parquet_rows,
    rows_of,
    text_of,
)
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import DataError

NAME = "vqa_rad"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = (
    "'VQA_RAD Dataset Public.json' and 'VQA_RAD Image Folder/'; or trainset.json, testset.json and images/; "
    "or Hugging Face's data/{train,test}-*.parquet with columns image, question, answer"
)
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

OSF_FILE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images")
MEVF_FILES: dict[Split, str] = {"train": "trainset.json", "test": "testset.json"}
META_KEYS = ("image_organ", "phrase_type", "question_relation", "evaluation", "qid_linked_id")


def detect(root: Folder) -> bool:
    """Any of the three layouts."""
    return bool(_layouts(root))


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of whichever layout is there. Raises DataError where there is more than one."""
    layouts = _layouts(root)
    if len(layouts) != 1:
        raise DataError(f"{str(root)!r} holds VQA-RAD in several layouts ({', '.join(layouts)}); keep one of them")
    if layouts == ["OSF"]:
        yield from _read_osf(root)
    elif layouts == ["MEVF"]:
        yield from _read_mevf(root)
    else:
        for split in ("train", "test"):
            yield from _read_parquet(root, split)


def _layouts(root: Folder) -> list[str]:
    found = {
        "OSF": root.is_file(OSF_FILE),
        "MEVF": all(root.is_file(name) for name in MEVF_FILES.values()),
        "Hugging Face": _is_hugging_face(root),
    }
    return [name for name, there in found.items() if there]


def _is_hugging_face(root: Folder) -> bool:
    # PathVQA's Parquet files have the same columns, but a validation split beside train and test.
    files = {split: root.matching("data", f"{split}-*.parquet") for split in ("train", "validation", "test")}
    if not files["train"] or not files["test"] or files["validation"]:
        return False
    return parquet_columns(root, files["train"][0]) == {"image", "question", "answer"}


def _read_osf(root: Folder) -> Iterator[Row]:
    folder = _image_folder(root)
    by_split: dict[Split, list[tuple[str, Any]]] = {"train": [], "test": []}
    for line, item in numbered(load_json(root, OSF_FILE), OSF_FILE, "train"):
        phrase_type = item.get("phrase_type") if isinstance(item, dict) else None
        by_split["test" if str(phrase_type).startswith("test") else "train"].append((line, item))
    for split, items in by_split.items():
        yield from rows_of(items, split, partial(_reference, split=split, folder=folder))


def _read_mevf(root: Folder) -> Iterator[Row]:
    folder = _image_folder(root)
    for split, name in MEVF_FILES.items():
        items = numbered(load_json(root, name), name, split)
        yield from rows_of(items, split, partial(_reference, split=split, folder=folder))


def _image_folder(root: Folder) -> str:
    return next((name for name in IMAGE_FOLDERS if root.is_dir(name)), IMAGE_FOLDERS[0])


def _reference(item: dict[str, Any], line: str, split: Split, folder: str) -> Reference:
    image = text_of(item["image_name"])
    # A `frame` row carries the qid of the row that it paraphrases.
    suffix = "-frame" if item["phrase_type"] == "frame" else ""
    return Reference(
        id=text_of(item["qid"]) + suffix,
        split=split,
        task="vqa",
        image_paths=(f"{folder}/{image}",),
        question=text_of(item["question"]),
        answer=text_of(item["answer"]),
        answer_type=answer_type_of(item["answer_type"]),
        question_type=text_of(item["question_type"]),
        group=image.rsplit(".", 1)[0],
        line=line,
        meta={key: item[key] for key in META_KEYS if key in item},
    )


def _read_parquet(root: Folder, split: Split) -> Iterator[Row]:
    number = 0
    for name in root.matching("data", f"{split}-*.parquet"):
        first_row_of: dict[str, int] = {}
        items = []
        for row, item in enumerate(parquet_rows(root, name, ("image", "question", "answer"))):
            data = (item.pop("image") or {}).get("bytes")
            if data is not None:
                # Rows of one image name the same place, so that they stay together in the shards.
                digest = sha256_bytes(data)
                item |= {"digest": digest, "image": f"{name}#{first_row_of.setdefault(digest, row)}"}
            items.append((f"{name}[{row}]", item | {"number": number}))
            number += 1
        yield from rows_of(items, split, partial(_hugging_face_reference, split=split))


def _hugging_face_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    answer = text_of(item["answer"])
    return Reference(
        id=f"{split}-{item['number']}",
        split=split,
        task="vqa",
        image_paths=(item["image"],) if "image" in item else (),
        question=text_of(item["question"]),
        answer=answer,
        answer_type="closed" if answer.strip().lower() in ("yes", "no") else "open",
        question_type=None,
        group=item.get("digest", line),
        line=line,
        meta={},
    )
