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
    streams: list[list[np.ndarray]] = [[] for _ in range(plan.lanes)]
    for block in range(plan.blocks):
        rows = plan.block_rows(block)
        assert len(rows) % plan.micro_batch_size == 0
        streams[block % plan.lanes] += list(rows.reshape(-1, plan.micro_batch_size))
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
            INDEX, 3, batch_size=8, micro_batch_size=2, lanes=workers, total_steps=15, first_step=first
        )
        ranks: list[list[list[int]]] = [[] for _ in range(workers)]
        for block in range(order.blocks):
            rows = order.block_rows(block)
            ranks[block % workers] += rows.reshape(-1, order.micro_batch_size).tolist()
        return ranks

    skipped = first_step * 8 // (2 * workers)
    assert micro_batches(first_step) == [rank[skipped:] for rank in micro_batches(0)]
    assert micro_batches(first_step) != micro_batches(0)


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("lanes", [2, 6, 12])
def test_any_number_of_workers_that_divides_the_lanes_takes_the_same_steps(lanes: int, first_step: int) -> None:
    """Blocks dealt out round robin, read lane by lane, and taken in turn: as many numbered micro-batches each step."""
    plan = TrainingOrder(INDEX, 3, batch_size=24, micro_batch_size=2, lanes=lanes, total_steps=9, first_step=first_step)
    expected = {(step, number): rows for step in range(first_step, 9) for number, rows in whole_step(step).items()}
    for workers in [count for count in (1, 2, 3, 4) if lanes % count == 0]:
        seen: dict[tuple[int, int], list[int]] = {}
        for rank in range(workers):
            blocks = [plan.block_rows(block).reshape(-1, 2).tolist() for block in range(rank, plan.blocks, workers)]
            mine = plan.in_turn(iter([micro for block in blocks for micro in block]), workers)
            numbers = plan.numbers(rank, workers)
            assert len(numbers) == 12 // workers
            for step in range(first_step, 9):
                seen |= {(step, number): next(mine) for number in numbers}
            assert list(mine) == []
        assert seen == expected


def whole_step(step: int) -> dict[int, list[int]]:
    """The micro-batches of a global batch of 24 rows by their numbers, as one worker with one lane takes them."""
    plan = TrainingOrder(INDEX, 3, batch_size=24, micro_batch_size=2, lanes=1, total_steps=9)
    micro_batches = [m for block in range(plan.blocks) for m in plan.block_rows(block).reshape(-1, 2).tolist()]
    return dict(enumerate(micro_batches[step * 12 : (step + 1) * 12]))
