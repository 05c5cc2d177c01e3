"""The training loop over steps and epochs, the same alone in a process and on every rank of a worker group."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pefomed_ray.artifacts.storage import local_path
from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import DivergedError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_base_of, put_on
from pefomed_ray.model.lora import attach_lora, peft_form, what_learns
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.checkpoint import gather, newest, restore
from pefomed_ray.training.keeper import Clock, Keeper, Run, hold
from pefomed_ray.training.lineage import run_identity
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.preflight import check_features
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import Step, build_optimizer, dropout_seed, learning_rate_at, train_step
from pefomed_ray.training.validation import ValidationSet

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after each epoch with that epoch's row of `epochs.json`."""
MustSave = Callable[[], bool]
"""Asked by every rank after each step, with the same answer on all: whether a checkpoint is wanted at once."""


def open_frozen(config: TrainConfig, device: torch.device) -> Base:
    """The base, without adapters as yet: what all runs share that differ in `lora` and `optimizer` alone.

    Raises ConfigError where the device cannot hold it as `config.base` wants, and what `open_bundle` does where the run
    starts from a bundle that is not for it.
    """
    if config.init_from is not None:
        base = open_base_of(local_path(config.init_from), config.base, device)[0]
    else:
        base = open_base(config.base.path, config.template, config.base, device)
    if config.training.gradient_checkpointing:
        base.recompute_layers()
    return base


def adapt(base: Base, config: TrainConfig) -> None:
    """Put fresh adapters into an open base, or those of the bundle that the run starts from; let them learn."""
    if config.init_from is not None:
        put_on(base, local_path(config.init_from), trainable=True)
        return
    # Every rank draws the same initial adapters; FSDP2 then keeps each rank's part of them.
    torch.manual_seed(config.seed)
    attach_lora(base, config.lora, train_projector=config.projector.train)


def prepare_model(config: TrainConfig, device: torch.device) -> Base:
    """The base with the adapters that the run begins with. Raises what `open_frozen` raises."""
    base = open_frozen(config, device)
    adapt(base, config)
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
    shards that are not what their manifest says, and what `hold`, `prepare_model` and `newest` raise.
    """
    lock = hold(output) if ranks.rank == 0 else None
    try:
        _run(config, output, stream, ranks, report, must_save)
    finally:
        if lock:
            lock.release()


def _run(
    config: TrainConfig,
    output: Path,
    stream: Callable[[TrainingOrder, Base], Iterator[Batch]],
    ranks: Ranks,
    report: Report,
    must_save: MustSave,
) -> None:
    learner = _Learner.begin(config, output, ranks)
    order, progress = learner.run.order, learner.run.progress
    base = learner.run.base
    validation = ValidationSet.load(rows_of(config, "validation"), config, base.renderer, ranks)
    keeper = Keeper(learner.run, output) if ranks.rank == 0 else None
    numbers = order.numbers(ranks.rank, ranks.world_size)
    batches = stream(order, base)
    base.model.train()
    clock = Clock()
    while not learner.run.is_over:
        micro_batches = {number: clock.wait(batches).to(ranks.device) for number in numbers}
        step = learner.step(micro_batches)
        timing = clock.step()
        if step and keeper:
            keeper.journal.step(progress.step, asdict(step) | timing)
        row = {}
        if learner.run.epoch_ended:
            row = learner.run.epoch_row(clock)
            row |= validation.measure(base.model, base.renderer, ranks)
            progress.end_epoch(row, config.validation.metric)
            clock = Clock()
        if row or progress.step % config.training.checkpoint_steps == 0 or must_save():
            tensors = gather(base.model, learner.optimizer)
            if keeper:
                keeper.keep(tensors, epoch_ended=bool(row))
        if row:
            report(row)
    if keeper:
        keeper.journal.close()


@dataclass(frozen=True)
class _Learner:
    """What learns, on one rank."""

    run: Run
    ranks: Ranks
    optimizer: torch.optim.Optimizer

    @classmethod
    def begin(cls, config: TrainConfig, output: Path, ranks: Ranks) -> "_Learner":
        """The base with its adapters, spread over the ranks, where the newest checkpoint in `output` left it."""
        base = prepare_model(config, ranks.home)
        check_features(config, base.path)
        learning, form = what_learns(base), peft_form(base)
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
        return cls(Run(config, base, order, progress, identity, begun, form), ranks, optimizer)

    def step(self, micro_batches: dict[int, Batch]) -> Step | None:
        """One step over this rank's micro-batches, by their numbers in the global batch.

        None where it was left out because loss or gradient was not finite; DivergedError where that was once too often.
        """
        run, config, progress = self.run, self.run.config, self.run.progress
        seeds = [dropout_seed(config.seed, progress.step, number) for number in micro_batches]
        learning_rate = learning_rate_at(progress.step, run.order.total_steps, config.optimizer)
        progress.step += 1
        try:
            step = train_step(
                run.base.model,
                self.optimizer,
                list(micro_batches.values()),
                run.base.renderer,
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
