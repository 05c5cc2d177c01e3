"""Packed trials beside the same trials apart, at the paper's size on one GPU: what throughput packing adds.

Llama-2-7B's shape with random weights, frozen, in bfloat16; the paper's adapters (rank 64 on query and value) and
projector learn in float32. Both arms have the tower's features at hand, on the device, as from a feature cache.

`k16_b1` is how many rows a second 16 packed adapters with a row each train on, over what `train_step` does for one
such adapter: its steps follow one another, so that is also the rate of 16 trials one after the other. Both are measured
in each round, the packed steps between two series of the others; A/A is the one of these over the other.

All adapters start alike on the same rows, so each has to have the losses that the one apart has.

Needs a CUDA device, with 80 GB by estimate, and 14 GB on disk. Without one it says so, and is no failure.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from benchmarks._adapters import packed_losses, with_features
from benchmarks._bases import LLAMA_2_7B, VIT_G, make_base
from benchmarks._measure import JsonOption, QuickOption, Spread, finish, machine, spread
from benchmarks._small import ANSWERS, QUESTIONS, make_batches
from benchmarks.gpu_step import GIB, NO_DEVICE, seconds
from benchmarks.step import put_back
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import Precision
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.pack import Adapter, Pack, take_off
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.checkpoint import WEIGHT
from pefomed_ray.training.packed_step import PackedOptimizer
from pefomed_ray.training.step import build_optimizer, train_step

NAME = "gpu_pack"
TARGETS = {"k16_b1": 4.0}
ADAPTERS = (1, 2, 4, 8, 16, 32)
WARM_UP_STEPS = 2
STEPS_PER_ROUND = 4
MAX_LOSS_DIFFERENCE = 0.1
"""Nats: bfloat16 products of other sizes are rounded otherwise. Nor half of what the loss falls by: an adapter that
learns nothing is off by all of that."""


@dataclass(frozen=True)
class Case:
    """So many adapters, each with so many rows."""

    adapters: int
    rows: int

    @property
    def name(self) -> str:
        """As in the ratios' names."""
        return f"k{self.adapters}_b{self.rows}"


@dataclass
class Measured:
    """One case; seconds of a step, a value a round."""

    packed_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    alone_again_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the first adapter, in the last round."""

    def throughput(self, case: Case) -> Spread:
        """Rows a second over those of one adapter alone."""
        return spread([case.adapters * a / p for a, p in zip(self.alone_s, self.packed_s, strict=True)])

    @property
    def again(self) -> Spread:
        """One adapter alone, against itself."""
        return spread([b / a for a, b in zip(self.alone_s, self.alone_again_s, strict=True)])


@dataclass(frozen=True)
class Setting:
    """The base twice, over the same weights: bare, for a pack, and with the adapter in it."""

    base: Base
    alone: Base
    adapter: Adapter
    config: TrainConfig


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report, where there is a GPU."""
    if not torch.cuda.is_available():
        print(f"{NAME}: skipped, {NO_DEVICE}")
        if json_:
            print(json.dumps({"name": NAME, "ratios": {}, "aa": {}, "machine": machine(), "skipped": NO_DEVICE}))
        return
    cases = [Case(16, 1)] if quick else [Case(count, rows) for rows in (1, 4) for count in ADAPTERS]
    report(LLAMA_2_7B, VIT_G, torch.device("cuda"), cases, 1 if quick else 7, as_json=json_, quick=quick)


