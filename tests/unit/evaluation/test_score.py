import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pefomed_ray.artifacts.records import Task
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.evaluation.score import (
    item_scores,
    radiology_scores,
    score_by_question_type,
    score_file,
    score_rows,
    score_rows_fully,
    score_systems_fully,
    unique_output_ratio,
)
from pefomed_ray.metrics.caption import CAPTION_METRICS, Captions, caption_metrics
from pefomed_ray.metrics.radiology import Radiology
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


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


CAPTIONS = [
    Prediction("1", "", "the lungs are clear", "the lungs are clear", group="a"),
    Prediction("2", "", "no effusion", "large effusion", group="b", references=("there is a large effusion",)),
    Prediction("3", "", "normal heart", None, group="b"),
    Prediction("4", "", "stable exam", "stable heart", group="c"),
]


@pytest.mark.usefixtures("no_java")
def test_captions_in_full() -> None:
    quick, full = score_rows(CAPTIONS, "report", strict), score_rows_fully(CAPTIONS, "report", strict)
    assert list(full) == [*quick, *CAPTION_METRICS]
    assert {name: full[name] for name in quick} == quick
    for name in CAPTION_METRICS:
        if name != "meteor":
            assert (full[name]["n"], full[name]["unscored"], full[name]["tokenizer"]) == (3, 1, "lower_split")
            low, high = full[name]["ci95"]
            assert low <= full[name]["value"] <= high
    assert full["meteor"] == {
        "value": None,
        "n": 0,
        "unscored": 4,
        "ci95": None,
        "not_computed": "METEOR needs Java: there is no `java` on the PATH",
    }


def test_systems_share_one_java_where_they_lack_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    alone = {
        "model": CAPTIONS,
        "constant": [replace(row, prediction=row.prediction and "stable") for row in CAPTIONS],
        "silent": [replace(row, prediction=None) for row in CAPTIONS],
    }
    expected = {name: score_rows_fully(rows, "report", strict) for name, rows in alone.items()}
    asked = []

    def counted(references: Sequence[Sequence[str]], systems: Sequence[Sequence[str]]) -> Captions:
        asked.append((len(references), len(systems)))
        return caption_metrics(references, systems)

    monkeypatch.setattr("pefomed_ray.evaluation.score.caption_metrics", counted)
    assert score_systems_fully(alone, "report", strict) == expected
    assert asked == [(3, 2), (0, 1)]
    assert list(expected) == ["model", "constant", "silent"]


@pytest.mark.usefixtures("no_java")
def test_the_nearest_reference_counts() -> None:
    scores = item_scores(CAPTIONS, "caption", strict)
    assert scores["rougeL"] == pytest.approx([1.0, 4 / 7, None, 0.5])
    # Precision is best against the second text, 2 of 2 words; recall against the first, 1 of 2; beta is 1.2.
    assert scores["rougeL_coco"][1] == pytest.approx(1.0 * 0.5 * 2.44 / (0.5 + 1.44 * 1.0))
    answers = [Prediction("1", "Which?", "left", "Right.", "open", references=("right",))]
    assert score_rows(answers, "vqa", strict)["exact_match"]["value"] == 1.0
    assert score_rows([replace(answers[0], references=())], "vqa", strict)["exact_match"]["value"] == 0.0


@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize("task", ["vqa", "report"])
def test_items_add_up_to_the_means(task: Task) -> None:
    rows = ROWS if task == "vqa" else CAPTIONS
    items, scores = item_scores(rows, task, strict), score_rows_fully(rows, task, strict)
    assert list(items) == list(scores)
    for name, values in items.items():
        known = [value for value in values if value is not None]
        assert len(values) == len(rows)
        assert len(known) == scores[name]["n"]
        if name not in ("bleu1", "bleu2", "bleu3", "bleu4", "meteor"):
            assert sum(known) / len(known) == pytest.approx(scores[name]["value"]), name
    assert items["rougeL"][4 if task == "vqa" else 2] is None


def test_one_caption_has_no_cider() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        scores = score_rows_fully(CAPTIONS[:1], "caption", strict)
        nothing = score_rows_fully(CAPTIONS[2:3], "caption", strict)
    assert (scores["cider"]["value"], scores["cider"]["n"], scores["cider"]["unscored"]) == (None, 0, 1)
    assert "all have the same words" in scores["cider"]["not_computed"]
    assert nothing["bleu1"] == {"value": None, "n": 0, "unscored": 1, "ci95": None}


def test_the_quick_metrics_start_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("pefomed_ray.evaluation.score.caption_metrics", refuse)
    score_rows(CAPTIONS, "report", strict)
    score_rows_fully(ROWS, "vqa", strict)
    with pytest.raises(AssertionError):
        score_rows_fully(CAPTIONS, "report", strict)


def test_radiology_counts_what_it_got_no_number_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(names: list[str], references: list[str], predictions: list[str]) -> Radiology:
        assert (names, len(references), len(predictions)) == (["f1chexbert"], 3, 3)
        return Radiology({"sample_acc": [1.0, None, 0.5], "nothing": [None, None, None]}, {"micro_f1": 0.25})

    monkeypatch.setattr("pefomed_ray.evaluation.score.radiology_metrics", found)
    scores = radiology_scores(CAPTIONS, ["f1chexbert"])
    assert {name: (s["value"], s["n"], s["unscored"]) for name, s in scores.items()} == {
        "sample_acc": (0.75, 2, 2),
        "nothing": (None, 0, 4),
        "micro_f1": (0.25, 3, 1),
    }
    assert scores["nothing"]["not_computed"] == "RadEval gave no number"


def test_a_metric_that_is_not_there_is_found_before_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'spice' is not known"):
        score_file(tmp_path / "none.jsonl", "report", "strict", ["spice"])
