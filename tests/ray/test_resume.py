"""What is lost while a run goes on is done again, and the adapter is the one that an unbroken run gives."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.training.journal import STEPS_FILE
from pefomed_ray.training.trainer import TrainResult, train

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

WAIT_S = 120
TIMEOUT_S = 20


def config(shards: Path, output: Path, workers: int, dropout: float = 0.1, max_failures: int = 3) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "resume",
        "task": "vqa",
        "template": "short",
        "output_dir": str(output),
        "data": {"shards": str(shards)},
        "lora": {"rank": 4, "alpha": 8, "dropout": dropout, "target_modules": ["q_proj", "v_proj"]},
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


def weights(result: TrainResult) -> torch.Tensor:
    files = ("adapter_model.safetensors", "projector.safetensors")
    tensors = [tensor for name in files for _, tensor in sorted(load_file(result.bundle / name).items())]
    return torch.cat([tensor.flatten() for tensor in tensors])


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


@contextmanager
def killing_at(output: Path, step: int, kill: Callable[[], None]) -> Iterator[list[int]]:
    """Call `kill` once the journal holds the step; yields a list that then holds it."""
    killed: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            path = output / STEPS_FILE
            if path.is_file() and len(path.read_bytes().splitlines()) >= step:
                kill()
                killed.append(step)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield killed
    watcher.join(WAIT_S)


def signal_a_rank(number: signal.Signals) -> None:
    ranks = processes("RayTrainWorker")
    assert len(ranks) == 2
    os.kill(ranks[1].pid, number)


def kill_a_rank() -> None:
    signal_a_rank(signal.SIGKILL)


@pytest.mark.parametrize("step", [4])
def test_a_killed_rank(step: int, unbroken: TrainResult, phantom_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with killing_at(output, step, kill_a_rank) as killed:
        result = train(config(phantom_shards, output, workers=2))
    assert killed == [step]
    assert torch.equal(weights(result), weights(unbroken))
    assert [row["train_loss"] for row in result.epochs] == [row["train_loss"] for row in unbroken.epochs]
