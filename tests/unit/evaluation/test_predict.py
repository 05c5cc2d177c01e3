"""What a prediction worker shows the model, without Ray; the pipeline itself is tested in tests/ray."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pefomed_ray.data.plan import open_index
from pefomed_ray.errors import DataError
from pefomed_ray.evaluation import predict as predict_module
from pefomed_ray.evaluation.controls import VARIANTS, questions
from pefomed_ray.evaluation.predict import GenerationSettings, Predictor
from pefomed_ray.evaluation.preflight import read_texts
from pefomed_ray.model.generate import Prompt

MakeShards = Callable[..., Path]


class Describer:
    """Answers with size and first pixel of the image it is shown."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(text=self._describe(prompt)) for prompt in prompts]

    def _describe(self, prompt: Prompt) -> str:
        (data,) = prompt.images
        image = Image.open(io.BytesIO(data))
        return f"{prompt.task} {prompt.question} {image.width} {image.getpixel((0, 0))}"


@pytest.fixture
def answers(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Variant -> answers in row order."""
    monkeypatch.setattr(predict_module, "open_generator", lambda *_: Describer())
    shards = make_shards()
    asked = questions([tuple(row["image_sha256"]) for row in read_texts(shards, "test")], VARIANTS, seed=42)
    columns: dict[str, Any] = {
        "variant": np.asarray([question.given for question in asked]),
        "row": np.asarray([question.row for question in asked]),
        "image_row": np.asarray([question.image_row for question in asked]),
    }
    found = Predictor("bundle", open_index(shards, "test"), GenerationSettings())(columns)
    by_key = dict(zip(zip(found["variant"], found["row"], strict=True), found["prediction"], strict=True))
    return {variant: [by_key[variant, row] for row in range(7)] for variant in VARIANTS}


def test_the_image_as_it_is(answers: dict[str, list[str]]) -> None:
    assert answers["image"][:2] == ["vqa What is <b>seen</b>? 10 (255, 0, 0)", "vqa Which colour is it? 11 (0, 128, 0)"]


def test_grey_of_the_same_size(answers: dict[str, list[str]]) -> None:
    assert answers["blank_image"][1] == "vqa Which colour is it? 11 (128, 128, 128)"


def test_noise_differs_from_image_to_image(answers: dict[str, list[str]]) -> None:
    noise = answers["noise_image"]
    assert noise[0] == noise[4] != noise[2]  # rows 0 and 4 show one picture
    assert all(shown.startswith(own[:26]) for own, shown in zip(answers["image"], noise, strict=True))


def test_another_image_with_the_own_question(answers: dict[str, list[str]]) -> None:
    for own, shown in zip(answers["image"], answers["shuffled_image"], strict=True):
        assert shown.split("?")[0] == own.split("?")[0]
        assert shown.split("?")[1] != own.split("?")[1]


def test_texts_are_read_in_row_order_and_up_to_the_limit(make_shards: MakeShards) -> None:
    shards = make_shards()
    assert [row["id"] for row in read_texts(shards, "test")] == [f"test-{number}" for number in range(7)]
    assert [row["id"] for row in read_texts(shards, "test", 2)] == ["test-0", "test-1"]
    assert "images" not in read_texts(shards, "test")[0]
    with pytest.raises(DataError, match="no rows"):
        read_texts(shards, "validation")
