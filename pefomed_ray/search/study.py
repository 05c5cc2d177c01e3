"""A search: Optuna proposes, ASHA stops what lags, and the leaderboard says what came of every trial."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from pefomed_ray.config import SearchConfig, TrainConfig, save_config
from pefomed_ray.config.schema import Choice, Dimension, Integer, LogUniform
from pefomed_ray.errors import ConfigError, PefomedError, original_error
from pefomed_ray.search.leaderboard import (
    TRIALS_FOLDER,
    EndedTrial,
    TrialRow,
    ranked,
    reason_of,
    trial_row,
    write_leaderboard,
)
from pefomed_ray.search.space import check_search, output_dir, trial_config
from pefomed_ray.search.trial import run_trial
from pefomed_ray.training.feed import DATA_WORKER_CPUS
from pefomed_ray.training.preflight import with_absolute_paths

OnReport = Callable[[str, dict[str, Any], dict[str, Any]], None]
"""Called with (trial id, its parameters, the epoch's row)."""


@dataclass(frozen=True)
class SearchResult:
    """Where a search's artifacts are; `best_config` trains the winner again."""

    output: Path
    leaderboard: Path
    best_config: Path
    rows: list[TrialRow]

    @property
    def best(self) -> TrialRow:
        """The winner."""
        return self.rows[0]


def run_search(
    search: SearchConfig, values: dict[str, Any], on_report: OnReport = lambda trial, params, row: None
) -> SearchResult:
    """Run all trials on the cluster Ray is connected to.

    A failed trial is marked with its reason and never wins; the first one's error is raised where all failed.
    """
    first = check_search(search, values)
    output = output_dir(search)
    output.mkdir(parents=True, exist_ok=True)
    save_config(search, output / "search.yaml")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    preset = with_absolute_paths(first).model_dump(mode="json")
    results = _tuner(search, preset, first, output, on_report).fit()
    trials = (
        EndedTrial(Path(result.path).name, dict(result.config), reason_of(result.error) if result.error else None)
        for result in results
    )
    rows = ranked(trial_row(output, trial, search.metric, first.training.epochs) for trial in trials)
    if rows[0].value is None:
        raise original_error(results.errors[0]) if results.errors else PefomedError("no trial reported anything")
    best_config = output / "best.yaml"
    save_config(trial_config(values, rows[0].params, name=f"{search.name}-best"), best_config)
    leaderboard = write_leaderboard(output, search.metric, rows)
    return SearchResult(output, leaderboard, best_config, rows)


def concurrent_trials(search: SearchConfig, config: TrainConfig, have: dict[str, float]) -> int:
    """How many trials the cluster holds at once, each with its own data workers.

    Raises ConfigError where it holds none: Tune would wait for ever.
    """
    resources = config.resources
    cpus = resources.data_workers * DATA_WORKER_CPUS + (0.0 if resources.use_gpu else resources.cpus_per_worker)
    fits = int(have.get("CPU", 0.0) / cpus)
    if resources.use_gpu:
        fits = min(fits, int(have.get("GPU", 0.0)))
    if fits < 1:
        gpu = " and 1 GPU" if resources.use_gpu else ""
        raise ConfigError(
            f"a trial needs {cpus:g} CPU{gpu}; "
            f"the cluster has {have.get('CPU', 0.0):g} CPU and {have.get('GPU', 0.0):g} GPU"
        )
    return min(fits, search.max_concurrent or fits)


class _Reports(tune.Callback):
    """Passes every report on to the caller."""

    def __init__(self, on_report: OnReport) -> None:
        self.on_report = on_report

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.on_report(trial.trial_id, trial.config, result)


def _tuner(
    search: SearchConfig, values: dict[str, Any], first: TrainConfig, output: Path, on_report: OnReport
) -> tune.Tuner:
    resources = first.resources
    request = {"GPU": 1.0, "CPU": 0.001} if resources.use_gpu else {"CPU": resources.cpus_per_worker}
    trainable = tune.with_parameters(run_trial, values=values, output=str(output / TRIALS_FOLDER))
    return tune.Tuner(
        tune.with_resources(trainable, request),
        param_space={key: _domain(dimension) for key, dimension in search.space.items()},
        tune_config=tune.TuneConfig(
            metric=search.metric,
            mode="max",
            num_samples=search.trials,
            max_concurrent_trials=concurrent_trials(search, first, ray.cluster_resources()),
            search_alg=OptunaSearch(seed=search.seed, points_to_evaluate=[dict(p) for p in search.points] or None),
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                # More than there are epochs: a trial ends by itself, not by being stopped in its last epoch.
                max_t=first.training.epochs + 1,
                grace_period=min(search.asha.grace_period_epochs, first.training.epochs),
                reduction_factor=search.asha.reduction_factor,
            ),
            reuse_actors=True,
            trial_dirname_creator=_trial_folder,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(output), verbose=0, callbacks=[_Reports(on_report)]),
    )


def _domain(dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.choice))
    if isinstance(dimension, LogUniform):
        return tune.loguniform(*dimension.loguniform)
    if isinstance(dimension, Integer):
        return tune.randint(dimension.int[0], dimension.int[1] + 1)
    return tune.uniform(*dimension.uniform)


def _trial_folder(trial: Any) -> str:
    return str(trial.trial_id)
