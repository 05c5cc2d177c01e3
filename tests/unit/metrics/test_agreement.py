"""Statistics of agreement against published worked examples and against the libraries, resample by resample."""

import json
import warnings
from typing import Any

import krippendorff
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from pefomed_ray.metrics import resampled
from pefomed_ray.metrics.agreement import (
    CIDER,
    GRADE,
    SHARE,
    STATISTICS,
    VERDICT,
    Agreement,
    agreement,
    difference_in_order,
    group_agreement,
)

NAN = float("nan")


def pair(first: Any, second: Any, scale: Any = VERDICT, reference_scale: Any = None, **more: Any) -> Agreement:
    clusters = more.pop("clusters", [str(number) for number in range(len(first))])
    return agreement(first, second, scale, reference_scale or scale, clusters, **more)


def spread_out(table: list[list[int]]) -> tuple[list[float], list[float]]:
    """A table of counts -> the two raters' scores."""
    cells = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return [float(i) for i, _ in cells], [float(j) for _, j in cells]


def test_cohens_kappa_of_the_textbook_table() -> None:
    # 50 proposals: both yes 20, both no 15, 5 and 10 apart: 0.7 the same, 0.5 by chance.
    found = pair(*spread_out([[20, 5], [10, 15]]))
    assert found.statistics["same"].value == pytest.approx(0.7)
    assert found.statistics["kappa"].value == pytest.approx(0.4)
    assert (found.mean, found.reference_mean) == (0.5, 0.4)


def test_weighted_kappa_of_published_tables() -> None:
    # Printed by SAS PROC FREQ for this table: kappa 0.4842, with linear weights 0.4701.
    found = pair(*spread_out([[0, 4, 1], [0, 8, 0], [0, 1, 5]]), scale=GRADE).statistics
    assert found["kappa"].value == pytest.approx(0.4842, abs=5e-5)
    assert found["kappa_linear"].value == pytest.approx(0.4701, abs=5e-5)
    # Cohen (1968): 200 diagnoses; kappa .492, and .348 with his weights of disagreement.
    first, second = (np.array(some, dtype=int) for some in spread_out([[88, 14, 18], [10, 40, 10], [2, 6, 12]]))
    once = np.ones((1, 200))
    assert resampled.kappa(first, second, 1 - np.eye(3))(once) == pytest.approx(0.492, abs=5e-4)
    his = np.array([[0, 1, 3], [1, 0, 6], [3, 6, 0]])
    assert resampled.kappa(first, second, his)(once) == pytest.approx(0.348, abs=5e-4)


def test_grades_that_nobody_gave_still_lie_between() -> None:
    # Grades 0, 1 and 4 only: 1 and 4 are three apart, not one.
    first, second = [0.0, 1, 4, 4, 0, 1], [0.0, 4, 4, 1, 1, 1]
    found = pair(first, second, scale=GRADE).statistics["kappa_linear"].value
    assert found == pytest.approx(cohen_kappa_score(first, second, weights="linear", labels=range(5)))
    assert found != pytest.approx(cohen_kappa_score(first, second, weights="linear"))


def test_krippendorffs_own_example() -> None:
    # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C: four observers, twelve units.
    observers = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
            [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
        ]
    )
    clusters = [str(number) for number in range(12)]
    ordinal = group_agreement(observers - 1, GRADE, clusters)
    assert ordinal.statistics["alpha"].value == pytest.approx(0.815, abs=5e-4)
    assert ordinal.n == 11  # the twelfth unit has one value, which pairs with none
    assert ordinal.complete == 8
    assert krippendorff.alpha(observers, level_of_measurement="nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff.alpha(observers, level_of_measurement="interval") == pytest.approx(0.849, abs=5e-4)
    # Two observers, two values: section A's ten objects, alpha 0.095.
    first, second = [0.0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1.0, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert pair(first, second).statistics["alpha"].value == pytest.approx(0.095, abs=5e-4)


def test_intraclass_correlation_of_shrout_and_fleiss() -> None:
    # Shrout and Fleiss (1979), table 2: ICC(2,1) 0.29, ICC(3,1) 0.71.
    judges = np.array([[9, 6, 8, 7, 10, 6], [2, 1, 4, 1, 5, 2], [5, 3, 6, 2, 6, 4], [8, 2, 8, 6, 9, 7]], dtype=float)
    over = {name: resampled.icc(judges.T, absolute=name == "2,1")(np.ones((1, 6)))[0] for name in ("2,1", "3,1")}
    assert over == pytest.approx({"2,1": 0.29, "3,1": 0.71}, abs=5e-3)
    found = pair(judges[0], judges[3], scale=CIDER).statistics
    both = judges[[0, 3]].T
    assert found["icc_2_1"].value == pytest.approx(resampled.icc(both, absolute=True)(np.ones((1, 6)))[0])
    assert found["icc_3_1"].value == pytest.approx(resampled.icc(both, absolute=False)(np.ones((1, 6)))[0])


def test_order_is_the_auc_and_somers_d() -> None:
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 2, 60).astype(float)
    measure = np.round(reference * 0.3 + rng.random(60), 1)
    found = pair(measure, reference, scale=SHARE, reference_scale=VERDICT).statistics["ordered"].value
    assert found == pytest.approx(roc_auc_score(reference, measure))
    grades = rng.integers(0, 5, 60).astype(float)
    found = pair(measure, grades, scale=SHARE, reference_scale=GRADE).statistics["ordered"].value
    assert found == pytest.approx((1 + stats.somersd(grades, measure).statistic) / 2)


def scores(n: int = 80) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    grade = rng.integers(0, 5, n).astype(float)
    other = np.clip(grade + rng.integers(-1, 2, n), 0, 4)
    return {"grade": grade, "other": other, "share": np.round(rng.random(n) * 0.5 + grade / 10, 2)}


def test_values_are_scipys_and_sklearns() -> None:
    some = scores()
    found = pair(some["grade"], some["other"], scale=GRADE).statistics
    assert found["spearman"].value == pytest.approx(stats.spearmanr(some["grade"], some["other"]).statistic)
    assert found["kendall"].value == pytest.approx(stats.kendalltau(some["grade"], some["other"]).statistic)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(some["grade"], some["other"]).statistic)
    assert found["kappa"].value == pytest.approx(cohen_kappa_score(some["grade"], some["other"]))
    assert all(statistic.ci95 is not None and statistic.reason is None for statistic in found.values())
    for statistic in found.values():
        assert statistic.value is not None
        assert statistic.ci95 is not None
        assert statistic.ci95[0] <= statistic.value <= statistic.ci95[1]