def report(
    text: dict[str, Any],
    vision: dict[str, Any],
    device: torch.device,
    cases: Sequence[Case],
    rounds: int,
    *,
    as_json: bool,
    quick: bool,
) -> None:
    """All cases of a base with these sizes on a device. One that the device's memory is too small for is left out."""
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        setting = open_setting(folder, text, vision, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measured: dict[Case, Measured] = {}
    too_large: list[str] = []
    for case in cases:
        try:
            measured[case] = measure(setting, case, rounds)
        except torch.OutOfMemoryError:
            too_large.append(case.name)
    finish(
        NAME,
        {case.name: of.throughput(case) for case, of in measured.items()},
        {case.name: of.again for case, of in measured.items()},
        {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "targets": TARGETS,
            "steps_per_round": STEPS_PER_ROUND,
            "out_of_memory": too_large,
            "cases": {case.name: summary(case, of) for case, of in measured.items()},
        },
        as_json=as_json,
        quick=quick,
    )


def open_setting(folder: Path, text: dict[str, Any], vision: dict[str, Any], device: torch.device) -> Setting:
    """A base with these sizes, written to the folder, in training mode."""
    torch.manual_seed(0)
    make_base(folder, text, vision, torch.bfloat16, device.type)
    base = open_base(str(folder), "paper", Precision(dtype="bfloat16"), device)
    base.model.requires_grad_(False)
    frozen = [value for name, value in base.model.named_parameters() if not name.startswith("projector.")]
    shared = {id(tensor): tensor for tensor in [*frozen, *base.model.buffers()]}
    alone = replace(base, model=deepcopy(base.model, shared))
    config = build_config(
        TrainConfig,
        {
            "name": "trial",
            "task": "vqa",
            "data": {"shards": "none"},
            "lora": {"dropout": 0.0},
            "optimizer": {"learning_rate": 1e-4},
        },
        "benchmark",
    )
    torch.manual_seed(1)
    attach_lora(base, config.lora, train_projector=True)
    adapter = take_off(base)
    attach_lora(alone, config.lora, train_projector=True)
    alone.model.to(device)
    for each in (base, alone):
        each.model.train()
    return Setting(base, alone, adapter, config)


def measure(setting: Setting, case: Case, rounds: int) -> Measured:
    """Both arms, from the adapter's first weights in each round.

    Raises AssertionError where losses differ or do not fall.
    """
    device = setting.base.model.device
    batch = make_batches(setting.base, 1, case.rows, QUESTIONS[:1], ANSWERS[3:4])[0].to(device)
    batch = with_features(setting.base, batch)
    measured = Measured()
    for _ in range(rounds):
        before, expected = alone(setting, batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took, losses = packed(setting, case, batch)
        if device.type == "cuda":
            measured.peak_bytes = torch.cuda.max_memory_allocated()
        after, _ = alone(setting, batch)
        measured.alone_s.append(before)
        measured.alone_again_s.append(after)
        measured.packed_s.append(took)
        measured.losses = [step[0] for step in losses]
        check(case, losses, expected)
    return measured


def check(case: Case, losses: list[list[float]], expected: list[float]) -> None:
    """Every adapter's losses, by step, are those of the one alone, which fall."""
    if not expected[-1] < expected[0]:
        raise AssertionError(f"{case.name}: the steps alone do not learn: losses {expected}")
    fallen = expected[0] - expected[-1]
    for step, (seen, wanted) in enumerate(zip(losses, expected, strict=True)):
        if not max(abs(loss - wanted) for loss in seen) <= min(MAX_LOSS_DIFFERENCE, fallen / 2):
            raise AssertionError(f"{case.name}: losses {seen} at step {step}, alone {wanted}; alone they go {expected}")


def packed(setting: Setting, case: Case, batch: Batch) -> tuple[float, list[list[float]]]:
    """(seconds a step, losses by step and adapter)."""
    adapters, configs = [setting.adapter] * case.adapters, [setting.config] * case.adapters
    device = setting.base.model.device
    with put_over(setting.base, adapters, device) as pack:
        start = {f"{WEIGHT}.{name}": value for name, value in setting.adapter.tensors.items()}
        optimizer = PackedOptimizer(pack, configs, [start] * case.adapters, [0] * case.adapters)
        return timed_steps(partial(packed_losses, pack, optimizer, configs, batch, setting.base), device)


@contextmanager
def put_over(base: Base, adapters: Sequence[Adapter], device: torch.device) -> Any:
    """A pack, for as long as the block lasts."""
    pack = Pack(base, adapters, device)
    try:
        yield pack
    finally:
        pack.remove()


def alone(setting: Setting, batch: Batch) -> tuple[float, list[float]]:
    """(seconds a step, losses by step) of one adapter by `train_step`."""
    model, config = setting.alone.model, setting.config.optimizer
    start = dict(setting.adapter.tensors)
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    put_back(learning.values(), [start[name] for name in learning])
    optimizer = build_optimizer(model, config)

    def step(_: int) -> float:
        rate, norm = config.learning_rate, config.max_grad_norm
        return train_step(model, optimizer, [batch], setting.alone.renderer, rate, norm).loss

    return timed_steps(step, model.device)


def timed_steps(step: Callable[[int], Any], device: torch.device) -> tuple[float, list[Any]]:
    """(seconds a step, what each gave), the first ones untimed but kept."""
    given = [step(number) for number in range(WARM_UP_STEPS)]

    def run() -> None:
        given.extend(step(WARM_UP_STEPS + number) for number in range(STEPS_PER_ROUND))

    return seconds(run, device) / STEPS_PER_ROUND, given


def summary(case: Case, measured: Measured) -> dict[str, Any]:
    """A case for the report; medians over the rounds."""
    packed_s, alone_s = median(measured.packed_s), median(measured.alone_s)
    return {
        "packed_rows_per_s": round(case.adapters * case.rows / packed_s, 3),
        "alone_rows_per_s": round(case.rows / alone_s, 3),
        "packed_step_s": round(packed_s, 6),
        "alone_step_s": round(alone_s, 6),
        "peak_gib": round(measured.peak_bytes / GIB, 2),
        "losses": [round(loss, 4) for loss in measured.losses],
    }


if __name__ == "__main__":
    typer.run(main)
