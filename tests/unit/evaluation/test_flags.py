"""The sentences of the page: what a reader is told, and that nothing is said against a sound result."""

from typing import Any

import pytest

from pefomed_ray.evaluation.flags import flags
from pefomed_ray.evaluation.headline import headline


def difference(value: float, low: float | None = None) -> dict[str, Any]:
    low = value - 0.03 if low is None else low
    return {"value": value, "n": 100, "ci95": [low, 2 * value - low], "p": 0.01}


def sound(task: str = "vqa") -> dict[str, Any]:
    """Nothing is to be said against it."""
    primary = "exact_match" if task == "vqa" else "rougeL"
    floors = {"blank_image": 0.4, "noise_image": 0.41, "shuffled_image": 0.42}
    floors |= {"majority": 0.2, "question_prior": 0.5} if task == "vqa" else {"constant_text": 0.3}
    return {
        primary: {"value": 0.64, "n": 100, "unscored": 0, "ci95": [0.546, 0.731]},
        "controls": {name: {primary: {"value": value}} for name, value in floors.items()},
        "against_controls": {name: difference(0.64 - value) for name, value in floors.items()},
        "unique_output_ratio": 0.2,
        "unique_reference_ratio": 0.3,
        "image_overlap_with_training": {"value": 0.0, "n": 30},
        "text_overlap": {"references": {"value": 0.0, "n": 100}, "predictions": {"value": 0.1, "n": 100}},
        "normal_reports_heuristic": None,
        "judge": None,
        "answered": {"by": {}, "unscored": {}},
        "task": task,
        "rows": 100,
    }


@pytest.mark.parametrize("task", ["vqa", "report"])
def test_nothing_is_said_against_a_sound_result(task: str) -> None:
    assert flags(sound(task)) == []


def test_headline_of_questions() -> None:
    assert headline(sound()) == [
        "The model answered 64 of 100 questions as the reference does (95 % interval 55 to 73): 100 questions about 30 "
        "images.",
        "Shown grey pictures, it still gets 40 of 100; giving the most frequent training answer to the same question, "
        "without any model, gets 50 of 100.",
        "So it is ahead of the best that needs no picture by 14 questions of 100 (95 % interval 11 to 17).",
    ]


def test_headline_of_reports() -> None:
    first, second, _ = headline(sound("report"))
    assert first == (
        "The model's reports share 64 % of their words, in order, with the references (95 % interval 55 to 73): "
        "100 reports."
    )
    assert second.endswith("writing the same training text about every picture, without any model, gets 30 %.")


def test_headline_of_a_model_that_does_not_look() -> None:
    metrics = sound()
    metrics["against_controls"]["question_prior"] = difference(0.01)
    assert headline(metrics)[-1] == "So these numbers do not show that it looks at the pictures."
    metrics["against_controls"] = {}
    assert headline(metrics)[-1] == "What is reached without seeing the pictures was not measured."
    metrics["exact_match"]["value"] = None
    assert headline(metrics) == ["None of the 100 rows has a score."]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("against_controls.noise_image", difference(-0.01), "no better than the same model shown noise"),
        ("against_controls.majority", difference(0.02), "not clearly better than always giving the most"),
        ("against_controls.blank_image", None, "Not measured: the same model shown grey pictures"),
        (
            "unique_output_ratio",
            0.1,
            "repeats itself: 10.0 % of its outputs are different ones, of the references 30.0 %",
        ),
        ("image_overlap_with_training.value", 0.1, "10.0 % of the 30 images are in the training split too"),
        ("answered.unscored", {"image": {"refusal": 3}}, "3 of 100 rows have no answer and are in no score: refusal 3"),
        ("answered.by", {"m a": 1, "m b": 1}, "Several versions of the model answered: m a, m b."),
        ("judge", {"judge": "j", "flags": ["null answer got 1"]}, "The judge j is flagged: null answer got 1"),
    ],
)
def test_each_flag(path: str, value: Any, said: str) -> None:
    metrics = sound()
    at = metrics
    *parents, last = path.split(".")
    for parent in parents:
        at = at[parent]
    at[last] = value
    (flag,) = flags(metrics)
    assert said in flag


def test_one_row_of_a_hundred_without_an_answer_is_no_flag() -> None:
    metrics = sound()
    metrics["answered"]["unscored"] = {"image": {"refusal": 1}, "blank_image": {"refusal": 90}}
    assert flags(metrics) == []


def test_flags_of_reports() -> None:
    metrics = sound("report")
    metrics["normal_reports_heuristic"] = {"predictions": {"value": 0.9, "n": 9}, "references": {"value": 0.4, "n": 9}}
    metrics["text_overlap"] = {"references": {"value": 0.06, "n": 9}, "predictions": {"value": 0.6, "n": 9}}
    healthy, known, copied = flags(metrics)
    assert "90.0 % of its reports look normal (by a keyword rule), of the references 40.0 %" in healthy
    assert known.startswith("6.0 % of the reference texts")
    assert copied.startswith("60.0 % of the model's texts are copies")
    questions = sound()
    questions["text_overlap"] = metrics["text_overlap"]
    assert flags(questions) == []  # the same question with the same answer is what many data sets are made of
