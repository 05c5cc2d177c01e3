"""A judge's verdicts as JSONL: one row an item and repeat, scored or with the reason why not."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pefomed_ray.artifacts.records import TASKS, Task
from pefomed_ray.artifacts.storage import write_bytes
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.predictions import json_object

BEST_SCORE: dict[Task, int] = {"vqa": 1, "caption": 4, "report": 4}
"""Of a visual question 0/1; of a caption or a report 0-4, as in the paper's five-point scale."""


@dataclass(frozen=True)
class Judgement:
    """What a judge said of one answer, one time."""

    id: str
    """Of the row of the predictions."""
    repeat: int
    """Counted from 0: the same answer may be judged several times."""
    score: float | None
    """0/1 for a visual question, 0-4 for a report or a caption; None where unscored."""
    unscored: str | None
    """Reason code where there is no score."""
    judge: str
    """Its name: the model that was asked for, and the prompt."""
    task: Task
    identity: str | None = None
    """Who answered, in the endpoint's own words: model and fingerprint."""


def write_judgements(path: Path, judgements: Iterable[Judgement]) -> None:
    """Write judgements as JSONL, whole or not at all."""
    lines = (json.dumps(asdict(judgement), ensure_ascii=False) + "\n" for judgement in judgements)
    write_bytes(path, "".join(lines).encode())


def read_judgements(path: Path) -> list[Judgement]:
    """The rows of a JSONL file; other keys than ours are ignored.

    Raises ConfigError where there is no such file; DataError naming file and line, never a text, for a line that is no
    judgement, a score outside its task's scale, a row that is neither scored nor unscored or both, and a repeated
    (id, repeat, judge); and for a file without rows.
    """
    if not path.is_file():
        raise ConfigError(f"judgements {str(path)!r} does not exist or is not a file")
    judgements: list[Judgement] = []
    seen: dict[tuple[str, int, str], int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                judgement = _parse(line)
                key = (judgement.id, judgement.repeat, judgement.judge)
                if key in seen:
                    raise DataError(f"a verdict of the same judge, id and repeat stands in line {seen[key]}")
            except DataError as error:
                raise DataError(f"judgements {str(path)!r}, line {number}: {error}") from None
            seen[key] = number
            judgements.append(judgement)
    if not judgements:
        raise DataError(f"judgements {str(path)!r} holds no rows")
    return judgements


def _parse(line: bytes) -> Judgement:
    value = json_object(line)
    task = _one_of(value, "task", str)
    if task not in TASKS:
        raise DataError(f"task is none of {', '.join(TASKS)}")
    found = Judgement(
        id=_one_of(value, "id", str),
        repeat=_one_of(value, "repeat", int),
        score=_one_of(value, "score", int, float, type(None)),
        unscored=_one_of(value, "unscored", str, type(None)),
        judge=_one_of(value, "judge", str),
        task=cast(Task, task),
        identity=_one_of(value, "identity", str, type(None)),
    )
    if (found.score is None) == (found.unscored is None):
        raise DataError("a row has either a score or, as `unscored`, the reason why not")
    if found.score is not None and not 0 <= found.score <= BEST_SCORE[found.task]:
        raise DataError(f"the score is outside 0-{BEST_SCORE[found.task]}")
    return found


def _one_of(value: dict[str, Any], key: str, *kinds: type) -> Any:
    found = value.get(key)
    if isinstance(found, bool) or not isinstance(found, kinds):
        raise DataError(f"key {key!r} is missing or of another kind")
    return found
