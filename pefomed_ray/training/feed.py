"""Shards to batches: Ray Data renders on CPU workers, off the training ranks; each rank takes whole micro-batches.

The order is fixed beforehand (`order`), so the stream is one pass for the whole run: nothing restarts between epochs.
With `preserve_order`, Ray's splitter hands each next block to the rank that has had the fewest rows; blocks of equal
size therefore go round robin, which is the order they were planned in, for any number of ranks that divides the lanes.

With a feature cache the rows name their images and each rank reads the features itself: they are larger than pixels
(2.9 MB an image at the paper's sizes), and mapped into memory they need no copy through Ray's object store.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from safetensors.torch import load, save

from pefomed_ray.artifacts.base import family_of
from pefomed_ray.artifacts.storage import local_path
from pefomed_ray.config import TrainConfig
from pefomed_ray.data.feature_cache import FeatureCache, open_cache
from pefomed_ray.data.plan import read_rows
from pefomed_ray.rendering.batches import Batch, Rendered, training_batch
from pefomed_ray.rendering.opening import AnyRenderer, open_renderer
from pefomed_ray.training.order import PADDING, TrainingOrder

DATA_WORKER_CPUS = 0.5
"""What one rendering actor reserves; small, so that training and data fit two CPUs."""
PREFETCHED_MICRO_BATCHES = 4
IMAGE_CACHE_BYTES = 256 << 20
"""Images, as they were read, that a data worker keeps."""
TEXT_FIELDS = [
    ("id", pa.string()),
    ("prompt", pa.list_(pa.int32())),
    ("answer", pa.list_(pa.int32())),
    ("weight", pa.int8()),
]
TENSOR_ROWS = pa.schema([*TEXT_FIELDS, ("tensors", pa.binary())])
FEATURE_ROWS = pa.schema([*TEXT_FIELDS, ("image_sha256", pa.list_(pa.string()))])
"""What a data worker sends to the ranks, without and with a feature cache."""


@dataclass(frozen=True)
class RenderSettings:
    """What a data worker needs to render; pickles small."""

    base: str
    template: str
    max_answer_tokens: int
    cached_features: bool = False
    """Name the images by sha256 in place of decoding them."""

    def open(self) -> AnyRenderer:
        """The renderer."""
        folder = Path(self.base)
        return open_renderer(folder, family_of(folder), self.template)


def features_of(config: TrainConfig) -> FeatureCache | None:
    """The run's feature cache, if it uses one."""
    return open_cache(local_path(config.data.feature_cache)) if config.data.feature_cache else None


class RecordRenderer:
    """Renders records, keeping recent images as they were read: a VQA corpus asks a dozen questions about each."""

    def __init__(self, renderer: AnyRenderer, max_answer_tokens: int, features: FeatureCache | None = None) -> None:
        self.renderer = renderer
        self.max_answer_tokens = max_answer_tokens
        self.features = features
        self._read = lru_cache(maxsize=max(IMAGE_CACHE_BYTES // renderer.bytes_per_image, 1))(renderer.read)

    def render(self, record: dict[str, Any]) -> Rendered:
        """A record (RECORD_SCHEMA) as prompt, answer and images: cached features if there is a cache."""
        if self.features is not None:
            images: Any = {"patch_features": self.features.features(record["image_sha256"])}
        else:
            images = self._read(tuple(image["bytes"] for image in record["images"]))
        return self._render(record, images)

    def render_texts(self, record: dict[str, Any]) -> Rendered:
        """A record without its images; of a `pefomed` base alone, where only their number counts."""
        return replace(self._render(record, {"patch_features": torch.empty(len(record["images"]))}), tensors={})

    def _render(self, record: dict[str, Any], images: Any) -> Rendered:
        return self.renderer.render(
            record["task"], record["question"], images, record["answer"], self.max_answer_tokens
        )


class RenderBlocks:
    """A Ray Data actor: block numbers in, rendered rows out."""

    def __init__(self, order: TrainingOrder, settings: RenderSettings) -> None:
        torch.set_num_threads(1)
        self.order = order
        self.renderer = RecordRenderer(settings.open(), settings.max_answer_tokens)
        self.cached_features = settings.cached_features

    def __call__(self, blocks: dict[str, np.ndarray]) -> pa.Table:
        """One table of `micro_batch_size` x n rows for the one block number given."""
        rows = self.order.block_rows(int(blocks["item"][0]))
        real = rows[rows != PADDING]
        records = read_rows(self.order.index, real if len(real) else np.zeros(1, dtype=np.int64))
        rendered = [self._row(record) for record in records]
        following = iter(rendered)
        padded = []
        for micro_batch in rows.reshape(-1, self.order.micro_batch_size):
            mine = [next(following) | {"weight": 1} for row in micro_batch if row != PADDING]
            # A padding row has weight 0: real shapes, no effect on the loss. It copies a row of its own micro-batch:
            # were it longer, dropout would draw otherwise, and a run that goes on cuts its blocks elsewhere.
            filler = (mine or rendered)[0] | {"weight": 0}
            padded += mine + [filler] * (len(micro_batch) - len(mine))
        return pa.Table.from_pylist(padded, FEATURE_ROWS if self.cached_features else TENSOR_ROWS)

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.cached_features:
            texts = self.renderer.render_texts(record)
            images = {"image_sha256": record["image_sha256"]}
        else:
            texts = self.renderer.render(record)
            images = {"tensors": save(texts.tensors)}
        return {"id": record["id"], "prompt": texts.prompt, "answer": texts.answer} | images


def training_dataset(order: TrainingOrder, settings: RenderSettings, data_workers: int) -> ray.data.Dataset:
    """The run's stream of rendered rows, lazily; nothing is read before a rank iterates.

    Without a row for a run that was cut off after its last step; its ranks end before they ask for one.
    """
    if not order.blocks:
        return ray.data.from_arrow(TENSOR_ROWS.empty_table())
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


def micro_batches(
    iterator: ray.data.DataIterator,
    order: TrainingOrder,
    workers: int,
    renderer: AnyRenderer,
    features: FeatureCache | None,
) -> Iterator[Batch]:
    """One of `workers` ranks' micro-batches, rendered rows padded to a batch. Raises DataError where the cache lacks an
    image."""
    tables = iterator.iter_batches(
        batch_size=order.micro_batch_size, batch_format="pyarrow", prefetch_batches=PREFETCHED_MICRO_BATCHES
    )
    for table in order.in_turn(iter(tables), workers):
        rows = [_rendered(row, features) for row in table.to_pylist()]
        yield training_batch(rows, renderer.pad_token_id)


def _rendered(row: dict[str, Any], features: FeatureCache | None) -> Rendered:
    """A row that a data worker sent."""
    if features is not None:
        tensors = {"patch_features": features.features(row["image_sha256"])}
    else:
        tensors = load(row["tensors"])
    return Rendered(row["prompt"], row["answer"], tensors, row["weight"], row["id"])
