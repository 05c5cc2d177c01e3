"""Your own data: `train.jsonl`, `validation.jsonl` and `test.jsonl` (any of them), one row a line, in three spellings.

    {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}], "image": "a.png"}
    {"query": "Q", "response": "A", "images": ["a.png", "b.png"]}

These are OpenAI's and LLaMA-Factory's, ShareGPT's and LLaVA's, and ms-swift's. A split may be one JSON list of such
rows instead, `train.json`, as LLaVA has it; `val` is read as `validation`.

In `messages`, content may also be a list of parts: `text`, OpenAI's `image_url`, or `image` (with a path, or without
one for the next of `images`). Image paths are relative to the folder. In a JSONL file an image may stand in its row as
base64 (`data:image/png;base64,...`); any other URL is quarantined (`image_not_local`). One question and one answer a
row, `system` text aside; a row with more turns, or with a `history`, is quarantined (`several_turns`).

Optional keys: `id` (else `train-1`, by its place in the file), `task` (else vqa, or caption where there is no
question), `answer_type`, `question_type`, `group` (what must not straddle splits, a patient say; else the first image),
`meta`.

The licence class is `restricted` unless `licence=open` is given: nobody but you knows where this may go.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, TASKS, Reference, Split
from pefomed_ray.data.corpora.reading import (
    Row,
    answer_type_of,
    as_written,
    decode,
    load_json,
    looks_like_chats,
    numbered,
    open_file,
    rows_of,
    text_of,
)
from pefomed_ray.data.inline import InlineImages
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DataError

NAME = "jsonl"
LICENCE: Literal["open", "restricted"] = "restricted"
LAYOUT = (
    "train.jsonl, validation.jsonl, test.jsonl (any of them), or .json lists of rows with `messages`, `conversations` "
    "or `query`, and images beside them"
)
OFFICIAL_SPLITS = True
OPTIONS = frozenset({"licence"})

NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Locate = Callable[[str], str]
"""From a `data:` URL to the image path of what it holds. Raises RowError."""


def detect(root: Folder) -> bool:
    """Any of the files."""
    return any(_files(root, split) for split in SPLITS)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the files that are there; blank lines are skipped. Raises DataError where a split has two files."""
    inline = InlineImages()
    for split in SPLITS:
        files = _files(root, split)
        if len(files) > 1:
            raise DataError(f"split {split!r} is there {len(files)} times: {', '.join(files)}; keep one of them")
        for name in files:
            if name.endswith(".jsonl"):
                yield from _read_lines(root, name, split, inline)
            else:
                yield from _read_list(root, name, split)


def _files(root: Folder, split: Split) -> list[str]:
    lines = [f"{name}.jsonl" for name in NAMES[split] if root.is_file(f"{name}.jsonl")]
    return lines + [f"{name}.json" for name in NAMES[split] if looks_like_chats(root, f"{name}.json")]


def _read_lines(root: Folder, name: str, split: Split, inline: InlineImages) -> Iterator[Row]:
    empty = True
    for number, offset, line in _lines(root, name):
        if not line.strip():
            continue
        empty = False
        locate = partial(inline.place, name=name, offset=offset, line=line)
        make = partial(_line_reference, split=split, number=number, locate=locate)
        yield from rows_of([(f"{name}:{number}", line)], split, make)
    if empty:
        raise DataError(f"split {split!r} is empty: {name!r} holds no rows; fetch it again, or remove it if meant so")


