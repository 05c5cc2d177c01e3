"""The model that the benchmark of a step gives to the Trainer: the same but for which logits it makes."""

import pytest
import torch

from benchmarks.step import AllLogits, plain_name
from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.model.base import open_base
from pefomed_ray.rendering.batches import training_batch


def test_logits_at_all_positions_give_the_same_loss() -> None:
    base = open_base("embedded", "short")
    side = base.renderer.image_spec.size_px
    pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = [
        base.renderer.render("vqa", "What is this?", {"pixel_values": pixels}, answer)
        for answer in ("Yes", "Upper Left Lung, Lower Right Lung")
    ]
    batch = training_batch(rows, base.renderer.pad_token_id)
    inputs = base.renderer.inputs(batch) | {"labels": batch.labels_BT, "num_items_in_batch": torch.tensor(7)}
    theirs = AllLogits.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, all_logits = base.model(**inputs), theirs(**inputs)
    assert float(ours.loss) == pytest.approx(float(all_logits.loss), rel=1e-5)
    assert all_logits.logits.shape[:2] == batch.ids_BT.shape
    assert ours.logits.shape[1] < all_logits.logits.shape[1]


def test_names_without_pefts_wrappers() -> None:
    assert plain_name("base_model.model.projector.modules_to_save.default.bias") == "projector.bias"
    name = "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert plain_name(f"base_model.model.{name}") == name
