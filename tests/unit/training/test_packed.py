"""Packed runs against the same runs alone: of any rank, alpha, dropout, rate; joining, leaving, diverging."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.training.packed import Advanced, PackedTrainer
from pefomed_ray.training.ranks import ALONE
from tests.tiny_runs import train, weights, write_shards

TOLERANCE = 1e-5
TRIALS: list[dict[str, Any]] = [
    {"lora": {"rank": 4, "alpha": 8, "dropout": 0.05}, "optimizer": {"learning_rate": 1e-3}},
    {"lora": {"rank": 8, "alpha": 3, "dropout": 0.2}, "optimizer": {"learning_rate": 3e-4, "weight_decay": 0.0}},
    {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}, "optimizer": {"learning_rate": 2e-3, "max_grad_norm": 0.3}},
    {
        "lora": {"rank": 6, "alpha": 6, "use_rslora": True, "loraplus_lr_ratio": 4, "target_modules": ["all-linear"]},
        "optimizer": {"learning_rate": 5e-4, "betas": [0.8, 0.99], "warmup_fraction": 0.3},
    },
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("phantom"))


@pytest.fixture
def config(shards: Path) -> Callable[..., TrainConfig]:
    def make(trial: dict[str, Any], **training: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "name": "packed",
            "task": "vqa",
            "template": "short",
            "data": {"shards": str(shards)},
            "training": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "checkpoint_steps": 3} | training,
            "validation": {"rows": 5, "max_new_tokens": 4},
        }
        return build_config(TrainConfig, values | trial, "test")

    return make


def pack(configs: list[TrainConfig], folder: Path, epochs: int = 2) -> list[Path]:
    """Train them all together; their output folders."""
    trainer = PackedTrainer(configs[0], ALONE)
    outputs = [folder / str(number) for number in range(len(configs))]
    for epoch in range(1, epochs + 1):
        for outcome in trainer.advance([(c, o, epoch) for c, o in zip(configs, outputs, strict=True)]):
            assert isinstance(outcome, Advanced), outcome
            assert outcome.is_over == (epoch == epochs)
    return outputs


def test_packed_runs_end_as_they_would_alone(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    configs = [config(trial) for trial in TRIALS]
    for number, (each, output) in enumerate(zip(configs, pack(configs, tmp_path / "pack"), strict=True)):
        alone = tmp_path / f"alone{number}"
        train(each, alone)
        ours, theirs = (weights(folder / "epochs/002") for folder in (output, alone))
        assert (ours - theirs).abs().max() < TOLERANCE
        packed, single = (json.loads((f / "epochs.json").read_text())["epochs"] for f in (output, alone))
        for row, other in zip(packed, single, strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert (row["exact_match"], row["rougeL"]) == (other["exact_match"], other["rougeL"])
            assert row["trainable_parameters"] == other["trainable_parameters"]
        assert {p.name for p in (output / "epochs/002").iterdir()} == {p.name for p in (alone / "epochs/002").iterdir()}
        verify_bundle(output / "epochs/002")
