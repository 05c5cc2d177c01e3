"""May this bundle be promoted? Only when it beats what does not look at the image."""

import json
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.errors import ConfigError, DataError, RefusedError
from pefomed_ray.evaluation.score import PRIMARY_METRIC

MUST_BEAT = ("question_prior", "majority", "blank_image")


def gate(metrics: dict[str, Any], metric: str = "exact_match") -> list[str]:
    """Reasons to refuse a bundle with this `metrics.json`; empty where there are none.

    `metric` must be above the same metric of every control in MUST_BEAT. What was not measured counts as not beaten.
    """
    value = _value(metrics, metric)
    if value is None:
        return [f"{metric} was scored on no row"]
    reasons = []
    for control in MUST_BEAT:
        floor = _value(metrics.get("controls", {}).get(control, {}), metric)
        if floor is None:
            reasons.append(f"{metric} of the control {control} was not measured, so nothing shows that it is beaten")
        elif value <= floor:
            reasons.append(f"{metric} {value:.3f} does not beat the control {control} at {floor:.3f}")
    return reasons


def require_passed(metrics_file: Path, bundle: Path) -> None:
    """Hold a bundle's `metrics.json` against the gate, by the task's first metric.

    Raises RefusedError with every reason; also where the file is about another bundle. Raises ConfigError where there
    is no such file, DataError where it is not an evaluation's.
    """
    if not metrics_file.is_file():
        raise ConfigError(f"metrics {str(metrics_file)!r} does not exist; `pefomed-ray evaluate` writes it")
    try:
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
        measured, metric = metrics["bundle"], PRIMARY_METRIC[metrics["task"]]
        reasons = gate(metrics, metric)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f"{str(metrics_file)!r} is not the metrics.json of an evaluation") from None
    digest = load_bundle_manifest(bundle).digest
    if measured != digest:
        raise RefusedError(
            f"{str(metrics_file)!r} measured bundle {measured[:16]}, not {digest[:16]}; evaluate this bundle first"
        )
    if reasons:
        raise RefusedError("the gate refuses this bundle: " + "; ".join(reasons))


def _value(scores: dict[str, Any], metric: str) -> float | None:
    found = scores.get(metric)
    return found["value"] if found and found["n"] > 0 else None