def test_every_resample_is_what_the_library_says_of_it() -> None:
    some, rng = scores(30), np.random.default_rng(5)
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=25)
    first, second, share = some["grade"], some["other"], some["share"]
    apart = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    whole = first.astype(int), second.astype(int)
    counts = np.eye(5)[list(whole)].sum(axis=0)

    def drawn(row: np.ndarray, *of: np.ndarray) -> list[np.ndarray]:
        return [np.repeat(scores, row) for scores in of]

    def alpha_of(row: np.ndarray, level: Any) -> float:
        return float(krippendorff.alpha(np.array(drawn(row, first, second)), level_of_measurement=level))

    def somers(row: np.ndarray) -> float:
        measure, reference = drawn(row, share, first)
        return float((1 + stats.somersd(reference, measure).statistic) / 2)

    checks: dict[str, tuple[Any, Any]] = {
        "same": (resampled.same(first, second), lambda row: (np.equal(*drawn(row, first, second))).mean()),
        "kappa": (
            resampled.kappa(*whole, apart > 0),
            lambda row: cohen_kappa_score(*drawn(row, *whole), labels=range(5)),
        ),
        "linear": (
            resampled.kappa(*whole, apart),
            lambda row: cohen_kappa_score(*drawn(row, *whole), labels=range(5), weights="linear"),
        ),
        "quadratic": (
            resampled.kappa(*whole, apart**2),
            lambda row: cohen_kappa_score(*drawn(row, *whole), labels=range(5), weights="quadratic"),
        ),
        "alpha nominal": (resampled.alpha(counts, ordinal=False), lambda row: alpha_of(row, "nominal")),
        "alpha ordinal": (resampled.alpha(counts, ordinal=True), lambda row: alpha_of(row, "ordinal")),
        "pearson": (resampled.pearson(first, share), lambda row: stats.pearsonr(*drawn(row, first, share)).statistic),
        "spearman": (
            resampled.spearman(first, share),
            lambda row: stats.spearmanr(*drawn(row, first, share)).statistic,
        ),
        "kendall": (resampled.kendall(first, share), lambda row: stats.kendalltau(*drawn(row, first, share)).statistic),
        "ordered": (resampled.ordered(share, first), somers),
    }
    for name, (over, library) in checks.items():
        ours = over(weights.astype(float))
        assert ours == pytest.approx([library(row) for row in weights], abs=1e-9), name


def test_intraclass_correlation_of_a_resample() -> None:
    rng = np.random.default_rng(6)
    judges = rng.integers(0, 5, (20, 3)) + rng.integers(0, 5, (20, 1))
    row = rng.multinomial(20, np.full(20, 1 / 20))
    repeated = np.repeat(judges, row, axis=0)
    found = group_agreement(np.clip(repeated.T, 0, 4).astype(float), GRADE, [str(i) for i in range(20)]).statistics
    for name in ("icc_2_1", "icc_3_1"):
        over = resampled.icc(np.clip(judges, 0, 4).astype(float), absolute=name == "icc_2_1")
        assert over(row[None].astype(float))[0] == pytest.approx(found[name].value)


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(8)
    first = np.repeat(rng.integers(0, 2, 40), 10).astype(float)
    second = np.where(np.repeat(rng.random(40) < 0.8, 10), first, 1 - first)
    alone = pair(first, second).statistics["kappa"].ci95
    together = pair(first, second, clusters=np.repeat(range(40), 10).astype(str)).statistics["kappa"].ci95
    assert alone is not None
    assert together is not None
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])


