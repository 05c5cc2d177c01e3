"""What is lost while a run goes on is done again, and the adapter is the one that an unbroken run gives."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import PefomedError
from pefomed_ray.training.journal import STEPS_FILE
from pefomed_ray.training.progress import step_of_newest
from pefomed_ray.training.trainer import TrainResult, Watch, train

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

WAIT_S = 120
TIMEOUT_S = 20
STEPS = 12
"""Three epochs of 27 rows, eight a step."""


def config(shards: Path, output: Path, workers: int, max_failures: int = 3) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "resume",
        "task": "vqa",
        "template": "short",
        "output_dir": str(output),
        "data": {"shards": str(shards)},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"epochs": 3, "batch_size": 8, "micro_batch_size": 2, "checkpoint_steps": 3},
        "validation": {"rows": 4, "max_new_tokens": 2},
        "resources": {
            "workers": workers,
            "strategy": "fsdp",
            "collective_timeout_s": TIMEOUT_S,
            "max_failures": max_failures,
        },
    }
    return build_config(TrainConfig, values, "test")


def last_state(result: TrainResult) -> torch.Tensor:
    """Trained weights and AdamW's moments after the last step, whichever epoch was the best."""
    tensors = load_file(result.output / f"checkpoints/{STEPS:08d}/state.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def unbroken(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(phantom_shards, tmp_path_factory.mktemp("unbroken") / "run", workers=2))


def processes(what: str) -> list[psutil.Process]:
    """Ray's processes of this test's own cluster whose title holds a word."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if what in process.name() or what in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def ranks(but: set[int]) -> list[psutil.Process]:
    """Training workers, without those that were met before."""
    return [process for process in processes("RayTrainWorker") if process.pid not in but]


@dataclass(frozen=True)
class Hit:
    """A rank that was sent a signal."""

    step: int
    """Lines of the journal at that time."""
    checkpoint: int
    """Step of the newest checkpoint."""
    at: float
    """Monotonic seconds."""


@contextmanager
def hitting(output: Path, steps: list[int], workers: int, number: signal.Signals) -> Iterator[list[Hit]]:
    """Send the signal to the last rank at each of these steps, once the ranks that were started anew are there."""
    hits: list[Hit] = []
    met: set[int] = set()

    def watch() -> None:
        deadline = time.monotonic() + WAIT_S * len(steps)
        while len(hits) < len(steps) and time.monotonic() < deadline:
            path = output / STEPS_FILE
            done = len(path.read_bytes().splitlines()) if path.is_file() else 0
            if done >= steps[len(hits)] and len(found := ranks(met)) == workers:
                os.kill(found[-1].pid, number)
                hits.append(Hit(done, step_of_newest(output), time.monotonic()))
                met.update(process.pid for process in found)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield hits
    watcher.join(WAIT_S)


def test_a_rank_that_is_killed_again_and_again(unbroken: TrainResult, phantom_shards: Path, tmp_path: Path) -> None:
    """After the first step, between two checkpoints, and before the last step."""
    output = tmp_path / "run"
    with hitting(output, [1, 5, 11], 2, signal.SIGKILL) as hits:
        result = train(config(phantom_shards, output, workers=2))
    assert len(hits) == 3
    assert all(0 <= hit.step - hit.checkpoint <= 3 for hit in hits)  # the interval between checkpoints
    assert torch.equal(last_state(result), last_state(unbroken))
    assert [row["train_loss"] for row in result.epochs] == [row["train_loss"] for row in unbroken.epochs]


def test_a_run_that_was_cut_off_after_its_last_step(
    unbroken: TrainResult, phantom_shards: Path, tmp_path: Path
) -> None:
    """Its last checkpoint is there, and its bundle was not yet published."""
    output = tmp_path / "run"
    shutil.copytree(unbroken.output, output)
    (output / "bundle").replace(output / f"epochs/{unbroken.best_epoch:03d}")
    result = train(config(phantom_shards, output, workers=2), resume=True)
    assert result.digest == unbroken.digest
    assert result.epochs == unbroken.epochs


def test_a_rank_that_hangs(unbroken: TrainResult, phantom_shards: Path, tmp_path: Path) -> None:
    """The other one waits for it no longer than it may, says so, and both start again."""
    output = tmp_path / "run"
    noticed: list[tuple[float, str]] = []

    def notice(failure: dict[str, Any]) -> None:
        noticed.append((time.monotonic() - hits[0].at, failure["error"]))

    with hitting(output, [5], 2, signal.SIGSTOP) as hits:
        result = train(config(phantom_shards, output, workers=2), Watch(failure=notice))
    (after_s, error), *more = noticed
    assert not more
    assert TIMEOUT_S / 2 < after_s < TIMEOUT_S + 10
    assert "Timed out" in error
    assert torch.equal(last_state(result), last_state(unbroken))


def test_two_workers_go_on_as_one_and_one_as_two(unbroken: TrainResult, phantom_shards: Path, tmp_path: Path) -> None:
    for first, then in ((2, 1), (1, 2)):
        output = tmp_path / f"{first}-{then}"
        with (
            hitting(output, [5], first, signal.SIGKILL) as hits,
            pytest.raises(PefomedError, match=r"more often than resources\.max_failures=0"),
        ):
            train(config(phantom_shards, output, first, max_failures=0))
        assert hits
        assert not (output / "bundle").exists()
        result = train(config(phantom_shards, output, then, max_failures=0), resume=True)
        assert (last_state(result) - last_state(unbroken)).abs().max() < 1e-5
        for ours, theirs in zip(result.epochs, unbroken.epochs, strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
