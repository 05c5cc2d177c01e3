"""Packed runs against the same runs alone: of any rank, alpha, dropout, rate; joining, leaving, diverging."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import ConfigError, DivergedError
from pefomed_ray.model.base import Base
from pefomed_ray.model.pack import Pack
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training import packed_step as packed_step_module
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.packed import Advanced, PackedTrainer
from pefomed_ray.training.packed_step import packed_losses
from pefomed_ray.training.preflight import check_packable
from pefomed_ray.training.ranks import ALONE
from tests.tiny_runs import stream, train, weights, write_shards

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


class Cut(BaseException):
    """As by SIGKILL: nobody catches it."""


def begin(config: TrainConfig, output: Path) -> None:
    """Its first epoch, and a step of the second: nine micro-batches."""

    def until(order: TrainingOrder, base: Base) -> Iterator[Batch]:
        yield from islice(stream(order, base), 10)
        raise Cut

    with pytest.raises(Cut):
        train(config, output, until)


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


@pytest.mark.long
def test_a_pack_may_change_between_epochs(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """One leaves after its first epoch, one joins then, a third begins alone and goes on packed, on another host."""
    leaves, stays, joins, begun = (config(trial) for trial in TRIALS)
    begin(begun, tmp_path / "begun")
    trainer = PackedTrainer(leaves, ALONE)
    trainer.advance([(leaves, tmp_path / "leaves", 1), (stays, tmp_path / "stays", 1)])
    for output in (tmp_path / "leaves", tmp_path / "stays"):
        trainer.forget(output)
    other = PackedTrainer(stays, ALONE)  # what is in memory of the first is of no use to it
    epochs = [(2, 1, 2), (2, 2, 2)]
    for numbers in epochs:
        named = zip((stays, joins, begun), ("stays", "joins", "begun"), numbers, strict=True)
        outcomes = other.advance([(each, tmp_path / name, number) for each, name, number in named])
        assert all(isinstance(outcome, Advanced) for outcome in outcomes)
    for each, name in ((stays, "stays"), (joins, "joins"), (begun, "begun")):
        train(each, tmp_path / f"{name}-alone")
        ours, theirs = (weights(tmp_path / folder / "epochs/002") for folder in (name, f"{name}-alone"))
        assert (ours - theirs).abs().max() < TOLERANCE
    assert len(json.loads((tmp_path / "leaves/epochs.json").read_text())["epochs"]) == 1


def test_a_cpu_packs_as_many_as_are_no_slower(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Where the tower runs, as many as there are: it runs once for all."""
    counts = []
    for rows in (2, 8):
        trainer = PackedTrainer(config(TRIALS[0], batch_size=8, micro_batch_size=rows), ALONE)
        assert trainer.worth_packing() > 1000
        trainer.rows.has_features = True
        counts.append(trainer.worth_packing())
        tokens = counts[-1] * rows * min(len(row.prompt) for row in trainer.validation.rows)
        assert tokens <= 1024
    few, many = sorted(counts)
    assert 1 <= few < many <= 4 * few + 3
    trainer.ranks = replace(ALONE, device=torch.device("cuda"))
    assert trainer.worth_packing() > 1000


