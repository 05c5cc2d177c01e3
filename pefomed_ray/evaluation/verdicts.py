"""What `judge` said of an evaluation's predictions, for its report and its gate."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import read_json, sha256_file
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.answers import ASKED_FILE
from pefomed_ray.evaluation.judgements import BEST_SCORE, read_judgements

METRICS_FILE = "metrics.json"
JUDGEMENTS_FILE = "judgements.jsonl"
METRIC_NAMES = ("judge_accuracy", "judge_accuracy_open", "judge_accuracy_closed", "judge_was")


@dataclass(frozen=True)
class Verdicts:
    """A judge's folder, read."""

    judge: str
    """Its name, as it stands on its rows."""
    metrics: dict[str, Any]
    """`judge_accuracy` or `judge_was`, as in a `metrics.json`."""
    flags: tuple[str, ...]
    """Why the run is not to be trusted; none of them where it is."""
    scores: Mapping[str, float]
    """Row id -> mean score over its repeats, as a share of the best one, in [0, 1]."""

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` keeps of it."""
        return {"judge": self.judge, "flagged": bool(self.flags), "flags": list(self.flags)}


def read_verdicts(folder: Path, predictions: Path, task: Task) -> Verdicts:
    """What `pefomed-ray judge` wrote to `folder` about this file of predictions.

    Raises ConfigError where there is no such folder, DataError where it does not hold what `judge` writes, or is
    about other predictions or another task.
    """
    if not (folder / METRICS_FILE).is_file() or not (folder / JUDGEMENTS_FILE).is_file():
        raise ConfigError(
            f"--judge {str(folder)!r} holds no judgements; `pefomed-ray judge PREDICTIONS.jsonl --output FOLDER` "
            "writes them"
        )
    try:
        judged = read_json(folder / ASKED_FILE)["predictions"]
        said = read_json(folder / METRICS_FILE)
        metrics = {name: said[name] for name in METRIC_NAMES if name in said}
        flags = tuple(str(flag) for flag in said["flags"])
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(f"{str(folder)!r} does not hold what `pefomed-ray judge` writes") from None
    if not predictions.is_file() or judged != sha256_file(predictions):
        raise DataError(f"{str(folder)!r} is about other predictions than {str(predictions)!r}; judge those")
    judgements = read_judgements(folder / JUDGEMENTS_FILE)
    if any(judgement.task != task for judgement in judgements):
        raise DataError(f"{str(folder)!r} is about another task than {task}; judge these predictions")
    scores: dict[str, list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.score is not None:
            scores[judgement.id].append(judgement.score / BEST_SCORE[task])
    names = sorted({judgement.judge for judgement in judgements})
    return Verdicts(
        ", ".join(names), metrics, flags, {row_id: sum(found) / len(found) for row_id, found in scores.items()}
    )
