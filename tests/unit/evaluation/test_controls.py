import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pefomed_ray.errors import DataError
from pefomed_ray.evaluation.controls import blank_image, constant_text, noise_image, shuffled_rows, text_priors
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.evaluation.score import score_rows
from pefomed_ray.metrics.vqa import strict

SLAKE_FLOORS = {"majority": (42.1, 8.2, 21.5), "question_prior": (66.1, 45.6, 53.6)}
"""Closed, open, all, in percent: counted from SLAKE's English rows, independently of this package."""


def picture(width: int = 7, height: int = 5, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, format="PNG")
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def english(path: Path) -> list[dict[str, str]]:
    return [row for row in json.loads(path.read_text(encoding="utf-8")) if row["q_lang"] == "en"]


def test_floors_of_slake(data_dir: Path) -> None:
    train, test = (english(data_dir / "slake" / f"{split}.json") for split in ("train", "test"))
    priors = text_priors((row["question"], row["answer"], row["answer_type"]) for row in train)
    assert priors is not None
    said = {
        "majority": [priors.majority(row["answer_type"]) for row in test],
        "question_prior": [priors.question_prior(row["question"], row["answer_type"]) for row in test],
    }
    for control, answers in said.items():
        rows = [
            Prediction(str(row["qid"]), row["question"], row["answer"], answer, row["answer_type"].lower())
            for row, answer in zip(test, answers, strict=True)
        ]
        closed, open_, everything = SLAKE_FLOORS[control]
        for normalizer in (strict, str.casefold):
            scores = score_rows(rows, "vqa", normalizer)
            assert 100 * scores["exact_match"]["value"] == pytest.approx(everything, abs=0.3)
            # Which of 77 tied answers is taken, and whether a list may be reordered, moves the parts a little more.
            assert 100 * scores["exact_match_closed"]["value"] == pytest.approx(closed, abs=0.6)
            assert 100 * scores["exact_match_open"]["value"] == pytest.approx(open_, abs=0.6)


def test_priors_do_not_depend_on_the_order_of_rows() -> None:
    training = [
        ("Which?", "lung", "open"),
        ("which? ", "Heart", "open"),
        ("Is it?", "Yes", "closed"),
        ("Is it?", "yes", "closed"),
        ("Is it?", "No", None),
    ]
    for seed in range(5):
        random.Random(seed).shuffle(training)
        priors = text_priors(training)
        assert priors is not None
        assert priors.by_answer_type == {None: "yes", "closed": "yes", "open": "lung"}
        assert priors.majority("unheard of") == "yes"
        assert priors.question_prior(" WHICH?", "closed") == "lung"  # a tie: the last in alphabetical order
        assert priors.question_prior("Is it? ", "open") == "yes"
        assert priors.question_prior("Never asked", "open") == "lung"


def test_no_training_rows() -> None:
    assert text_priors([]) is None


def test_blank_image_is_grey_and_of_the_same_size() -> None:
    blank = pixels(blank_image(picture()))
    assert blank.shape == (5, 7, 3)
    assert (blank == 128).all()


def test_noise_is_fixed_by_seed_and_image() -> None:
    noise = noise_image(picture(), seed=1)
    assert noise == noise_image(picture(), seed=1)
    assert noise != noise_image(picture(), seed=2)
    assert noise != noise_image(picture(colour="blue"), seed=1)
    assert pixels(noise).shape == (5, 7, 3)
    assert pixels(noise_image(picture(200, 100), seed=1)).std() == pytest.approx(73.9, abs=1)  # uniform on 0..255


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="is not one of"):
        blank_image(b"<html>")


def test_nobody_is_shown_an_own_image() -> None:
    digests = [(f"image {number // 3}",) for number in range(30)]
    for seed in range(20):
        donors = shuffled_rows(digests, seed)
        shown = [digests[donor] for donor in donors if donor is not None]
        assert len(shown) == 30
        assert all(own != other for own, other in zip(digests, shown, strict=True))
        assert all(len({shown[row] for row in range(first, first + 3)}) == 1 for first in range(0, 30, 3))
        assert len(set(shown)) == 10  # every image is given once
    assert shuffled_rows(digests, 1) == shuffled_rows(digests, 1) != shuffled_rows(digests, 2)


def test_studies_that_share_an_image_do_not_swap() -> None:
    digests = [("a", "b"), ("b", "c"), ("d",)]
    for seed in range(20):
        donors = shuffled_rows(digests, seed)
        assert (donors[0], donors[1]) == (2, 2)
        assert donors[2] in (0, 1)


def test_without_another_image_there_is_no_control() -> None:
    assert shuffled_rows([("a",), ("a",)], seed=1) == [None, None]


def test_the_most_frequent_text_is_the_constant_one() -> None:
    found = constant_text(["Normal.", "Effusion.", " normal. ", "Effusion of the left side."])
    assert found is not None
    assert (found.text, found.how) == ("normal.", "the most frequent of 4 training texts, 2 times")
    assert constant_text([" ", ""]) is None


def test_where_all_texts_differ_the_one_nearest_to_the_rest() -> None:
    """`a b c` shares two of three words with each other text, and those share one with each other."""
    texts = ["a b x", "a y c", "z b c", "a b c", "u v w"]
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        found = constant_text(texts)
        assert found is not None
        assert found.text == "a b c"
        assert found.how == "no training text comes twice; of 5 drawn, the one that shares most words with the others"
