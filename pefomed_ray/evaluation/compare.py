"""Two prediction files on the items that both answer: per metric, how far the first is ahead, and how sure that is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.records import Task
from pefomed_ray.errors import DataError
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.evaluation.score import Scored, all_metrics
from pefomed_ray.metrics.caption import NotComputed
from pefomed_ray.metrics.intervals import difference
from pefomed_ray.metrics.vqa import normalizer_named


def compare_files(first: Path, second: Path, task: Task, normalizer: str) -> dict[str, Any]:
    """`first - second` of every metric, on the ids that have a prediction in both, resampled by cluster.

    Answers `{"common", "only_first", "only_second", "unscored": counts of ids, "differences": {metric name:
    {"value", "n", "ci95", "p", "first", "second"}}}`; answers, types and groups are those of the first file. Raises
    ConfigError for an unknown normaliser; DataError where no id is in both, where no common one has a prediction in
    both, and where an id has another right answer in the other file; and what `read_predictions` raises.
    """
    normalize = normalizer_named(normalizer)
    ours, theirs = read_predictions(first), {row.id: row for row in read_predictions(second)}
    common = [row for row in ours if row.id in theirs]
    if not common:
        raise DataError(f"{str(first)!r} and {str(second)!r} have no id in common, so there is nothing to compare")
    differing = sum(set(row.right) != set(theirs[row.id].right) for row in common)
    if differing:
        raise DataError(f"{differing} of {len(common)} ids have another right answer in {str(second)!r}")
    rows = [row for row in common if row.prediction is not None and theirs[row.id].prediction is not None]
    if not rows:
        raise DataError(f"none of the {len(common)} ids in both files has a prediction in both")
    others = [replace(row, prediction=theirs[row.id].prediction) for row in rows]
    found, against = all_metrics([rows, others], task, normalize)
    return {
        "common": len(common),
        "only_first": len(ours) - len(common),
        "only_second": len(theirs) - len(common),
        "unscored": len(common) - len(rows),
        "differences": {name: _difference(found[name], against[name], rows) for name in found},
    }


def _difference(ours: Scored, theirs: Scored, rows: list[Prediction]) -> dict[str, Any]:
    if isinstance(ours.found, NotComputed) or isinstance(theirs.found, NotComputed):
        reasons = [scored.found.reason for scored in (ours, theirs) if isinstance(scored.found, NotComputed)]
        why = {"not_computed": reasons[0]} if ours.rows else {}
        return {"value": None, "n": 0, "ci95": None, "p": None, "first": None, "second": None} | why
    found = difference(ours.found, theirs.found, [rows[row].cluster for row in ours.rows])
    return found.to_json() | {"first": ours.found.value, "second": theirs.found.value}
