"""Rows that name their images: what a data worker sends, and what a rank makes of it from the feature cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.model.base import open_base
from pefomed_ray.training import feed
from pefomed_ray.training.feed import RecordRenderer, RenderBlocks, RenderSettings, micro_batches
from pefomed_ray.training.order import PADDING
from pefomed_ray.training.step import mean_loss

SHAPE = (36, 512)


class Features:
    """A cache whose features of image `n` are all n / 10."""

    def features(self, digests: list[str]) -> torch.Tensor:
        return torch.stack([torch.full(SHAPE, int(digest) / 10, dtype=torch.float16) for digest in digests])


class Tables:
    """Ray Data's iterator over one block."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, batch_size: int, **options: Any) -> list[pa.Table]:
        return [self.table.slice(start, batch_size) for start in range(0, len(self.table), batch_size)]


class Order:
    """One block of three rows in batches of two."""

    index = None
    micro_batch_size = 2

    def block_rows(self, block: int) -> np.ndarray:
        return np.array([2, 0, 1, PADDING])

    def in_turn(self, tables: Iterator[pa.Table], workers: int) -> Iterator[pa.Table]:
        return tables


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Order:
    """Images that cannot be decoded, so that whoever tries is found out."""

    def read_rows(index: None, rows: np.ndarray) -> list[dict[str, Any]]:
        image = {"bytes": b"not an image", "path": "x.png"}
        text = {"id": "q", "task": "vqa", "question": "?", "images": [image]}
        return [text | {"answer": str(row), "image_sha256": [str(row)]} for row in rows]

    monkeypatch.setattr(feed, "read_rows", read_rows)
    return Order()


def test_features_arrive_with_their_rows_and_nothing_is_decoded(order: Order) -> None:
    settings = RenderSettings(str(EMBEDDED_FOLDER), "short", max_answer_tokens=8, cached_features=True)
    table = RenderBlocks(order, settings)({"item": np.array([0])})
    assert table.column_names == ["id", "prompt", "answer", "weight", "image_sha256"]
    base = open_base("embedded", "short")
    batches = list(micro_batches(Tables(table), order, 1, base.renderer, Features()))
    assert len(batches) == 2
    seen = []
    for batch in batches:
        assert list(batch.tensors) == ["patch_features"]
        features_NVW = batch.tensors["patch_features"]
        assert (features_NVW.dtype, tuple(features_NVW.shape)) == (torch.float16, (2, *SHAPE))
        for ids, labels, features in zip(batch.ids_BT, batch.labels_BT, features_NVW, strict=True):
            if (labels != -100).any():  # not padding
                row = int(base.renderer.decode(ids[labels != -100].tolist()))
                assert torch.equal(features, Features().features([str(row)])[0])
                seen.append(row)
        moved = batch.to(torch.device("cpu"))
        assert torch.equal(moved.tensors["patch_features"], features_NVW)
    assert sorted(seen) == [0, 1, 2]
    del base.model.vision_tower
    assert mean_loss(base.model, batches, base.renderer) > 0


def test_without_a_cache_images_are_decoded(order: Order) -> None:
    """The control: the same rows, and somebody does try to decode them."""
    settings = RenderSettings(str(EMBEDDED_FOLDER), "short", max_answer_tokens=8)
    with pytest.raises(ValueError, match="an image of 12 bytes"):
        RenderBlocks(order, settings)({"item": np.array([0])})


def test_validation_rows_hold_features() -> None:
    renderer = open_base("embedded", "short").renderer
    record = {
        "id": "q",
        "task": "vqa",
        "question": "?",
        "answer": "4",
        "images": [{"bytes": b""}] * 2,
        "image_sha256": ["3", "5"],
    }
    row = RecordRenderer(renderer, 8, Features()).render(record)  # type: ignore[arg-type]
    assert list(row.tensors) == ["patch_features"]
    assert row.tensors["patch_features"][:, 0, 0].tolist() == pytest.approx([0.3, 0.5], abs=1e-3)
    assert row.prompt.count(renderer.image_token_id) == 2 * SHAPE[0]
