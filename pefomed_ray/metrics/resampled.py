"""Statistics of agreement over many resamples of the same items at once.

`metrics.agreement` takes its values from the libraries. An interval takes the same statistic 2,000 times, one library
call each, which is minutes for a handful of measures; here a resample is a row of weights (how often each item is in
it), and a statistic is computed for all rows together. The tests hold each against its library, resample by resample.
A statistic that is not defined in a resample is NaN there.

Shapes: R resamples, N items, K measures or raters, V categories or distinct values, D distinct pairs of scores.
"""

from collections.abc import Callable, Iterator

import numpy as np

from pefomed_ray.metrics.intervals import RESAMPLES, RESAMPLES_AT_ONCE, SEED

Array = np.ndarray
OverResamples = Callable[[Array], Array]
"""Weights, R x N -> the statistic of each resample, R."""


def cluster_weights(members_N: Array) -> Iterator[Array]:
    """R x N weights of 2,000 resamples of whole clusters, in batches; `members_N` numbers each item's cluster from 0.

    The same items and clusters give the same resamples, so that differences between statistics can be resampled too.
    """
    rng = np.random.default_rng(SEED)
    clusters = int(members_N.max()) + 1
    for _ in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        drawn_RC = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES_AT_ONCE)
        yield drawn_RC[:, members_N].astype(np.float64)


def same(first_N: Array, second_N: Array) -> OverResamples:
    """Share of items on which both are equal."""
    equal_N = (first_N == second_N).astype(np.float64)
    return lambda weights_RN: weights_RN @ equal_N / weights_RN.sum(axis=1)


def kappa(first_N: Array, second_N: Array, disagreement_VV: Array) -> OverResamples:
    """Cohen's kappa of categories 0..V-1, weighted by how bad each disagreement is (Cohen 1968)."""
    categories = len(disagreement_VV)
    cells_NV = np.eye(categories * categories)[first_N * categories + second_N]

    def over(weights_RN: Array) -> Array:
        table_RVV = (weights_RN @ cells_NV).reshape(-1, categories, categories)
        total_R = table_RVV.sum(axis=(1, 2))
        expected_RVV = table_RVV.sum(axis=2)[:, :, None] * table_RVV.sum(axis=1)[:, None, :]
        seen_R = (table_RVV * disagreement_VV).sum(axis=(1, 2)) / total_R
        return 1 - _ratio(seen_R, (expected_RVV * disagreement_VV).sum(axis=(1, 2)) / total_R**2)

    return over


def alpha(counts_NV: Array, *, ordinal: bool) -> OverResamples:
    """Krippendorff's alpha of how many raters gave each item each category; items of one rater do not count."""
    pairable_N = np.maximum(counts_NV.sum(axis=1), 2)
    ordered_pairs_NVV = counts_NV[:, :, None] * counts_NV[:, None, :] - counts_NV[:, :, None] * np.eye(
        counts_NV.shape[1]
    )
    coincidences_NVV = ordered_pairs_NVV / (pairable_N - 1)[:, None, None]
    items, categories = counts_NV.shape

    def over(weights_RN: Array) -> Array:
        seen_RVV = (weights_RN @ coincidences_NVV.reshape(items, -1)).reshape(-1, categories, categories)
        totals_RV = seen_RVV.sum(axis=2)
        # Ordinal distance: how many values lie between the middles of two categories.
        middles_RV = np.cumsum(totals_RV, axis=1) - totals_RV / 2
        distance_RVV = (
            (middles_RV[:, :, None] - middles_RV[:, None, :]) ** 2 if ordinal else 1 - np.eye(categories)[None]
        )
        expected_RVV = totals_RV[:, :, None] * totals_RV[:, None, :] / (totals_RV.sum(axis=1) - 1)[:, None, None]
        return 1 - _ratio((seen_RVV * distance_RVV).sum(axis=(1, 2)), (expected_RVV * distance_RVV).sum(axis=(1, 2)))

    return over


def pearson(first_N: Array, second_N: Array) -> OverResamples:
    """Pearson's correlation."""
    x_N, y_N = first_N - first_N.mean(), second_N - second_N.mean()
    return lambda weights_RN: _correlation(weights_RN, x_N[None], y_N[None])


def spearman(first_N: Array, second_N: Array) -> OverResamples:
    """Spearman's correlation: Pearson's of ranks, ties sharing the mean of theirs."""
    rank_first, rank_second = _ranks(first_N), _ranks(second_N)
    return lambda weights_RN: _correlation(weights_RN, rank_first(weights_RN), rank_second(weights_RN))


def kendall(first_N: Array, second_N: Array) -> OverResamples:
    """Kendall's tau-b."""
    pairs = _PairsOfItems(first_N, second_N)

    def over(weights_RN: Array) -> Array:
        balance_R, untied_first_R, untied_second_R = pairs.count(weights_RN)
        return _ratio(balance_R, np.sqrt(untied_first_R * untied_second_R))

    return over


