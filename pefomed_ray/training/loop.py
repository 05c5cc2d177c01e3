"""The training loop over steps and epochs, the same alone in a process and on every rank of a worker group."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pefomed_ray.artifacts.storage import digest_of, local_path, write_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import DivergedError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.lora import attach_lora, what_learns
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.checkpoint import Progress, gather, newest, restore, save_checkpoint, weights
from pefomed_ray.training.journal import Journal
from pefomed_ray.training.lineage import lineage_of, run_identity
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.preflight import check_features
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import Step, build_optimizer, learning_rate_at, train_step
from pefomed_ray.training.trackers import Trackers
from pefomed_ray.training.validation import ValidationSet

START_FILE = "start.json"
"""What learns, what a step will send (`model.lora.what_learns`, `ranks.Traffic`), the rows of a micro-batch, the step
that the run goes on from, and damaged checkpoints that were passed over for it; written before the first step."""

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after each epoch with that epoch's row of `epochs.json`."""
MustSave = Callable[[], bool]
"""Asked by every rank after each step, with the same answer on all: whether a checkpoint is wanted at once."""


def prepare_model(config: TrainConfig, device: torch.device) -> Base:
    """The base with fresh adapters, or with those of the bundle the run starts from.

    Raises ConfigError where the device cannot hold the base as `config.base` wants it.
    """
    if config.init_from is not None:
        directory = local_path(config.init_from)
        base = open_bundle(directory, trainable=True, precision=config.base, device=device)[0]
    else:
        base = open_base(config.base.path, config.template, config.base, device)
        # Every rank draws the same initial adapters; FSDP2 then keeps each rank's part of them.
        torch.manual_seed(config.seed)
        attach_lora(base, config.lora, train_projector=config.projector.train)
    if config.training.gradient_checkpointing:
        base.recompute_layers()
    return base


def run(
    config: TrainConfig,
    output: Path,
    stream: Callable[[TrainingOrder, Base], Iterator[Batch]],
    ranks: Ranks,
    report: Report,
    must_save: MustSave = lambda: False,
) -> None:
    """Train, validate after every epoch, keep the best and the last bundle under `output/epochs`.

    Goes on from the newest checkpoint in `output` that is whole. `stream` gives this rank's micro-batches from the
    order's first step on. Raises DivergedError, with no step taken, where loss or gradient is not finite, DataError for
    shards that are not what their manifest says, and what `prepare_model` and `newest` raise.
    """
    learner = _Learner.begin(config, output, ranks)
    order, progress = learner.order, learner.progress
    validation = ValidationSet.load(rows_of(config, "validation"), config, learner.base.renderer, ranks)
    keeper = _Keeper(learner, output) if ranks.rank == 0 else None
    numbers = order.numbers(ranks.rank, ranks.world_size)
    batches = stream(order, learner.base)
    learner.base.model.train()
    clock = _Clock()
    while progress.step < order.total_steps and not _is_enough(config, progress):
        micro_batches = {number: clock.wait(batches).to(ranks.device) for number in numbers}
        step = learner.step(micro_batches)
        timing = clock.step()
        if step and keeper:
            keeper.journal.step(progress.step, asdict(step) | timing)
        row = {}
        if progress.step % order.steps_per_epoch == 0 or progress.step == order.total_steps:
            row = learner.epoch_row(clock)
            row |= validation.measure(learner.base.model, learner.base.renderer, ranks)
            progress.end_epoch(row, config.validation.metric)
            clock = _Clock()
        if row or progress.step % config.training.checkpoint_steps == 0 or must_save():
            tensors = gather(learner.base.model, learner.optimizer)
            if keeper:
                keeper.keep(tensors, epoch_ended=bool(row))
        if row:
            report(row)
    if keeper:
        keeper.journal.close()


