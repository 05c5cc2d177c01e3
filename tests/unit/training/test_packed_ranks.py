"""A host of two ranks, its base sharded or whole: packed runs end as they would alone in one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.training.packed import Advanced, PackedTrainer
from pefomed_ray.training.ranks import Ranks
from tests.tiny_runs import train, weights, write_shards
from tests.two_ranks import on_two_ranks

pytestmark = pytest.mark.long

EPOCHS = 2
TRIALS: list[dict[str, Any]] = [
    {"lora": {"rank": 4, "alpha": 8, "dropout": 0.05}, "optimizer": {"learning_rate": 1e-3}},
    {
        "lora": {"rank": 8, "alpha": 3, "dropout": 0.0, "target_modules": ["all-linear"]},
        "optimizer": {"learning_rate": 5e-4},
    },
]


def configs(shards: Path, workers: int, strategy: str) -> list[TrainConfig]:
    values: dict[str, Any] = {
        "name": "packed",
        "task": "vqa",
        "template": "short",
        "data": {"shards": str(shards)},
        "training": {"epochs": EPOCHS, "batch_size": 8, "micro_batch_size": 2},
        "validation": {"rows": 5, "max_new_tokens": 4},
        "resources": {"workers": workers, "strategy": strategy},
    }
    return [build_config(TrainConfig, values | trial, "test") for trial in TRIALS]


def host(rank: int, folder: Path) -> list[float]:
    """All losses that this rank saw; the second run joins in the second epoch of the first."""
    strategy = json.loads((folder / "strategy.json").read_text())
    first, second = configs(folder / "shards", 2, strategy)
    trainer = PackedTrainer(first, Ranks(rank, 2, torch.device("cpu"), strategy))
    asked = [
        [(first, folder / "0", 1)],
        [(first, folder / "0", 2), (second, folder / "1", 1)],
        [(second, folder / "1", 2)],
    ]
    outcomes = [outcome for runs in asked for outcome in trainer.advance(runs)]
    return [outcome.row["loss"] for outcome in outcomes if isinstance(outcome, Advanced)]


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_ranks_pack_what_one_process_trains_alone(strategy: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    assert shards == tmp_path / "shards"
    (tmp_path / "strategy.json").write_text(json.dumps(strategy))
    one, other = on_two_ranks(host, tmp_path)
    assert one == other
    assert len(one) == 4
    for number, config in enumerate(configs(shards, 1, "auto")):
        train(config, tmp_path / f"alone{number}")
        ours, theirs = (weights(tmp_path / name / "epochs/002") for name in (str(number), f"alone{number}"))
        assert (ours - theirs).abs().max() < 1e-5
    traffic = json.loads((tmp_path / "0/start.json").read_text())["traffic"]
    assert traffic["strategy"] == strategy
