"""Keys and values in slots: what a row has is what it was given, and everything else is zero."""

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pefomed_ray.serving.engine.kv import KVSlots

HEADS, DIM = 2, 3


def prefilled(numbers: list[float], lengths: list[int]) -> DynamicCache:
    """Two layers, padded on the left with NaN: whatever stands there is nobody's."""
    cache = DynamicCache()
    width = max(lengths)
    keys_BHWD = torch.full((len(numbers), HEADS, width, DIM), float("nan"))
    for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        keys_BHWD[row, :, -length:] = number
    for layer in range(2):
        cache.update(keys_BHWD.clone(), -keys_BHWD, layer)
    return cache


@pytest.mark.parametrize("seed", range(6))
def test_rows_come_and_go(seed: int) -> None:
    """Numbers name the rows, NaN among them; several hundred columns, so that buffers grow and are moved."""
    draw, slots = random.Random(seed), KVSlots(5)
    rows: list[tuple[float, int]] = []
    for number in range(1, 400):
        action = draw.choice(("join", "leave", "step", "step"))
        if action == "join" and len(rows) < 5:
            count = draw.randint(1, 5 - len(rows))
            numbers = [float("nan") if draw.random() < 0.3 else number + i / 10 for i in range(count)]
            lengths = [draw.randint(1, 90) for _ in numbers]
            slots.join(prefilled(numbers, lengths), lengths)
            rows += list(zip(numbers, lengths, strict=True))
        elif action == "leave" and rows:
            gone = draw.randrange(len(rows))
            slots.leave(gone)
            rows[gone] = rows[-1]
            rows.pop()
        elif action == "step" and rows:
            rows = _step(slots, rows)
        _check(slots, rows)


def _step(slots: KVSlots, rows: list[tuple[float, int]]) -> list[tuple[float, int]]:
    slots.prepare()
    new_BH1D = torch.stack([torch.full((HEADS, 1, DIM), number) for number, _ in rows])
    for layer in slots.cache.layers:
        layer.update(new_BH1D, -new_BH1D)
    slots.advance()
    return [(number, length + 1) for number, length in rows]


def _check(slots: KVSlots, rows: list[tuple[float, int]]) -> None:
    window: Any = slots._window
    assert window.lengths == [length for _, length in rows]
    for layer in slots.cache.layers:
        expected = torch.zeros_like(layer.keys)
        for row, (number, length) in enumerate(rows):
            expected[row, :, window.edge - length : window.edge] = number
        torch.testing.assert_close(layer.keys, expected, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(layer.values, -expected, equal_nan=True, rtol=0, atol=0)
