"""MLflow and W&B as they are installed: what a run tells them, and that none of them can stop it."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import ConfigError
from pefomed_ray.training import preflight, trackers
from pefomed_ray.training.journal import Journal
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.trackers import TRACKERS_FILE, Trackers

STEP = {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3, "answer_tokens": 40, "step_s": 0.5}
EPOCH = {"exact_match": 0.25, "loss": 2.0, "n": 4.0, "steps": 2}
CLOSED_PORT = "http://user:hunter2@127.0.0.1:9"


class Order:
    """As much of a TrainingOrder as the journal reads."""

    batch_size = 8
    total_steps = 4


@pytest.fixture(autouse=True)
def _nobodys_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(tmp_path / "no-settings"),
        "NETRC": str(tmp_path / "no-netrc"),
    }.items():
        monkeypatch.setenv(name, value)


def config(report_to: Any) -> TrainConfig:
    values = {"name": "mine", "task": "vqa", "data": {"shards": "x"}, "report_to": report_to}
    return build_config(TrainConfig, values, "test")


def journal(output: Path, report_to: str, progress: Progress | None = None) -> Journal:
    return Journal(output, Order(), progress or Progress(), Trackers(config(report_to), output))  # type: ignore[arg-type]


def cut_off_and_gone_on(output: Path, report_to: str) -> None:
    """Three steps of which the last has no checkpoint; then that one again, a fourth, and the epoch's end."""
    first = journal(output, report_to)
    for number in (1, 2, 3):
        first.step(number, STEP | {"loss": float(number)})
    second = journal(output, report_to, Progress(step=2))
    for number in (3, 4):
        second.step(number, STEP | {"loss": float(number)})
    second.epoch(Progress(step=4, epochs=[EPOCH], best=0))
    second.close()


def test_mlflow_has_one_run_with_each_step_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    cut_off_and_gone_on(tmp_path, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pefomed-ray")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / TRACKERS_FILE).read_text())["runs"]["mlflow"]
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert (run.data.params["lora.rank"], run.data.params["data.shards"]) == ("64", "[{'shards': 'x', 'weight': 1.0}]")
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in losses] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    (match,) = client.get_metric_history(run.info.run_id, "epoch/exact_match")
    assert (match.step, match.value) == (4, 0.25)
    assert "train/tokens_per_s" in run.data.metrics
    assert "train/answer_tokens" not in run.data.metrics  # as in TensorBoard's events
    (tmp_path / TRACKERS_FILE).unlink()  # the control: without what it keeps, what goes on would be a second run
    journal(tmp_path, "mlflow").step(1, STEP)
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_wandb_without_a_key_keeps_the_run_for_later(tmp_path: Path) -> None:
    cut_off_and_gone_on(tmp_path, "wandb")
    run = json.loads((tmp_path / TRACKERS_FILE).read_text())["runs"]["wandb"]
    pieces = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(pieces) == 2
    assert all(piece.name.endswith(f"-{run}") for piece in pieces)  # `wandb sync` puts them into one run
    first, second = ((piece / f"run-{run}.wandb").read_bytes() for piece in pieces)
    assert b"train/loss" in first
    assert b"train/loss" in second
    assert b"epoch/exact_match" not in first
    assert b"epoch/exact_match" in second
    assert b"mine" in first
    assert not list((tmp_path / "wandb").rglob("requirements.txt"))  # numbers and the config alone
    assert not list((tmp_path / "wandb").rglob("*.patch"))
    assert not list((tmp_path / "wandb").rglob("wandb-metadata.json"))


def lines(output: Path) -> int:
    return len((output / "steps.jsonl").read_text().splitlines())


def test_a_server_that_is_not_there_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", CLOSED_PORT)
    with caplog.at_level(logging.WARNING, logger=trackers.__name__):
        cut_off_and_gone_on(tmp_path, "mlflow")
    warnings = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert len(warnings) == 2  # each time it was opened, and never again
    assert all("mlflow is left out" in warning and "127.0.0.1" in warning for warning in warnings)
    assert not any("hunter2" in warning for warning in warnings)
    assert lines(tmp_path) == 4
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="hunter2"):  # the control: asked directly, it fails, and tells
        MlflowClient(CLOSED_PORT).get_experiment_by_name("pefomed-ray")


class Fake:
    """A tracker that is lost at some step, or never."""

    run = "1"

    def __init__(self, lost_at: int | None) -> None:
        self.lost_at = lost_at
        self.told: list[int | str] = []

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.told.append(step)
        if step == self.lost_at:
            raise OSError("the server\nis down")

    def close(self) -> None:
        self.told.append("end")


def test_a_tracker_that_fails_on_the_way_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost, other = Fake(lost_at=2), Fake(lost_at=None)
    monkeypatch.setitem(trackers.KINDS, "wandb", lambda *_: lost)
    monkeypatch.setitem(trackers.KINDS, "mlflow", lambda *_: other)
    book = journal(tmp_path, "wandb,mlflow")
    for number in (1, 2, 3):
        book.step(number, STEP)
    book.close()
    assert lost.told == [1, 2]
    assert other.told == [1, 2, 3, "end"]
    assert [record.getMessage() for record in caplog.records if record.name == trackers.__name__] == [
        "report_to: wandb is left out from here on (OSError: the server is down)"
    ]
    assert lines(tmp_path) == 3


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (None, ()),
        ("none", ()),
        ("tensorboard", ()),
        ([], ()),
        ("mlflow", ("mlflow",)),
        ("wandb, tensorboard,mlflow", ("wandb", "mlflow")),
        (["wandb", "wandb"], ("wandb",)),
    ],
)
def test_trackers_as_others_spell_them(typed: Any, expected: tuple[str, ...]) -> None:
    assert config(typed).report_to == expected


@pytest.mark.parametrize("typed", ["all", ["mlflow", "comet_ml"], 3, True])
def test_other_trackers_are_refused(typed: Any) -> None:
    with pytest.raises(ConfigError, match="report_to"):
        config(typed)
    with pytest.raises(ConfigError, match=r"'mlflow' or 'wandb', but got 'all'"):
        config("all")


def test_a_tracker_that_is_not_installed_is_named_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_trackers(config("mlflow,wandb"))
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ConfigError, match=r"wandb is not installed; `pip install 'pefomed-ray\[trackers\]'`"):
        preflight.check_run(config("mlflow,wandb"))
    preflight.check_trackers(config("mlflow"))


def test_a_run_without_trackers_loads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    book = journal(tmp_path, "none")
    book.step(1, STEP)
    book.close()
    assert not (tmp_path / TRACKERS_FILE).exists()
