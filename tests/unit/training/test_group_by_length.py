"""Rows of like length together: the same rows, less padding, no more reading, and still an order of (seed, epoch)."""

from collections import OrderedDict

import numpy as np
import pytest

from pefomed_ray.data.plan import WINDOW_GROUPS, Part, RowIndex, epoch_windows
from pefomed_ray.training import order as order_module
from pefomed_ray.training.order import PADDING, TrainingOrder, group_by_length

GROUPS, ROWS_A_GROUP = 50, 40
ROWS = GROUPS * ROWS_A_GROUP - 13
STARTS = (*range(0, ROWS, ROWS_A_GROUP), ROWS)
NAMES = tuple(("part", number) for number in range(GROUPS))
INDEX = RowIndex("train", NAMES, STARTS, (Part(GROUPS, 1.0),))
MIXTURE = RowIndex("train", NAMES, STARTS, (Part(30, 2.0), Part(20, 1.0)))
LENGTHS = np.random.default_rng(0).lognormal(4, 1, ROWS).astype(np.int32)
BATCH = 16
STEPS = -(-ROWS // BATCH)


@pytest.fixture(autouse=True)
def _skewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "_lengths", lambda index: LENGTHS)


def order(grouped: bool, lanes: int = 1, micro: int = 8, seed: int = 3, first_step: int = 0) -> TrainingOrder:
    return TrainingOrder(INDEX, seed, BATCH, micro, lanes, 2 * STEPS, first_step, group_by_length=grouped)


def micro_batches(plan: TrainingOrder) -> list[list[np.ndarray]]:
    """Of each lane, in order."""
    lanes: list[list[np.ndarray]] = [[] for _ in range(plan.lanes)]
    for block in range(plan.blocks):
        lanes[block % plan.lanes] += list(plan.block_rows(block).reshape(-1, plan.micro_batch_size))
    return lanes


def steps_of(plan: TrainingOrder) -> np.ndarray:
    """The rows of each global batch in order, [steps, BATCH]."""
    each = plan.micro_batches_per_step
    lanes = micro_batches(plan)
    steps = [
        np.concatenate([lane[step * each + part] for part in range(each) for lane in lanes])
        for step in range(len(lanes[0]) // each)
    ]
    return np.array(steps)


def padding_share(plan: TrainingOrder) -> float:
    lengths = [LENGTHS[micro[micro != PADDING]] for lane in micro_batches(plan) for micro in lane]
    computed = sum(len(micro) * micro.max() for micro in lengths if len(micro))
    return 1 - sum(int(micro.sum()) for micro in lengths) / int(computed)


def test_every_row_comes_once_an_epoch_and_the_short_step_is_the_last() -> None:
    steps = steps_of(order(True))
    for epoch in (steps[:STEPS], steps[STEPS:]):
        assert sorted(epoch[epoch != PADDING]) == list(range(ROWS))
        assert not (epoch[:-1] == PADDING).any()
    assert not np.array_equal(steps[:STEPS], steps[STEPS:])


@pytest.mark.parametrize(("lanes", "micro"), [(2, 8), (2, 4), (4, 2), (1, 16)])
def test_global_batches_do_not_depend_on_workers_or_micro_batches(lanes: int, micro: int) -> None:
    assert np.array_equal(steps_of(order(True, lanes, micro)), steps_of(order(True)))


def test_the_order_depends_on_the_seed() -> None:
    steps = steps_of(order(True))
    order_module._order.cache_clear()
    assert np.array_equal(steps_of(order(True)), steps)
    assert not np.array_equal(steps_of(order(True, seed=4)), steps)


def test_less_is_padded() -> None:
    grouped, mixed = padding_share(order(True)), padding_share(order(False))
    assert mixed > 0.5
    assert grouped < 0.15


def test_long_and_short_batches_take_turns() -> None:
    """Sorted through, the epoch would be a curriculum."""
    longest = LENGTHS[steps_of(order(True))[: STEPS - 1]].max(axis=1)
    rises = np.diff(longest.astype(float)) > 0
    assert 0.35 < rises.mean() < 0.65


@pytest.mark.parametrize("first_step", [1, 70, STEPS])
@pytest.mark.parametrize("lanes", [1, 2])
def test_an_order_that_begins_later_is_the_rest_of_the_whole_one(lanes: int, first_step: int) -> None:
    whole, rest = steps_of(order(True, lanes)), steps_of(order(True, lanes, first_step=first_step))
    assert np.array_equal(rest, whole[first_step:])


def groups_read(rows: np.ndarray) -> int:
    """Row groups that a reader with WINDOW_GROUPS of them in memory reads."""
    kept: OrderedDict[int, None] = OrderedDict()
    read = 0
    for group in rows // ROWS_A_GROUP:
        read += group not in kept
        kept[group] = None
        kept.move_to_end(group)
        if len(kept) > WINDOW_GROUPS:
            kept.popitem(last=False)
    return read


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("index", [INDEX, MIXTURE])
def test_nothing_is_read_more_often(index: RowIndex, epoch: int) -> None:
    rows, begins = epoch_windows(index, 3, epoch)
    generator = np.random.default_rng(0)
    grouped = group_by_length(rows, begins, LENGTHS, BATCH, generator)
    assert sorted(grouped) == sorted(rows)  # of a mixture each part keeps its share
    assert not np.array_equal(grouped, rows)
    assert groups_read(grouped) <= groups_read(rows)
    one_stretch = np.zeros_like(begins)
    one_stretch[0] = True  # the control: over the ends of windows, a row group for almost every row
    assert groups_read(group_by_length(rows, one_stretch, LENGTHS, BATCH, generator)) > 10 * groups_read(rows)


def test_equal_lengths_keep_their_order_in_a_batch_and_any_size_is_taken() -> None:
    rows, begins = np.arange(10), np.array([True] + [False] * 9)
    for batch_size in (1, 3, 10, 16):
        grouped = group_by_length(rows, begins, np.zeros(10, dtype=np.int32), batch_size, np.random.default_rng(0))
        batches = [grouped[first : first + batch_size] for first in range(0, 10, batch_size)]
        assert all((np.diff(batch) == 1).all() for batch in batches)
        assert sorted(grouped) == list(range(10))
