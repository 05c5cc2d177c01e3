"""May this bundle be promoted? Three rules, each written down with the numbers it looked at.

    beats_controls             the task's first metric is above that of every control in MUST_BEAT
    judge_not_flagged          where the evaluation holds a judge's numbers: nothing was found against the judge
    not_worse_than_champion    on the same items, not all of the 95 % interval of candidate - champion is below -margin

The champion is what the alias stands for now. Its scores are in the registry since its own gate was asked; a candidate
is compared on the same items or not at all. What was decided, and why, is written to `gate.json` beside `metrics.json`
and to the registry's decisions, a refusal too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.registry import (
    Decision,
    Evaluation,
    evaluations,
    keep_decision,
    keep_evaluation,
    standing,
)
from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.errors import ConfigError, DataError, RefusedError
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.evaluation.primary import row_scores
from pefomed_ray.evaluation.score import PRIMARY_METRIC
from pefomed_ray.metrics.intervals import paired_difference
from pefomed_ray.metrics.vqa import normalizer_named

MUST_BEAT: dict[Task, tuple[str, ...]] = {
    "vqa": ("question_prior", "majority", "blank_image"),
    "caption": ("constant_text", "blank_image"),
    "report": ("constant_text", "blank_image"),
}
GATE_FILE = "gate.json"
SAME_TO = 1e-9
"""Mean of the items' scores and the metric they should add up to."""


@dataclass(frozen=True)
class Ruling:
    """What one rule said."""

    rule: str
    passed: bool
    why: tuple[str, ...]
    numbers: dict[str, Any] = field(default_factory=dict)


def ask_gate(registry: str | Path, alias: str, bundle: Path, metrics_file: Path, margin: float = 0.0) -> Decision:
    """Whether a bundle with this evaluation may get `alias`; what was said is kept, a refusal too.

    Raises RefusedError with every reason, also where the file is about another bundle; ConfigError where there is no
    such file or `margin` is not in [0, 1); DataError where the folder does not hold an evaluation's files.
    """
    if not 0 <= margin < 1:
        raise ConfigError(f"margin {margin} is not in [0, 1): 0.01 lets a bundle be one point of a hundred worse")
    metrics = _read_metrics(metrics_file)
    digest = load_bundle_manifest(bundle).digest
    if metrics["bundle"] != digest:
        measured = f"bundle {metrics['bundle'][:16]}" if metrics["bundle"] else "a model that is no bundle"
        raise RefusedError(f"{str(metrics_file)!r} measured {measured}, not {digest[:16]}; evaluate this bundle first")
    candidate = _evaluation(metrics, metrics_file)
    champion = standing(registry, alias)
    rulings = [
        beats_controls(metrics),
        judge_not_flagged(metrics),
        not_worse_than_champion(candidate, champion, evaluations(registry, champion) if champion else [], margin),
    ]
    reasons = tuple(reason for ruling in rulings if not ruling.passed for reason in ruling.why)
    decision = Decision(
        asked_at=datetime.now(UTC).isoformat(timespec="seconds"),
        bundle=digest,
        champion=champion,
        passed=not reasons,
        reasons=reasons,
        rules=tuple(asdict(ruling) for ruling in rulings),
    )
    write_json(metrics_file.parent / GATE_FILE, {"alias": alias, "margin": margin, **decision.model_dump(mode="json")})
    # Scores are facts, whatever follows of them: a champion that would not pass today can still be compared with.
    keep_evaluation(registry, candidate)
    keep_decision(registry, alias, decision)
    if reasons:
        raise RefusedError(f"the gate refuses this bundle for {alias!r}: " + "; ".join(reasons))
    return decision


def beats_controls(metrics: dict[str, Any]) -> Ruling:
    """The task's first metric must be above that of every control in MUST_BEAT; what was not measured is not beaten."""
    task: Task = metrics["task"]
    metric = PRIMARY_METRIC[task]
    value = _value(metrics, metric)
    if value is None:
        return Ruling("beats_controls", False, (f"{metric} was scored on no row",))
    controls = metrics.get("controls", {})
    floors = {name: _value(controls.get(name, {}), metric) for name in MUST_BEAT[task]}
    reasons = []
    for control, floor in floors.items():
        if floor is None:
            reasons.append(f"{metric} of the control {control} was not measured, so nothing shows that it is beaten")
        elif value <= floor:
            reasons.append(f"{metric} {value:.3f} does not beat the control {control} at {floor:.3f}")
    return Ruling("beats_controls", not reasons, tuple(reasons), {metric: value, "controls": floors})


def judge_not_flagged(metrics: dict[str, Any]) -> Ruling:
    """Passes where no judge was asked: the rule is about a judge's numbers, not about having some."""
    judge = metrics.get("judge")
    if judge is None:
        return Ruling("judge_not_flagged", True, ("no judge's numbers were given",))
    reasons = tuple(f"the judge {judge['judge']} is flagged: {flag}" for flag in judge["flags"])
    return Ruling("judge_not_flagged", not reasons, reasons, {"judge": judge["judge"]})


