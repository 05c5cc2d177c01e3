"""Which rows each worker's micro-batches hold: fixed by (seed, epoch) and the global batch, whatever the workers.

Step s of an epoch takes the next `batch_size` rows of that epoch's order, as numbered micro-batches. They are dealt
out to lanes in turn, and the lanes to the workers in turn: as many lanes as workers, or, where their number may change
while a run goes on, as many as every number of workers divides. The last step of an epoch is filled up with PADDING, so
every row comes once an epoch and every worker does the same number of steps.

Where rows are grouped by length, those of each stretch of the epoch are sorted by length, cut into global batches, and
shuffled as whole batches, before all this.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import TypeVar

import numpy as np

from pefomed_ray.config import TrainConfig
from pefomed_ray.data.plan import RowIndex, epoch_rows, epoch_windows, open_mixture, text_lengths

Item = TypeVar("Item")

PADDING = -1
BLOCK_ROWS = 64
"""Rows a data worker renders at once, about: enough to hide the cost of scheduling it."""
GROUPING = 1 << 32
"""Sets the draws of `group_by_length` apart from those of the parts of a mixture, which are numbered from 0."""


def rows_of(config: TrainConfig, split: str) -> RowIndex:
    """Where the rows of a split stand, in all parts of the run's mixture. Raises DataError as `open_mixture` does."""
    return open_mixture([(part.shards, part.weight) for part in config.data.shards], split)


@dataclass(frozen=True)
class TrainingOrder:
    """The whole run's order, cut into blocks: block j belongs to lane j modulo `lanes`."""

    index: RowIndex
    seed: int
    batch_size: int
    micro_batch_size: int
    lanes: int
    total_steps: int
    first_step: int = 0
    """Steps before it were taken by a run that was interrupted; blocks begin with this one."""
    group_by_length: bool = False
    """Whoever asks for rows then reads the lengths of all texts first, once in a process."""

    @classmethod
    def of(cls, index: RowIndex, config: TrainConfig, first_step: int = 0) -> "TrainingOrder":
        """The order a config asks for: `epochs` passes, or `max_steps` if that is less."""
        steps_per_epoch = -(-index.rows // config.training.batch_size)
        total = steps_per_epoch * config.training.epochs
        return cls(
            index=index,
            seed=config.seed,
            batch_size=config.training.batch_size,
            micro_batch_size=config.training.micro_batch_size,
            lanes=config.resources.lanes,
            total_steps=min(total, config.training.max_steps or total),
            first_step=first_step,
            group_by_length=config.training.group_by_length,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the data."""
        return -(-self.index.rows // self.batch_size)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one lane in one step."""
        return self.batch_size // (self.lanes * self.micro_batch_size)

    @property
    def micro_batches_per_block(self) -> int:
        """Consecutive micro-batches of one lane that are rendered together."""
        return max(BLOCK_ROWS // self.micro_batch_size, 1)

    @property
    def blocks(self) -> int:
        """Blocks of all steps from `first_step` on, over all lanes."""
        each = (self.total_steps - self.first_step) * self.micro_batches_per_step
        return -(-each // self.micro_batches_per_block) * self.lanes

    def block_rows(self, block: int) -> np.ndarray:
        """Rows of a block in order, int64, PADDING where there is none; a multiple of micro_batch_size."""
        chunk, lane = divmod(block, self.lanes)
        first = self.first_step * self.micro_batches_per_step + chunk * self.micro_batches_per_block
        last = min(first + self.micro_batches_per_block, self.total_steps * self.micro_batches_per_step)
        return np.concatenate([self._micro_batch(lane, number) for number in range(first, last)])

    def numbers(self, rank: int, workers: int) -> list[int]:
        """Which micro-batches of a global batch a worker takes, in its order; there are batch_size / micro_batch_size,
        and what a number holds does not depend on the workers."""
        lanes = range(rank, self.lanes, workers)
        return [part * self.lanes + lane for part in range(self.micro_batches_per_step) for lane in lanes]

    def rows_at(self, step: int, number: int) -> np.ndarray:
        """Rows of a micro-batch by its number in a step's global batch, as `block_rows` gives them."""
        part, lane = divmod(number, self.lanes)
        return self._micro_batch(lane, step * self.micro_batches_per_step + part)

    def in_turn(self, micro_batches: Iterator[Item], workers: int) -> Iterator[Item]:
        """A worker's micro-batches in the order of `numbers`, from those of its blocks one after the other."""
        lanes = self.lanes // workers
        if lanes == 1:  # nothing to wait for
            yield from micro_batches
        while blocks := list(islice(micro_batches, lanes * self.micro_batches_per_block)):
            each = len(blocks) // lanes
            for number in range(each):
                yield from blocks[number::each]

    def _micro_batch(self, lane: int, number: int) -> np.ndarray:
        step, part = divmod(number, self.micro_batches_per_step)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch_size + (part * self.lanes + lane) * self.micro_batch_size
        grouped = self.batch_size if self.group_by_length else None
        rows = _order(self.index, self.seed, epoch, grouped)[start : start + self.micro_batch_size]
        return np.pad(rows, (0, self.micro_batch_size - len(rows)), constant_values=PADDING)


@lru_cache(maxsize=2)
def _order(index: RowIndex, seed: int, epoch: int, grouped: int | None) -> np.ndarray:
    """`grouped`: rows of a global batch, where it is to hold texts of like length."""
    if grouped is None:
        return epoch_rows(index, seed, epoch)
    rows, begins = epoch_windows(index, seed, epoch)
    return group_by_length(rows, begins, _lengths(index), grouped, np.random.default_rng([seed, epoch, GROUPING]))


@lru_cache(maxsize=1)
def _lengths(index: RowIndex) -> np.ndarray:
    return text_lengths(index)


def group_by_length(
    rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray, batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """An epoch's rows in another order, in which those of a global batch have texts of like length, the shortest first.

    `rows` and `begins` are those of `epoch_windows`, `lengths` those of `text_lengths`. Rows move inside a stretch,
    which is the batches that lie whole in one window (64 of 16 rows, where row groups are full): so no row group is
    read more often. A batch that lies in two windows stays as it is, and the short one at the end stays there.
    """
    ends = np.append(np.flatnonzero(begins), len(rows))
    cuts = np.unique(np.concatenate([ends // batch_size, -(-ends // batch_size)])) * batch_size
    stretches = []
    for first, last in pairwise(cuts):
        stretch = rows[first:last]
        in_two_windows = begins[first + 1 : last].any()
        ordered = stretch if in_two_windows else stretch[np.argsort(lengths[stretch], kind="stable")]
        batches = ordered.reshape(-1, min(batch_size, len(ordered)))
        stretches.append(generator.permutation(batches).reshape(-1))
    return np.concatenate(stretches)
