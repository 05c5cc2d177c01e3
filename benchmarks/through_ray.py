"""A training run through Ray Train and Ray Data beside a bare loop over the same steps.

`ours` is `training.trainer.train` with one worker and one data worker, as a run on two cores has them: shards are read,
decoded and rendered in a process beside the training one, batches pass through Ray's object store, and each step is
written down. `bare` is this process with every batch in memory before the first step. Both train the embedded base on
one thread, a step of about a quarter of a second: what Ray adds to a step weighs less the longer a step is.

Rows a second of wall time while the stream runs: start-up, the first steps and the end of an epoch are left out.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import typer

from benchmarks._measure import JsonOption, QuickOption, Sample, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks._pictures import write_corpus
from benchmarks._ray import scratch_with_ray
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.plan import read_rows
from pefomed_ray.data.shards import prepare
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch, training_batch
from pefomed_ray.training.feed import RecordRenderer
from pefomed_ray.training.journal import STEPS_FILE
from pefomed_ray.training.loop import prepare_model
from pefomed_ray.training.order import BLOCK_ROWS, TrainingOrder, rows_of
from pefomed_ray.training.step import build_optimizer, learning_rate_at, train_step, trainable
from pefomed_ray.training.trainer import train

SOURCE_PX = 512
DISTINCT_PICTURES = 64
BATCH_ROWS = 8
STEPS_A_BLOCK = BLOCK_ROWS // BATCH_ROWS
"""The stream comes in blocks: what is measured is a number of whole ones."""
SKIPPED_BLOCKS = 2
MAX_LOSS_DIFFERENCE = 1e-5
"""Nats, at each step."""

Losses = list[float]


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    with scratch_with_ray(2) as folder:
        config = make_config(folder, steps=STEPS_A_BLOCK * (SKIPPED_BLOCKS + (1 if quick else 5)))
        measure(config, folder, rounds=1 if quick else 3, as_json=json_, quick=quick)


def measure(config: TrainConfig, folder: Path, rounds: int, *, as_json: bool, quick: bool) -> None:
    """Both arms; the loss of each step must be the same."""
    loop = BareLoop(config)
    expected, _ = loop.run()
    if not np.mean(expected[-3:]) < expected[0]:
        raise AssertionError(f"the steps do not learn: losses {expected}")
    waits: list[float] = []

    def check(arm: str, losses: Losses) -> None:
        if not np.allclose(losses, expected, rtol=0, atol=MAX_LOSS_DIFFERENCE):
            raise AssertionError(f"{arm}: losses {losses}, expected {expected}")

    done = run_rounds({"ours": partial(through_ray, config, folder, waits), "bare": loop.run}, check, rounds)
    finish(
        "through_ray",
        {"through_ray": ratio(done, "bare", "wall_s")},
        {"wall": a_a(done, "wall_s")},
        {
            "step_s": {arm: took["wall_s"] for arm, took in per_arm(done).items()},
            "rows_per_s": {arm: round(BATCH_ROWS / took["wall_s"], 1) for arm, took in per_arm(done).items()},
            "data_wait_share": round(median(waits), 4),
            "steps_measured": len(expected) - first_measured(),
            "batch_rows": BATCH_ROWS,
        },
        as_json=as_json,
        quick=quick,
    )


def through_ray(config: TrainConfig, folder: Path, waits: list[float]) -> tuple[Losses, Sample]:
    """A whole run; what a step of its steady part took, and how much of that it waited for data, into `waits`."""
    output = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    _, whole = timed(lambda: train(config.model_copy(update={"output_dir": str(output)})))
    steps: list[dict[str, Any]] = [json.loads(line) for line in (output / STEPS_FILE).read_text().splitlines()]
    measured = steps[first_measured() :]
    wall_s = sum(step["step_s"] for step in measured)
    waits.append(sum(step["step_s"] * step["data_wait_share"] for step in measured) / wall_s)
    return [step["loss"] for step in steps], Sample(wall_s / len(measured), whole.cpu_s / len(steps))


def first_measured() -> int:
    """Steps that are left out at the beginning."""
    return STEPS_A_BLOCK * SKIPPED_BLOCKS


class BareLoop:
    """The run's steps in this process, without anything around them."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.base: Base = prepare_model(config, torch.device("cpu"))
        self.base.model.train()
        self.start = [parameter.detach().clone() for parameter in trainable(self.base.model)]
        order = TrainingOrder.of(rows_of(config, "train"), config)
        self.batches = [batch for block in range(order.blocks) for batch in self._block(order, block)]

    def run(self) -> tuple[Losses, Sample]:
        """All steps from the first adapters; what one of those took that the other arm's time is of."""
        with torch.no_grad():
            for parameter, value in zip(trainable(self.base.model), self.start, strict=True):
                parameter.copy_(value)
        optimizer = build_optimizer(self.base.model, self.config.optimizer)
        first = self._steps(optimizer, 0, first_measured())
        rest, took = timed(partial(self._steps, optimizer, first_measured(), len(self.batches)))
        return first + rest, Sample(took.wall_s / len(rest), took.cpu_s / len(rest))

    def _steps(self, optimizer: torch.optim.Optimizer, begin: int, end: int) -> Losses:
        settings = self.config.optimizer
        return [
            train_step(
                self.base.model,
                optimizer,
                [self.batches[number]],
                self.base.renderer,
                learning_rate_at(number, len(self.batches), settings),
                settings.max_grad_norm,
            ).loss
            for number in range(begin, end)
        ]

    def _block(self, order: TrainingOrder, block: int) -> list[Batch]:
        renderer = RecordRenderer(self.base.renderer, self.config.data.max_answer_tokens)
        rows = [renderer.render(record) for record in read_rows(order.index, order.block_rows(block))]
        return [
            training_batch(rows[at : at + BATCH_ROWS], self.base.renderer.pad_token_id)
            for at in range(0, len(rows), BATCH_ROWS)
        ]


def make_config(folder: Path, steps: int) -> TrainConfig:
    """A run of so many steps, less than an epoch, over shards of its own."""
    write_corpus(folder / "corpus", BATCH_ROWS * steps * 5 // 4, SOURCE_PX, distinct=DISTINCT_PICTURES)
    prepare(folder / "corpus", folder / "shards", DataOptions(validation_fraction=0.1))
    config = build_config(
        TrainConfig,
        {
            "name": "through-ray",
            "task": "vqa",
            "template": "short",
            "data": {"shards": str(folder / "shards")},
            "lora": {"rank": 16, "dropout": 0.0, "target_modules": ["all-linear"]},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"epochs": 1, "max_steps": steps, "batch_size": BATCH_ROWS, "micro_batch_size": BATCH_ROWS},
            "validation": {"rows": BATCH_ROWS, "max_new_tokens": 2},
        },
        "through_ray",
    )
    if rows_of(config, "train").rows < BATCH_ROWS * steps:
        raise AssertionError("an epoch is to hold all steps")
    return config


if __name__ == "__main__":
    typer.run(main)
