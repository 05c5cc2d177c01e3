import json
from dataclasses import replace
from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.evaluation.score import score_by_question_type, score_file, score_rows, unique_output_ratio
from pefomed_ray.metrics.vqa import pefomed, strict

NAMES = ["exact_match", "exact_match_open", "exact_match_closed", "token_f1", "token_recall", "rougeL"]
ROWS = [
    Prediction("1", "Is it?", "yes", "Yes.", "closed", "PRES", "s", "a"),
    Prediction("2", "Is it?", "no", "yes", "closed", "PRES", "s", "a"),
    Prediction("3", "Which?", "left lung", "left lung", "open", "POS", "s", "b"),
    Prediction("4", "Which?", "left lung", "lung", "open", None, "s", "c"),
    Prediction("5", "Which?", "heart", None, "open", "POS", "s", "c"),
]


def test_vqa_by_hand() -> None:
    scores = score_rows(ROWS, "vqa", strict)
    assert list(scores) == NAMES
    assert {name: (s["value"], s["n"], s["unscored"]) for name, s in scores.items()} == {
        "exact_match": (0.5, 4, 1),
        "exact_match_open": (0.5, 2, 1),
        "exact_match_closed": (0.5, 2, 0),
        "token_f1": (pytest.approx((1 + 0 + 1 + 2 / 3) / 4), 4, 1),
        "token_recall": (pytest.approx((1 + 1 / 2) / 2), 2, 1),
        "rougeL": (pytest.approx((1 + 0 + 1 + 2 / 3) / 4), 4, 1),
    }
    assert scores["exact_match_closed"]["ci95"] is None  # one group only
    low, high = scores["exact_match"]["ci95"]
    assert 0 <= low < 0.5 < high <= 1


def test_a_missing_prediction_is_not_a_wrong_one() -> None:
    wrong = [replace(row, prediction=row.prediction or "liver") for row in ROWS]
    assert score_rows(wrong, "vqa", strict)["exact_match"]["value"] == pytest.approx(0.4)


def test_rows_without_group_are_independent() -> None:
    rows = [replace(row, group=None) for row in ROWS[:2]]
    assert score_rows(rows, "vqa", strict)["exact_match"]["ci95"] is not None


def test_report_and_no_rows() -> None:
    assert list(score_rows(ROWS, "report", strict)) == ["rougeL", "token_f1"]
    closed = score_rows(ROWS[2:], "vqa", strict)["exact_match_closed"]
    assert closed == {"value": None, "n": 0, "unscored": 0, "ci95": None}


def test_by_question_type_leaves_out_rows_without_one() -> None:
    scores = score_by_question_type(ROWS, strict)
    assert {kind: (s["exact_match"]["value"], s["exact_match"]["n"]) for kind, s in scores.items()} == {
        "POS": (1.0, 1),
        "PRES": (0.5, 2),
    }


def test_unique_outputs() -> None:
    assert unique_output_ratio(ROWS, strict) == pytest.approx(3 / 4)
    assert unique_output_ratio(ROWS[4:], strict) is None


def test_score_file_uses_the_normalizer(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.jsonl", [Prediction("1", "Which?", "hepatitis A", "hepatitis")], {})
    assert score_file(tmp_path / "p.jsonl", "vqa", "pefomed")["exact_match"]["value"] == 1.0
    assert score_file(tmp_path / "p.jsonl", "vqa", "strict")["exact_match"]["value"] == 0.0
    with pytest.raises(ConfigError, match="task: 'quiz'"):
        score_file(tmp_path / "p.jsonl", "quiz", "strict")


def test_published_accuracies(parity_dir: Path, tmp_path: Path) -> None:
    document = json.loads((parity_dir / "vqa_metric" / "slake_test_en.json").read_text(encoding="utf-8"))
    rows = [
        Prediction(str(r["qid"]), "", r["gt"], r["pred"], r["answer_type"].lower(), r["question_type"])
        for r in document["rows"]
    ]
    scores = score_rows(rows, "vqa", pefomed)
    published = document["accuracy"]
    assert round(100 * scores["exact_match"]["value"], 2) == published["overall"]
    assert round(100 * scores["exact_match_open"]["value"], 2) == published["perAnswerType"]["OPEN"]
    assert round(100 * scores["exact_match_closed"]["value"], 2) == published["perAnswerType"]["CLOSED"]
    by_type = score_by_question_type(rows, pefomed)
    assert {kind: round(100 * s["exact_match"]["value"], 2) for kind, s in by_type.items()} == published[
        "perQuestionType"
    ]
