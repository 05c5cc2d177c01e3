"""Means with 95 % intervals that respect that questions about one image are not independent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 42
RESAMPLES_AT_ONCE = 200
"""Bounds the memory: this many times the number of clusters, 8 bytes each."""


@dataclass(frozen=True)
class Metric:
    """A mean over `n` scored rows; `unscored` rows stand beside it, never inside it."""

    value: float | None
    """None where no row was scored."""
    n: int
    unscored: int
    ci95: tuple[float, float] | None
    """None where fewer than two clusters were scored: one image says nothing about the next."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        interval = None if self.ci95 is None else list(self.ci95)
        return {"value": self.value, "n": self.n, "unscored": self.unscored, "ci95": interval}


def mean_with_interval(values: Sequence[float], clusters: Sequence[str], unscored: int = 0) -> Metric:
    """The mean of `values` in [0, 1] and its 95 % interval, resampled by cluster (patient, study or image).

    Percentile bootstrap of 2,000 resamples with a fixed seed. Where every value is 0, or every one 1, resampling shows
    no spread at all; the interval is then the exact binomial one (Clopper-Pearson) with as many trials as clusters.
    """
    if not values:
        return Metric(None, 0, unscored, None)
    scores = np.asarray(values, dtype=np.float64)
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(members, weights=scores), np.bincount(members)
    return Metric(float(scores.mean()), len(scores), unscored, _interval(sums, counts))


def _interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    clusters, mean = len(counts), sums.sum() / counts.sum()
    if clusters < 2:
        return None
    if mean in (0.0, 1.0):
        exact = stats.binomtest(round(mean * clusters), clusters).proportion_ci(CONFIDENCE, method="exact")
        return float(exact.low), float(exact.high)
    interval = stats.bootstrap(
        (sums, counts),
        _ratio_of_sums,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)
