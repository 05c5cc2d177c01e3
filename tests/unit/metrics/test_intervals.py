import json

import numpy as np
import pytest

from pefomed_ray.metrics.intervals import mean_with_interval, paired_difference


def test_no_rows() -> None:
    assert mean_with_interval([], [], unscored=3).to_json() == {"value": None, "n": 0, "unscored": 3, "ci95": None}


def test_one_cluster_has_no_interval() -> None:
    metric = mean_with_interval([1.0, 0.0, 1.0], ["a", "a", "a"])
    assert metric.value == pytest.approx(2 / 3)
    assert metric.ci95 is None


def test_independent_rows_agree_with_the_normal_interval() -> None:
    values = [1.0] * 300 + [0.0] * 200
    low, high = mean_with_interval(values, [str(i) for i in range(500)]).ci95 or (0, 0)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 500)
    assert low == pytest.approx(0.6 - half, abs=0.008)
    assert high == pytest.approx(0.6 + half, abs=0.008)


def test_clusters_widen_the_interval() -> None:
    # 50 images of 10 questions, all right or all wrong: 50 observations, not 500.
    values = [float(i // 10 % 2) for i in range(500)]
    alone = mean_with_interval(values, [str(i) for i in range(500)]).ci95 or (0, 0)
    clustered = mean_with_interval(values, [str(i // 10) for i in range(500)]).ci95 or (0, 0)
    assert clustered[1] - clustered[0] > 2.5 * (alone[1] - alone[0])


def test_coverage_is_near_95_percent() -> None:
    generator = np.random.default_rng(7)
    inside = 0
    for _ in range(60):
        rate = np.repeat(generator.beta(2, 2, 40), 4)
        metric = mean_with_interval(
            (generator.random(160) < rate).astype(float).tolist(), np.repeat(range(40), 4).astype(str).tolist()
        )
        assert metric.ci95 is not None
        inside += metric.ci95[0] <= 0.5 <= metric.ci95[1]
    assert inside >= 51  # 5 % of binomial(60, 0.95) lie at 54 or below; 51 is far out


@pytest.mark.parametrize(("value", "edge"), [(1.0, 1), (0.0, 0)])
def test_all_the_same_is_not_certain(value: float, edge: int) -> None:
    interval = mean_with_interval([value] * 20, [str(i) for i in range(20)]).ci95
    assert interval is not None
    assert interval[edge] == value
    assert abs(interval[1 - edge] - value) == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-6)


def test_the_same_every_time_and_plain_json() -> None:
    values, clusters = [0.0, 1.0, 0.5, 1.0], ["a", "b", "c", "c"]
    first, second = (mean_with_interval(values, clusters, 1).to_json() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert first["n"] == 4
    assert first["unscored"] == 1


def test_a_difference_of_independent_rows_agrees_with_the_normal_interval() -> None:
    ours, theirs = [1.0] * 300 + [0.0] * 200, [1.0] * 200 + [0.0] * 250 + [1.0] * 50
    found = paired_difference(ours, theirs, [str(i) for i in range(500)])
    assert (found.value, found.n) == (pytest.approx(0.1), 500)
    half = 1.96 * np.sqrt((100 / 500 + 50 / 500 - 0.1**2) / 500)
    low, high = found.ci95 or (0, 0)
    assert (low, high) == (pytest.approx(0.1 - half, abs=0.008), pytest.approx(0.1 + half, abs=0.008))
    assert found.p is not None
    assert found.p < 0.002


def test_pairing_and_clusters_both_count() -> None:
    # Two models that agree on all but 10 of 200 rows: unpaired intervals overlap, the paired one does not reach 0.
    theirs = [float(i % 2) for i in range(200)]
    ours = [1.0 if i < 20 else value for i, value in enumerate(theirs)]
    rows = [str(i) for i in range(200)]
    means = [mean_with_interval(values, rows).ci95 or (0, 0) for values in (ours, theirs)]
    assert means[0][0] < means[1][1]
    assert (paired_difference(ours, theirs, rows).ci95 or (0, 0))[0] > 0
    # The ten rows are of two images of ten questions: as two observations of twenty they prove nothing.
    clustered = paired_difference(ours, theirs, [str(i // 10) for i in range(200)])
    assert clustered.ci95 is not None
    assert clustered.ci95[0] <= 0
    assert (clustered.p or 0) > 0.05


def test_a_difference_turned_round() -> None:
    ours, theirs, rows = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5], ["a", "b", "c", "d"]
    there, back = paired_difference(ours, theirs, rows), paired_difference(theirs, ours, rows)
    assert back.value == -there.value
    assert back.ci95 == pytest.approx((-there.ci95[1], -there.ci95[0])) if there.ci95 else False
    assert back.p == there.p
    assert json.loads(json.dumps(there.to_json())) == there.to_json()


def test_models_that_never_differ_are_not_certainly_equal() -> None:
    found = paired_difference([1.0, 0.0] * 10, [1.0, 0.0] * 10, [str(i) for i in range(20)])
    high = 1 - 0.025 ** (1 / 20)
    assert found.ci95 == pytest.approx((-high, high))
    assert found.p == 1.0
    assert paired_difference([1.0, 0.0], [0.0, 0.0], ["a", "a"]).ci95 is None
