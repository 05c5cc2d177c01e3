"""One training step of a model of the paper's size with random weights on one GPU: measured memory beside an estimate.

`pytest -s -m gpu tests/gpu/test_memory.py` prints the figures. Needs 16 GB on disk and 40 GB on the GPU.
"""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks._bases import LLAMA_2_7B, VIT_G, make_base
from pefomed_ray.config.schema import LoraConfig, OptimizerConfig, Precision
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora, parameter_counts
from pefomed_ray.rendering.batches import training_batch
from pefomed_ray.training.step import build_optimizer, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS = 4
GB = 1e9
BYTES_OF_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: 4 bits, a byte of scale for 64 of them, and a float32 for 256 scales (arXiv 2305.14314, section 3)."""
BYTES_LEARNING = 4 * 4
"""Of a trained weight: itself, its gradient and AdamW's two moments, in float32."""


def expected_bytes(base: Base) -> tuple[float, float]:
    """(frozen, learning): what weights take, and what gradients and AdamW add. Nothing is said of activations."""
    trainable, total = parameter_counts(base.model)
    layers = sum(
        math.prod(module.weight.quant_state.shape)
        for module in base.model.modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    )
    return BYTES_OF_NF4 * layers + 2 * (total - trainable - layers), float(BYTES_LEARNING * trainable)


def one_step(base: Base, device: str) -> float:
    renderer: Any = base.renderer
    side = renderer.image_spec.size_px
    pixels = torch.full((1, 3, side, side), 90, dtype=torch.uint8)
    rows = [renderer.render("vqa", f"What is {i}?", {"pixel_values": pixels}, "Left lung", 16) for i in range(ROWS)]
    batch = training_batch(rows, renderer.pad_token_id).to(torch.device(device))
    optimizer = build_optimizer(base.model, OptimizerConfig())
    base.model.train()
    return train_step(base.model, optimizer, [batch], renderer, 1e-5, 1.0).loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("paper-size") / "base"
    make_base(target, LLAMA_2_7B, VIT_G, torch.bfloat16, "cuda")
    torch.cuda.empty_cache()
    return target


@pytest.mark.timeout(900)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_step_at_the_papers_size(quantization: Literal["none", "nf4"], folder: Path) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = open_base(str(folder), "short", Precision(dtype="bfloat16", quantization=quantization), "cuda")
    loaded, loading_peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    attach_lora(base, LoraConfig(), train_projector=True)
    assert parameter_counts(base.model)[0] == 56_627_200
    frozen, learning = expected_bytes(base)
    torch.cuda.reset_peak_memory_stats()
    loss = one_step(base, "cuda")
    peak = torch.cuda.max_memory_allocated() - before
    print(
        f"\nbfloat16, quantization {quantization}, {ROWS} rows of {base.model.config.visual_tokens} visual tokens: "
        f"weights {loaded / GB:.2f} GB (estimate {frozen / GB:.2f}), {loading_peak / GB:.2f} GB while loading; "
        f"weights, gradients and AdamW {(frozen + learning) / GB:.2f} GB by estimate, "
        f"a step's peak {peak / GB:.2f} GB, so {(peak - frozen - learning) / GB:.2f} GB of activations"
    )
    assert math.isfinite(loss)
    assert loaded == pytest.approx(frozen, rel=0.05)
    assert loading_peak < 1.1 * frozen + 1 * GB  # no detour over float32, nor over a second copy
    assert peak > frozen + learning
    del base
    torch.cuda.empty_cache()
