"""The whole loop in this process, fed without Ray: going on, bad steps, memory that runs out, stopping early."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.phantom import write_slake
from pefomed_ray.data.shard_file import plan_shards, write_shard
from pefomed_ray.errors import ConfigError, DivergedError, PefomedError
from pefomed_ray.model.base import Base
from pefomed_ray.model.published import Settings, convert_published
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training import step as step_module
from pefomed_ray.training.checkpoint import newest
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.outcome import halve, that_fits
from tests.tiny_published import write_published
from tests.tiny_runs import stream, train, weights

STEPS = 8
"""Two epochs of 27 rows, eight a step."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_slake(folder / "corpus", images=13, questions_per_image=3, seed=5, splits=(9, 2, 2))
    source, output, options = open_folder(folder / "corpus"), folder / "shards", DataOptions()
    intake = take_in(source, options)
    files: list[ShardFile] = []
    for spec in plan_shards(intake.references, source, options.seed, options.shard_bytes):
        result = write_shard(spec.to_json(), source, open_folder(output), intake.source, options)
        assert result.file
        files.append(result.file)
    rows = {split: sum(file.rows for file in files if file.split == split) for split in ("train", "validation", "test")}
    nothing: dict[str, int] = {}
    manifest = ShardManifest(
        source="slake", licence="open", rows=rows, tasks=nothing, answer_types=nothing, bytes=nothing,
        quarantined=nothing, image_overlap=nothing, files=tuple(files), made_by={},
    )  # fmt: skip
    save_document(manifest, output / "manifest.json")
    return output


@pytest.fixture
def config(shards: Path) -> Callable[..., TrainConfig]:
    def make(**training: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "name": "loop",
            "task": "vqa",
            "template": "short",
            "data": {"shards": str(shards)},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "checkpoint_steps": 2} | training,
            "validation": {"rows": 2, "max_new_tokens": 2},
        }
        return build_config(TrainConfig, values, "test")

    return make


class Killed(BaseException):
    """As by SIGKILL: nobody catches it."""


