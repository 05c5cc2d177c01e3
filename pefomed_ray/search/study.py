"""A search: Optuna proposes, ASHA stops what lags, and the leaderboard says what came of every trial."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from optuna.study import Study
from optuna.trial import TrialState
from ray import tune
from ray.tune.result import TRAINING_ITERATION
from ray.tune.schedulers import ASHAScheduler

from pefomed_ray.config import SearchConfig, TrainConfig, save_config
from pefomed_ray.errors import ConfigError, PefomedError
from pefomed_ray.search.choice import Choice, choose, in_order, winning_bundle
from pefomed_ray.search.features import with_cached_features
from pefomed_ray.search.host import CLIENT_CPUS, hosts_of
from pefomed_ray.search.leaderboard import (
    TRIALS_FOLDER,
    EndedTrial,
    TrialRow,
    ranked,
    trial_row,
    write_leaderboard,
)
from pefomed_ray.search.lock import locked
from pefomed_ray.search.packed_trial import run_packed_trial
from pefomed_ray.search.plain_trial import run_trial
from pefomed_ray.search.planner import plan_packs
from pefomed_ray.search.report import write_report
from pefomed_ray.search.searcher import LOST, StudySearch
from pefomed_ray.search.space import check_search, output_dir, params_of, record_search, trial_config, why_not_packed
from pefomed_ray.search.storage import ENDED, REASON, open_study, remaining, reported, trial_name
from pefomed_ray.search.trial import failure
from pefomed_ray.training.feed import DATA_WORKER_CPUS
from pefomed_ray.training.outcome import raise_stop

TrialFunction = Callable[..., None]
"""Called in a process of its own with what is suggested, the preset's `values` and the folder of all trials, `output`;
reports an epoch's row by `tune.report`, and again those up to where it goes on."""


class Watch(Protocol):
    """Whom a search tells how it goes."""

    def __call__(self, trial: str, params: dict[str, Any], row: dict[str, Any]) -> None:
        """A trial has reported an epoch."""

    def failed(self, trial: str, params: dict[str, Any], reason: str) -> None:
        """A trial came to no result."""

    def rescoring(self, done: int, total: int) -> None:
        """So many answers of a trial that is re-scored are there."""

    def judging(self, done: int, total: int) -> None:
        """So many questions about them are answered by the judge."""


