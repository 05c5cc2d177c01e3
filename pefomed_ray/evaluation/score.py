"""Predictions -> metric name -> value, n, unscored rows and 95 % interval."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.records import TASKS, Task
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.metrics.intervals import mean_with_interval
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import Normalizer, exact_match, normalizer_named, token_f1

PRIMARY_METRIC: dict[Task, str] = {"vqa": "exact_match", "caption": "rougeL", "report": "rougeL"}
"""The one that a task's report shows first and its gate looks at."""

Scores = dict[str, dict[str, Any]]
"""Metric name -> Metric.to_json()."""


def score_file(path: Path, task: str, normalizer: str) -> Scores:
    """Score a JSONL file of predictions made anywhere.

    Raises ConfigError for an unknown task or normaliser, before the file is read, and what `read_predictions` raises.
    """
    if task not in TASKS:
        raise ConfigError(f"task: {task!r} is not known; allowed: {', '.join(TASKS)}")
    normalize = normalizer_named(normalizer)
    return score_rows(read_predictions(path), task, normalize)


def score_rows(rows: Sequence[Prediction], task: Task, normalizer: Normalizer) -> Scores:
    """Every metric of the task over these rows. A metric without rows has value null and n 0."""

    def f1(prediction: str, answer: str) -> float:
        return token_f1(prediction, answer, normalizer)

    if task != "vqa":
        return {"rougeL": _mean(rows, rouge_l), "token_f1": _mean(rows, f1)}
    return {
        "exact_match": _exact_match(rows, normalizer),
        "exact_match_open": _exact_match([row for row in rows if row.answer_type == "open"], normalizer),
        "exact_match_closed": _exact_match([row for row in rows if row.answer_type == "closed"], normalizer),
        "token_f1": _mean(rows, f1),
        "rougeL": _mean(rows, rouge_l),
    }


def score_by_question_type(rows: Sequence[Prediction], normalizer: Normalizer) -> dict[str, Scores]:
    """Question type -> exact match, in the order of the types' names; rows without a type are left out."""
    by_type: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        if row.question_type is not None:
            by_type[row.question_type].append(row)
    return {kind: {"exact_match": _exact_match(members, normalizer)} for kind, members in sorted(by_type.items())}


def unique_output_ratio(rows: Sequence[Prediction], normalizer: Normalizer) -> float | None:
    """Distinct outputs over outputs, in (0, 1]; near 0 a model says the same whatever it is shown. None without any."""
    outputs = [normalizer(row.prediction) for row in rows if row.prediction is not None]
    return len(set(outputs)) / len(outputs) if outputs else None


def _exact_match(rows: Sequence[Prediction], normalizer: Normalizer) -> dict[str, Any]:
    return _mean(rows, lambda prediction, answer: exact_match(prediction, answer, normalizer))


def _mean(rows: Sequence[Prediction], score: Callable[[str, str], float]) -> dict[str, Any]:
    values, clusters = [], []
    for row in rows:
        if row.prediction is not None:
            values.append(score(row.prediction, row.answer))
            clusters.append(f"row {row.id}" if row.group is None else f"group {row.group}")
    return mean_with_interval(values, clusters, len(rows) - len(values)).to_json()
