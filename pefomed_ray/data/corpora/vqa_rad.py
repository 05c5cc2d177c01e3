"""VQA-RAD (Lau et al., 2018): 2,248 questions about 315 radiology images; CC0. Three layouts of it are read:

- the publisher's OSF folder; test rows are those whose `phrase_type` starts with `test`;
- MEVF's and PeFoMed's `trainset.json` and `testset.json`, whose 1,267 `frame` rows are paraphrases of other rows;
- Hugging Face's Parquet files, lower-cased, which lack `qid` and `answer_type`. Put the publisher's JSON file (alone,
  without its images) beside `data/` and the answer types are looked up there by question, answer and image. Without
  it, a yes/no answer counts as closed and any other as open, which calls about 1 closed row in 12 open: scores by
  answer type then do not compare with the other layouts. `answer_type_from` in a record's meta says which: `osf` or
  `yes_no`.

There is no validation split, and every test image stands in train too: the publisher split by question.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.data.corpora.reading import Row, answer_type_of, load_json, numbered, rows_of, text_of
from pefomed_ray.data.corpora.vqa_parquet import has_parquet, parquet_items, parquet_reference, yes_no_type
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
MISSPELLED = {"ATRIB": "ATTRIB", "PRSE": "PRES"}

OsfTypes = dict[tuple[str, str], list[tuple[str, Literal["open", "closed"]]]]
"""Group (the image) and answer type of the rows that have a question and an answer in common."""


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
        yield from _read_parquet(root)


def _layouts(root: Folder) -> list[str]:
    hugging_face = has_parquet(root, ("train", "test"))
    images = any(root.is_dir(name) for name in IMAGE_FOLDERS)
    found = {
        # Beside Parquet files and without images of its own, it is there for its answer types.
        "OSF": root.is_file(OSF_FILE) and (images or not hugging_face),
        "MEVF": all(root.is_file(name) for name in MEVF_FILES.values()),
        "Hugging Face": hugging_face,
    }
    return [name for name, there in found.items() if there]


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
        question_type=_question_type(text_of(item["question_type"])),
        group=_group(image),
        line=line,
        meta={key: item[key] for key in META_KEYS if key in item},
    )


def _group(image_name: str) -> str:
    return image_name.rsplit(".", 1)[0]


def _question_type(given: str) -> str:
    """`POS, PRES` of `pos,PRSE `: a row may have several types; the publisher's 26 spellings stand for fewer."""
    names = [name.strip().upper() for name in given.split(",")]
    return ", ".join(MISSPELLED.get(name, name) for name in names)


def _read_parquet(root: Folder) -> Iterator[Row]:
    osf_types = _osf_types(root) if root.is_file(OSF_FILE) else {}
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        make = partial(_parquet_reference, split=split, osf_types=osf_types)
        yield from rows_of(parquet_items(root, split), split, make)


def _parquet_reference(item: dict[str, Any], line: str, split: Split, osf_types: OsfTypes) -> Reference:
    question, answer = text_of(item["question"]), text_of(item["answer"])
    candidates = osf_types.get(_key(question, answer), [])
    # The image decides where Hugging Face's copy names it; else the candidates have to agree.
    named = [candidate for candidate in candidates if candidate[0] == _group(text_of(item["image_name"]))]
    types = {answer_type for _, answer_type in named or candidates}
    if len(types) == 1:
        return parquet_reference(item, line, split, types.pop(), "osf")
    return parquet_reference(item, line, split, yes_no_type(answer), "yes_no")


def _osf_types(root: Folder) -> OsfTypes:
    found: OsfTypes = {}
    items = numbered(load_json(root, OSF_FILE), OSF_FILE, "train")
    for row in rows_of(items, "train", partial(_reference, split="train", folder="")):
        if isinstance(row, Reference) and row.answer_type is not None:
            found.setdefault(_key(row.question, row.answer), []).append((row.group, row.answer_type))
    return found


def _key(question: str, answer: str) -> tuple[str, str]:
    """What both copies have in common: Hugging Face's is lower-cased."""
    return " ".join(question.lower().split()), " ".join(answer.lower().split())
