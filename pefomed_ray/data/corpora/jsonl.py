"""Your own data: `train.jsonl`, `validation.jsonl` and `test.jsonl` (any of them), one row a line, in three spellings.

    {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}], "image": "a.png"}
    {"query": "Q", "response": "A", "images": ["a.png", "b.png"]}

In `messages`, content may also be OpenAI's list of `text` and `image_url` parts. Image paths are relative to the
folder; URLs, `data:` too, are quarantined (`image_not_local`). One question and one answer a row. Optional keys: `id`
(else `train-1`, by line), `task` (else vqa, or caption where there is no question), `answer_type`, `question_type`,
`group` (what must not straddle splits; else the first image), `meta`.

The licence class is `restricted` unless `licence=open` is given: nobody but you knows where this may go.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import SPLITS, TASKS, Reference, Split
from pefomed_ray.data.corpora.reading import Row, answer_type_of, decode, lines_of, rows_of, text_of
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError

NAME = "jsonl"
LICENCE: Literal["open", "restricted"] = "restricted"
LAYOUT = "train.jsonl, validation.jsonl, test.jsonl (any of them) and images beside them"
OFFICIAL_SPLITS = True
OPTIONS = frozenset({"licence"})

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def detect(root: Folder) -> bool:
    """Any of the three files."""
    return any(root.is_file(f"{split}.jsonl") for split in SPLITS)


def read(root: Folder, options: DataOptions) -> Iterator[Row]:
    """Rows of the files that are there; blank lines are skipped."""
    for split in SPLITS:
        name = f"{split}.jsonl"
        if not root.is_file(name):
            continue
        yield from rows_of(lines_of(root, name, split), split, partial(_reference, split=split))


def _reference(data: Any, line: str, split: Split) -> Reference:
    item = _parse(data)
    question, answer, system, inline = _turns(item)
    images = tuple(_local(path) for path in [*inline, *_images(item)])
    tokens = question.count(IMAGE_TOKEN)
    if tokens not in (0, len(images)):
        raise RowError("malformed_row")
    question = question.replace(IMAGE_TOKEN, "").strip()
    task = item.get("task", "vqa" if question else "caption")
    if task not in TASKS:
        raise RowError("malformed_row")
    answer_type = item.get("answer_type")
    number = line.rsplit(":", 1)[1]
    return Reference(
        id=text_of(item["id"]) if "id" in item else f"{split}-{number}",
        split=split,
        task=task,
        image_paths=images,
        question=question,
        answer=answer,
        answer_type=None if answer_type is None else answer_type_of(answer_type),
        question_type=text_of(item["question_type"]) if item.get("question_type") is not None else None,
        group=text_of(item["group"]) if "group" in item else (images[0] if images else line),
        line=line,
        meta=dict(item.get("meta") or {}) | ({"system": system} if system else {}),
    )


def _parse(data: bytes) -> dict[str, Any]:
    try:
        item = json.loads(decode(data))
    except (json.JSONDecodeError, RecursionError):
        raise RowError("malformed_row") from None
    if not isinstance(item, dict):
        raise RowError("malformed_row")
    return item


def _turns(item: dict[str, Any]) -> tuple[str, str, str, list[str]]:
    """Question, answer, system text, and images named inside the question."""
    if "messages" in item:
        turns = [(ROLES[turn["role"]], *_content(turn["content"])) for turn in item["messages"]]
    elif "conversations" in item:
        turns = [(ROLES[turn["from"]], text_of(turn["value"]), []) for turn in item["conversations"]]
    else:
        return text_of(item.get("query")), text_of(item["response"]), text_of(item.get("system")), []
    system = "\n".join(text for role, text, _ in turns if role == "system")
    spoken = [turn for turn in turns if turn[0] != "system"]
    if [role for role, _, _ in spoken] != ["user", "assistant"]:
        raise RowError("several_turns" if len(spoken) > 2 else "malformed_row")
    (_, question, images), (_, answer, _) = spoken
    return question, answer, system, images


def _content(content: Any) -> tuple[str, list[str]]:
    """Text and image paths of OpenAI's content, a string or a list of parts."""
    if not isinstance(content, list):
        return text_of(content), []
    texts, images = [], []
    for part in content:
        if part["type"] == "text":
            texts.append(text_of(part["text"]))
        elif part["type"] == "image_url":
            images.append(part["image_url"]["url"])
        else:
            raise RowError("malformed_row")
    return "\n".join(texts), images


def _images(item: dict[str, Any]) -> list[Any]:
    value = item.get("images", item.get("image"))
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _local(path: Any) -> str:
    if not isinstance(path, str):
        raise RowError("malformed_row")
    if path.startswith("data:") or "://" in path:
        raise RowError("image_not_local")
    return path
