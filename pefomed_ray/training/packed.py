"""Many runs over one open base, an epoch at a time: what a host of packed trials does.

The runs differ in `lora` and `optimizer` alone. Those that are to do their next epoch train it as one pack, are
validated together, and leave what any run leaves: a journal, checkpoints, bundles. In between a run is a dictionary of
tensors, so each time other runs may come together, and one that was never here, or is long gone, comes from its newest
checkpoint: written by a pack or by a run alone, they are the same.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from torch import Tensor

from pefomed_ray.config import TrainConfig, save_config
from pefomed_ray.errors import ConfigError, DivergedError, PefomedError
from pefomed_ray.model.pack import Adapter, Pack, take_off
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.checkpoint import WEIGHT, newest, weights
from pefomed_ray.training.keeper import Clock, Keeper, Run, hold
from pefomed_ray.training.lineage import run_identity
from pefomed_ray.training.loop import adapt, open_frozen
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.packed_rows import PackedRows
from pefomed_ray.training.packed_step import BadStep, PackedOptimizer, Turn, moved, packed_step
from pefomed_ray.training.preflight import check_features, check_packable
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import learning_rate_at
from pefomed_ray.training.validation import ValidationSet

APART = ("name", "output_dir", "lora", "optimizer")
"""What runs of a pack may differ in."""

CPU_PASS_TOKENS = 1024
"""Of all adapters, in a pass on a CPU. So many keep a core busy, and what a layer works on still fits its caches: an
adapter of 60 tokens took 2.4 times less in a pack of sixteen than alone, one of 960 tokens 1.2 times more in a pack of
eight (docs/LOG.md)."""


@dataclass(frozen=True)
class Advanced:
    """An epoch that a run has done."""

    row: dict[str, Any]
    """Of `epochs.json`."""
    is_over: bool
    """Whether it was the run's last."""


Outcome = Advanced | PefomedError
"""Why not, where it could not."""


@dataclass
class Member:
    """A run between its epochs."""

    run: Run
    adapter: Adapter
    tensors: dict[str, Tensor]
    """As `checkpoint.gather` gives them."""
    keeper: Keeper | None
    """On rank 0; so is the lock."""
    lock: BaseFileLock | None
    trouble: PefomedError | None = None

    def outcome(self, epoch: int) -> Outcome:
        """Of an epoch, by its number from 1."""
        rows = self.run.progress.epochs
        return self.trouble or Advanced(rows[epoch - 1], is_over=epoch == len(rows) and self.run.is_over)

    @property
    def steps_to_go(self) -> int:
        """To the end of its epoch, or of the run."""
        order, step = self.run.order, self.run.progress.step
        return min(order.steps_per_epoch - step % order.steps_per_epoch, order.total_steps - step)