def not_worse_than_champion(
    candidate: Evaluation, champion: str | None, kept: Sequence[Evaluation], margin: float
) -> Ruling:
    """Candidate and champion on the same items, by paired bootstrap; `kept` are the champion's evaluations."""
    rule = "not_worse_than_champion"
    if champion is None:
        return Ruling(rule, True, ("the alias stands for nothing yet",))
    if champion == candidate.bundle:
        return Ruling(rule, True, ("the alias stands for this bundle already",))
    same = [found for found in kept if found.about == candidate.about and set(found.ids) == set(candidate.ids)]
    if not same:
        return Ruling(rule, False, (_not_comparable(candidate, champion, kept),))
    theirs = dict(zip(same[0].ids, same[0].scores, strict=True))
    pairs = [
        (ours, other, str(cluster))
        for row_id, ours, cluster in zip(candidate.ids, candidate.scores, candidate.clusters, strict=True)
        if ours is not None and (other := theirs[row_id]) is not None
    ]
    if not pairs:
        return Ruling(rule, False, (f"no item has a score of both this bundle and the champion {champion[:16]}",))
    difference = paired_difference(*zip(*pairs, strict=True))
    numbers = {"champion": champion, "metric": candidate.metric, "margin": margin, "difference": difference.to_json()}
    if difference.ci95 is None:
        why = f"all items are about one image or patient, so nothing shows how it compares with {champion[:16]}"
        return Ruling(rule, False, (why,), numbers)
    low, high = difference.ci95
    said = (
        f"{candidate.metric} is {difference.value:+.3f} against the champion {champion[:16]} on the same "
        f"{difference.n} items (95 % interval {low:+.3f} to {high:+.3f})"
    )
    if high < -margin:
        return Ruling(rule, False, (f"{said}: worse" + (f" by more than {margin:g}" if margin else ""),), numbers)
    return Ruling(rule, True, (said,), numbers)


def _not_comparable(candidate: Evaluation, champion: str, kept: Sequence[Evaluation]) -> str:
    advice = (
        f"evaluate it from the registry (bundles/{champion}) on the split of the candidate, "
        "`promote` it again under this alias with that --metrics, then ask about this bundle again"
    )
    if not kept:
        return f"the champion {champion[:16]} was promoted without --metrics, so its scores are not known; {advice}"
    there = "; ".join(_about(found) for found in kept)
    return (
        f"the champion {champion[:16]} was evaluated on other items ({there}) than this bundle ({_about(candidate)}); "
        f"{advice}"
    )


def _about(found: Evaluation) -> str:
    measure = f"{found.metric}, {found.normalizer}"
    return f"{len(found.ids)} items of split {found.split} of shards {found.shards[:8]}, {measure}"


def _read_metrics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"metrics {str(path)!r} does not exist; `pefomed-ray evaluate` writes it")
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("bundle", "shards", "split", "normalizer", "controls"):
            metrics[key]
        PRIMARY_METRIC[metrics["task"]]
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{str(path)!r} is not the metrics.json of an evaluation") from None
    return metrics


def _evaluation(metrics: dict[str, Any], metrics_file: Path) -> Evaluation:
    """The scores of the items in the `predictions.jsonl` beside a `metrics.json`.

    Raises DataError where their mean is not what `metrics.json` says: then one of the two is of something else.
    """
    path = metrics_file.parent / "predictions.jsonl"
    if not path.is_file():
        raise DataError(f"{str(path)!r} is missing; the gate compares item by item. Evaluate again")
    rows, metric = read_predictions(path), PRIMARY_METRIC[metrics["task"]]
    scores = row_scores(rows, metrics["task"], normalizer_named(metrics["normalizer"]))
    known = [score for score in scores if score is not None]
    value = _value(metrics, metric)
    if value is not None and (not known or abs(sum(known) / len(known) - value) > SAME_TO):
        raise DataError(f"{str(path)!r} does not add up to {metric} {value:.4f} of metrics.json; evaluate again")
    return Evaluation(
        **{key: metrics[key] for key in ("bundle", "shards", "split", "task", "normalizer")},
        metric=metric,
        ids=tuple(row.id for row in rows),
        scores=tuple(scores),
        clusters=_clusters(rows),
    )


def _clusters(rows: Sequence[Prediction]) -> tuple[int, ...]:
    """Numbers in place of names: a group may be called after a patient."""
    number: dict[str, int] = {}
    return tuple(number.setdefault(row.cluster, len(number)) for row in rows)


def _value(scores: dict[str, Any], metric: str) -> float | None:
    found = scores.get(metric)
    return found["value"] if found and found["n"] > 0 else None