def cut_off_after(batches: int) -> Callable[[TrainingOrder, Base], Iterator[Batch]]:
    def until(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        for number, batch in enumerate(stream(order, base)):
            if number == batches:
                raise Killed
            yield batch

    return until


def bundle(output: Path, epoch: int = 2) -> torch.Tensor:
    return weights(output / f"epochs/{epoch:03d}")


def journal(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


@pytest.fixture
def unbroken(config: Callable[..., TrainConfig], tmp_path: Path) -> Path:
    train(config(), tmp_path / "unbroken")
    return tmp_path / "unbroken"


@pytest.mark.parametrize("batches", [1, 5, 7, 8, 14])
def test_a_run_that_is_cut_off_ends_as_the_unbroken_one(
    batches: int, unbroken: Path, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Two micro-batches a step: within the first step, within an accumulation, around the end of an epoch."""
    output = tmp_path / "cut"
    with pytest.raises(Killed):
        train(config(), output, cut_off_after(batches))
    done = len(journal(output))
    found = newest(output, json.loads((unbroken / "checkpoints/00000008/checkpoint.json").read_text())["identity"])
    redone = done - (found.progress.step if found else 0)
    assert 0 <= redone <= 2  # the interval between checkpoints
    train(config(), output)
    last = newest(output, json.loads((unbroken / "checkpoints/00000008/checkpoint.json").read_text())["identity"])
    assert last
    assert last.progress.step == STEPS
    assert torch.equal(bundle(output), bundle(unbroken))
    assert [row["loss"] for row in journal(output)] == [row["loss"] for row in journal(unbroken)]


def test_without_its_checkpoint_a_run_begins_again_and_the_test_would_notice_other_dropout(
    unbroken: Path, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The control: one other draw anywhere gives other weights."""
    other = config().model_copy(update={"seed": 43})
    train(other, tmp_path / "other")
    assert not torch.equal(bundle(tmp_path / "other"), bundle(unbroken))


def test_a_run_goes_on_with_its_own_settings_only(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(config(), tmp_path / "run", cut_off_after(5))
    faster = config().model_copy(update={"optimizer": config().optimizer.model_copy(update={"learning_rate": 2e-3})})
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 0\.001 and is 0\.002"):
        train(faster, tmp_path / "run")
    train(config(checkpoint_steps=3), tmp_path / "run")  # what changes no number may change


def poisoned(numbers: set[int]) -> Callable[[TrainingOrder, Base], Iterator[Batch]]:
    """The stream with pixels that are not numbers in some of its micro-batches."""

    def feed(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        for number, batch in enumerate(stream(order, base)):
            if number in numbers:
                side = batch.tensors["pixel_values"]
                bad = {"pixel_values": torch.full(side.shape, float("nan"))}
                batch = Batch(batch.ids_BT, batch.mask_BT, batch.labels_BT, bad, batch.record_ids)
            yield batch

    return feed


def test_a_loss_that_is_not_a_number_stops_before_the_step(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"step 3: loss nan .* records: \d+") as caught:
        train(config(checkpoint_steps=1), output, poisoned({5}))
    found = newest(output, json.loads((output / "checkpoints/00000002/checkpoint.json").read_text())["identity"])
    assert found
    assert found.progress.step == 2
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())
    assert len(str(caught.value).rpartition(": ")[2].split(", ")) == 4  # the bad micro-batch, not the whole step


def test_some_bad_steps_may_be_left_out(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    rows = train(config(max_bad_steps=2), tmp_path / "run", poisoned({2, 9}))
    assert rows[-1]["bad_steps"] == 2
    assert [row["steps"] for row in rows] == [3, 3]
    assert bundle(tmp_path / "run").isfinite().all()
    with pytest.raises(DivergedError):
        train(config(max_bad_steps=1), tmp_path / "other", poisoned({2, 9}))


def test_what_does_not_fit_is_halved_and_gives_the_same_losses(
    unbroken: Path, config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_module.answer_loss

    def small_device(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, inputs, *rest)

    monkeypatch.setattr(step_module, "answer_loss", small_device)
    output = tmp_path / "run"
    plain = config()
    plain = plain.model_copy(update={"lora": plain.lora.model_copy(update={"dropout": 0.0})})
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(plain, output)
    smaller = halve(plain, output, caught.value)
    assert (smaller.training.micro_batch_size, smaller.training.batch_size) == (2, 8)
    assert that_fits(plain, output) == smaller
    train(smaller, output)
    monkeypatch.setattr(step_module, "answer_loss", real)
    train(plain, tmp_path / "whole")
    for ours, theirs in zip(journal(output), journal(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    with pytest.raises(PefomedError, match=r"micro_batch_size 1, which cannot be halved"):
        halve(config(micro_batch_size=1), tmp_path, caught.value)


def test_a_metric_that_gets_no_better_stops_the_run(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    still = config(epochs=5, early_stopping_patience=2)
    rates = {"learning_rate": 1e-12, "min_learning_rate": 0.0, "warmup_start_learning_rate": 0.0}
    still = still.model_copy(update={"optimizer": still.optimizer.model_copy(update=rates)})
    assert len(train(still, tmp_path / "run")) == 3


def test_recomputing_layers_changes_no_loss(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    plain, recomputed = (
        train(config(epochs=1), tmp_path / "p"),
        train(config(epochs=1, gradient_checkpointing=True), tmp_path / "r"),
    )
    assert plain[0]["train_loss"] == pytest.approx(recomputed[0]["train_loss"], abs=1e-6)


def test_a_run_starts_from_a_converted_checkpoint(shards: Path, tmp_path: Path) -> None:
    files = write_published(tmp_path)
    base, start = tmp_path / "base", tmp_path / "start"
    convert_published(
        files.checkpoint,
        files.vision,
        str(files.language_model),
        base,
        start,
        Settings(vision_layers=2, vision_heads=2),
    )
    still = {"learning_rate": 1e-12, "min_learning_rate": 0.0, "warmup_start_learning_rate": 0.0}
    values: dict[str, Any] = {
        "name": "converted",
        "task": "vqa",
        "template": "legacy",
        "base": {"path": str(base)},
        "data": {"shards": str(shards)},
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": still,
        "training": {"epochs": 1, "max_steps": 1, "batch_size": 4, "micro_batch_size": 4},
        "validation": {"rows": 1, "max_new_tokens": 2},
    }
    train(build_config(TrainConfig, values | {"init_from": str(start)}, "test"), tmp_path / "run")
    train(build_config(TrainConfig, values, "test"), tmp_path / "fresh")
    given = load_file(start / "adapter_model.safetensors")
    kept, fresh = (load_file(tmp_path / name / "epochs/001/adapter_model.safetensors") for name in ("run", "fresh"))
    assert kept.keys() == given.keys()
    assert all(torch.allclose(kept[name], given[name], atol=1e-6) for name in given)
    assert not any(torch.allclose(fresh[name], given[name], atol=1e-6) for name in given)
