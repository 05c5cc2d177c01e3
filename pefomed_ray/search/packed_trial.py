"""A packed trial: a thin client of the host that trains it beside others (`host`). Loads no torch: there are many."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from pefomed_ray.search.space import trial_config
from pefomed_ray.search.trial import Suggestion, beginning, report_again
from pefomed_ray.training.outcome import is_stopped


def run_packed_trial(suggestion: Suggestion, values: dict[str, Any], output: str, hosts: Sequence[Any]) -> None:
    """`plain_trial.run_trial`, with each epoch done by one of the hosts: always the same one, by the trial's number."""
    folder = Path(output) / suggestion["trial"]
    config = trial_config(values, suggestion["params"], name=folder.name, output_dir=str(folder))
    plain = config.model_dump(mode="json")
    host = hosts[int(suggestion["trial"]) % len(hosts)]
    with beginning(folder):
        if is_stopped(folder):
            return
        epochs, is_over = report_again(folder), False
        while not is_over:
            epochs += 1
            row, is_over = ray.get(host.advance.remote((plain, str(folder), epochs)))
            tune.report(row)
