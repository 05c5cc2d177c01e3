"""How a number of `metrics.json` is written for people: in percent, or on the scale that its metric is known by."""

from collections.abc import Sequence

SCALES = {"cider": 1.0, "judge_was": 4.0}
"""Metrics that are not shown in percent -> what is shown is so many times what `metrics.json` holds."""


def score_text(value: float | None, metric: str = "") -> str:
    """0.634 -> `63.4 %`; of a CIDEr, which goes to 10: `0.63`; a dash where there is none."""
    if value is None:
        return "–"
    return f"{SCALES[metric] * value:.2f}" if metric in SCALES else f"{100 * value:.1f} %"


def interval_text(interval: Sequence[float] | None, metric: str = "") -> str:
    """Both ends on the scale of the metric, without a sign."""
    if interval is None:
        return "–"
    scale, digits = (SCALES[metric], 2) if metric in SCALES else (100, 1)
    return " to ".join(f"{scale * end:.{digits}f}" for end in interval)
