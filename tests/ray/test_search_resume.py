"""What Tune, Optuna's study and a search's folder make of trials that take no time: drawn, stopped, lost, gone on with.

The trials are stand-ins: what they report is known, and where they began is written down.
"""

import math
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from pefomed_ray.config import SearchConfig, TrainConfig, build_config
from pefomed_ray.search.space import params_of
from pefomed_ray.search.storage import ENDED, open_study
from pefomed_ray.search.study import Unwatched, Watch, run_trials

pytestmark = [pytest.mark.ray, pytest.mark.long]

EPOCHS = 3
RATE = "optimizer.learning_rate"


def search(output: Path, **changes: Any) -> SearchConfig:
    found = {
        "name": "stand-ins",
        "preset": "unused",
        "output_dir": str(output),
        "space": {RATE: {"loguniform": [1e-5, 1e-1]}, "lora.alpha": {"times": "lora.rank", "choice": [0.25, 1]}}
        | {"lora.rank": {"choice": [4, 8]}},
        "points": [{RATE: 1e-4, "lora.rank": 8, "lora.alpha": 2.0}],
        "trials": 6,
        "max_concurrent": 1,
        "sampler": {"n_startup_trials": 2},
        "scheduler": "none",
    }
    return build_config(SearchConfig, found | changes, "test")


def first(output: Path) -> TrainConfig:
    values = {"name": "p", "task": "vqa", "data": {"shards": "unused"}, "output_dir": str(output)}
    return build_config(
        TrainConfig, values | {"training": {"epochs": EPOCHS}, "resources": {"max_failures": 1}}, "test"
    )


def stand_in(**befalls: Any) -> Any:
    """A trial that reports how near its rate is to 1e-2, epoch by epoch; `befalls` says what happens to which trial."""

    def trial(suggestion: Any, values: dict[str, Any], output: str) -> None:
        from contextlib import nullcontext

        from ray import tune

        name = suggestion["trial"]
        folder = Path(output) / name
        folder.mkdir(parents=True, exist_ok=True)
        if befalls:  # to import this takes longer than all else here
            from pefomed_ray.errors import DivergedError
            from pefomed_ray.search.trial import beginning
        with beginning(folder) if befalls else nullcontext():
            with open(folder / "begun.txt", "a") as file:
                file.write("begun\n")
            for epoch in range(1, EPOCHS + 1):
                if (name, epoch) == befalls.get("diverges"):
                    raise DivergedError("step 3: the loss is nan")
                if (name, epoch) == befalls.get("breaks"):
                    raise KeyError("what a patient said")
                if name == befalls.get("is_lost") or (name == befalls.get("is_lost_once") and begun(folder) == 1):
                    os._exit(1)
                near = -abs(math.log10(suggestion["params"]["optimizer.learning_rate"]) + 2)
                tune.report({"exact_match": near - (EPOCHS - epoch)})

    def begun(folder: Path) -> int:
        return len((folder / "begun.txt").read_text().splitlines())

    return trial