class PackedTrainer:
    """One rank of a host: the open base, its data, and the runs that were here last."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        """`config`: any of the runs'. Raises what `open_frozen` and `check_features` raise."""
        self.shared = config.model_dump(exclude=set(APART))
        self.ranks = ranks
        self.base = open_frozen(config, ranks.home)
        self.base.model.requires_grad_(False)
        check_features(config, self.base.path)
        if config.data.feature_cache is not None:
            del self.base.model.vision_tower
        size = config.training
        micro_batches = size.batch_size // (ranks.world_size * size.micro_batch_size)
        self.traffic = ranks.distribute(self.base, micro_batches)
        self.order = TrainingOrder.of(rows_of(config, "train"), config)
        self.rows = PackedRows(self.order, config, self.base.renderer)
        self.validation = ValidationSet.load(rows_of(config, "validation"), config, self.base.renderer, ranks)
        self.members: dict[Path, Member] = {}

    def worth_packing(self) -> int:
        """How many adapters a pass takes no longer with than with one after the other; every rank must call.

        As many as there may be where the tower runs, which costs most: once for all that see the same images.
        """
        if self.ranks.device.type != "cpu" or not self.rows.has_features:
            return sys.maxsize
        rows = self.validation.rows
        tokens = self.ranks.sum(sum(len(row.prompt) for row in rows)) / self.ranks.sum(len(rows))
        return max(1, int(CPU_PASS_TOKENS / (tokens * self.order.micro_batch_size)))

    def advance(self, runs: Sequence[tuple[TrainConfig, Path, int]]) -> list[Outcome]:
        """Let each run, by its output folder, do an epoch, by its number from 1; every rank must call with the same.

        All epochs before it are done. One that is done already is not done again. Raises what is no run's own fault:
        errors of the data and of the process group.
        """
        members = [self._member(config, output) for config, output, _ in runs]
        numbers = [number for _, _, number in runs]
        waiting = [m for m, number in zip(members, numbers, strict=True) if len(m.run.progress.epochs) < number]
        for _, group in groupby(sorted(waiting, key=self._stands), self._stands):
            self._fit(list(group))
        outcomes = [member.outcome(number) for member, number in zip(members, numbers, strict=True)]
        for (_, output, _), outcome in zip(runs, outcomes, strict=True):
            if isinstance(outcome, PefomedError) or outcome.is_over:
                self.forget(output)
        return outcomes

    def forget(self, output: Path) -> None:
        """Let a run go: everything of it is on disk."""
        member = self.members.pop(output, None)
        if member and member.keeper and member.lock:
            member.keeper.journal.close()
            member.lock.release()

    def _stands(self, member: Member) -> tuple[int, int]:
        """Equal for members that can train together: features are at hand for any rows, other images for one batch."""
        return member.steps_to_go, 0 if self.rows.has_features else member.run.progress.step

    def _member(self, config: TrainConfig, output: Path) -> Member:
        if output not in self.members:
            self.members[output] = self._joins(config, output)
        return self.members[output]

    def _joins(self, config: TrainConfig, output: Path) -> Member:
        if config.model_dump(exclude=set(APART)) != self.shared:
            raise ConfigError(f"runs of one pack differ in {', '.join(APART)} alone; {str(output)!r} differs in more")
        check_packable(config)
        output.mkdir(parents=True, exist_ok=True)
        lock = hold(output) if self.ranks.rank == 0 else None
        save_config(config, output / "run.yaml")
        adapt(self.base, config)
        adapter = take_off(self.base)
        tensors = {f"{WEIGHT}.{name}": tensor for name, tensor in adapter.tensors.items()}
        identity = run_identity(config, self.base)
        progress, passed_over = Progress(), tuple[str, ...]()
        if (found := newest(output, identity)) is not None:
            progress, tensors, passed_over = found.progress, found.tensors, found.passed_over
        begun = adapter.learning | {
            "traffic": asdict(self.traffic),
            "micro_batch_size": config.training.micro_batch_size,
            "step": progress.step,
            "passed_over": passed_over,
        }
        run = Run(config, self.base, self.order, progress, identity, begun, adapter.form)
        return Member(run, adapter, tensors, Keeper(run, output) if lock else None, lock)

    def _fit(self, members: list[Member]) -> None:
        """An epoch of as many at once as fit into memory."""
        try:
            return self._epoch(members)
        except torch.OutOfMemoryError as error:
            if len(members) == 1:
                members[0].trouble = PefomedError(
                    f"out of memory with one adapter and training.micro_batch_size "
                    f"{self.order.micro_batch_size}: {error}. Take a smaller one, or base.dtype=bfloat16"
                )
                return None
        half = len(members) // 2  # all stand where the last whole step left them
        self._fit(members[:half])
        return self._fit(members[half:])

    def _epoch(self, members: list[Member]) -> None:
        """Steps to the epoch's end, which all have equally far to, and its validation."""
        adapters = [replace(member.adapter, tensors=weights(member.tensors)) for member in members]
        pack = Pack(self.base, adapters, self.ranks.device)
        configs = [member.run.config for member in members]
        counts = [member.run.progress.step - member.run.progress.bad_steps for member in members]
        optimizer = PackedOptimizer(pack, configs, [member.tensors for member in members], counts)
        numbers = self.order.numbers(self.ranks.rank, self.ranks.world_size)
        positions = [member.run.progress.step for member in members]
        clock = Clock()
        self.base.model.train()
        try:
            for micro_batches in clock.waits(self.rows.batches(positions, members[0].steps_to_go, numbers)):
                self._step(pack, optimizer, members, micro_batches, clock)
            rows = self.validation.measure_packed(pack, self.base.renderer, self.ranks)
        finally:
            for k, member in enumerate(members):
                member.tensors = optimizer.take(k)
            pack.remove()
        for member, row in zip(members, rows, strict=True):
            self._end_epoch(member, row, clock)

    def _step(
        self,
        pack: Pack,
        optimizer: PackedOptimizer,
        members: list[Member],
        micro_batches: dict[int, list[Batch]],
        clock: Clock,
    ) -> None:
        """One step of all. A run in trouble stays in the pack till the epoch's end, and steps no more."""
        there = {number: moved(batches, self.ranks.device) for number, batches in micro_batches.items()}
        turns = [_turn(member) for member in members]
        steps = packed_step(pack, optimizer, turns, there, self.base.renderer, self.ranks)
        timing = clock.step() | {"packed": len(members)}
        for k, (member, step) in enumerate(zip(members, steps, strict=True)):
            if member.trouble:
                continue
            progress = member.run.progress
            progress.step += 1
            if isinstance(step, BadStep):
                progress.bad_steps += 1
                if progress.bad_steps > member.run.config.training.max_bad_steps:
                    member.trouble = step.error(progress.step, turns[k])
                continue
            progress.steps.append(asdict(step))
            if member.keeper:
                member.keeper.journal.step(progress.step, asdict(step) | timing)
                if progress.step % member.run.config.training.checkpoint_steps == 0 and not member.run.epoch_ended:
                    member.keeper.keep(optimizer.take(k), epoch_ended=False)

    def _end_epoch(self, member: Member, row: dict[str, float], clock: Clock) -> None:
        if member.trouble:
            return
        try:
            row = member.run.epoch_row(clock) | row
        except DivergedError as error:
            member.trouble = error
            return
        member.run.progress.end_epoch(row, member.run.config.validation.metric)
        if member.keeper:
            member.keeper.keep(member.tensors, epoch_ended=True)


def _turn(member: Member) -> Turn:
    config, progress = member.run.config, member.run.progress
    learning_rate = learning_rate_at(progress.step, member.run.order.total_steps, config.optimizer)
    # One in trouble steps no more: what it brings is of no account.
    return Turn(config, progress.step, learning_rate, takes_part=member.trouble is None)