def ordered(measure_N: Array, reference_N: Array) -> OverResamples:
    """Of the pairs of items that the reference tells apart, the share that the measure puts in the same order; pairs
    that the measure ties count half.
    """
    pairs = _PairsOfItems(measure_N, reference_N)

    def over(weights_RN: Array) -> Array:
        balance_R, _, untied_reference_R = pairs.count(weights_RN)
        return (1 + _ratio(balance_R, untied_reference_R)) / 2

    return over


def icc(scores_NK: Array, *, absolute: bool) -> OverResamples:
    """ICC(2,1) (absolute agreement) or ICC(3,1) (consistency) of Shrout and Fleiss (1979)."""
    scores_NK = scores_NK - scores_NK.mean()
    raters = scores_NK.shape[1]
    squares_N, means_N = (scores_NK**2).sum(axis=1), scores_NK.mean(axis=1)

    def over(weights_RN: Array) -> Array:
        n_R = weights_RN.sum(axis=1)
        mean_R = weights_RN @ means_N / n_R
        between_items_R = raters * (weights_RN @ means_N**2 - n_R * mean_R**2)
        rater_means_RK = weights_RN @ scores_NK / n_R[:, None]
        between_raters_R = n_R * ((rater_means_RK - mean_R[:, None]) ** 2).sum(axis=1)
        within_R = weights_RN @ squares_N - n_R * raters * mean_R**2
        left_R = np.maximum(within_R - between_items_R - between_raters_R, 0)
        items_MS_R, raters_MS_R = between_items_R / (n_R - 1), between_raters_R / (raters - 1)
        left_MS_R = left_R / ((n_R - 1) * (raters - 1))
        bias_R = raters * (raters_MS_R - left_MS_R) / n_R if absolute else 0.0
        return _ratio(items_MS_R - left_MS_R, items_MS_R + (raters - 1) * left_MS_R + bias_R)

    return over


class _PairsOfItems:
    """Counts pairs of items by what two measures say of their order."""

    def __init__(self, first_N: Array, second_N: Array) -> None:
        values_D2, self._place_N = np.unique(np.stack([first_N, second_N], axis=1), axis=0, return_inverse=True)
        first_D, second_D = values_D2.T
        self._agreeing_DD = np.sign(first_D[:, None] - first_D) * np.sign(second_D[:, None] - second_D)
        self._first_DV, self._second_DV = _one_hot(first_D), _one_hot(second_D)
        self._cells_ND = _Sums(self._place_N)

    def count(self, weights_RN: Array) -> tuple[Array, Array, Array]:
        """Pairs in the same order less pairs in opposite order; pairs that the first, and that the second tells apart;
        each R.
        """
        counts_RD = self._cells_ND(weights_RN)
        balance_R = ((counts_RD @ self._agreeing_DD) * counts_RD).sum(axis=1) / 2
        n_R = counts_RD.sum(axis=1)
        untied = [
            (n_R**2 - ((counts_RD @ one_hot_DV) ** 2).sum(axis=1)) / 2
            for one_hot_DV in (self._first_DV, self._second_DV)
        ]
        return balance_R, untied[0], untied[1]


class _Sums:
    """Adds up the weights of items of the same place."""

    def __init__(self, place_N: Array) -> None:
        self._order_N = np.argsort(place_N, kind="stable")
        self._starts_V = np.searchsorted(place_N[self._order_N], np.arange(place_N.max() + 1))

    def __call__(self, weights_RN: Array) -> Array:
        return np.add.reduceat(weights_RN[:, self._order_N], self._starts_V, axis=1)


def _ranks(values_N: Array) -> OverResamples:
    """Weights -> mid-ranks of the items, R x N."""
    _, place_N = np.unique(values_N, return_inverse=True)
    sums = _Sums(place_N)

    def over(weights_RN: Array) -> Array:
        counts_RV = sums(weights_RN)
        return (np.cumsum(counts_RV, axis=1) - counts_RV / 2)[:, place_N]

    return over


def _correlation(weights_RN: Array, x_RN: Array, y_RN: Array) -> Array:
    n_R1 = weights_RN.sum(axis=1, keepdims=True)
    x_RN = x_RN - (weights_RN * x_RN).sum(axis=1, keepdims=True) / n_R1
    y_RN = y_RN - (weights_RN * y_RN).sum(axis=1, keepdims=True) / n_R1
    covariance_R = (weights_RN * x_RN * y_RN).sum(axis=1)
    variance_R = (weights_RN * x_RN**2).sum(axis=1) * (weights_RN * y_RN**2).sum(axis=1)
    return _ratio(covariance_R, np.sqrt(variance_R))


def _one_hot(values_D: Array) -> Array:
    distinct, place_D = np.unique(values_D, return_inverse=True)
    return np.eye(len(distinct))[place_D]


def _ratio(over_R: Array, under_R: Array) -> Array:
    """NaN where the denominator is 0, but for rounding."""
    defined_R = np.abs(under_R) > 1e-12
    return np.divide(over_R, under_R, out=np.full_like(over_R, np.nan), where=defined_R)
