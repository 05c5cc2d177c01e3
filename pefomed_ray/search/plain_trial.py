"""A trial on its own: the plain training loop in Tune's own process, reporting every epoch."""

from pathlib import Path
from typing import Any

from ray import tune

from pefomed_ray.search.space import trial_config
from pefomed_ray.search.trial import Suggestion, beginning, report_again
from pefomed_ray.training.alone import train_alone
from pefomed_ray.training.outcome import is_stopped


def run_trial(suggestion: Suggestion, values: dict[str, Any], output: str) -> None:
    """Train with the suggested parameters over the preset's `values`; everything goes to `<output>/<trial>`.

    Goes on there where it began before. Tune may reuse the process for a later trial, which spares it importing
    everything again.
    """
    folder = Path(output) / suggestion["trial"]
    config = trial_config(values, suggestion["params"], name=folder.name, output_dir=str(folder))
    with beginning(folder):
        if not is_stopped(folder):
            report_again(folder)
            train_alone(config, folder, tune.report)
