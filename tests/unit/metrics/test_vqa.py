import pytest
from hypothesis import given
from hypothesis import strategies as st

from pefomed_ray.errors import ConfigError
from pefomed_ray.metrics.vqa import (
    NORMALIZERS,
    exact_match,
    normalizer_named,
    pefomed,
    strict,
    token_f1,
    token_recall,
)

EQUAL = [
    ("Yes", "yes."),
    ("  left   lung\n", "Left lung"),
    ("X-Ray", "x ray"),
    ("x-rays", "XRays"),
    ("two", "2"),
    ("1,000", "1000"),
    ("5", "５"),
    ("(left) lung", '"left lung"'),
    ("Lung, Spinal Cord", "spinal cord, lung"),
    ("肺,心脏", "心脏、肺"),
    ("T2‑weighted", "T2-weighted"),
]
DIFFERENT = [
    ("hepatitis A", "hepatitis"),
    ("3.5 cm", "35 cm"),
    (".5", "5"),
    ("-3", "3"),
    ("none", "0"),
    ("max ray", "maxray"),
    ("lung, lung", "lung"),
    ("left lung", "lung left"),
    ("yes", ""),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_strict_calls_equal(one: str, other: str) -> None:
    assert strict(one) == strict(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_strict_tells_apart(one: str, other: str) -> None:
    assert strict(one) != strict(other)


@pytest.mark.parametrize(("one", "other"), [("hepatitis A", "hepatitis"), ("none", "0"), ("max ray", "maxray")])
def test_pefomed_keeps_the_published_defects(one: str, other: str) -> None:
    assert pefomed(one) == pefomed(other)


@given(st.text(alphabet=st.sampled_from("aAx ray-–.,、1235%()\"'\n５"), max_size=30))
def test_strict_output_is_equal_to_its_input(text: str) -> None:
    assert exact_match(strict(text), text, strict) == 1.0


def test_exact_match_depends_on_the_normalizer() -> None:
    assert exact_match("hepatitis", "hepatitis A", pefomed) == 1.0
    assert exact_match("hepatitis", "hepatitis A", strict) == 0.0


def test_token_f1_counts_repeated_words() -> None:
    assert token_f1("left left lung", "left lung", strict) == pytest.approx(0.8)
    assert token_f1("heart", "lung", strict) == 0.0
    assert token_f1("Lung, heart", "heart, lung", strict) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"), [("", "", 1.0), ("yes", "", 0.0), ("...", "yes", 0.0)]
)
def test_token_f1_without_words(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference, strict) == expected


def test_unknown_normalizer_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'lenient'.*strict, pefomed"):
        normalizer_named("lenient")
    assert normalizer_named("strict") is NORMALIZERS["strict"]


def test_token_recall_by_hand() -> None:
    assert token_recall("the left lower lobe", "left lung") == pytest.approx(1 / 2)
    assert token_recall("it is in the Left Lung.", "left lung") == 1.0
    assert token_recall("heart", "left lung") == 0.0
    assert token_recall("", "left lung") == token_recall("left", "") == 0.0
    assert token_recall("lung, heart", "heart, liver") == pytest.approx(1 / 2)


def test_token_recall_has_the_oddity_of_its_source() -> None:
    # LLaVA-Med's calculate_f1score: tp = 3 (as often as it is said), fn = 1.
    assert token_recall("left left left", "left lung") == pytest.approx(3 / 4)
