"""PathVQA (He et al., 2020): 32,795 questions about pathology images of two textbooks; MIT. Three layouts are read:

- the publisher's `pvqa/` folder, or its content: lists of rows in pickle files, which are opened without running code;
- PeFoMed's and MUMC's `pathvqa_{train,val,test}.json`;
- Hugging Face's Parquet files, in which exact repetitions of a row are left out (32,632 rows stay). They look like
  those of SLAKE in English: say `corpus=pathvqa`.

None of them has an id or an answer type that can be relied on: ids are positions (`train-0`), and in all three
layouts `closed` means that the answer is yes or no, so that scores compare. 715 images have no question. About 1,850
questions stand there again with another answer; all are kept, so that no model can score 100.
"""

import io
import json
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, Never

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.data.corpora.reading import Row, load_json, numbered, read_file, rows_of, text_of
from pefomed_ray.data.corpora.vqa_parquet import has_parquet, parquet_items, parquet_reference, yes_no_type
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DataError

NAME = "pathvqa"
LICENCE: Literal["open", "restricted"] = "open"
LAYOUT = (
    "pvqa/ (or its content) with images/{train,val,test}/ and qas/{train,val,test}/*_qa.pkl; "
    "or pathvqa_{train,val,test}.json and images/ (PeFoMed); "
    "or Hugging Face's data/{train,validation,test}-*.parquet with columns image, question, answer"
)
OFFICIAL_SPLITS = True
OPTIONS: frozenset[str] = frozenset()

KEYS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}

QuestionTypes = dict[tuple[str, str, str], str]
"""By image, question and answer."""


def detect(root: Folder) -> bool:
    """Any of the three layouts."""
    return bool(_layouts(root))


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of whichever layout is there, and of the splits that it has. Raises DataError where there are several."""
    layouts = _layouts(root)
    if len(layouts) != 1:
        raise DataError(f"{str(root)!r} holds PathVQA in several layouts ({', '.join(layouts)}); keep one of them")
    read_split = {"publisher": _read_pickles, "PeFoMed": _read_json, "Hugging Face": _read_parquet}[layouts[0]]
    for split in SPLITS:
        yield from read_split(root, split)


def _layouts(root: Folder) -> list[str]:
    found = {
        "publisher": any(root.is_file(_pickle_name(root, split)) for split in SPLITS),
        "PeFoMed": any(root.is_file(_json_name(split)) for split in SPLITS),
        "Hugging Face": has_parquet(root, SPLITS),
    }
    return [name for name, there in found.items() if there]


def _read_pickles(root: Folder, split: Split) -> Iterator[Row]:
    name = _pickle_name(root, split)
    if root.is_file(name):
        items = numbered(_load_pickle(root, name), name, split)
        images = f"{_base(root)}images/{KEYS[split]}"
        make = partial(_reference, split=split, images=images, question_types=_question_types(root, split))
        yield from rows_of(_with_number(items), split, make)


def _read_json(root: Folder, split: Split) -> Iterator[Row]:
    name = _json_name(split)
    if root.is_file(name):
        items = numbered(load_json(root, name), name, split)
        yield from rows_of(_with_number(items), split, partial(_converted_reference, split=split))


def _read_parquet(root: Folder, split: Split) -> Iterator[Row]:
    yield from rows_of(parquet_items(root, split), split, partial(_parquet_reference, split=split))


def _base(root: Folder) -> str:
    return "pvqa/" if root.is_dir("pvqa") else ""


def _pickle_name(root: Folder, split: Split) -> str:
    return f"{_base(root)}qas/{KEYS[split]}/{KEYS[split]}_qa.pkl"


def _json_name(split: Split) -> str:
    return f"pathvqa_{KEYS[split]}.json"


def _with_number(items: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Adds a row's number to it, where it is one."""
    for number, (line, item) in enumerate(items):
        yield line, item | {"number": number} if isinstance(item, dict) else item


def _reference(item: dict[str, Any], line: str, split: Split, images: str, question_types: QuestionTypes) -> Reference:
    image, question, answer = text_of(item["image"]), text_of(item["question"]), text_of(item["answer"])
    return Reference(
        id=f"{split}-{item['number']}",
        split=split,
        task="vqa",
        image_paths=(f"{images}/{image}.jpg",),
        question=question,
        answer=answer,
        answer_type=yes_no_type(answer),
        question_type=question_types.get((image, question, answer)),
        group=image,
        line=line,
        meta={},
    )


def _converted_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    image, answer = text_of(item["image_name"]), text_of(item["answer"])
    return Reference(
        id=f"{split}-{item['number']}",
        split=split,
        task="vqa",
        image_paths=(f"images/{image}",),
        question=text_of(item["question"]),
        answer=answer,
        answer_type=yes_no_type(answer),
        question_type=text_of(item["question_type"]) if "question_type" in item else None,
        group=image.rsplit("/", 1)[-1].rsplit(".", 1)[0],
        line=line,
        meta={"qid": item["qid"]} if "qid" in item else {},
    )


def _parquet_reference(item: dict[str, Any], line: str, split: Split) -> Reference:
    return parquet_reference(item, line, split, yes_no_type(text_of(item["answer"])), "yes_no")


def _question_types(root: Folder, split: Split) -> QuestionTypes:
    """From the publisher's second file, a copy of the questions for VQA v2 tools; nothing where it is not there."""
    name = f"{_base(root)}qas/{KEYS[split]}_vqa.pkl"
    if not root.is_file(name):
        return {}
    found: QuestionTypes = {}
    for _, item in numbered(_load_pickle(root, name), name, split):
        try:
            for answer in item["label"]:
                found[item["img_id"], item["sent"], answer] = text_of(item["question_type"])
        except (KeyError, TypeError, RowError):
            raise DataError(f"{name!r} does not hold what PathVQA's does; fetch it again, or do without it") from None
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Loads lists, dicts, strings and numbers; a pickle that asks for anything else could run code."""

    def __init__(self, data: bytes, name: str) -> None:
        # Bytes that are not UTF-8 become lone surrogates, as `decode` has it.
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
        self._name = name

    def find_class(self, module_name: str, global_name: str) -> Never:
        raise DataError(
            f"the pickle {self._name!r} asks for a class or function, through which it could run code here; PathVQA's "
            "do not. It is not the publisher's: open it nowhere, fetch it again"
        )


def _load_pickle(root: Folder, name: str) -> Any:
    """The lists and dicts that a pickle file holds. Raises DataError where it holds more, or cannot be read."""
    try:
        # Bytes and sets, which need no class, do not survive the way through JSON.
        return json.loads(json.dumps(_PlainUnpickler(read_file(root, name), name).load()))
    except DataError:
        raise
    except Exception as error:  # unpickling foreign bytes raises almost anything
        raise DataError(f"{name!r} cannot be read as a pickle ({type(error).__name__}); fetch it again") from None
