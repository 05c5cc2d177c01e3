"""Shards and training in this very process, without Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.config import TrainConfig
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.phantom import write_slake
from pefomed_ray.data.shard_file import plan_shards, write_shard
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.feed import RenderBlocks, RenderSettings, micro_batches
from pefomed_ray.training.loop import run
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.ranks import Ranks


def write_shards(folder: Path, images: tuple[int, int, int] = (9, 2, 2)) -> Path:
    """Phantoms with three questions each, by split."""
    write_slake(folder / "corpus", images=sum(images), questions_per_image=3, seed=5, splits=images)
    source, output, options = open_folder(folder / "corpus"), folder / "shards", DataOptions()
    intake = take_in(source, options)
    files: list[ShardFile] = []
    for spec in plan_shards(intake.references, source, options.seed, options.shard_bytes):
        result = write_shard(spec.to_json(), source, open_folder(output), intake.source, options)
        assert result.file
        files.append(result.file)
    rows = {split: sum(file.rows for file in files if file.split == split) for split in ("train", "validation", "test")}
    nothing: dict[str, int] = {}
    manifest = ShardManifest(
        source="slake", licence="open", rows=rows, tasks=nothing, answer_types=nothing, bytes=nothing,
        quarantined=nothing, image_overlap=nothing, files=tuple(files), made_by={},
    )  # fmt: skip
    save_document(manifest, output / "manifest.json")
    return output


class Blocks:
    """What Ray Data brings: the blocks of a data worker, one after the other, as one rank's iterator gives them."""

    def __init__(self, order: TrainingOrder, base: Base) -> None:
        self.order = order
        settings = RenderSettings(str(base.path), base.renderer.template.name, max_answer_tokens=32)
        self.render = RenderBlocks(order, settings)

    def iter_batches(self, batch_size: int, **_: Any) -> Iterator[pa.Table]:
        for block in range(self.order.blocks):
            table = self.render({"item": np.array([block])})
            yield from (table.slice(start, batch_size) for start in range(0, len(table), batch_size))


def stream(order: TrainingOrder, base: Base) -> Iterator[Batch]:
    """One rank's micro-batches."""
    return micro_batches(Blocks(order, base), order, 1, base.renderer, features=None)


def train(
    config: TrainConfig, output: Path, feed: Callable[[TrainingOrder, Base], Iterator[Batch]] = stream
) -> list[dict[str, Any]]:
    """Run it, or go on with it; its epochs."""
    output.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    run(config, output, feed, Ranks(), rows.append)
    return rows


def weights(bundle: Path) -> torch.Tensor:
    """All that was trained, in one row."""
    tensors = {name: value for path in sorted(bundle.glob("*.safetensors")) for name, value in load_file(path).items()}
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
