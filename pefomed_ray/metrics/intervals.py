"""Means, and how far they lie apart, with 95 % intervals that respect that questions about one image hang together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Difference:
    """How far one model is ahead of another on the same rows, in the mean."""

    value: float
    """Above 0: the first is better."""
    n: int
    ci95: tuple[float, float] | None
    """None where there are fewer than two clusters."""
    p: float | None
    """Two-sided: how often resampling leaves nothing of the lead. None without an interval."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def paired_difference(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str]) -> Difference:
    """The mean of `ours - theirs`, values in [0, 1] of the same rows, resampled by cluster as `mean_with_interval`.

    p is twice the smaller share of resamples at or beyond 0, counted with one more so that it is never 0. Where no row
    differs, resampling shows no spread; the interval is then as wide as the exact upper limit of the share of clusters
    that differ. Raises ValueError without rows.
    """
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(members, weights=differences), np.bincount(members)
    value, n = float(differences.mean()), len(differences)
    if len(counts) < 2:
        return Difference(value, n, None, None)
    if not differences.any():
        high = _exact_interval(0.0, len(counts))[1]
        return Difference(value, n, (-high, high), 1.0)
    found = _bootstrap(sums, counts)
    interval, means = found.confidence_interval, found.bootstrap_distribution
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
    return Difference(value, n, (float(interval.low), float(interval.high)), p)


def _interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    clusters, mean = len(counts), sums.sum() / counts.sum()
    if clusters < 2:
        return None
    if mean in (0.0, 1.0):
        return _exact_interval(mean, clusters)
    interval = _bootstrap(sums, counts).confidence_interval
    return float(interval.low), float(interval.high)


def _exact_interval(share: float, clusters: int) -> tuple[float, float]:
    exact = stats.binomtest(round(share * clusters), clusters).proportion_ci(CONFIDENCE, method="exact")
    return float(exact.low), float(exact.high)


def _bootstrap(sums: np.ndarray, counts: np.ndarray) -> Any:
    return stats.bootstrap(
        (sums, counts),
        _ratio_of_sums,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)
