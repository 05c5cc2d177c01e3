"""Packed runs on tiny Hugging Face bases: the tower runs once a batch for all, projectors learn apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.training.packed import Advanced, PackedTrainer
from pefomed_ray.training.ranks import ALONE
from tests.tiny_bases import FAMILIES
from tests.tiny_runs import train, weights, write_shards

SHORT = ("llava", "qwen2_5_vl", "qwen3_vl")
"""A projector after the tower, one inside it before tokens are put in order, several inside it. The others are for the
long tier."""
TRIALS: list[dict[str, Any]] = [
    {"lora": {"rank": 4, "alpha": 8, "dropout": 0.05}, "optimizer": {"learning_rate": 1e-3}},
    {
        "lora": {"rank": 8, "alpha": 3, "dropout": 0.0, "target_modules": ["all-linear"]},
        "optimizer": {"learning_rate": 5e-4},
    },
    {"lora": {"rank": 2, "alpha": 2, "dropout": 0.1}, "optimizer": {"learning_rate": 2e-3}},
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("phantom"))


def configs(base: Path, shards: Path, *, train_projector: bool) -> list[TrainConfig]:
    values: dict[str, Any] = {
        "name": "packed",
        "task": "vqa",
        "template": "chat",
        "base": {"path": str(base)},
        "data": {"shards": str(shards)},
        "projector": {"train": train_projector},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4},
        "validation": {"rows": 5, "max_new_tokens": 4},
    }
    return [build_config(TrainConfig, values | trial, "test") for trial in TRIALS]


@pytest.mark.parametrize(
    ("family", "train_projector"),
    [
        pytest.param(family, learns, marks=[] if learns and family in SHORT else pytest.mark.long)
        for family in FAMILIES
        for learns in (True, False)
    ],
)
def test_packed_runs_end_as_they_would_alone(
    family: str, train_projector: bool, tiny_base: Callable[[str], Path], shards: Path, tmp_path: Path
) -> None:
    chosen = configs(tiny_base(family), shards, train_projector=train_projector)
    trainer = PackedTrainer(chosen[0], ALONE)
    seen = looks(trainer)
    outputs = [tmp_path / f"packed{number}" for number in range(len(chosen))]
    outcomes = trainer.advance([(each, output, 1) for each, output in zip(chosen, outputs, strict=True)])
    packed_looks, packed_calls = sum(seen), len(seen)
    for number, (each, output, outcome) in enumerate(zip(chosen, outputs, outcomes, strict=True)):
        assert isinstance(outcome, Advanced), outcome
        alone = tmp_path / f"alone{number}"
        (row,) = train(each, alone)
        assert (weights(output / "epochs/001") - weights(alone / "epochs/001")).abs().max() < 1e-5
        assert outcome.row["train_loss"] == pytest.approx(row["train_loss"], abs=1e-5)
        assert outcome.row["exact_match"] == row["exact_match"]
        assert outcome.row["loss"] == pytest.approx(row["loss"], abs=1e-5)
    seen.clear()
    trainer.advance([(chosen[0], tmp_path / "single", 1)])
    assert packed_looks == sum(seen)  # the tower worked for three as for one
    assert packed_calls >= len(seen) > 0


def looks(trainer: PackedTrainer) -> list[int]:
    """A list that grows with each forward of the tower's first block, by the numbers that go in."""
    seen: list[int] = []
    block = trainer.base.tower_blocks[0]
    block.register_forward_pre_hook(lambda module, inputs: seen.append(_size(inputs)))
    return seen


def _size(inputs: tuple[Any, ...]) -> int:
    return next(value.numel() for value in inputs if isinstance(value, torch.Tensor))
