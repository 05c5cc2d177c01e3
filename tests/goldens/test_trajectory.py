"""Training the converted base as the published code did gives its losses and weights, step by step.

Tolerances: losses 2e-6 absolute; weights after the last step 1e-5 of how far the tensor moved, AdamW's moments 1e-5 of
their norm. The published schedule is computed here: ours reaches its ends, theirs does not, so it is no option of ours.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.config.schema import LoraConfig, OptimizerConfig
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.checkpoint import load_pickled
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.rendering.batches import training_batch
from pefomed_ray.training.step import build_optimizer

WeightSet = Any
"""Of conftest.py."""

RUNS = ("no_accum", "accum2")


def published_learning_rate(epoch: int, iteration: int, run: dict[str, Any]) -> float:
    """Linear warm-up by iterations in the first epoch, then a cosine by whole epochs."""
    low, peak = run["min_lr"], run["init_lr"]
    if epoch == 0:
        done = min(iteration / run["warmup_steps"], 1.0)
        return float(run["warmup_lr"] + (peak - run["warmup_lr"]) * done)
    return float(low + (peak - low) * 0.5 * (1 + math.cos(math.pi * epoch / run["max_epoch"])))


@pytest.fixture(scope="module")
def trajectory(parity_dir: Path) -> Path:
    return parity_dir / "model" / "trajectory"


@pytest.fixture
def started(trained_weights: WeightSet) -> Base:
    """The base with fresh adapters, in evaluation mode as in the reference: no dropout."""
    config = read_json(trained_weights.folder / "config.json")["lora"]
    base = open_base(str(trained_weights.base), "legacy-train")
    lora = LoraConfig(rank=config["r"], alpha=config["alpha"], target_modules=tuple(config["targets"]))
    attach_lora(base, lora, train_projector=True)
    return base


@pytest.mark.parametrize("run_name", RUNS)
def test_each_step_is_the_published_one(
    run_name: str, trained_weights: WeightSet, started: Base, trajectory: Path
) -> None:
    run = read_json(trajectory / "trajectory.json")[run_name]
    arrays = trained_weights.load_arrays(trajectory / "trajectory.npz")
    parameters = trained_weights.trained(started)
    optimizer = optimizer_of(run, started)
    assert grouped(optimizer, parameters) == [sorted(group["params"]) for group in run["param_groups"]]

    losses = train(run, run_name, arrays, trained_weights, started, optimizer)
    assert losses == pytest.approx([step["loss"] for step in run["steps"]], rel=0, abs=2e-6)
    assert {name: far for name, far in moved_apart(parameters, arrays, run_name).items() if far > 1e-5} == {}
    if run_name == "no_accum":
        stored = load_pickled(trajectory / "checkpoint_1.pth")["optimizer"]["state"]
        names = [name for group in run["param_groups"] for name in group["params"]]
        for number, name in enumerate(names):
            for moment in ("exp_avg", "exp_avg_sq"):
                ours, theirs = optimizer.state[parameters[name]][moment], stored[number][moment]
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), (name, moment)


def test_another_weight_decay_is_seen(trained_weights: WeightSet, started: Base, trajectory: Path) -> None:
    """The control of the test above."""
    run = read_json(trajectory / "trajectory.json")["accum2"]
    arrays = trained_weights.load_arrays(trajectory / "trajectory.npz")
    optimizer = optimizer_of(run, started, weight_decay=0.049)
    train(run, "accum2", arrays, trained_weights, started, optimizer)
    parameters = trained_weights.trained(started)
    assert max(moved_apart(parameters, arrays, "accum2").values()) > 1e-5


def optimizer_of(run: dict[str, Any], base: Base, weight_decay: float | None = None) -> torch.optim.Optimizer:
    """Ours, told what the published one was."""
    decaying, flat = run["param_groups"]
    assert flat["weight_decay"] == 0
    config = OptimizerConfig(weight_decay=weight_decay or decaying["weight_decay"], betas=decaying["betas"])
    optimizer = build_optimizer(base.model, config)
    assert [group["eps"] for group in optimizer.param_groups] == [decaying["eps"], flat["eps"]]
    return optimizer


def train(
    run: dict[str, Any],
    run_name: str,
    arrays: dict[str, Tensor],
    weights: WeightSet,
    base: Base,
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """The published loop from the run's initial weights; the loss of each iteration."""
    start(weights.trained(base), arrays, run_name)
    accumulated = run["run"].get("accum_grad_iters", 1)
    losses = []
    for done, step in enumerate(run["steps"], start=1):
        learning_rate = published_learning_rate(step["epoch"], step["it"], run["run"])
        assert step["lr"] == pytest.approx([learning_rate] * 2, rel=1e-12)
        number = step["it"] % len(run["batches"])
        batch = training_batch([weights.training_row(row) for row in run["batches"][number]], pad_token_id=0)
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT}
        loss = base.model(**inputs, pixel_values=arrays[f"images/batch{number}"], labels=batch.labels_BT).loss
        losses.append(loss.item())
        (loss / accumulated).backward()
        if done % accumulated == 0:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
    return losses


def moved_apart(
    parameters: dict[str, torch.nn.Parameter], arrays: dict[str, Tensor], run_name: str
) -> dict[str, float]:
    """How far each tensor ended from the reference, over how far the reference moved."""
    far = {}
    for name, parameter in parameters.items():
        first, last = arrays[f"{run_name}/init/{name}"], arrays[f"{run_name}/final/{name}"]
        far[name] = float((parameter.detach() - last).norm() / (last - first).norm())
    return far


def start(parameters: dict[str, torch.nn.Parameter], arrays: dict[str, Tensor], run_name: str) -> None:
    """Put the run's initial weights in place."""
    prefix = f"{run_name}/init/"
    initial = {name.removeprefix(prefix): tensor for name, tensor in arrays.items() if name.startswith(prefix)}
    assert initial.keys() == parameters.keys()
    with torch.no_grad():
        for name, tensor in initial.items():
            parameters[name].copy_(tensor)


def grouped(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> list[list[str]]:
    """Published names of what stands in each of the optimizer's groups."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    return [sorted(name_of[id(parameter)] for parameter in group["params"]) for group in optimizer.param_groups]
