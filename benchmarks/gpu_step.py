"""Our training step at the paper's size on one GPU: what it reaches of the chip's own rate of multiplying matrices.

EVA-CLIP ViT-g at 448 px and Llama-2-7B's shape with random weights, frozen, in bfloat16; the paper's adapters (rank 64
on query and value) and projector learn in float32. A row is 256 visual tokens and about 45 of text. One fixed batch a
case, already on the device; its loss must fall. Rows are equally long, so no column is padding; real batches pad.

A round measures the rate of a large square bfloat16 product, then steps; their ratio, the model FLOPs utilisation
(arXiv 2204.02311, appendix B), is taken inside the round, for chips slow down as they grow warm. Its spread over the
rounds is what the same measurement gives when it is repeated. Model FLOPs of a step are `step_flops`; what is computed
twice to save memory counts once.

Needs a CUDA device, with 80 GB by estimate, and 16 GB on disk. Without one it says so, and is no failure.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from benchmarks._bases import LLAMA_2_7B, VIT_G, make_base
from benchmarks._measure import JsonOption, QuickOption, Spread, finish, machine, spread, timed
from benchmarks._small import ANSWERS, QUESTIONS, make_batches
from pefomed_ray.config.schema import LoraConfig, OptimizerConfig, Precision
from pefomed_ray.jobs.flops import Matrices
from pefomed_ray.jobs.flops import step_flops as flops_of_sizes
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora, parameter_counts
from pefomed_ray.rendering.batches import IGNORED_LABEL, Batch
from pefomed_ray.training.step import build_optimizer, train_step, trainable

NAME = "gpu_step"
NO_DEVICE = "no CUDA device"
TARGETS = {"mfu_b16": 0.40}
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
WARM_UP_STEPS = 3
STEPS_PER_ROUND = 4
MATMUL_SIDE = 8192
MATMULS = 10
"""Products a round, of which the median counts."""
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One batch size; `recompute`: decoder layers are computed again in the backward pass, not kept."""

    rows: int
    recompute: bool = False

    @property
    def name(self) -> str:
        """As in the ratios' names."""
        return f"b{self.rows}" + ("_recomputed" if self.recompute else "")


CASES = (Case(1), Case(4), Case(16), Case(16, recompute=True))
"""Layers that are recomputed stay so: such cases come last."""


