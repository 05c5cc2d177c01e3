"""MLflow and W&B, for those who keep their runs there: the numbers of TensorBoard's events, same names and steps.

<output_dir>/trackers.json   {"runs": {"mlflow": id, "wandb": id}, "told": {"train": step, "epoch": step}}

A run that goes on finds there its runs at the trackers, and up to which step they were told: a tracker takes nothing
back, so steps that are taken again are not told again.

Numbers and the config are told, nothing else: no console output, no code, no state of git, no patient's text. Where a
tracker is and the key to it come from its own environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...).
"""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.config import TrainConfig

TRACKERS_FILE = "trackers.json"
PROJECT = "pefomed-ray"
"""Name of MLflow's experiment and of W&B's project."""
REQUEST_TIMEOUT_S = 10
RETRIES = 2
"""Of a request to MLflow. At each step rank 0 waits for one, and the others for it; MLflow's own would be minutes."""
INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60
"""Of W&B, which sends from a process of its own. What it has not sent lies in the output folder, for `wandb sync`."""
PARAMS_A_REQUEST = 100
PARAM_CHARACTERS = 6000
"""MLflow's limits."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A run at one tracker. Whatever a method raises, the tracker is left out for the rest of the run."""

    run: str
    """The tracker's id of it."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, counted from 1, by name. A step never comes after a later one."""

    def close(self) -> None:
        """The run has ended as it should."""


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; by default in `<output_dir>/mlflow.db`."""

    def __init__(self, config: TrainConfig, output: Path, run: str | None) -> None:
        """`run`: go on with this one."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(RETRIES))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers how it is used
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output / 'mlflow.db'}")
        if run is None:
            self.run = self._begin(config)
        else:
            self.run = run
            self._client.update_run(run, status="RUNNING")

    def _begin(self, config: TrainConfig) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        run: str = self._client.create_run(experiment, run_name=config.name).info.run_id
        params = [Param(key, text[:PARAM_CHARACTERS]) for key, text in _flat(config.model_dump(mode="json")).items()]
        for first in range(0, len(params), PARAMS_A_REQUEST):
            self._client.log_batch(run, params=params[first : first + PARAMS_A_REQUEST])
        return run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See Tracker; one request."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self.run, metrics=[Metric(name, value, now_ms, step) for name, value in numbers.items()])

    def close(self) -> None:
        """See Tracker; a run that did not end so stays `RUNNING`."""
        self._client.set_terminated(self.run, "FINISHED")


class Wandb:
    """A run of W&B; without WANDB_API_KEY, a login or WANDB_MODE it stays in `<output_dir>/wandb`, for `wandb sync`."""

    def __init__(self, config: TrainConfig, output: Path, run: str | None) -> None:
        """`run`: go on with this one."""
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        import wandb

        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        self.run = run or secrets.token_hex(4)
        self._run = wandb.init(
            project=PROJECT,
            name=config.name,
            id=self.run,
            resume="allow",
            dir=output,
            config=config.model_dump(mode="json"),
            mode=None if known else "offline",
            settings=wandb.Settings(
                reinit="finish_previous",  # a run of this process that was cut off
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See Tracker. What comes for a step that it has closed, it would drop: it then gets the next one's number."""
        self._run.log(dict(numbers), step=max(step, self._run.step))

    def close(self) -> None:
        """See Tracker."""
        import wandb

        self._run.finish()
        wandb.teardown()  # waits until all is written; `finish` alone does not where nothing is sent


KINDS: dict[str, Callable[[TrainConfig, Path, str | None], Tracker]] = {"mlflow": Mlflow, "wandb": Wandb}
"""By the names that `report_to` takes."""


class Trackers:
    """All trackers of a run; one that fails is named in a warning and left out, and the run goes on."""

    def __init__(self, config: TrainConfig, output: Path) -> None:
        """Open the trackers of `report_to`, each where the run in `output` stood at it."""
        self._file = output / TRACKERS_FILE
        known = read_json(self._file) if self._file.is_file() else {"runs": {}, "told": {}}
        self._runs: dict[str, str] = known["runs"]
        self._told: dict[str, int] = known["told"]
        self._open: dict[str, Tracker] = {}
        for name in config.report_to:
            with self._surviving(name):
                self._open[name] = KINDS[name](config, output, self._runs.get(name))
                self._runs[name] = self._open[name].run
        self._save()

    def log(self, group: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, as `<group>/<name>`; nothing where the group has been told of this step or a later one."""
        if step <= self._told.get(group, 0):
            return
        for name, tracker in list(self._open.items()):
            with self._surviving(name):
                tracker.log(step, {f"{group}/{key}": value for key, value in numbers.items()})
        self._told[group] = step
        self._save()

    def close(self) -> None:
        """See Tracker."""
        for name, tracker in list(self._open.items()):
            with self._surviving(name):
                tracker.close()

    def _save(self) -> None:
        if self._open:
            write_json(self._file, {"runs": self._runs, "told": self._told})

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of two large libraries, their network and their files: anything may come
            self._open.pop(name, None)
            said = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:300]  # an address may hold a password
            logger.warning("report_to: %s is left out from here on (%s: %s)", name, type(error).__name__, said)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys, and values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat
