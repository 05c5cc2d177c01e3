"""One way of writing a number, on the page and on the terminal."""

import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.cli.progress import metrics_table
from pefomed_ray.evaluation.shown import interval_text, score_text


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [(0.634, "exact_match", "63.4 %"), (0.043, "cider", "0.04"), (0.5, "judge_was", "2.00"), (None, "cider", "–")],
)
def test_a_score_is_on_the_scale_of_its_metric(value: float | None, metric: str, text: str) -> None:
    assert score_text(value, metric) == text


def test_an_interval_is_on_the_same_scale() -> None:
    assert interval_text((0.02, 0.081), "cider") == "0.02 to 0.08"
    assert interval_text((0.02, 0.081), "rougeL") == "2.0 to 8.1"


def test_the_table_shows_what_the_page_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(value: float) -> dict[str, Any]:
        return {"value": value, "ci95": [value, value], "n": 7}

    controls = {"constant_text": {"cider": found(0.08)}, "majority": {"cider": found(0.01)}}
    metrics = {"split": "test", "controls": controls, "against_controls": {"constant_text": {}}, "cider": found(0.043)}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    metrics_table(tmp_path / "metrics.json")
    shown = capsys.readouterr().err
    assert "0.04" in shown
    assert "0.08" in shown
    assert "4.3" not in shown
    assert "majority" not in shown
