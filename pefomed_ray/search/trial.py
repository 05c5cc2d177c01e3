"""One trial: the plain training loop in Tune's own process, reporting every epoch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune

from pefomed_ray.config import save_config
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.search.space import trial_config
from pefomed_ray.training.feed import execution_options, micro_batches
from pefomed_ray.training.loop import run
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.trainer import dataset


def run_trial(params: dict[str, Any], values: dict[str, Any], output: str) -> None:
    """Train with `params` over the preset's `values`; everything goes to `<output>/<trial id>`.

    Tune may reuse the process for a later trial, which spares it importing everything again.
    """
    folder = Path(output) / tune.get_context().get_trial_id()
    config = trial_config(values, params, name=folder.name, output_dir=str(folder))
    folder.mkdir(parents=True)
    save_config(config, folder / "run.yaml")
    device = torch.device("cuda" if config.resources.use_gpu else "cpu")

    def stream(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        rendered = dataset(config)
        rendered.context.execution_options = execution_options()
        return micro_batches(rendered.iterator(), order, base.renderer)

    run(config, folder, stream, Ranks(device=device), tune.report)
