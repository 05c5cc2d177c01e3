"""What a data worker makes of a block: every row in its place, padding where the order says."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.data.plan import Part, RowIndex
from pefomed_ray.training import feed
from pefomed_ray.training.feed import RenderBlocks, RenderSettings
from pefomed_ray.training.order import PADDING, TrainingOrder


@pytest.fixture
def answers_are_row_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("L", (32, 32)).save(buffer, "PNG")

    def read_rows(index: RowIndex, rows: np.ndarray) -> list[dict[str, Any]]:
        image = {"bytes": buffer.getvalue(), "path": "x.png"}
        return [
            {"id": f"q{row}", "task": "vqa", "question": "?", "answer": str(row), "images": [image]} for row in rows
        ]

    monkeypatch.setattr(feed, "read_rows", read_rows)


@pytest.mark.usefixtures("answers_are_row_numbers")
def test_a_micro_batch_is_the_same_wherever_its_block_begins() -> None:
    """Padding too: its length decides how many numbers dropout draws."""
    index = RowIndex("train", (("part-0", 0),), (0, 11), (Part(1, 1.0),))

    def micro_batches(first_step: int) -> list[dict[str, Any]]:
        order = TrainingOrder(
            index, seed=1, batch_size=4, micro_batch_size=4, lanes=1, total_steps=6, first_step=first_step
        )
        table = RenderBlocks(order, RenderSettings(str(EMBEDDED_FOLDER), "short", max_answer_tokens=8))({"item": [0]})
        return [table.slice(start, 4).to_pylist() for start in range(0, len(table), 4)]

    whole = micro_batches(0)
    assert [row["weight"] for row in whole[5]] == [1, 1, 1, 0]
    for first_step in range(1, 6):
        assert micro_batches(first_step) == whole[first_step:]


@pytest.mark.usefixtures("answers_are_row_numbers")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_block_over_the_end_of_an_epoch_keeps_every_row(workers: int) -> None:
    index = RowIndex("train", (("part-0", 0),), (0, 11), (Part(1, 1.0),))
    order = TrainingOrder(index, seed=1, batch_size=4, micro_batch_size=2, lanes=workers, total_steps=6)
    render = RenderBlocks(order, RenderSettings(str(EMBEDDED_FOLDER), "short", max_answer_tokens=8))
    seen: list[int] = []
    for block in range(order.blocks):
        rows = order.block_rows(block)
        assert PADDING in rows[:-1] or workers == 2
        table = render({"item": np.array([block])})
        assert table["weight"].to_pylist() == (rows != PADDING).astype(int).tolist()
        texts = [render.renderer.renderer.decode(ids) for ids in table["answer"].to_pylist()]
        placed = [int(text) for text, row in zip(texts, rows, strict=True) if row != PADDING]
        assert placed == rows[rows != PADDING].tolist()
        seen += placed
    assert sorted(seen) == sorted(list(range(11)) * 2)  # two epochs, every row once in each
