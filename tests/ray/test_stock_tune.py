"""Our trial functions under Ray's own searcher, scheduler and restore: to Tune a packed trial is one like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.search.features import with_cached_features
from pefomed_ray.search.host import CLIENT_CPUS, Plan, hosts_of
from pefomed_ray.search.packed_trial import run_packed_trial
from pefomed_ray.search.plain_trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.long]

TRIALS = 5
EPOCHS = 3
CUT_OFF = "cut off"

Seen = list[tuple[dict[str, Any], list[float]]]
"""Of each trial, in the order in which they were drawn: its parameters, and the losses that it reported."""


def config_of(shards: Path) -> TrainConfig:
    values = {
        "name": "preset",
        "task": "vqa",
        "template": "short",
        "data": {"shards": str(shards)},
        "training": {"epochs": EPOCHS, "batch_size": 8, "micro_batch_size": 4, "checkpoint_steps": 2},
        "validation": {"rows": 5, "max_new_tokens": 4},
    }
    return build_config(TrainConfig, values, "test")


class CutOff(tune.Callback):
    """Breaks Tune at a report, once."""

    def __init__(self, at: int, marker: Path) -> None:
        self.left, self.marker = at, marker

    def on_trial_result(self, **info: Any) -> None:
        self.left -= 1
        if self.left == 0 and not self.marker.exists():
            self.marker.touch()
            raise RuntimeError(CUT_OFF)


def trial_for(function: Callable[..., None], output: Path, **given: Any) -> Callable[..., None]:
    """Takes parameters alone, as Ray's searcher hands them out; a trial's name is its id."""

    def trial(config: dict[str, Any]) -> None:
        name = str(int(tune.get_context().get_trial_id(), 16))
        function({"trial": name, "params": config}, output=str(output / "trials"), **given)

    return trial


def tuner(trial: Callable[..., None], output: Path, cpus: float, cut_off_at: int) -> tune.Tuner:
    space = {
        "lora.rank": tune.choice([2, 4, 8]),
        "optimizer.learning_rate": tune.loguniform(1e-4, 3e-3),
    }
    return tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=TRIALS,
            max_concurrent_trials=1,
            search_alg=OptunaSearch(sampler=TPESampler(n_startup_trials=2, seed=1)),
            scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=2),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(output), verbose=0, callbacks=[CutOff(cut_off_at, output / "was-cut-off")]
        ),
    )


def ran(trial: Callable[..., None], output: Path, cpus: float, cut_off_at: int = 0) -> Seen:
    """What Tune saw of each trial; restored where it was cut off."""
    started = tuner(trial, output, cpus, cut_off_at)
    if cut_off_at:
        with pytest.raises(Exception, match=CUT_OFF):
            started.fit()
        assert tune.Tuner.can_restore(output / "tune")
        results = tune.Tuner.restore(str(output / "tune"), trial, param_space=None).fit()
    else:
        results = started.fit()
    assert results.num_errors == 0
    drawn = sorted(results, key=lambda result: result.metrics["timestamp"])
    return [(found.config, list(reports(found)["loss"])) for found in drawn]


def reports(result: tune.Result) -> Any:
    """A row an epoch: what went on after it was cut off reports again what it had reported."""
    return result.metrics_dataframe.drop_duplicates("training_iteration", keep="last")


@pytest.fixture(scope="module")
def runs(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """The same search four times: plain and packed, left alone and cut off at the sixth report."""
    folder = tmp_path_factory.mktemp("stock")
    config = with_cached_features(config_of(phantom_shards), folder, workers=1)
    values, found = config.model_dump(mode="json"), {}
    for name, at in (("plain", 0), ("plain, cut off", 6)):
        (output := folder / name).mkdir()
        found[name] = ran(trial_for(run_trial, output, values=values), output, 0.5, at)
    for name, at in (("packed", 0), ("packed, cut off", 6)):
        (output := folder / name).mkdir()
        with hosts_of(config, Plan(hosts=1, places=1, largest_rank=8), output) as (hosts, _):
            found[name] = ran(trial_for(run_packed_trial, output, values=values, hosts=hosts), output, CLIENT_CPUS, at)
    return found


def test_the_control_something_is_drawn_and_something_stopped(runs: dict[str, Seen]) -> None:
    whole = runs["plain"]
    assert len({config["optimizer.learning_rate"] for config, _ in whole}) == TRIALS
    assert {len(losses) for _, losses in whole} > {EPOCHS}  # ASHA stopped some and not others


@pytest.mark.parametrize("other", ["packed", "plain, cut off", "packed, cut off"])
def test_suggestions_reports_and_stops_are_the_same(runs: dict[str, Seen], other: str) -> None:
    assert len(runs[other]) == TRIALS
    for (config, losses), (same_config, same_losses) in zip(runs["plain"], runs[other], strict=True):
        assert same_config == config
        assert same_losses == pytest.approx(losses, abs=1e-5)