class Unwatched:
    """Tells nobody."""

    def __call__(self, trial: str, params: dict[str, Any], row: dict[str, Any]) -> None: ...

    def failed(self, trial: str, params: dict[str, Any], reason: str) -> None: ...

    def rescoring(self, done: int, total: int) -> None: ...

    def judging(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Running:
    """How a search's trials run."""

    trial: TrialFunction
    request: dict[str, float]
    """What Tune reserves for one."""
    at_once: int
    first: TrainConfig
    """What all start from."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What else the function takes."""


@dataclass(frozen=True)
class SearchResult:
    """Where a search's artifacts are; `best_config` trains the winner again."""

    output: Path
    leaderboard: Path
    best_config: Path
    report: Path
    bundle: Path
    """The winner's."""
    rows: list[TrialRow]
    """The winner first."""
    why: str
    """It won, in words."""

    @property
    def best(self) -> TrialRow:
        """The winner."""
        return self.rows[0]


def run_search(
    search: SearchConfig,
    values: dict[str, Any],
    watch: Watch | None = None,
    *,
    resume: bool = False,
) -> SearchResult:
    """Run all trials on the cluster Ray is connected to, and choose the winner.

    With `resume` the search in the output folder goes on: with those of its trials that had begun, from their newest
    checkpoints, then with the others; from the beginning where the folder is empty. A failed trial is marked with its
    reason and never wins; the first one's error is raised where all failed. Raises what `check_search` and `open_study`
    raise.
    """
    first = check_search(search, values, resume=resume)
    output = output_dir(search)
    output.mkdir(parents=True, exist_ok=True)
    watch = watch or Unwatched()
    with locked(output):
        study = run_trials(search, first, watch, resume=resume)
        rows = ranked(trial_row(output, trial, search.metric) for trial in _ended(search, study))
        if not rows:
            raise PefomedError("no trial has ended an epoch yet; go on with --resume")
        if rows[0].value is None:
            write_leaderboard(output, search.metric, rows)
            write_report(output, search.name, search.metric, study, rows, None)
            raise_stop(output / TRIALS_FOLDER / rows[0].trial)
            raise PefomedError(f"all trials failed; the first: {rows[0].reason}")
        workers = concurrent_trials(search, first, _nodes())
        choice = choose(search, rows, output, workers=workers, on_progress=watch.rescoring, on_judging=watch.judging)
        return _with_a_winner(search, values, study, rows, choice)


def _with_a_winner(
    search: SearchConfig, values: dict[str, Any], study: Study, rows: Sequence[TrialRow], choice: Choice
) -> SearchResult:
    output = output_dir(search)
    rows = in_order(rows, choice)
    best, best_config = trial_config(values, choice.winner.params, name=f"{search.name}-best"), output / "best.yaml"
    save_config(best, best_config)
    return SearchResult(
        output=output,
        leaderboard=write_leaderboard(output, search.metric, rows),
        best_config=best_config,
        report=write_report(output, search.name, search.metric, study, rows, choice),
        bundle=winning_bundle(search, choice, best, output),
        rows=rows,
        why=choice.why,
    )


def run_trials(
    search: SearchConfig, first: TrainConfig, watch: Watch, *, resume: bool, trial: TrialFunction | None = None
) -> Study:
    """The study, once all its trials have ended or the search's plateau or time budget is reached.

    `trial`: called for each by itself, in place of what trains one.
    """
    study = open_study(search, resume=resume)
    record_search(search, first)
    if remaining(search, study):
        # Tune refuses a trial that ends without a report, as one does that fails in its first epoch.
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
        with nullcontext(by_themselves(search, first, trial)) if trial else _running(search, first) as running:
            _tuner(search, running, study, watch).fit()
    return study


@contextmanager
def _running(search: SearchConfig, first: TrainConfig) -> Iterator[Running]:
    """Packed where that can be."""
    if why_not_packed(search, first.model_dump(mode="json")):
        yield by_themselves(search, first, run_trial)
        return
    output, plan = output_dir(search), plan_packs(search, first, _nodes())
    cached = with_cached_features(first, output, workers=plan.hosts)
    with hosts_of(cached, plan, output) as (hosts, at_once):
        yield Running(run_packed_trial, {"CPU": CLIENT_CPUS}, at_once, cached, {"hosts": hosts})


def by_themselves(search: SearchConfig, first: TrainConfig, trial: TrialFunction) -> Running:
    """Each trial in a process of its own, which trains it."""
    resources = first.resources
    request = {"GPU": 1.0, "CPU": CLIENT_CPUS} if resources.use_gpu else {"CPU": resources.cpus_per_worker}
    return Running(trial, request, concurrent_trials(search, first, _nodes()), first)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def concurrent_trials(search: SearchConfig, config: TrainConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials nodes with these resources hold at once, each on one node with its own data workers.

    Raises ConfigError where they hold none: Tune would wait for ever.
    """
    resources = config.resources
    need = {"CPU": resources.data_workers * DATA_WORKER_CPUS}
    if resources.use_gpu:
        need["GPU"] = 1.0
    else:
        need["CPU"] += resources.cpus_per_worker
    fits = sum(min(int(node.get(name, 0.0) / amount) for name, amount in need.items()) for node in nodes)
    if fits < 1:
        gpu = " and 1 GPU" if resources.use_gpu else ""
        have = "; ".join(f"{node.get('CPU', 0.0):g} CPU and {node.get('GPU', 0.0):g} GPU" for node in nodes)
        raise ConfigError(f"a trial needs {need['CPU']:g} CPU{gpu} on one node; the cluster's have {have or 'nothing'}")
    return min(fits, search.max_concurrent or fits)


class _Reports(tune.Callback):
    """Passes on every report of a trial, and why it failed."""

    def __init__(self, watch: Watch, trials: Path) -> None:
        self.watch = watch
        self.trials = trials

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.watch(**trial.config, row=result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if reason := failure(self.trials / trial.config["trial"]):
            self.watch.failed(**trial.config, reason=reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch.failed(**trial.config, reason=LOST)


def _tuner(search: SearchConfig, running: Running, study: Study, watch: Watch) -> tune.Tuner:
    output, first = output_dir(search), running.first
    trainable = tune.with_parameters(
        running.trial, values=first.model_dump(mode="json"), output=str(output / TRIALS_FOLDER), **running.parameters
    )
    return tune.Tuner(
        tune.with_resources(trainable, running.request),
        tune_config=tune.TuneConfig(
            num_samples=remaining(search, study),
            max_concurrent_trials=running.at_once,
            search_alg=StudySearch(search, study),
            scheduler=asha(search, first.training.epochs, study) if search.scheduler == "asha" else None,
            time_budget_s=search.time_budget_s,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            # A name of its own each time: what Tune remembers of an earlier try may be torn, and is not needed.
            name=f"tune-{len(list(output.glob('tune-*'))) + 1}",
            storage_path=str(output),
            verbose=0,
            callbacks=[_Reports(watch, output / TRIALS_FOLDER)],
            failure_config=tune.FailureConfig(max_failures=first.resources.max_failures),  # of lost processes alone
        ),
    )


def asha(search: SearchConfig, epochs: int, study: Study) -> ASHAScheduler | None:
    """ASHA that knows what trials reported which ended in an earlier invocation; None where it could stop nobody.

    It does not judge a trial's last epoch: one that came so far has run to its end.
    """
    if search.asha.grace_period_epochs >= epochs:
        return None
    scheduler = ASHAScheduler(
        time_attr=TRAINING_ITERATION,
        metric=search.metric,
        mode="max",
        max_t=epochs - 1,
        stop_last_trials=False,
        grace_period=search.asha.grace_period_epochs,
        reduction_factor=search.asha.reduction_factor,
    )
    for row in study.get_trials(deepcopy=False, states=ENDED):
        trial = SimpleNamespace(trial_id=trial_name(row.number))
        scheduler.on_trial_add(None, trial)
        for epoch, value in reported(row).items():
            scheduler.on_trial_result(None, trial, {TRAINING_ITERATION: epoch, search.metric: value})
    return scheduler


def _ended(search: SearchConfig, study: Study) -> list[EndedTrial]:
    """All trials that there is something to say of; those that the time budget cut short too, once they reported."""
    return [
        EndedTrial(
            trial_name(row.number),
            params_of(search, row.params),
            row.user_attrs.get(REASON),
            stopped=row.state != TrialState.COMPLETE,
        )
        for row in study.get_trials(deepcopy=False)
        if row.state in ENDED or (row.state == TrialState.RUNNING and row.intermediate_values)
    ]
