import pytest
from rouge_score.rouge_scorer import RougeScorer

from pefomed_ray.metrics.text import rouge_l


def test_by_hand() -> None:
    # Common subsequence "the heart normal": 3 of 4 words and 3 of 5.
    assert rouge_l("The heart is normal.", "the heart size appears normal") == pytest.approx(2 * 3 / (4 + 5))


def test_equal_to_the_package_on_ascii() -> None:
    prediction, reference = "No pleural effusions; the T2-weighted scan is clear.", "no effusion: T2 scans are clear"
    expected = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == pytest.approx(expected)
    stemmed = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) != pytest.approx(stemmed)


def test_letters_beyond_ascii_count() -> None:
    assert rouge_l("左肺", "左肺") == 1.0
    assert rouge_l("左肺", "右肺") == pytest.approx(0.5)
    assert rouge_l("Ménière", "ménière") == 1.0


def test_nothing_said_scores_zero() -> None:
    assert rouge_l("", "clear lungs") == 0.0