class Failures(Unwatched):
    """Those that a search tells of."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def failed(self, trial: str, params: dict[str, Any], reason: str) -> None:
        self.reasons[trial] = reason


def run(
    config: SearchConfig, output: Path, watch: Watch | None = None, *, resume: bool = False, **befalls: Any
) -> list[optuna.trial.FrozenTrial]:
    output.mkdir(exist_ok=True)
    study = run_trials(config, first(output), watch or Unwatched(), resume=resume, trial=stand_in(**befalls))
    return study.get_trials()


def best(config: SearchConfig, trials: list[optuna.trial.FrozenTrial]) -> dict[str, Any]:
    return params_of(config, max((t for t in trials if t.value is not None), key=lambda t: t.value).params)


def test_trials_end_in_the_study_as_what_they_were(tmp_path: Path) -> None:
    """One ends in each way; none of them keeps the others from ending."""
    befalls = {"diverges": ("0001", 2), "breaks": ("0002", 1), "is_lost": "0003", "is_lost_once": "0004"}
    watch = Failures()
    trials = run(search(tmp_path), tmp_path, watch, **befalls)
    assert watch.reasons == {f"{t.number:04d}": t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs}
    found = [(trial.state.name, trial.user_attrs.get("reason")) for trial in trials]
    assert found[0] == found[4] == found[5] == ("COMPLETE", None)
    assert found[1] == ("FAIL", "DivergedError: step 3: the loss is nan")
    assert found[2][0] == "FAIL"
    assert (found[2][1] or "").startswith("KeyError (test_search_resume.py, line ")
    assert found[3][0] == "FAIL"
    assert "its process was lost" in (found[3][1] or "")
    assert params_of(search(tmp_path), trials[0].params) == {RATE: 1e-4, "lora.rank": 8, "lora.alpha": 2.0}
    assert [trial.value for trial in trials if trial.state == TrialState.COMPLETE] == [
        trial.intermediate_values[EPOCHS] for trial in trials if trial.state == TrialState.COMPLETE
    ]


def test_a_search_that_goes_on_is_the_one_that_was_never_broken(tmp_path: Path) -> None:
    """Its driver was killed while the fourth trial ran: the study holds three that ended and one RUNNING."""
    config = search(tmp_path / "whole")
    whole = run(config, tmp_path / "whole")
    broken = search(tmp_path / "broken")
    run(search(tmp_path / "broken", trials=3), tmp_path / "broken")
    study = open_study(broken, resume=True)
    from pefomed_ray.search.searcher import StudySearch

    left = StudySearch(broken, study)
    left.suggest("as the killed driver did")
    left.on_trial_result(
        "as the killed driver did", {"exact_match": whole[3].intermediate_values[1], "training_iteration": 1}
    )
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"] * 3 + ["RUNNING"]
    for torn in (tmp_path / "broken").glob("tune-*/*.json"):
        torn.write_bytes(torn.read_bytes()[:40])
    gone_on = run(broken, tmp_path / "broken", resume=True)
    assert [trial.params for trial in gone_on] == [trial.params for trial in whole]
    assert [trial.intermediate_values for trial in gone_on] == [trial.intermediate_values for trial in whole]
    assert best(broken, gone_on) == best(config, whole)
    folders = sorted((tmp_path / "broken" / "trials").iterdir())
    assert [len((folder / "begun.txt").read_text().splitlines()) for folder in folders] == [1] * 6
    again = run(broken, tmp_path / "broken", resume=True)  # nothing is left to do, and nothing is enqueued again
    assert [trial.state.name for trial in again] == ["COMPLETE"] * 6
    assert len({tuple(trial.params.values()) for trial in again}) == 6  # the control: not all are one


def test_what_lags_is_stopped_and_pruned(tmp_path: Path) -> None:
    """And ASHA remembers, over a resume, what it is held against."""
    near, far = {RATE: 1e-2, "lora.rank": 4, "lora.alpha": 4.0}, {RATE: 1e-5, "lora.rank": 4, "lora.alpha": 4.0}
    changes = {"scheduler": "asha", "asha": {"reduction_factor": 2}, "points": [near, far]}
    run(search(tmp_path, **changes, trials=1), tmp_path)
    trials = run(search(tmp_path, **changes, trials=2), tmp_path, resume=True)
    assert [(trial.state.name, len(trial.intermediate_values)) for trial in trials] == [("COMPLETE", 3), ("PRUNED", 1)]


def test_a_plateau_and_a_time_budget_end_a_search(tmp_path: Path) -> None:
    points = [{RATE: rate, "lora.rank": 4, "lora.alpha": 4.0} for rate in (1e-2, 1e-3, 1e-4, 1e-5)]
    trials = run(search(tmp_path / "p", points=points, plateau_trials=2), tmp_path / "p")
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3 + ["WAITING"]
    begun = run(search(tmp_path / "t", time_budget_s=0.01), tmp_path / "t")
    assert len([trial for trial in begun if trial.state in ENDED]) < 6
    assert len([t for t in run(search(tmp_path / "t"), tmp_path / "t", resume=True) if t.state in ENDED]) == 6
