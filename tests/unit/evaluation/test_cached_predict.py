"""A prediction worker with a feature cache: real images come from it, only those that were made up are encoded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pefomed_ray.data.plan import open_index
from pefomed_ray.evaluation import predict as predict_module
from pefomed_ray.evaluation.controls import VARIANTS, questions
from pefomed_ray.evaluation.predict import GenerationSettings, Predictor
from pefomed_ray.evaluation.preflight import read_texts
from pefomed_ray.model.generate import Prompt


class Describer:
    """Answers with what it was shown: the number in the features, or that it was an image."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(text=self._describe(prompt)) for prompt in prompts]

    def _describe(self, prompt: Prompt) -> str:
        if prompt.features_NVW is None:
            return f"{len(prompt.images)} image"
        assert prompt.images == ()
        return str(int(prompt.features_NVW[0, 0, 0]))


@pytest.mark.parametrize("cached", [True, False])
def test_real_images_come_from_the_cache(
    cached: bool, make_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards()
    texts = read_texts(shards, "test")
    number = {digest: i for i, digest in enumerate(sorted({row["image_sha256"][0] for row in texts}))}
    features = SimpleNamespace(features=lambda digests: torch.tensor([[[number[digest]]] for digest in digests]))
    monkeypatch.setattr(predict_module, "open_generator", lambda *_: Describer())
    monkeypatch.setattr(predict_module, "open_cache", lambda folder: features)
    asked = questions([tuple(row["image_sha256"]) for row in texts], VARIANTS, seed=42)
    columns: dict[str, Any] = {
        "variant": np.asarray([question.given for question in asked]),
        "row": np.asarray([question.row for question in asked]),
        "image_row": np.asarray([question.image_row for question in asked]),
    }
    settings = GenerationSettings(feature_cache="cache" if cached else None)
    found = Predictor("bundle", open_index(shards, "test"), settings)(columns)
    assert set(found["error_kind"]) == {""}
    for question, answer in zip(asked, found["prediction"], strict=True):
        shown = number[texts[question.image_row]["image_sha256"][0]]
        from_cache = cached and question.given in ("image", "shuffled_image")
        assert answer == (str(shown) if from_cache else "1 image")
