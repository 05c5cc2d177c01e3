"""Shards to batches: Ray Data renders on CPU workers, off the training ranks; each rank takes whole micro-batches.

The order is fixed beforehand (`order`), so the stream is one pass for the whole run: nothing restarts between epochs.
With `preserve_order`, Ray's splitter hands each next block to the rank that has had the fewest rows; blocks of equal
size therefore go round robin, which is the order they were planned in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from pefomed_ray.data.plan import read_rows
from pefomed_ray.rendering.batches import Batch, Rendered, training_batch
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.templates import template_named
from pefomed_ray.training.order import PADDING, TrainingOrder

DATA_WORKER_CPUS = 0.5
"""What one rendering actor reserves; small, so that training and data fit two CPUs."""
PREFETCHED_MICRO_BATCHES = 4
PIXEL_CACHE_BYTES = 256 << 20
"""Rendered pixels a data worker keeps."""


@dataclass(frozen=True)
class RenderSettings:
    """What a data worker needs to render; pickles small."""

    base: str
    template: str
    max_answer_tokens: int

    def open(self) -> Renderer:
        """The renderer."""
        return Renderer.open(Path(self.base), template_named(self.template))


class RecordRenderer:
    """Renders records, keeping the pixels of recent images: a VQA corpus asks a dozen questions about each."""

    def __init__(self, renderer: Renderer, max_answer_tokens: int) -> None:
        self.renderer = renderer
        self.max_answer_tokens = max_answer_tokens
        image_bytes = 3 * renderer.image_spec.size_px**2
        self._pixels = lru_cache(maxsize=max(PIXEL_CACHE_BYTES // image_bytes, 1))(renderer.pixels)

    def render(self, record: dict[str, Any]) -> Rendered:
        """A record (RECORD_SCHEMA) as prompt, answer and pixels."""
        images = tuple(image["bytes"] for image in record["images"])
        return Rendered(
            prompt=self.renderer.prompt_ids(record["task"], record["question"], len(images)),
            answer=self.renderer.answer_ids(record["answer"], self.max_answer_tokens),
            pixels_NCHW=self._pixels(images),
        )


class RenderBlocks:
    """A Ray Data actor: block numbers in, rendered rows out."""

    def __init__(self, order: TrainingOrder, settings: RenderSettings) -> None:
        torch.set_num_threads(1)
        self.order = order
        self.renderer = RecordRenderer(settings.open(), settings.max_answer_tokens)

    def __call__(self, blocks: dict[str, np.ndarray]) -> pa.Table:
        """One table of `micro_batch_size` x n rows for the one block number given."""
        rows = self.order.block_rows(int(blocks["item"][0]))
        real = rows[rows != PADDING]
        records = read_rows(self.order.index, real if len(real) else np.zeros(1, dtype=np.int64))
        rendered = [self.renderer.render(record) for record in records]
        # A padding row is a copy of the first one with weight 0: real shapes, no effect on the loss. It may stand in
        # the middle: a block can hold the end of one epoch and the beginning of the next.
        following = iter(rendered)
        padded = [rendered[0] if row == PADDING else next(following) for row in rows]
        return pa.table(
            {
                "prompt": pa.array([row.prompt for row in padded], pa.list_(pa.int32())),
                "answer": pa.array([row.answer for row in padded], pa.list_(pa.int32())),
                "pixels": pa.array([row.pixels_NCHW.numpy().tobytes() for row in padded], pa.binary()),
                "weight": pa.array((rows != PADDING).astype(np.int8)),
            }
        )


def training_dataset(order: TrainingOrder, settings: RenderSettings, data_workers: int) -> ray.data.Dataset:
    """The run's stream of rendered rows, lazily; nothing is read before a rank iterates."""
    numbers = ray.data.from_items(list(range(order.blocks)), override_num_blocks=order.blocks)
    return numbers.map_batches(
        RenderBlocks,
        fn_constructor_args=(order, settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=data_workers),
        num_cpus=DATA_WORKER_CPUS,
    )


def execution_options() -> ray.data.ExecutionOptions:
    """Order is a promise here, not an accident."""
    return ray.data.ExecutionOptions(preserve_order=True)


def micro_batches(iterator: ray.data.DataIterator, order: TrainingOrder, renderer: Renderer) -> Iterator[Batch]:
    """A rank's micro-batches, rendered rows padded to a batch."""
    size_px = renderer.image_spec.size_px
    for table in iterator.iter_batches(
        batch_size=order.micro_batch_size, batch_format="pyarrow", prefetch_batches=PREFETCHED_MICRO_BATCHES
    ):
        rows = [
            Rendered(
                prompt=row["prompt"],
                answer=row["answer"],
                pixels_NCHW=torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(-1, 3, size_px, size_px),
                weight=row["weight"],
            )
            for row in table.to_pylist()
        ]
        yield training_batch(rows, renderer.pad_token_id)
