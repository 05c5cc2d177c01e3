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
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.trainer import dataset


def train_alone(config: TrainConfig, output: Path, report: Report) -> None:
    """Run `config`, which must ask for one worker, into `output`; errors and epochs as `loop.run` gives them."""
    output.mkdir(parents=True)
    save_config(config, output / "run.yaml")

    def stream(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        rendered = dataset(config)
        rendered.context.execution_options = execution_options()
        return micro_batches(rendered.iterator(), order, base.renderer, features_of(config))

    run(config, output, stream, Ranks(device=torch.device("cuda" if config.resources.use_gpu else "cpu")), report)
