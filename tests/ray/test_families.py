"""Training a Hugging Face base on a real Ray: FSDP2 on two workers equals one process, and the bundle answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.model.bundle import open_bundle
from pefomed_ray.training.alone import train_alone
from pefomed_ray.training.trainer import publish, train
from tests.tiny_bases import FAMILIES

pytestmark = [pytest.mark.ray, pytest.mark.long]


def config(base: Path, shards: Path, output: Path, workers: int) -> TrainConfig:
    values = {
        "name": "test",
        "task": "vqa",
        "template": "chat",
        "output_dir": str(output),
        "base": {"path": str(base)},
        "data": {"shards": str(shards)},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["all-linear"]},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 2},
        "validation": {"rows": 5, "max_new_tokens": 4},
        "resources": {"workers": workers, "strategy": "fsdp"},
    }
    return build_config(TrainConfig, values, "test")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_workers_train_what_one_does(
    family: str, tiny_base: Callable[[str], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    base = tiny_base(family)
    both = train(config(base, phantom_shards, tmp_path / "two", 2))
    train_alone(config(base, phantom_shards, tmp_path / "one", 1), tmp_path / "one", lambda row: None)
    one = publish(tmp_path / "one")
    assert one.epochs[0]["answer_tokens"] == both.epochs[0]["answer_tokens"]
    assert one.epochs[0]["train_loss"] == pytest.approx(both.epochs[0]["train_loss"], abs=1e-5)
    assert one.epochs[0]["loss"] == pytest.approx(both.epochs[0]["loss"], abs=1e-5)
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        ours, theirs = load_file(one.bundle / name), load_file(both.bundle / name)
        assert ours.keys() == theirs.keys()
        assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-5
    open_bundle(both.bundle)
