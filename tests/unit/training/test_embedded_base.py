"""Texts packed behind one picture give the loss they would give in rows of their own."""

import pytest
import torch

from pefomed_ray.model.base import open_base
from pefomed_ray.rendering.batches import training_batch
from pefomed_ray.rendering.images import normalise
from pefomed_ray.training.embedded_base import Text, pack, packed_loss
from pefomed_ray.training.step import mean_loss

TEXTS = [
    Text("vqa", "Is this a CT?", "Yes"),
    Text("vqa", "Which organ takes up the most space?", "Liver"),
    Text("caption", "", "Axial CT of the abdomen with normal findings."),
]


def test_packed_texts_do_not_see_each_other() -> None:
    base = open_base("embedded", "short")
    renderer = base.renderer
    side = renderer.image_spec.size_px
    pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = [renderer.render(t.task, t.question, {"pixel_values": pixels}, t.answer, 96) for t in TEXTS]
    separate = mean_loss(base.model, [training_batch(rows, renderer.pad_token_id)], renderer)
    pictures = normalise(pixels, renderer.image_spec)
    sequence = pack(renderer, TEXTS)
    with torch.no_grad():
        assert float(packed_loss(base.model, [sequence], pictures)) == pytest.approx(separate, abs=1e-4)
        # The control: in one block, each text sees those before it.
        together = type(sequence)(sequence.ids, sequence.labels, sequence.positions, [0] * len(sequence.ids))
        assert abs(float(packed_loss(base.model, [together], pictures)) - separate) > 1e-2