@dataclass(frozen=True)
class Measured:
    """One case: model FLOPs of a step by part, and what was seen. A round has one value in each list but `losses`."""

    flops: dict[str, float]
    tokens: int
    """Of a step, visual ones too."""
    step_s: list[float]
    matmul_flops_per_s: list[float]
    peak_bytes: int
    """Of the device's memory, weights included; 0 on a CPU."""
    losses: list[float]
    """Of all steps, those before the first round too."""

    @property
    def mfu(self) -> Spread:
        """Model FLOPs utilisation."""
        flops = sum(self.flops.values())
        return spread([flops / s / rate for s, rate in zip(self.step_s, self.matmul_flops_per_s, strict=True)])


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report, where there is a GPU."""
    if not torch.cuda.is_available():
        print(f"{NAME}: skipped, {NO_DEVICE}")
        if json_:
            print(json.dumps({"name": NAME, "ratios": {}, "aa": {}, "machine": machine(), "skipped": NO_DEVICE}))
        return
    cases, rounds = (CASES[:1], 1) if quick else (CASES, 7)
    report(LLAMA_2_7B, VIT_G, MATMUL_SIDE, torch.device("cuda"), cases, rounds, as_json=json_, quick=quick)


def report(
    text: dict[str, Any],
    vision: dict[str, Any],
    matmul_side: int,
    device: torch.device,
    cases: Sequence[Case],
    rounds: int,
    *,
    as_json: bool,
    quick: bool,
) -> None:
    """All cases of a base with these sizes on a device."""
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        base = open_trainable(folder, text, vision, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measured = {case.name: measure(base, case, rounds, matmul_side) for case in cases}
    learning, parameters = parameter_counts(base.model)
    finish(
        NAME,
        {f"mfu_{name}": case.mfu for name, case in measured.items()},
        {},
        {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "targets": TARGETS,
            "parameters": parameters,
            "trainable_parameters": learning,
            "steps_per_round": STEPS_PER_ROUND,
            "cases": {case.name: summary(case, measured[case.name]) for case in cases},
        },
        as_json=as_json,
        quick=quick,
    )


def open_trainable(folder: Path, text: dict[str, Any], vision: dict[str, Any], device: torch.device) -> Base:
    """A base with these sizes, written to the folder, with the paper's adapters, in training mode; its projector learns
    too."""
    torch.manual_seed(0)
    make_base(folder, text, vision, torch.bfloat16, device.type)
    base = open_base(str(folder), "paper", Precision(dtype="bfloat16"), device)
    attach_lora(base, LoraConfig(), train_projector=True)
    base.model.to(device).train()
    return base


def measure(base: Base, case: Case, rounds: int, matmul_side: int) -> Measured:
    """Train on one batch where the base's weights are, from its adapters as they are now; they are put back after.

    Raises AssertionError where the loss does not fall, DivergedError where it is not finite.
    """
    device = base.model.device
    if case.recompute:
        base.recompute_layers()
    batch = make_batches(base, 1, case.rows, QUESTIONS[:1], ANSWERS[3:4])[0].to(device)
    learning = trainable(base.model)
    start = [parameter.detach().clone() for parameter in learning]
    optimizer = build_optimizer(base.model, OPTIMIZER)
    losses: list[float] = []

    def steps(count: int) -> None:
        for _ in range(count):
            rate, norm = OPTIMIZER.learning_rate, OPTIMIZER.max_grad_norm
            losses.append(train_step(base.model, optimizer, [batch], base.renderer, rate, norm).loss)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps(WARM_UP_STEPS)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    step_s, rates = [], []
    for _ in range(rounds):
        rates.append(matmul_flops_per_s(matmul_side, device))
        step_s.append(seconds(partial(steps, STEPS_PER_ROUND), device) / STEPS_PER_ROUND)
    with torch.no_grad():
        for parameter, value in zip(learning, start, strict=True):
            parameter.copy_(value)
    if not np.mean(losses[-2:]) < losses[0]:
        raise AssertionError(f"{case.name}: the steps do not learn: losses {losses}")
    return Measured(step_flops(base, batch), int(batch.mask_BT.sum()), step_s, rates, peak_bytes, losses)


def step_flops(base: Base, batch: Batch) -> dict[str, float]:
    """Model FLOPs of one training step of a `pefomed` base on `batch`, as `jobs.flops.step_flops` counts them."""
    rows, tokens = batch.ids_BT.shape
    columns = int((batch.labels_BT[:, 1:] != IGNORED_LABEL).any(dim=0).sum())
    return flops_of_sizes(matrices_of(base), rows, tokens, columns, images=rows)


def matrices_of(base: Base) -> Matrices:
    """Of a `pefomed` base with its adapters in it."""
    model: Any = base.model
    vision, text = model.config.vision_config, model.config.text_config
    adapters = entries(base.decoder_layers, nn.Linear, learning=True)
    return Matrices(
        patch_embedding=entries(model.vision_tower, nn.Conv2d),
        tower=entries(model.vision_tower, nn.Linear),
        projector=entries(model.projector, nn.Linear),
        layers=entries(base.decoder_layers, nn.Linear) - adapters,
        adapters=adapters,
        head=entries(model.language_model.lm_head, nn.Linear),
        tower_depth=vision.num_hidden_layers,
        tower_width=vision.hidden_size,
        depth=text.num_hidden_layers,
        attention_width=text.num_attention_heads * text.head_dim,
        patches=(vision.image_size // vision.patch_size) ** 2,
        tiles=1,
        image_tokens=model.config.visual_tokens,
    )


def entries(module: nn.Module, kind: type[nn.Module], *, learning: bool = False) -> int:
    """In the weight matrices of a module's parts of that kind; `learning`: of those that learn."""
    weights: list[Tensor] = [part.weight for part in module.modules() if isinstance(part, kind)]
    return sum(weight.numel() for weight in weights if weight.requires_grad or not learning)


def matmul_flops_per_s(side: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """What the device does here and now, in a square product."""
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    run = partial(torch.matmul, left, right, out=product)
    run()  # libraries choose their kernel at the first call
    return 2 * side**3 / median(seconds(run, device) for _ in range(MATMULS))


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What `run` takes on a device; on a GPU by its own clock, from when it has done what came before."""
    if device.type != "cuda":
        return timed(run)[1].wall_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def summary(case: Case, measured: Measured) -> dict[str, Any]:
    """A case for the report; medians over the rounds."""
    step_s = median(measured.step_s)
    return {
        "tokens_per_s": round(measured.tokens / step_s, 1),
        "rows_per_s": round(case.rows / step_s, 3),
        "step_s": round(step_s, 6),
        "peak_gib": round(measured.peak_bytes / GIB, 2),
        "matmul_tflops_per_s": round(median(measured.matmul_flops_per_s) / 1e12, 3),
        "tokens_per_row": measured.tokens / case.rows,
        "tflops_per_step": {part: round(flops / 1e12, 4) for part, flops in measured.flops.items()},
        "losses": [round(loss, 4) for loss in measured.losses],
    }


if __name__ == "__main__":
    typer.run(main)
