"""Predictions as JSONL: one row an answer, made by us or anywhere else."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pefomed_ray.errors import ConfigError, DataError

ANSWER_TYPES = ("open", "closed")


@dataclass(frozen=True)
class Prediction:
    """What was asked, what is right, and what a model or a baseline said."""

    id: str
    question: str
    answer: str
    prediction: str | None
    """None where there is none: the row counts as unscored, not as wrong."""
    answer_type: str | None = None
    question_type: str | None = None
    source: str | None = None
    group: str | None = None
    """What the interval is clustered by; rows without one are independent."""
    references: tuple[str, ...] = ()
    """Right answers or reference texts where there are several; `answer` may be one of them."""

    @property
    def right(self) -> tuple[str, ...]:
        """Every text that the prediction is held against: `references`, with `answer` first where it is not in them."""
        return self.references if self.answer in self.references else (self.answer, *self.references)

    @property
    def cluster(self) -> str:
        """What the interval is clustered by."""
        return f"row {self.id}" if self.group is None else f"group {self.group}"


def write_predictions(path: Path, rows: Iterable[Prediction], produced_by: dict[str, Any]) -> None:
    """Write rows as JSONL, each with `produced_by` (bundle, shards, split, images) in it."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row) | {"produced_by": produced_by}, ensure_ascii=False) + "\n")


def read_predictions(path: Path) -> list[Prediction]:
    """The rows of a JSONL file; `id` and `answer` must be there, other keys than ours are ignored.

    Where there are `references` (a list of texts) and no `answer`, the first of them is the answer.

    A `prediction` that is missing, null or not a string becomes None. Raises ConfigError where there is no such file,
    DataError naming file and line, never the text, for a line that is no JSON object, lacks a key or repeats an id,
    and for a file without rows.
    """
    if not path.is_file():
        raise ConfigError(f"predictions {str(path)!r} does not exist or is not a file")
    rows: list[Prediction] = []
    seen: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _parse(line)
            except DataError as error:
                raise DataError(f"predictions {str(path)!r}, line {number}: {error}") from None
            if row.id in seen:
                raise DataError(f"predictions {str(path)!r}, line {number}: its id is that of line {seen[row.id]} too")
            seen[row.id] = number
            rows.append(row)
    if not rows:
        raise DataError(f"predictions {str(path)!r} holds no rows")
    return rows


def json_object(line: bytes) -> dict[str, Any]:
    """A line of a JSONL file. Raises DataError, without the text, where it is no JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("not valid JSON; was the file cut short?") from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    return value


def _parse(line: bytes) -> Prediction:
    value = json_object(line)
    answer_type = _text(value, "answer_type", default=None)
    if answer_type is not None:
        answer_type = answer_type.strip().lower()
        if answer_type not in ANSWER_TYPES:
            raise DataError(f"answer_type is none of {', '.join(ANSWER_TYPES)} and null")
    prediction = value.get("prediction")
    references = _texts(value, "references")
    return Prediction(
        id=_required_text(value, "id"),
        question=_text(value, "question", default="") or "",
        answer=references[0] if references and value.get("answer") is None else _required_text(value, "answer"),
        prediction=prediction if isinstance(prediction, str) else None,
        answer_type=answer_type,
        question_type=_text(value, "question_type", default=None),
        source=_text(value, "source", default=None),
        group=_text(value, "group", default=None),
        references=references,
    )


def _texts(value: dict[str, Any], key: str) -> tuple[str, ...]:
    found = value.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"key {key!r} is not a list of texts")
    return tuple(found)


def _required_text(value: dict[str, Any], key: str) -> str:
    text = _text(value, key, default=None)
    if text is None:
        raise DataError(f"key {key!r} is missing")
    return text


def _text(value: dict[str, Any], key: str, *, default: str | None) -> str | None:
    """The key as text; whole and decimal numbers are understood, because VQA-RAD has them as ids and answers."""
    found = value.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise DataError(f"key {key!r} is not text")
    return str(found)
