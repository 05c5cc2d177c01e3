"""Metrics, and how far two lie apart, with 95 % intervals that respect that questions about one image hang together.

Shapes: N items, C clusters (patients, studies or images), K numbers that are added up, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 42
RESAMPLES_AT_ONCE = 200
"""Bounds the memory: this many times the number of clusters, 8 bytes each, for each of the K numbers."""
EDGE = 1e-6
"""BLEU and its like add a little so as never to divide by 0: nothing right is 1e-8 there, all right is 1 - 1e-9."""

Array = np.ndarray


@dataclass(frozen=True)
class Metric:
    """A metric over `n` scored rows; `unscored` rows stand beside it, never inside it."""

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


@dataclass(frozen=True)
class Summed:
    """A metric that depends on its items only through numbers added up over them: a mean, or BLEU, or METEOR."""

    value: float
    """Over all items, as the metric's own library computes it."""
    items: tuple[float, ...]
    """Each item's own score."""
    sums_NK: Array
    """What each item adds."""
    of_sums: Callable[[Array], Array]
    """Sums [..., K] -> value [...]."""
    highest: float | None = 1.0
    """What a faultless item scores, the lowest being 0; None where there are no such bounds."""


def mean_of(values: Sequence[float], highest: float | None = 1.0) -> Summed:
    """The mean of the items' scores. Raises ValueError without any."""
    if not len(values):
        raise ValueError("no values, so no mean")
    items = np.asarray(values, dtype=np.float64)
    sums_NK = np.stack([items, np.ones_like(items)], axis=1)
    return Summed(float(items.mean()), tuple(items.tolist()), sums_NK, _ratio, highest)


def with_interval(summed: Summed, clusters: Sequence[str], unscored: int = 0) -> Metric:
    """The metric and its 95 % interval, resampled by cluster (patient, study or image).

    Percentile bootstrap of 2,000 resamples with a fixed seed. Where all clusters score the same, resampling shows no
    spread at all: if that score is 0 or the highest, the interval is the exact binomial one (Clopper-Pearson) with as
    many trials as clusters; if it is any other, there is none.
    """
    return Metric(summed.value, len(summed.items), unscored, _interval(summed, clusters))


def mean_with_interval(values: Sequence[float], clusters: Sequence[str], unscored: int = 0) -> Metric:
    """The mean of `values` in [0, 1] with the interval of `with_interval`; of no values, a metric without value."""
    return with_interval(mean_of(values), clusters, unscored) if len(values) else Metric(None, 0, unscored, None)


@dataclass(frozen=True)
class Difference:
    """How far one model is ahead of another on the same rows."""

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


def difference(ours: Summed, theirs: Summed, clusters: Sequence[str]) -> Difference:
    """One metric of two models on the same items, `ours - theirs`, resampled by cluster as `with_interval`.

    p is twice the smaller share of resamples at or beyond 0, counted with one more so that it is never 0. Where no item
    differs, resampling shows no spread; the interval is then as wide as the exact upper limit of the share of clusters
    that differ.
    """
    value, n = ours.value - theirs.value, len(ours.items)
    sums_CK = _by_cluster(np.hstack([ours.sums_NK, theirs.sums_NK]), clusters)
    split = ours.sums_NK.shape[1]
    if len(sums_CK) < 2:
        return Difference(value, n, None, None)
    if np.array_equal(ours.sums_NK, theirs.sums_NK):
        if ours.highest is None:
            return Difference(value, n, None, None)
        high = ours.highest * _exact_interval(0.0, len(sums_CK))[1]
        return Difference(value, n, (-high, high), 1.0)
    found = _bootstrap(sums_CK, lambda sums: ours.of_sums(sums[..., :split]) - theirs.of_sums(sums[..., split:]))
    interval, values_R = found.confidence_interval, found.bootstrap_distribution
    beyond = min(int((values_R <= 0).sum()), int((values_R >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
    return Difference(value, n, (float(interval.low), float(interval.high)), p)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str]) -> Difference:
    """`difference` of two means of values in [0, 1]. Raises ValueError without rows."""
    return difference(mean_of(ours), mean_of(theirs), clusters)


def _interval(summed: Summed, clusters: Sequence[str]) -> tuple[float, float] | None:
    sums_CK = _by_cluster(summed.sums_NK, clusters)
    if len(sums_CK) < 2:
        return None
    if summed.highest is not None:
        share = summed.value / summed.highest
        if min(abs(share), abs(share - 1)) <= EDGE:
            low, high = _exact_interval(float(round(share)), len(sums_CK))
            return summed.highest * low, summed.highest * high
    interval = _bootstrap(sums_CK, summed.of_sums).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return None if low == high else (low, high)


def _by_cluster(sums_NK: Array, clusters: Sequence[str]) -> Array:
    _, members_N = np.unique(np.asarray(clusters), return_inverse=True)
    return np.stack([np.bincount(members_N, weights=column_N) for column_N in sums_NK.T], axis=1)


def _exact_interval(share: float, clusters: int) -> tuple[float, float]:
    exact = stats.binomtest(round(share * clusters), clusters).proportion_ci(CONFIDENCE, method="exact")
    return float(exact.low), float(exact.high)


def _bootstrap(sums_CK: Array, of_sums: Callable[[Array], Array]) -> Any:
    def of_resamples(*columns: Array, axis: int) -> Array:
        return of_sums(np.stack([column.sum(axis=axis) for column in columns], axis=-1))

    return stats.bootstrap(
        tuple(sums_CK.T),
        of_resamples,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )


def _ratio(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])
