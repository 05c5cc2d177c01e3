"""Two GPUs train what one does, with their parts of the weights on them or in the CPU's memory."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pefomed_ray.config.schema import LoraConfig, OptimizerConfig, Precision
from pefomed_ray.model.base import open_base
from pefomed_ray.model.generate import generate_ids
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.precision import FLOAT32
from pefomed_ray.rendering.batches import generation_batch, training_batch
from pefomed_ray.training.checkpoint import Checkpoint, gather, restore
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import build_optimizer, train_step
from tests.two_ranks import on_two_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

ANSWERS = ("Liver", "Left Lung", "2", "No")


def losses(ranks: Ranks, precision: Precision = FLOAT32) -> list[float]:
    """Of five steps, with answers and a checkpoint taken up again before the last."""
    base = open_base("embedded", "short", precision, ranks.home)
    torch.manual_seed(0)
    attach_lora(base, LoraConfig(rank=4, alpha=8, dropout=0.0), train_projector=True)
    traffic = asdict(ranks.distribute(base))
    assert traffic["strategy"] == ("alone" if ranks.world_size == 1 else "fsdp")
    renderer: Any = base.renderer
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    images = renderer.read((buffer.getvalue(),))
    rows = [renderer.render("vqa", f"What is {answer}?", images, answer, 16) for answer in ANSWERS]
    mine = rows[ranks.rank :: ranks.world_size]
    batch = training_batch(mine, renderer.pad_token_id).to(ranks.device)
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=1e-3))
    found = []
    for number in range(5):
        if number == 4:
            base.model.eval()
            prompts = generation_batch(mine, renderer.pad_token_id).to(ranks.device)
            generate_ids(base.model, renderer, prompts, 4, synced_gpus=ranks.world_size > 1)
            base.model.train()
            restore(base.model, optimizer, Checkpoint(Progress(step=4), gather(base.model, optimizer), ()))
        step = train_step(base.model, optimizer, [batch], renderer, 1e-3, 1.0, ranks)
        found.append(step.loss)
    return found


def on_one_of_two(rank: int, folder: Path) -> dict[str, list[float]]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return {
        "on them": losses(Ranks(rank, 2, device, "fsdp")),
        "offloaded": losses(Ranks(rank, 2, device, "auto", cpu_offload=True)),
        "nf4": losses(Ranks(rank, 2, device, "fsdp"), Precision(quantization="nf4")),
    }


def test_two_gpus_train_what_one_does(tmp_path: Path) -> None:
    one = losses(Ranks(device=torch.device("cuda", 0)))
    two = on_two_ranks(on_one_of_two, tmp_path, "cpu:gloo,cuda:nccl")[0]
    assert two["on them"] == pytest.approx(one, rel=1e-3)
    assert two["offloaded"] == pytest.approx(one, rel=1e-3)
    quantised = losses(Ranks(device=torch.device("cuda", 0)), Precision(quantization="nf4"))
    assert two["nf4"] == pytest.approx(quantised, rel=1e-2)
    assert one[-1] < one[0]
