"""The one metric that a task's report shows first and its gate looks at, row by row and fast."""

from collections.abc import Sequence

from pefomed_ray.artifacts.records import Task
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import Normalizer, exact_match


def row_scores(rows: Sequence[Prediction], task: Task, normalizer: Normalizer) -> list[float | None]:
    """Each row's score by `score.PRIMARY_METRIC` of the task; None where unscored."""
    return [_score(row, task, normalizer) for row in rows]


def _score(row: Prediction, task: Task, normalizer: Normalizer) -> float | None:
    if row.prediction is None:
        return None
    if task == "vqa":
        return max(exact_match(row.prediction, text, normalizer) for text in row.right)
    return max(rouge_l(row.prediction, text) for text in row.right)
