"""Training on a real Ray: FSDP2 on two workers equals one process; errors arrive as our own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import ConfigError, DivergedError
from pefomed_ray.model.load import load_model
from pefomed_ray.training.alone import train_alone
from pefomed_ray.training.trainer import TrainResult, Watch, publish, train

pytestmark = pytest.mark.ray

FIFTY_STEPS = {"epochs": 13, "max_steps": 50, "batch_size": 8, "micro_batch_size": 2}


def config(shards: Path, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "test",
        "task": "vqa",
        "template": "short",
        "output_dir": str(output),
        "data": {"shards": str(shards)},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.05, "target_modules": ["all-linear"]},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"epochs": 2, "batch_size": 8, "micro_batch_size": 2},
        "validation": {"rows": 5, "max_new_tokens": 2},
        "resources": {"workers": 1},
    }
    return build_config(TrainConfig, values | changes, "test")


@pytest.fixture(scope="module")
def two_workers(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("two") / "run"
    seen: list[Any] = []
    result = train(
        config(phantom_shards, output, resources={"workers": 2, "strategy": "fsdp"}),
        Watch(start=seen.append, epoch=lambda epoch, row: seen.append(epoch)),
    )
    learning, *epochs = seen
    assert epochs == [1, 2]
    assert learning["trainable_parameters"] == result.epochs[0]["trainable_parameters"]
    return result


def alone(config: TrainConfig, output: Path) -> TrainResult:
    train_alone(config, output, lambda row: None)
    return publish(output)


def trained(result: TrainResult) -> torch.Tensor:
    """All trained weights after the last step, whichever epoch was the best."""
    last = max((result.output / "checkpoints").iterdir())
    tensors = load_file(last / "state.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("weight.")])


def test_two_workers_train_what_one_process_does(
    two_workers: TrainResult, phantom_shards: Path, tmp_path: Path
) -> None:
    """With dropout, which is drawn for a micro-batch and not for a rank."""
    one = alone(config(phantom_shards, tmp_path / "one"), tmp_path / "one")
    assert one.best_epoch == two_workers.best_epoch
    for a, b in zip(one.epochs, two_workers.epochs, strict=True):
        assert a["answer_tokens"] == b["answer_tokens"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert (trained(one) - trained(two_workers)).abs().max() < 1e-5
    other = alone(config(phantom_shards, tmp_path / "other", seed=43), tmp_path / "other")
    assert (trained(one) - trained(other)).abs().max() > 1e-2  # the control: another seed shows


@pytest.mark.long
@pytest.mark.timeout(900)
def test_fifty_steps_of_one_process_one_worker_and_two(phantom_shards: Path, tmp_path: Path) -> None:
    def fifty(name: str, **changes: Any) -> TrainConfig:
        return config(phantom_shards, tmp_path / name, training=FIFTY_STEPS, **changes)

    one = alone(fifty("one"), tmp_path / "one")
    assert sum(row["steps"] for row in one.epochs) == 50
    assert torch.equal(trained(one), trained(train(fifty("worker"))))
    two = train(fifty("two", resources={"workers": 2, "strategy": "fsdp"}))
    assert (trained(one) - trained(two)).abs().max() < 1e-5


def test_a_run_leaves_its_artifacts_and_nothing_else_trained(two_workers: TrainResult) -> None:
    manifest = verify_bundle(two_workers.bundle)
    assert manifest.digest == two_workers.digest
    lineage = json.loads((two_workers.bundle / "lineage.json").read_text())
    assert lineage["source"] == "slake"
    assert lineage["epoch"] == two_workers.best_epoch
    assert (two_workers.output / "run.yaml").is_file()
    row = two_workers.epochs[-1]
    assert 0 < row["trainable_parameters"] < row["parameters"]
    assert 0 <= row["data_wait_share"] <= 1
    assert row["n"] == 5
    model, _ = load_model(two_workers.bundle)
    base, _ = load_model("embedded")
    trained = model.state_dict()
    for name, tensor in base.vision_tower.state_dict().items():
        assert torch.equal(trained[f"vision_tower.{name}"], tensor)
    assert not torch.equal(model.projector.weight, base.projector.weight)


def test_stage_two_starts_from_stage_one(two_workers: TrainResult, phantom_shards: Path, tmp_path: Path) -> None:
    tiny = {"epochs": 1, "max_steps": 1, "batch_size": 8, "micro_batch_size": 2}
    still = {"learning_rate": 1e-9, "min_learning_rate": 0, "warmup_start_learning_rate": 0}
    started = config(phantom_shards, tmp_path / "s", init_from=str(two_workers.bundle), training=tiny, optimizer=still)
    result = alone(started, tmp_path / "s")
    expected = two_workers.epochs[two_workers.best_epoch - 1]["loss"]
    assert result.epochs[0]["loss"] == pytest.approx(expected, abs=1e-3)
    fresh = config(phantom_shards, tmp_path / "f", training=tiny, optimizer=still)
    # The control: without it, the run starts from the base.
    assert abs(alone(fresh, tmp_path / "f").epochs[0]["loss"] - expected) > 0.01


def test_a_mixture_from_disk_and_from_s3(phantom_shards: Path, s3: str, tmp_path: Path) -> None:
    remote = open_folder(f"{s3}/shards")
    for path in phantom_shards.rglob("*"):
        if path.is_file():
            remote.write_bytes(path.relative_to(phantom_shards).as_posix(), path.read_bytes())
    parts = [{"shards": str(phantom_shards), "weight": 3}, {"shards": remote.url, "weight": 1}]
    tiny = {"epochs": 1, "batch_size": 9, "micro_batch_size": 9}
    result = alone(config(phantom_shards, tmp_path / "m", data={"shards": parts}, training=tiny), tmp_path / "m")
    assert result.epochs[0]["steps"] == 6  # twice 27 rows
    assert result.epochs[0]["n"] == 5
    lineage = json.loads((result.bundle / "lineage.json").read_text())
    assert [part["weight"] for part in lineage["mixture"]] == [3, 1]
    assert len({part["shards"] for part in lineage["mixture"]}) == 1  # the same shards, wherever they lie
    nowhere = [parts[0], {"shards": f"{s3}/none"}]
    with pytest.raises(ConfigError, match="none"):
        train(config(phantom_shards, tmp_path / "n", data={"shards": nowhere}))


@pytest.mark.long
def test_divergence_arrives_as_our_error_and_publishes_nothing(phantom_shards: Path, tmp_path: Path) -> None:
    wild = {"rank": 4, "alpha": 1e38, "dropout": 0.0, "target_modules": ["all-linear"]}
    fast = {"learning_rate": 1e6, "warmup_fraction": 0.0}
    with pytest.raises(DivergedError, match="no step was taken"):
        train(config(phantom_shards, tmp_path / "wild", lora=wild, optimizer=fast))
    assert not (tmp_path / "wild" / "bundle").exists()


def test_a_run_the_cluster_cannot_hold_is_refused_at_once(phantom_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 2\.5 CPU .* the cluster has 2"):
        train(config(phantom_shards, tmp_path / "big", resources={"workers": 4}))
    with pytest.raises(ConfigError, match="needs 1 GPU"):
        train(config(phantom_shards, tmp_path / "gpu", resources={"use_gpu": True}))
