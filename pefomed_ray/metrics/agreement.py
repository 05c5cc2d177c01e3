"""How far two measures of the same items agree, or several raters among themselves: numbers in, numbers out.

Values come from the libraries: Cohen's kappa from scikit-learn, Krippendorff's alpha from krippendorff, correlations
from scipy, intraclass correlation from pingouin. Intervals are 95 % percentile bootstraps by cluster (patient, study or
image), because questions about one image are not independent. Which statistic says what: docs/agreement.md.

Shapes: N items, K raters, V categories, R resamples.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from pefomed_ray.metrics import resampled
from pefomed_ray.metrics.intervals import CONFIDENCE, RESAMPLES, Difference
from pefomed_ray.metrics.resampled import OverResamples, cluster_weights

STATISTICS = (
    "ordered",
    "same",
    "kappa",
    "kappa_linear",
    "kappa_quadratic",
    "alpha",
    "spearman",
    "kendall",
    "pearson",
    "icc_2_1",
    "icc_3_1",
)
"""Of a measure and its reference, in the order of tables. All but the first are symmetric."""
GROUP_STATISTICS = ("same", "alpha", "icc_2_1", "icc_3_1")
"""Of several raters, or repeats of one judge."""
MOST_UNDEFINED = 0.05
"""Share of resamples in which a statistic may be undefined before its interval is."""
FEWEST_FOR_ICC = 3
"""Items; pingouin wants five scores."""

_PINGOUIN_NAMES = {"icc_2_1": "ICC(A,1)", "icc_3_1": "ICC(C,1)"}


@dataclass(frozen=True)
class Scale:
    """What a measure's numbers mean. Only measures of the same scale can give the same number for the same reason."""

    name: str
    best: float
    """The lowest is 0."""
    categories: int | None
    """How many whole numbers from 0 there are; None where any number between is possible."""
    ordinal: bool = False


VERDICT = Scale("wrong or right", 1.0, 2)
GRADE = Scale("grade 0 to 4", 4.0, 5, ordinal=True)
SHARE = Scale("0 to 1", 1.0, None)
CIDER = Scale("0 to 10", 10.0, None)


@dataclass(frozen=True)
class Statistic:
    """One number of agreement."""

    value: float | None
    ci95: tuple[float, float] | None
    reason: str | None
    """Why there is no value, or no interval; None where there are both, or no interval was asked for."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        interval = None if self.ci95 is None else list(self.ci95)
        return {"value": self.value, "ci95": interval, "reason": self.reason}


@dataclass(frozen=True)
class Agreement:
    """A measure beside a reference, on the items that both scored."""

    n: int
    clusters: int
    mean: float | None
    """The measure's, on these items: where it is 0/1 its base rate. None without items."""
    reference_mean: float | None
    statistics: Mapping[str, Statistic]
    """By the names of STATISTICS."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        found = {name: statistic.to_json() for name, statistic in self.statistics.items()}
        means = {"mean": self.mean, "reference_mean": self.reference_mean}
        return {"n": self.n, "clusters": self.clusters, **means, "statistics": found}


@dataclass(frozen=True)
class GroupAgreement:
    """Several raters, or repeats, among themselves."""

    n: int
    """Items scored by two or more."""
    complete: int
    """Items scored by all; the intraclass correlations are about these."""
    statistics: Mapping[str, Statistic]
    """By the names of GROUP_STATISTICS."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        found = {name: statistic.to_json() for name, statistic in self.statistics.items()}
        return {"n": self.n, "complete": self.complete, "statistics": found}


