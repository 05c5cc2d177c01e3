"""Training in this very process: the plain loop, with Ray Data rendering beside it."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pefomed_ray.config import TrainConfig, save_config
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.feed import execution_options, features_of, micro_batches
from pefomed_ray.training.loop import Report, run
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.outcome import halve, that_fits
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.trainer import dataset


def train_alone(config: TrainConfig, output: Path, report: Report) -> None:
    """Run `config`, which must ask for one worker, into `output`, or go on there; errors and epochs as `loop.run` gives
    them. What does not fit into memory is tried again with half the micro-batch."""
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "run.yaml")

    def stream(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        rendered = dataset(config, output)
        rendered.context.execution_options = execution_options()
        return micro_batches(rendered.iterator(), order, 1, base.renderer, features_of(config))

    ranks = Ranks(device=torch.device("cuda" if config.resources.use_gpu else "cpu"))
    while True:
        fitting = that_fits(config, output)
        try:
            return run(fitting, output, stream, ranks, report)
        except torch.OutOfMemoryError as error:
            halve(fitting, output, error)