def test_coverage_of_the_interval_is_near_95_percent() -> None:
    rng = np.random.default_rng(9)
    inside = 0
    for _ in range(40):
        # 0/1 in equal parts, 80 % the same: kappa 0.6.
        first = rng.integers(0, 2, 150)
        second = np.where(rng.random(150) < 0.8, first, 1 - first)
        kappa = resampled.kappa(first, second, 1 - np.eye(2))
        found = np.concatenate([kappa(weights) for weights in resampled.cluster_weights(np.arange(150))])
        inside += np.quantile(found, 0.025) <= 0.6 <= np.quantile(found, 0.975)
    assert inside >= 33  # of binomial(40, 0.95), 33 is far out


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([1.0, 1, 1, 1], [0.0, 1, 0, 1], "one of the two says the same"),
        ([1.0, 1, 1, 1], [1.0, 1, 1, 1], "both say the same"),
        ([1.0], [1.0], "fewer than two items"),
        ([], [], "no item"),
    ],
)
def test_what_is_not_defined_has_a_reason_and_warns_nobody(
    first: list[float], second: list[float], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pair(first, second)
    assert found.n == len(first)
    for name, statistic in found.statistics.items():
        if name == "same" and len(first) > 1:
            assert statistic.value == np.mean(np.equal(first, second))
        else:
            assert statistic.value is None
            assert statistic.ci95 is None
            assert statistic.reason is not None
            assert says in statistic.reason or "three items" in statistic.reason
    assert set(found.statistics) == set(STATISTICS)
    assert "NaN" not in json.dumps(found.to_json())
    assert capfd.readouterr() == ("", "")


def test_two_measures_that_never_differ_have_no_interval() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pair([0.0, 1, 0, 1, 1, 0, 1, 0] * 5, [0.0, 1, 0, 1, 1, 0, 1, 0] * 5).statistics
    assert {name: round(statistic.value or 0, 9) for name, statistic in found.items()} == dict.fromkeys(STATISTICS, 1)
    assert found["kappa"].ci95 is None
    assert "every resample" in (found["kappa"].reason or "")


def test_different_scales_have_ranks_only() -> None:
    some = scores()
    found = pair(some["share"], some["grade"], scale=SHARE, reference_scale=GRADE).statistics
    defined = {name for name, statistic in found.items() if statistic.value is not None}
    assert defined == {"ordered", "spearman", "kendall", "pearson"}
    assert "scales differ" in (found["kappa"].reason or "")
    between_shares = pair(some["share"], some["share"] ** 2, scale=SHARE).statistics
    assert between_shares["icc_2_1"].value is not None
    assert between_shares["kappa"].value is None
    assert "not of categories" in (between_shares["kappa"].reason or "")


def test_one_image_has_no_interval() -> None:
    found = pair([0.0, 1, 1, 0], [0.0, 1, 0, 0], clusters=["a"] * 4).statistics["kappa"]
    assert found.value is not None
    assert found.ci95 is None
    assert "one patient" in (found.reason or "")


def test_the_same_every_time() -> None:
    some = scores()
    first, second = (pair(some["share"], some["grade"], scale=SHARE, reference_scale=GRADE) for _ in range(2))
    assert first.to_json() == second.to_json()


def test_raters_together() -> None:
    rng = np.random.default_rng(11)
    truth = rng.integers(0, 2, 90)
    raters = np.array([np.where(rng.random(90) < 0.9, truth, 1 - truth) for _ in range(3)], dtype=float)
    raters[0, :30] = NAN
    found = group_agreement(raters, VERDICT, [str(i) for i in range(90)])
    assert (found.n, found.complete) == (90, 60)
    alpha = krippendorff.alpha(raters, level_of_measurement="nominal")
    assert found.statistics["alpha"].value == pytest.approx(alpha)
    assert all(statistic.ci95 is not None for statistic in found.statistics.values())


def test_raters_who_never_met() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart = group_agreement(np.array([[0.0, 1, NAN, NAN], [NAN, NAN, 1, 0]]), VERDICT, list("abcd"))
        alike = group_agreement(np.ones((2, 9)), VERDICT, list("abcdefghi"))
    assert apart.n == 0
    assert all(statistic.value is None and statistic.reason for statistic in apart.statistics.values())
    assert alike.statistics["same"].value == 1
    assert alike.statistics["alpha"].reason == "all scores are the same"
    with pytest.raises(ValueError, match="has none"):
        group_agreement(np.ones((2, 9)), SHARE, list("abcdefghi"))


def test_difference_between_two_measures() -> None:
    rng = np.random.default_rng(13)
    reference = rng.integers(0, 2, 200).astype(float)
    good, bad = reference + rng.normal(0, 0.3, 200), reference + rng.normal(0, 3, 200)
    clusters = [str(number) for number in range(200)]
    found = difference_in_order(good, bad, reference, clusters)
    assert found is not None
    assert found.ci95 is not None
    assert found.ci95[0] > 0
    assert found.value == pytest.approx(roc_auc_score(reference, good) - roc_auc_score(reference, bad))
    same = difference_in_order(good, good, reference, clusters)
    assert same is not None
    assert (same.value, same.p) == (0, 1)
    assert difference_in_order(good, bad, np.ones(200), clusters) is None
