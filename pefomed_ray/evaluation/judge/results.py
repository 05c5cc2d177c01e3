"""Verdicts to numbers: accuracy or weighted average score with intervals, the distribution, self-consistency."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from pefomed_ray.artifacts.records import Task
from pefomed_ray.evaluation.judgements import BEST_SCORE, Judgement
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.metrics.intervals import Metric, mean_with_interval


def judge_metrics(rows: Sequence[Prediction], judgements: Sequence[Judgement], task: Task) -> dict[str, Any]:
    """Metric name -> Metric.to_json(), over rows; a row with several repeats counts once, with their mean.

    `judge_accuracy` is the share of right answers, also of open and closed questions; `judge_was` the weighted average
    score of the paper, the mean of 0-4 (each score weighted by how often it was given), divided by 4 to lie in [0, 1].
    """
    scores = _scores_by_id(judgements)
    if task != "vqa":
        return {"judge_was": _mean(rows, scores, task).to_json()}
    return {
        "judge_accuracy": _mean(rows, scores, task).to_json(),
        **{
            f"judge_accuracy_{kind}": _mean([row for row in rows if row.answer_type == kind], scores, task).to_json()
            for kind in ("open", "closed")
        },
    }


def distribution(judgements: Sequence[Judgement], task: Task) -> dict[str, int]:
    """Score -> how many verdicts gave it, every score of the scale named."""
    counts = Counter(judgement.score for judgement in judgements)
    return {str(score): counts[score] for score in range(BEST_SCORE[task] + 1)}


def self_consistency(rows: Sequence[Prediction], judgements: Sequence[Judgement], task: Task) -> dict[str, Any] | None:
    """How far repeats agree; None where nothing was judged twice.

    `agreeing` is the share of rows (of those with two verdicts and more) whose verdicts are all the same; `row_std` the
    mean over rows of the standard deviation between a row's verdicts, in points of the scale; `run_std` that between
    the means of whole repeats, as a share of the highest score: how much the headline moves when the judge is asked
    again.
    """
    repeated = {key: found for key, found in _scores_by_id(judgements).items() if len(found) > 1}
    if not repeated:
        return None
    members = [row for row in rows if row.id in repeated]
    agreeing = [float(len(set(repeated[row.id])) == 1) for row in members]
    by_repeat: dict[int, list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.score is not None:
            by_repeat[judgement.repeat].append(judgement.score / BEST_SCORE[task])
    return {
        "agreeing": mean_with_interval(
            agreeing, [_cluster(row) for row in members], len(rows) - len(members)
        ).to_json(),
        "row_std": statistics.fmean(statistics.stdev(found) for found in repeated.values()),
        "run_std": statistics.stdev(map(statistics.fmean, by_repeat.values())),
    }


def identities(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Who answered, in the endpoint's words -> how many verdicts."""
    return dict(Counter(judgement.identity for judgement in judgements if judgement.identity).most_common())


def unscored(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Reason -> how many verdicts there are not for it."""
    return dict(Counter(judgement.unscored for judgement in judgements if judgement.unscored).most_common())


def _scores_by_id(judgements: Sequence[Judgement]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.score is not None:
            scores[judgement.id].append(judgement.score)
    return scores


def _mean(rows: Sequence[Prediction], scores: dict[str, list[float]], task: Task) -> Metric:
    scored = [row for row in rows if row.id in scores]
    values = [statistics.fmean(scores[row.id]) / BEST_SCORE[task] for row in scored]
    return mean_with_interval(values, [_cluster(row) for row in scored], len(rows) - len(scored))


def _cluster(row: Prediction) -> str:
    return f"row {row.id}" if row.group is None else f"group {row.group}"
