from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.compare import compare_files
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.metrics.intervals import paired_difference

ROWS = [
    Prediction(str(n), "Which?", "left lung", "left lung" if n % 4 else "heart", "open", group=f"image {n // 2}")
    for n in range(24)
]
WORSE = [replace(row, prediction="right lung" if int(row.id) % 3 == 0 else row.prediction) for row in ROWS]

Compare = Callable[..., dict[str, Any]]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    def run(first: Sequence[Prediction], second: Sequence[Prediction], task: Any = "vqa") -> dict[str, Any]:
        write_predictions(tmp_path / "a.jsonl", first, {})
        write_predictions(tmp_path / "b.jsonl", second, {})
        return compare_files(tmp_path / "a.jsonl", tmp_path / "b.jsonl", task, "strict")

    return run


def test_on_the_ids_that_both_have(compare: Compare) -> None:
    theirs = [replace(row, prediction=None) if row.id == "5" else row for row in reversed(WORSE[4:])]
    found = compare(ROWS[:20], theirs)
    assert {key: found[key] for key in ("common", "only_first", "only_second", "unscored")} == {
        "common": 16,
        "only_first": 4,
        "only_second": 4,
        "unscored": 1,
    }
    ours = [float(row.prediction == row.answer) for row in ROWS[4:20] if row.id != "5"]
    others = [float(row.prediction == row.answer) for row in WORSE[4:20] if row.id != "5"]
    groups = [str(row.group) for row in ROWS[4:20] if row.id != "5"]
    expected = paired_difference(ours, others, groups)
    match = found["differences"]["exact_match"]
    assert match == expected.to_json() | {"first": sum(ours) / 15, "second": sum(others) / 15}
    assert match["value"] > 0
    assert found["differences"]["exact_match_closed"]["n"] == 0


def test_turned_round(compare: Compare) -> None:
    there, back = compare(ROWS, WORSE)["differences"], compare(WORSE, ROWS)["differences"]
    for name in ("exact_match", "token_f1", "rougeL"):
        assert there[name]["value"] == -back[name]["value"]
        assert there[name]["p"] == back[name]["p"]


def test_a_file_against_itself(compare: Compare) -> None:
    for name, found in compare(ROWS, ROWS)["differences"].items():
        if found["n"]:
            assert (found["value"], found["p"]) == (0.0, 1.0), name
            assert found["ci95"][0] < 0 < found["ci95"][1]


def test_corpus_metrics_of_reports(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    texts = [replace(row, answer=f"lung {row.id} is clear", prediction=f"lung {row.id} is clear") for row in ROWS]
    worse = [replace(row, prediction="heart" if int(row.id) % 3 == 0 else row.prediction) for row in texts]
    found = compare(texts, worse, "report")["differences"]
    for name in ("bleu1", "bleu2", "rougeL_coco", "cider"):
        low, high = found[name]["ci95"]
        assert low <= found[name]["value"] <= high
        assert found[name]["value"] == pytest.approx(found[name]["first"] - found[name]["second"])
        assert found[name]["value"] > 0
    assert found["meteor"]["value"] is None
    assert "Java" in found["meteor"]["not_computed"]


def test_nothing_to_compare(compare: Compare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no id in common"):
        compare(ROWS[:4], ROWS[4:])
    with pytest.raises(DataError, match="none of the 2 ids in both"):
        compare([ROWS[0], replace(ROWS[1], prediction=None)], [replace(ROWS[0], prediction=None), ROWS[1]])
    with pytest.raises(DataError, match="1 of 24 ids have another right answer") as caught:
        compare(ROWS, [replace(row, answer="secret") if row.id == "3" else row for row in ROWS])
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="normalizer"):
        compare_files(tmp_path / "none", tmp_path / "none", "vqa", "loose")
