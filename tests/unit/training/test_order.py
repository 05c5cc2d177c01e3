"""The order of training rows: once an epoch each, the same for any number of workers."""

import numpy as np
import pytest

from pefomed_ray.data.plan import Part, RowIndex
from pefomed_ray.training.order import PADDING, TrainingOrder

INDEX = RowIndex("train", tuple((f"part-{i}", 0) for i in range(7)), (0, 15, 30, 45, 60, 75, 90, 101), (Part(7, 1.0),))


def order(workers: int, micro: int, batch: int = 16, steps: int = 14, seed: int = 3) -> TrainingOrder:
    return TrainingOrder(INDEX, seed, batch, micro, workers, steps)


def steps_of(plan: TrainingOrder) -> list[list[int]]:
    """The rows of each global step, read the way the ranks read their blocks."""
    streams: list[list[np.ndarray]] = [[] for _ in range(plan.workers)]
    for block in range(plan.blocks):
        rows = plan.block_rows(block)
        assert len(rows) % plan.micro_batch_size == 0
        streams[block % plan.workers] += list(rows.reshape(-1, plan.micro_batch_size))
    each = plan.micro_batches_per_step
    return [
        sorted(
            int(r) for stream in streams for micro in stream[s * each : (s + 1) * each] for r in micro if r != PADDING
        )
        for s in range(plan.total_steps)
    ]


@pytest.mark.parametrize(("workers", "micro"), [(2, 8), (2, 4), (4, 2), (1, 16), (1, 4)])
def test_global_batches_do_not_depend_on_the_number_of_workers(workers: int, micro: int) -> None:
    assert steps_of(order(workers, micro)) == steps_of(order(1, 8))


def test_every_row_comes_once_an_epoch() -> None:
    steps = steps_of(order(2, 4))
    for epoch in (steps[:7], steps[7:]):
        assert sorted(row for step in epoch for row in step) == list(range(101))
    assert steps[:7] != steps[7:]
    assert steps_of(order(2, 4, seed=4)) != steps  # the control: another seed, another order


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_rank_gets_equally_many_rows_in_equal_blocks(workers: int) -> None:
    plan = order(workers, 4)
    sizes = [len(plan.block_rows(block)) for block in range(plan.blocks)]
    ranks = [sum(sizes[rank::workers]) for rank in range(workers)]
    assert ranks == [14 * 16 // workers] * workers
    # Ray hands a block to the rank with the fewest rows: round robin only while blocks come in equal groups.
    assert all(len(set(sizes[i : i + workers])) == 1 for i in range(0, len(sizes), workers))


def test_a_run_cut_by_max_steps_stops_there() -> None:
    assert len(steps_of(order(2, 4, steps=3))) == 3
    assert steps_of(order(2, 4, steps=3)) == steps_of(order(2, 4))[:3]


@pytest.mark.parametrize("first_step", [1, 4, 7])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_order_that_begins_later_is_the_rest_of_the_whole_one(workers: int, first_step: int) -> None:
    def micro_batches(first: int) -> list[list[list[int]]]:
        """By rank, in order."""
        order = TrainingOrder(
            INDEX, 3, batch_size=8, micro_batch_size=2, workers=workers, total_steps=15, first_step=first
        )
        ranks: list[list[list[int]]] = [[] for _ in range(workers)]
        for block in range(order.blocks):
            rows = order.block_rows(block)
            ranks[block % workers] += rows.reshape(-1, order.micro_batch_size).tolist()
        return ranks

    skipped = first_step * 8 // (2 * workers)
    assert micro_batches(first_step) == [rank[skipped:] for rank in micro_batches(0)]
    assert micro_batches(first_step) != micro_batches(0)
