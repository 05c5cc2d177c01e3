"""One trial: the plain training loop in Tune's own process, reporting every epoch."""

from pathlib import Path
from typing import Any

from ray import tune

from pefomed_ray.search.space import trial_config
from pefomed_ray.training.alone import train_alone


def run_trial(params: dict[str, Any], values: dict[str, Any], output: str) -> None:
    """Train with `params` over the preset's `values`; everything goes to `<output>/<trial id>`.

    Tune may reuse the process for a later trial, which spares it importing everything again.
    """
    folder = Path(output) / tune.get_context().get_trial_id()
    train_alone(trial_config(values, params, name=folder.name, output_dir=str(folder)), folder, tune.report)