@dataclass(frozen=True)
class _Learner:
    """What learns, on one rank, and how far it is."""

    config: TrainConfig
    ranks: Ranks
    base: Base
    optimizer: torch.optim.Optimizer
    order: TrainingOrder
    progress: Progress
    identity: dict[str, Any]
    begun: dict[str, Any]
    """What START_FILE says."""

    @classmethod
    def begin(cls, config: TrainConfig, output: Path, ranks: Ranks) -> "_Learner":
        """The base with its adapters, spread over the ranks, where the newest checkpoint in `output` left it."""
        base = prepare_model(config, ranks.home)
        check_features(config, base.path)
        learning = what_learns(base)
        if config.data.feature_cache is not None:
            del base.model.vision_tower  # a `pefomed` base, as check_features says; it would only take memory
        size = config.training
        traffic = ranks.distribute(base, size.batch_size // (ranks.world_size * size.micro_batch_size))
        optimizer = build_optimizer(base.model, config.optimizer, config.lora.loraplus_lr_ratio)
        identity = run_identity(config, base)
        progress, passed_over = Progress(), tuple[str, ...]()
        if (found := newest(output, identity)) is not None:
            restore(base.model, optimizer, found)
            progress, passed_over = found.progress, found.passed_over
        order = TrainingOrder.of(rows_of(config, "train"), config, progress.step)
        begun = learning | {
            "traffic": asdict(traffic),
            "micro_batch_size": size.micro_batch_size,
            "step": progress.step,
            "passed_over": passed_over,
        }
        return cls(config, ranks, base, optimizer, order, progress, identity, begun)

    def step(self, micro_batches: dict[int, Batch]) -> Step | None:
        """One step over this rank's micro-batches, by their numbers in the global batch.

        None where it was left out because loss or gradient was not finite; DivergedError where that was once too often.
        """
        config, progress = self.config, self.progress
        # Dropout follows from the step and the micro-batch's number alone: a run which goes on draws what an unbroken
        # one would, and so does any number of workers.
        seeds = [int(digest_of([config.seed, progress.step, number])[:15], 16) for number in micro_batches]
        learning_rate = learning_rate_at(progress.step, self.order.total_steps, config.optimizer)
        progress.step += 1
        try:
            step = train_step(
                self.base.model,
                self.optimizer,
                list(micro_batches.values()),
                self.base.renderer,
                learning_rate,
                config.optimizer.max_grad_norm,
                ranks=self.ranks,
                dropout_seeds=seeds,
            )
        except DivergedError as error:
            progress.bad_steps += 1
            if progress.bad_steps <= config.training.max_bad_steps:
                return None
            raise DivergedError(f"step {progress.step}: {error}") from None
        progress.steps.append(asdict(step))
        return step

    def epoch_row(self, clock: "_Clock") -> dict[str, Any]:
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


class _Keeper:
    """What rank 0 writes down: the journal, bundles and checkpoints."""

    def __init__(self, learner: _Learner, output: Path) -> None:
        self.learner = learner
        self.output = output
        write_json(output / START_FILE, learner.begun)
        trackers = Trackers(learner.config, output)
        self.journal = Journal(output, learner.order, learner.progress, trackers)

    def keep(self, tensors: dict[str, Tensor], *, epoch_ended: bool) -> None:
        """A checkpoint of what `gather` gave, after the bundle of the epoch if one has ended."""
        if epoch_ended:
            self._keep_bundle(weights(tensors))
            self.journal.epoch(self.learner.progress)
        save_checkpoint(self.output, self.learner.progress, tensors, self.learner.identity)

    def _keep_bundle(self, trained: dict[str, Tensor]) -> None:
        """The last epoch's and the best one's stay."""
        config, base, epochs = self.learner.config, self.learner.base, self.learner.progress.epochs
        row = epochs[-1]
        metrics = {
            name: {"value": row[name], "n": int(row["n"]), "unscored": 0, "ci95": None}
            for name in ("exact_match", "rougeL")
        } | {"split": "validation", "loss": row["loss"]}
        folder = self.output / "epochs"
        folder.mkdir(exist_ok=True)
        target = folder / f"{len(epochs):03d}"
        shutil.rmtree(target, ignore_errors=True)  # what a run left that ended here, before its checkpoint was there
        save_bundle(target, base, config, trained, lineage_of(config, base, len(epochs)), metrics)
        for position in range(len(epochs) - 1):
            if position != self.learner.progress.best:
                shutil.rmtree(folder / f"{position + 1:03d}", ignore_errors=True)


def _is_enough(config: TrainConfig, progress: Progress) -> bool:
    """Whether the metric has not become better for as long as the config allows."""
    patience = config.training.early_stopping_patience
    return patience is not None and len(progress.epochs) - 1 - progress.best >= patience > 0 and progress.best >= 0


class _Clock:
    """Seconds of an epoch, or of what this process has done of it, and how many were spent waiting for data."""

    def __init__(self) -> None:
        self.started = self.step_started = time.monotonic()
        self.waited_s = self.waited_in_step_s = 0.0
        self.steps = 0

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch."""
        before = time.monotonic()
        batch = next(batches)
        self.waited_in_step_s += time.monotonic() - before
        return batch

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
