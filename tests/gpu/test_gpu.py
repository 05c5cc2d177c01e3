"""The same step and the same answers on a GPU as on the CPU."""

import io

import pytest
import torch
from PIL import Image

from pefomed_ray.config.schema import LoraConfig, OptimizerConfig
from pefomed_ray.model.base import open_base
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.rendering.batches import training_batch
from pefomed_ray.training.step import build_optimizer, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def losses(device: str) -> list[float]:
    base = open_base("embedded", "short")
    torch.manual_seed(0)
    attach_lora(base, LoraConfig(rank=4, alpha=8, dropout=0.0), train_projector=True)
    base.model.to(device)
    renderer = base.renderer
    side = renderer.image_spec.size_px
    pixels = torch.full((1, 3, side, side), 90, dtype=torch.uint8)
    rows = [
        renderer.render("vqa", f"What is {answer}?", {"pixel_values": pixels}, answer, 16)
        for answer in ("Liver", "Left Lung", "2")
    ]
    batch = training_batch(rows, renderer.pad_token_id).to(torch.device(device))
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=1e-3))
    return [train_step(base.model, optimizer, [batch], renderer, 1e-3, 1.0).loss for _ in range(5)]


def test_steps_on_a_gpu_are_those_of_the_cpu() -> None:
    on_cpu, on_gpu = losses("cpu"), losses("cuda")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert on_gpu[-1] < on_gpu[0]


def test_answers_on_a_gpu_are_those_of_the_cpu() -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    prompts = [Prompt("vqa", question, (buffer.getvalue(),)) for question in ("Is this a CT?", "Which region?")]
    texts = [
        [answer.text for answer in Generator(open_base("embedded", "short"), device).answer(prompts, 8)]
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])
