"""The record: one image-text example as every stage after the readers sees it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

Task = Literal["caption", "vqa", "report"]
Split = Literal["train", "validation", "test"]

TASKS: tuple[Task, ...] = ("caption", "vqa", "report")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))),
        pa.field("image_sha256", pa.list_(pa.string())),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("answer_type", pa.string()),
        pa.field("question_type", pa.string()),
        pa.field("group", pa.string(), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
    ],
    metadata={"schema_version": "1"},
)


@dataclass(frozen=True)
class Reference:
    """One row of a corpus before its images are read: what a reader yields.

    A reader fixes names (split, task, answer type), never repairs content: blank answers and missing files are found
    and counted by the sharder, so that every corpus is judged by the same rules.
    """

    id: str
    """Unique in the corpus; the publisher's own id where there is one."""
    split: Split
    task: Task
    image_paths: tuple[str, ...]
    """Relative to the corpus root, in reading order."""
    question: str
    """Empty for captions and reports without a prompt of their own."""
    answer: str
    answer_type: Literal["open", "closed"] | None
    question_type: str | None
    group: str
    """What must not straddle splits: patient, study or image."""
    line: str
    """Where the row stands, for a person to find it: `train.json[17]`."""
    meta: dict[str, Any]
    as_written: dict[str, str] = field(default_factory=dict)
    """What the file writes otherwise than this row reads, for `data check`: a number's type in place of a text
    (`{"answer": "int"}`), an answer type's own spelling (`{"answer_type": "CLOSED "}`). Not part of the record."""