def _lines(root: Folder, name: str) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, offset in the file, and content of each line."""
    with open_file(root, name) as file:
        offset = 0
        for number, line in enumerate(file, 1):
            yield number, offset, line.rstrip(b"\n")
            offset += len(line)


def _read_list(root: Folder, name: str, split: Split) -> Iterator[Row]:
    for number, (line, item) in enumerate(numbered(load_json(root, name), name, split), 1):
        make = partial(_reference, split=split, number=number, locate=_refuse)
        yield from rows_of([(line, item)], split, make)


def _refuse(url: str) -> str:
    raise RowError("image_not_local")


def _line_reference(data: bytes, line: str, split: Split, number: int, locate: Locate) -> Reference:
    try:
        item = json.loads(decode(data))
    except (json.JSONDecodeError, RecursionError):
        raise RowError("malformed_row") from None
    return _reference(item, line, split, number, locate)


def _reference(item: Any, line: str, split: Split, number: int, locate: Locate) -> Reference:
    if not isinstance(item, dict):
        raise RowError("malformed_row")
    question, answer, system, found = _turns(item)
    images = tuple(_image_path(image, locate) for image in [*found, *_images(item)])
    tokens = question.count(IMAGE_TOKEN)
    if tokens not in (0, len(images)):
        raise RowError("malformed_row")
    question = question.replace(IMAGE_TOKEN, "").strip()
    task = item.get("task", "vqa" if question else "caption")
    if task not in TASKS:
        raise RowError("malformed_row")
    return Reference(
        id=_text_or(item.get("id"), f"{split}-{number}"),
        split=split,
        task=task,
        image_paths=images,
        question=question,
        answer=answer,
        answer_type=None if item.get("answer_type") is None else answer_type_of(item["answer_type"]),
        question_type=None if item.get("question_type") is None else text_of(item["question_type"]),
        group=_text_or(item.get("group"), images[0] if images else line),
        line=line,
        meta=dict(item.get("meta") or {}) | ({"system": system} if system else {}),
        as_written=as_written(_written_answer(item), item.get("answer_type")),
    )


def _text_or(value: Any, default: str) -> str:
    return default if value is None else text_of(value)


def _turns(item: dict[str, Any]) -> tuple[str, str, str, list[str]]:
    """Question, answer, system text, and images named inside the question."""
    if item.get("history"):
        raise RowError("several_turns")
    if "messages" in item:
        turns = [(ROLES[turn["role"]], *_content(turn["content"])) for turn in item["messages"]]
    elif "conversations" in item:
        turns = [(ROLES[turn["from"]], text_of(turn["value"]), []) for turn in item["conversations"]]
    else:
        turns = [("user", text_of(item.get("query")), []), ("assistant", text_of(item["response"]), [])]
    systems = [text_of(item.get("system")), *(text for role, text, _ in turns if role == "system")]
    spoken = [turn for turn in turns if turn[0] != "system"]
    if [role for role, _, _ in spoken] != ["user", "assistant"]:
        raise RowError("several_turns" if len(spoken) > 2 else "malformed_row")
    (_, question, images), (_, answer, _) = spoken
    if any(found for role, _, found in turns if role != "user"):
        raise RowError("malformed_row")  # an image in an answer cannot be learnt
    return question, answer, "\n".join(text for text in systems if text), images


def _written_answer(item: dict[str, Any]) -> Any:
    """The answer of a row that `_turns` could read, as it stands there."""
    last = (item.get("messages") or item.get("conversations") or [item])[-1]
    return last.get("content", last.get("value", last.get("response")))


def _content(content: Any) -> tuple[str, list[str]]:
    """Text and images of a message's content, a string or a list of parts."""
    if not isinstance(content, list):
        return text_of(content), []
    texts, images = [], []
    for part in content:
        if part["type"] == "text":
            texts.append(text_of(part["text"]))
        elif part["type"] == "image_url":
            images.append(part["image_url"]["url"])
        elif part["type"] == "image":
            image = part.get("image")
            if image is None:
                texts.append(IMAGE_TOKEN)
            else:
                images.append(image)
        else:
            raise RowError("malformed_row")
    return "\n".join(texts), images


def _images(item: dict[str, Any]) -> list[Any]:
    value = item.get("images") or item.get("image") or []
    return value if isinstance(value, list) else [value]


def _image_path(image: Any, locate: Locate) -> str:
    if not isinstance(image, str):
        raise RowError("malformed_row")
    if image.startswith("data:"):
        return locate(image)
    if "://" in image:
        raise RowError("image_not_local")
    return image
