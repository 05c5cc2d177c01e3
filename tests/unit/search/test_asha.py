"""Whom ASHA stops, by what trials report."""

from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler

from pefomed_ray.config import SearchConfig, build_config
from pefomed_ray.search.study import asha

EPOCHS = 2


def search(**changes: Any) -> SearchConfig:
    space = {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]}}
    found = {"name": "t", "preset": "p", "space": space, "trials": 4, "asha": {"reduction_factor": 2} | changes}
    return build_config(SearchConfig, found, "test")


def actions(scheduler: ASHAScheduler, trial: str, *values: float) -> list[str]:
    """What becomes of a trial at each of its epochs."""
    running = SimpleNamespace(trial_id=trial)
    scheduler.on_trial_add(None, running)
    return [
        scheduler.on_trial_result(None, running, {"training_iteration": epoch, "exact_match": value})
        for epoch, value in enumerate(values, start=1)
    ]


def test_one_that_lags_is_stopped_but_not_in_its_last_epoch() -> None:
    scheduler = asha(search(), EPOCHS, optuna.create_study(direction="maximize"))
    assert scheduler
    assert actions(scheduler, "good", 0.5, 0.9) == ["CONTINUE", "CONTINUE"]
    assert actions(scheduler, "fell behind", 0.6, 0.1) == ["CONTINUE", "CONTINUE"]
    assert actions(scheduler, "lags", 0.1) == ["STOP"]
    longer = asha(search(), EPOCHS + 1, optuna.create_study(direction="maximize"))
    assert longer
    assert actions(longer, "good", 0.5, 0.9) == ["CONTINUE", "CONTINUE"]
    assert actions(longer, "fell behind", 0.6, 0.1) == ["CONTINUE", "STOP"]  # the control: it has an epoch left


def test_with_no_epoch_to_spare_nobody_is_stopped() -> None:
    study = optuna.create_study(direction="maximize")
    assert asha(search(grace_period_epochs=2), 2, study) is None
    assert asha(search(), 1, study) is None
