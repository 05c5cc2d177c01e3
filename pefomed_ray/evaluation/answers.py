"""Answers kept as they come: an evaluation that was killed goes on and asks only what is missing.

OUTPUT.answers/asked.json         what is asked, of whom, about what: another question never goes on with these answers
OUTPUT.answers/part-NNN.jsonl     an answer a line, flushed at once; every start begins a part of its own

The folder stands beside the output, which appears whole once every answer is there, and then goes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.errors import ConfigError, DataError

ASKED_FILE = "asked.json"

Key = tuple[str, int]
"""What was shown, and the row that was asked about."""


@dataclass(frozen=True)
class Question:
    """One thing to ask."""

    given: str
    """What the model is shown: `image`, or a control's name."""
    row: int
    """Of the split, counted from 0: whose question it is."""
    image_row: int
    """Whose pictures it is about."""

    @property
    def key(self) -> Key:
        """What its answer is filed under."""
        return self.given, self.row


@dataclass(frozen=True)
class Answered:
    """One answer, or why there is none."""

    given: str
    row: int
    """As in `Question`."""
    text: str | None
    unscored: str | None = None
    """Reason code where there is no text."""
    by: str | None = None
    """Who answered, in an endpoint's own words: model and fingerprint."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def key(self) -> Key:
        """What it is filed under."""
        return self.given, self.row


class KeptAnswers:
    """The answers there are, on disk and in memory."""

    def __init__(self, folder: Path) -> None:
        self.by_key: dict[Key, Answered] = {}
        parts = sorted(folder.glob("part-*.jsonl"))
        for part in parts:
            self.by_key |= {answer.key: answer for answer in _read_part(part)}
        self._path = folder / f"part-{len(parts):03}.jsonl"
        self._file: IO[str] | None = None

    def add(self, answer: Answered) -> None:
        """Keep an answer; once this returns it outlives the process."""
        if self._file is None:
            self._file = open(self._path, "x", encoding="utf-8")  # noqa: SIM115, closed by `close`
        self._file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        self._file.flush()
        self.by_key[answer.key] = answer

    def close(self) -> None:
        """Close the part that is being written."""
        if self._file is not None:
            self._file.close()


def answers_folder(target: Path) -> Path:
    """Where the answers of the evaluation that will become `target` are kept."""
    return target.with_name(f"{target.name}.answers")


@contextmanager
def keeping_answers(folder: Path, asked: Mapping[str, Any]) -> Iterator[KeptAnswers]:
    """The answers in `folder`, made where it is not there; `asked` is what they are the answers to.

    Raises ConfigError where the folder holds answers to something else, or another process is writing it; DataError
    where a line is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{str(folder)!r}: another evaluation is writing there; wait for it, or end it") from None
    try:
        if (folder / ASKED_FILE).is_file():
            check_same(asked, read_json(folder / ASKED_FILE), folder)
        else:
            write_json(folder / ASKED_FILE, asked)
        kept = KeptAnswers(folder)
        try:
            yield kept
        finally:
            kept.close()
    finally:
        lock.release()


def check_same(asked: Mapping[str, Any], before: Any, folder: Path) -> None:
    """Raise ConfigError naming what is asked otherwise than `before`."""
    if not isinstance(before, dict):
        raise ConfigError(f"{str(folder)!r} does not say what was asked; remove it, or name another output")
    other = sorted(key for key in asked.keys() | before.keys() if asked.get(key) != before.get(key))
    if other:
        raise ConfigError(
            f"{str(folder)!r} holds answers to something else: {', '.join(other)} differ; give the same words as then, "
            "or name another output"
        )


def _read_part(path: Path) -> Iterator[Answered]:
    """The answers of a part. What a kill left of its last line is passed over: that row is asked again."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield Answered(**json.loads(line))
        except (ValueError, TypeError):
            raise DataError(f"{str(path)!r}, line {number}: damaged; remove that line and resume again") from None