def agreement(
    measure: Sequence[float],
    reference: Sequence[float],
    scale: Scale,
    reference_scale: Scale,
    clusters: Sequence[str],
    *,
    intervals: bool = True,
) -> Agreement:
    """All statistics of two measures of the same items, scores in the order of `clusters`.

    Kappas and alpha are of categories: scores between two (a mean of raters) go to the nearer one, halves to the even
    one, so that neither direction is favoured. What is not defined has no value and a reason: a measure that always
    says the same, fewer than two items, statistics of the same verdict where the scales are not the same.
    """
    first_N, second_N = np.asarray(measure, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    n = len(first_N)
    if n == 0:
        nothing = Statistic(None, None, "no item has both scores")
        return Agreement(0, 0, None, None, dict.fromkeys(STATISTICS, nothing))
    members_N = np.unique(np.asarray(clusters), return_inverse=True)[1]
    undefined = _undefined(first_N, second_N, scale, reference_scale)
    values, over = _pair_statistics(first_N, second_N, scale, undefined)
    spread = _intervals(over, members_N) if intervals else {}
    found = {name: _statistic(name, values, spread, undefined) for name in STATISTICS}
    return Agreement(n, int(members_N.max()) + 1, float(first_N.mean()), float(second_N.mean()), found)


def difference_in_order(
    ours: Sequence[float], theirs: Sequence[float], reference: Sequence[float], clusters: Sequence[str]
) -> Difference | None:
    """How far one measure is ahead of another in `ordered`, on items that both and the reference scored; paired.

    None where either is not defined. p as in `intervals.paired_difference`.
    """
    ours_N, theirs_N, reference_N = (np.asarray(some, dtype=np.float64) for some in (ours, theirs, reference))
    if len(reference_N) < 2 or any(_constant(some_N) for some_N in (ours_N, theirs_N, reference_N)):
        return None
    members_N = np.unique(np.asarray(clusters), return_inverse=True)[1]
    both = [resampled.ordered(some_N, reference_N) for some_N in (ours_N, theirs_N)]
    once_1N = np.ones((1, len(reference_N)))
    value = float(both[0](once_1N)[0] - both[1](once_1N)[0])
    if members_N.max() < 1:
        return Difference(value, len(reference_N), None, None)
    differences_R = np.concatenate([both[0](some_RN) - both[1](some_RN) for some_RN in cluster_weights(members_N)])
    defined_R = differences_R[np.isfinite(differences_R)]
    if len(defined_R) < (1 - MOST_UNDEFINED) * RESAMPLES:
        return Difference(value, len(reference_N), None, None)
    beyond = min(int((defined_R <= 0).sum()), int((defined_R >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(defined_R) + 1))
    return Difference(value, len(reference_N), _ends(defined_R), p)


def group_agreement(scores_KN: np.ndarray, scale: Scale, clusters: Sequence[str]) -> GroupAgreement:
    """K raters of N items, NaN where one did not score; `scale` must have categories.

    Alpha takes every item that two or more scored; the intraclass correlations only those that all did. `same` is the
    share of items, of those with two scores or more, on which all that there are are equal.
    """
    if scale.categories is None:
        raise ValueError(f"agreement among raters is of categories, and a scale {scale.name!r} has none")
    scores_KN = np.asarray(scores_KN, dtype=np.float64)
    paired = np.isfinite(scores_KN).sum(axis=0) >= 2
    scores_KN, members_N = scores_KN[:, paired], np.asarray(clusters)[paired]
    n = scores_KN.shape[1]
    if n < 2:
        nothing = Statistic(None, None, "fewer than two items were scored twice")
        return GroupAgreement(n, 0, dict.fromkeys(GROUP_STATISTICS, nothing))
    members_N = np.unique(members_N, return_inverse=True)[1]
    complete_N = np.isfinite(scores_KN).all(axis=0)
    categories_KN = np.rint(scores_KN)
    counts_NV = np.stack([(categories_KN == grade).sum(axis=0) for grade in range(scale.categories)], axis=1)
    equal_N = counts_NV.max(axis=1) == counts_NV.sum(axis=1)
    complete_NK = scores_KN[:, complete_N].T

    reasons = {}
    if (counts_NV.sum(axis=0) > 0).sum() < 2:
        reasons["alpha"] = "all scores are the same"
    if len(complete_NK) < FEWEST_FOR_ICC:
        reasons |= dict.fromkeys(_PINGOUIN_NAMES, "fewer than three items were scored by all")
    elif _constant(complete_NK):
        reasons |= dict.fromkeys(_PINGOUIN_NAMES, "all scores are the same")
    values = {"same": float(equal_N.mean())}
    over = {"same": resampled.same(equal_N, np.ones(n))}
    if "alpha" not in reasons:
        values["alpha"] = _alpha(categories_KN, scale)
        over["alpha"] = resampled.alpha(counts_NV, ordinal=scale.ordinal)
    spread = _intervals(over, members_N)
    if "icc_2_1" not in reasons:
        values |= _icc(complete_NK)
        spread |= _intervals(_icc_over(complete_NK), np.unique(members_N[complete_N], return_inverse=True)[1])
    found = {name: _statistic(name, values, spread, reasons) for name in GROUP_STATISTICS}
    return GroupAgreement(n, int(complete_N.sum()), found)


def _undefined(first_N: np.ndarray, second_N: np.ndarray, scale: Scale, reference_scale: Scale) -> dict[str, str]:
    """Names of statistics that are not defined -> why."""
    if len(first_N) < 2:
        return dict.fromkeys(STATISTICS, "fewer than two items have both scores")
    reasons: dict[str, str] = {}
    if _constant(first_N) or _constant(second_N):
        which = "both say" if _constant(first_N) and _constant(second_N) else "one of the two says"
        reasons = dict.fromkeys(STATISTICS, f"{which} the same of every item")
        del reasons["same"]
    of_categories = ("same", "kappa", "kappa_linear", "kappa_quadratic", "alpha")
    if scale != reference_scale:
        different = f"the scales differ: {scale.name}, and {reference_scale.name}"
        reasons |= dict.fromkeys((*of_categories, *_PINGOUIN_NAMES), different)
    elif scale.categories is None:
        reasons |= dict.fromkeys(of_categories, "not of categories, but of numbers with anything between")
    if len(first_N) < FEWEST_FOR_ICC:
        reasons |= dict.fromkeys(_PINGOUIN_NAMES, "fewer than three items have both scores")
    return reasons


def _pair_statistics(
    first_N: np.ndarray, second_N: np.ndarray, scale: Scale, undefined: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, OverResamples]]:
    """Name -> the library's value, and -> the same over resamples; without what is not defined."""
    values: dict[str, float] = {}
    over: dict[str, OverResamples] = {}
    if "kendall" not in undefined:
        values["ordered"], over["ordered"] = _ordered(first_N, second_N), resampled.ordered(first_N, second_N)
        values["spearman"] = float(stats.spearmanr(first_N, second_N).statistic)
        over["spearman"] = resampled.spearman(first_N, second_N)
        values["kendall"] = float(stats.kendalltau(first_N, second_N, variant="b").statistic)
        over["kendall"] = resampled.kendall(first_N, second_N)
        values["pearson"] = float(stats.pearsonr(first_N, second_N).statistic)
        over["pearson"] = resampled.pearson(first_N, second_N)
    if "icc_2_1" not in undefined:
        both_NK = np.stack([first_N, second_N], axis=1)
        values |= _icc(both_NK)
        over |= _icc_over(both_NK)
    if scale.categories is not None and "same" not in undefined:
        categories_KN = np.rint([first_N, second_N]).astype(np.int64)
        first_category_N, second_category_N = categories_KN
        values["same"] = float((categories_KN[0] == categories_KN[1]).mean())
        over["same"] = resampled.same(first_category_N, second_category_N)
        if "kappa" not in undefined and not any(_constant(some_N) for some_N in categories_KN):
            grades = np.arange(scale.categories)
            apart_VV = np.abs(grades[:, None] - grades)
            weights_of = {"kappa": apart_VV > 0, "kappa_linear": apart_VV, "kappa_quadratic": apart_VV**2}
            for name, weights_VV in weights_of.items():
                values[name] = _kappa(categories_KN, scale, name)
                over[name] = resampled.kappa(first_category_N, second_category_N, weights_VV)
            values["alpha"] = _alpha(categories_KN.astype(np.float64), scale)
            over["alpha"] = resampled.alpha(np.eye(scale.categories)[categories_KN].sum(axis=0), ordinal=scale.ordinal)
    return values, over


def _ordered(measure_N: np.ndarray, reference_N: np.ndarray) -> float:
    """(1 + Somers' D) / 2, for which scipy's tau-b is set free of the measure's ties; of a 0/1 reference the AUC."""
    pairs = len(measure_N) * (len(measure_N) - 1) / 2
    untied = [pairs - _tied(some_N) for some_N in (measure_N, reference_N)]
    tau_b = stats.kendalltau(measure_N, reference_N, variant="b").statistic
    return float((1 + tau_b * np.sqrt(untied[0] / untied[1])) / 2)


def _tied(values_N: np.ndarray) -> float:
    counts = np.unique(values_N, return_counts=True)[1]
    return float((counts * (counts - 1) / 2).sum())


def _kappa(categories_KN: np.ndarray, scale: Scale, name: str) -> float:
    from sklearn.metrics import cohen_kappa_score  # seconds to import

    weights = {"kappa": None, "kappa_linear": "linear", "kappa_quadratic": "quadratic"}[name]
    return float(cohen_kappa_score(*categories_KN, labels=list(range(scale.categories or 0)), weights=weights))


def _alpha(scores_KN: np.ndarray, scale: Scale) -> float:
    import krippendorff

    level: Literal["ordinal", "nominal"] = "ordinal" if scale.ordinal else "nominal"
    return float(krippendorff.alpha(reliability_data=scores_KN, level_of_measurement=level))


def _icc(scores_NK: np.ndarray) -> dict[str, float]:
    import pandas as pd  # type: ignore[import-untyped]  # both take seconds to import
    import pingouin

    items, raters = scores_NK.shape
    table = pd.DataFrame(
        {
            "item": np.repeat(np.arange(items), raters),
            "rater": np.tile(np.arange(raters), items),
            "score": scores_NK.reshape(-1),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its F, which divides by 0 where raters never differ and is not used here
        found = pingouin.intraclass_corr(table, targets="item", raters="rater", ratings="score")
    found = found.set_index("Type")["ICC"]
    return {name: float(found[theirs]) for name, theirs in _PINGOUIN_NAMES.items()}


def _icc_over(scores_NK: np.ndarray) -> dict[str, OverResamples]:
    return {name: resampled.icc(scores_NK, absolute=name == "icc_2_1") for name in _PINGOUIN_NAMES}


Spread = tuple[tuple[float, float] | None, str | None]
"""Interval, or None and why."""


def _statistic(
    name: str, values: Mapping[str, float], spread: Mapping[str, Spread], reasons: Mapping[str, str]
) -> Statistic:
    if name in reasons:
        return Statistic(None, None, reasons[name])
    if not np.isfinite(values.get(name, np.nan)):
        return Statistic(None, None, "these scores do not differ from item to item")
    interval, reason = spread.get(name, (None, None))
    return Statistic(values[name], interval, reason)


def _intervals(over: Mapping[str, OverResamples], members_N: np.ndarray) -> dict[str, Spread]:
    if members_N.max() < 1:
        return dict.fromkeys(over, (None, "all items are of one patient, study or image"))
    found: dict[str, list[np.ndarray]] = {name: [] for name in over}
    for weights_RN in cluster_weights(members_N):
        for name, statistic in over.items():
            found[name].append(statistic(weights_RN))
    return {name: _interval(np.concatenate(values)) for name, values in found.items()}


def _interval(values_R: np.ndarray) -> Spread:
    defined_R = values_R[np.isfinite(values_R)]
    if len(defined_R) < (1 - MOST_UNDEFINED) * len(values_R):
        return None, "not defined in more than one of twenty resamples: too few items, or they are too alike"
    if np.ptp(defined_R) < 1e-12:
        return None, "every resample gives the same, which says nothing of the next items"
    return _ends(defined_R), None


def _ends(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) == 0)
