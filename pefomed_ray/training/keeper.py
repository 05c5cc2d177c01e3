"""What a run writes down as it goes: its start, the journal, bundles and checkpoints. One rank keeps it."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import DivergedError, PefomedError
from pefomed_ray.model.base import Base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.lora import PeftForm
from pefomed_ray.training.checkpoint import save_checkpoint, weights
from pefomed_ray.training.journal import Journal
from pefomed_ray.training.lineage import lineage_of
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.trackers import Trackers

Item = TypeVar("Item")

LOCK_FILE = "run.lock"
LOCK_TIMEOUT_S = 60

START_FILE = "start.json"
"""What learns, what a step will send (`model.lora.what_learns`, `ranks.Traffic`), the rows of a micro-batch, the step
that the run goes on from, and damaged checkpoints that were passed over for it; written before the first step."""


def hold(output: Path) -> BaseFileLock:
    """Be the one process that writes a run's folder, until the lock that comes back is released, or the process ends.

    A rank outlives a driver that was killed by a few seconds, and goes on writing: whoever goes on with the run waits
    for its end. Raises PefomedError where it has not ended within LOCK_TIMEOUT_S.
    """
    lock = FileLock(output / LOCK_FILE)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise PefomedError(
            f"another process trains in {str(output)!r}, and has not ended within {LOCK_TIMEOUT_S} s; stop it, or take "
            "another output_dir"
        ) from None
    return lock


@dataclass(frozen=True)
class Run:
    """A run, and how far it is."""

    config: TrainConfig
    base: Base
    order: TrainingOrder
    progress: Progress
    identity: dict[str, Any]
    """What it is, for its checkpoints (`lineage.run_identity`)."""
    begun: dict[str, Any]
    """What START_FILE says."""
    form: PeftForm
    """How its adapter is written."""

    @property
    def epoch_ended(self) -> bool:
        """Whether the step that was taken last is an epoch's last, or the run's."""
        step = self.progress.step
        return step % self.order.steps_per_epoch == 0 or step == self.order.total_steps

    @property
    def is_over(self) -> bool:
        """Whether all steps were taken, or the metric has not become better for as long as the config allows."""
        progress, patience = self.progress, self.config.training.early_stopping_patience
        if progress.step >= self.order.total_steps:
            return True
        return patience is not None and progress.best >= 0 and len(progress.epochs) - 1 - progress.best >= patience

    def epoch_row(self, clock: "Clock") -> dict[str, Any]:
        """The epoch that has just ended, but for its validation. Rows a second are of what `clock` has seen of it."""
        steps = self.progress.steps
        if not steps:
            raise DivergedError("no step of a whole epoch could be taken; lower optimizer.learning_rate or lora.alpha")
        tokens = sum(step["answer_tokens"] for step in steps)
        timing = clock.epoch()
        return {
            "train_loss": sum(step["loss"] * step["answer_tokens"] for step in steps) / max(tokens, 1),
            "grad_norm": steps[-1]["grad_norm"],
            "learning_rate": steps[-1]["learning_rate"],
            "answer_tokens": tokens,
            "steps": len(steps),
            "bad_steps": self.progress.bad_steps,
            "rows_per_s": clock.steps * self.order.batch_size / timing["train_s"],
            **timing,
            **{name: self.begun[name] for name in ("trainable_parameters", "parameters")},
        }


class Keeper:
    """What is written of a run into its output folder; whoever has one holds the folder (`hold`)."""

    def __init__(self, run: Run, output: Path) -> None:
        self.run = run
        self.output = output
        write_json(output / START_FILE, run.begun)
        trackers = Trackers(run.config, output)
        self.journal = Journal(output, run.order, run.progress, trackers)

    def keep(self, tensors: dict[str, Tensor], *, epoch_ended: bool) -> None:
        """A checkpoint of what `checkpoint.gather` gave, after the bundle of the epoch if one has ended."""
        if epoch_ended:
            self._keep_bundle(weights(tensors))
            self.journal.epoch(self.run.progress)
        save_checkpoint(self.output, self.run.progress, tensors, self.run.identity)

    def _keep_bundle(self, trained: dict[str, Tensor]) -> None:
        """The last epoch's and the best one's stay."""
        config, base, epochs = self.run.config, self.run.base, self.run.progress.epochs
        row = epochs[-1]
        metrics = {
            name: {"value": row[name], "n": int(row["n"]), "unscored": 0, "ci95": None}
            for name in ("exact_match", "rougeL")
        } | {"split": "validation", "loss": row["loss"]}
        folder = self.output / "epochs"
        folder.mkdir(exist_ok=True)
        target = folder / f"{len(epochs):03d}"
        shutil.rmtree(target, ignore_errors=True)  # what a run left that ended here, before its checkpoint was there
        save_bundle(target, base, config, trained, lineage_of(config, base, len(epochs)), metrics, self.run.form)
        for position in range(len(epochs) - 1):
            if position != self.run.progress.best:
                shutil.rmtree(folder / f"{position + 1:03d}", ignore_errors=True)


class Clock:
    """Seconds of an epoch, or of what this process has done of it, and how many were spent waiting for data."""

    def __init__(self) -> None:
        self.started = self.step_started = time.monotonic()
        self.waited_s = self.waited_in_step_s = 0.0
        self.steps = 0

    def wait(self, batches: Iterator[Item]) -> Item:
        """The next batch."""
        before = time.monotonic()
        batch = next(batches)
        self.waited_in_step_s += time.monotonic() - before
        return batch

    def waits(self, batches: Iterator[Item]) -> Iterator[Item]:
        """All batches, waited for one by one."""
        while True:
            try:
                yield self.wait(batches)
            except StopIteration:
                return

    def step(self) -> dict[str, float]:
        """Of the step that has just ended."""
        now = time.monotonic()
        step_s, waited_s = now - self.step_started, self.waited_in_step_s
        self.step_started, self.waited_in_step_s = now, 0.0
        self.waited_s += waited_s
        self.steps += 1
        return {"step_s": step_s, "data_wait_share": waited_s / step_s}

    def epoch(self) -> dict[str, float]:
        """So far."""
        train_s = time.monotonic() - self.started
        return {"train_s": train_s, "data_wait_share": self.waited_s / train_s}
