"""What Ray Train runs on every worker: the plain loop, with this rank's stream and reports to Ray."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import DivergedError, PefomedError
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.feed import features_of, micro_batches
from pefomed_ray.training.loop import run
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.outcome import halve, is_stopped, record_failure, record_stop, that_fits
from pefomed_ray.training.ranks import Ranks

ASK_INTERVAL_S = 1.0
"""Clouds give notice 15 s ahead or more."""


def train_worker(payload: dict[str, Any]) -> None:
    """`payload`: the config as plain values, and `output`, a folder every node sees.

    Ray starts all workers again where one is lost; they go on from the newest checkpoint. What another try would meet
    again is written down, and the next try ends at once.
    """
    config, output = build_config(TrainConfig, payload["config"], "config"), Path(payload["output"])
    if is_stopped(output):
        return
    config = that_fits(config, output)
    context = ray.train.get_context()
    ranks = Ranks(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        config.resources.strategy,
        getattr(torch, config.resources.reduce_dtype),
        config.resources.cpu_offload,
    )

    def stream(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        return micro_batches(
            ray.train.get_dataset_shard("train"), order, ranks.world_size, base.renderer, features_of(config)
        )

    try:
        run(config, output, stream, ranks, ray.train.report, _Preemption(ranks))
    except DivergedError as error:  # on all ranks alike: nobody waits for this one
        record_stop(output, error)
    except PefomedError as error:
        record_stop(output, error)
        raise
    except torch.OutOfMemoryError as error:
        record_failure(output, ranks.rank, error)
        try:
            halve(config, output, error)
        except PefomedError as nothing_left:
            record_stop(output, nothing_left)
        raise
    except Exception as error:
        record_failure(output, ranks.rank, error)
        raise


class _Preemption:
    """Whether a node of the run is about to be taken away: from the notice on True, on all ranks at the same step.

    Steps then go on, each with a checkpoint, until Ray starts the ranks again elsewhere: how long that takes is not
    known. Ray is asked once a second, when rank 0's clock says so: its answer takes milliseconds, a small step no
    longer.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked = time.monotonic()
        self._noticed = False

    def __call__(self) -> bool:
        due = self._ranks.rank == 0 and time.monotonic() - self._asked > ASK_INTERVAL_S
        if not self._noticed and self._ranks.sum(float(due)):
            self._asked = time.monotonic()
            self._noticed = ray.train.get_preemption_info() is not None
        return self._noticed