def test_an_epoch_that_was_done_is_not_done_again(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    trainer = PackedTrainer(config(TRIALS[0]), ALONE)
    once, again = (trainer.advance([(config(TRIALS[0]), tmp_path / "run", 1)]) for _ in range(2))
    assert once == again
    assert len((tmp_path / "run/steps.jsonl").read_text().splitlines()) == 4


def test_one_that_diverges_leaves_and_the_others_never_notice(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    good, bad = TRIALS[0], {"lora": {"rank": 4, "alpha": 1e38}, "optimizer": {"learning_rate": 1e-2}}
    trainer = PackedTrainer(config(good), ALONE)
    runs = [(config(good), tmp_path / "good"), (config(bad), tmp_path / "bad"), (config(TRIALS[1]), tmp_path / "other")]
    outcomes = trainer.advance([(each, output, 1) for each, output in runs])
    assert isinstance(outcomes[1], DivergedError)
    assert re.match(r"step \d: loss", str(outcomes[1]))
    assert "look at the records: " in str(outcomes[1])
    outcomes = trainer.advance([(each, output, 2) for each, output in (runs[0], runs[2])])
    assert all(isinstance(outcome, Advanced) and outcome.is_over for outcome in outcomes)
    train(config(good), tmp_path / "alone")
    assert (weights(tmp_path / "good/epochs/002") - weights(tmp_path / "alone/epochs/002")).abs().max() < TOLERANCE
    assert not (tmp_path / "bad/epochs").exists()


@pytest.mark.long
def test_some_bad_steps_may_be_left_out_of_one_run(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not a number at the second step, for the first of two: its third step is its second."""
    configs = [config(trial, max_bad_steps=1) for trial in TRIALS[:2]]
    calls = iter(range(1000))

    def poisoned(*given: Any) -> torch.Tensor:
        losses_K = packed_losses(*given)
        return losses_K * torch.tensor([float("nan") if next(calls) == 3 else 1.0, 1.0])

    monkeypatch.setattr(packed_step_module, "packed_losses", poisoned)
    outputs = pack(configs, tmp_path)
    rows = [json.loads((output / "epochs.json").read_text())["epochs"][-1] for output in outputs]
    assert [row["bad_steps"] for row in rows] == [1, 0]
    assert weights(outputs[0] / "epochs/002").isfinite().all()
    train(configs[1], tmp_path / "alone")
    assert (weights(outputs[1] / "epochs/002") - weights(tmp_path / "alone/epochs/002")).abs().max() < TOLERANCE


@pytest.mark.long
def test_what_does_not_fit_into_memory_is_trained_in_halves(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small_device(pack: Pack, *rest: Any) -> torch.Tensor:
        if pack.size > 1 and pack.base.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return packed_losses(pack, *rest)

    configs = [config(trial) for trial in TRIALS[:2]]
    monkeypatch.setattr(packed_step_module, "packed_losses", small_device)
    outputs = pack(configs, tmp_path)
    monkeypatch.undo()
    for number, (each, output) in enumerate(zip(configs, outputs, strict=True)):
        train(each, tmp_path / f"alone{number}")
        ours, theirs = (weights(folder / "epochs/002") for folder in (output, tmp_path / f"alone{number}"))
        assert (ours - theirs).abs().max() < TOLERANCE


def test_other_weights_would_be_noticed(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The control: a hundredth of the learning rate, or a tenth of a per cent of alpha, is more than the tolerance."""
    trial = TRIALS[2]
    train(config(trial), tmp_path / "alone")
    found = weights(tmp_path / "alone/epochs/002")
    for name, change in {
        "rate": {"optimizer": trial["optimizer"] | {"learning_rate": 2.02e-3}},
        "alpha": {"lora": trial["lora"] | {"alpha": 4.04}},
    }.items():
        (output,) = pack([config(trial | change)], tmp_path / name)
        assert (weights(output / "epochs/002") - found).abs().max() > 3 * TOLERANCE


def test_what_cannot_be_packed_is_refused(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_dora cannot be packed"):
        check_packable(config({"lora": {"use_dora": True}}))
    with pytest.raises(ConfigError, match=r"gradient_checkpointing with lora\.dropout"):
        check_packable(config({"lora": {"dropout": 0.1}}, gradient_checkpointing=True))
    trainer = PackedTrainer(config(TRIALS[0]), ALONE)
    with pytest.raises(ConfigError, match="differ in name, output_dir, lora, optimizer alone"):
        trainer.advance([(config(TRIALS[0], batch_size=4), tmp_path / "other", 1)])


@pytest.mark.long
def test_fifty_steps(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    configs = [config(trial, epochs=13) for trial in TRIALS]
    for number, (each, output) in enumerate(zip(configs, pack(configs, tmp_path / "pack", 13), strict=True)):
        train(each, tmp_path / f"{number}")
        ours, theirs = (weights(folder / "epochs/013") for folder in (output, tmp_path / f"{number}"))
        assert len((output / "steps.jsonl").read_text().splitlines()) == 52
        assert (ours - theirs).abs().max() < TOLERANCE
