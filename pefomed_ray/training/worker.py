"""What Ray Train runs on every worker: the plain loop, with this rank's stream and reports to Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.feed import features_of, micro_batches
from pefomed_ray.training.loop import run
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.ranks import Ranks


def train_worker(payload: dict[str, Any]) -> None:
    """`payload`: the config as plain values, and `output`, a folder every node sees."""
    config = build_config(TrainConfig, payload["config"], "config")
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def stream(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        return micro_batches(ray.train.get_dataset_shard("train"), order, base.renderer, features_of(config))

    run(config, Path(payload["output"]), stream, ranks, ray.train.report)
