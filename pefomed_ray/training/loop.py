"""The training loop over steps and epochs, the same alone in a process and on every rank of a worker group."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pefomed_ray import __version__
from pefomed_ray.artifacts.base import base_digest
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.storage import digest_of, local_path, write_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.lora import attach_lora, what_learns
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.feed import features_of
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.preflight import check_features
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import Step, build_optimizer, learning_rate_at, train_step
from pefomed_ray.training.validation import ValidationSet

WHAT_LEARNS_FILE = "what_learns.json"
"""Written before the first step; see `model.lora.what_learns`."""

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after each epoch with that epoch's row of `epochs.json`."""


@dataclass
class Progress:
    """What the epochs so far gave; rank 0 keeps it on disk."""

    epochs: list[dict[str, Any]]
    best: int = -1
    """Position in `epochs` of the best validation metric; the earlier of equals."""

    def add(self, row: dict[str, Any], metric: str) -> None:
        """One more epoch."""
        self.epochs.append(row)
        if self.best < 0 or row[metric] > self.epochs[self.best][metric]:
            self.best = len(self.epochs) - 1


def prepare_model(config: TrainConfig, device: torch.device) -> Base:
    """The base with fresh adapters, or with those of the bundle the run starts from.

    Raises ConfigError where the device cannot hold the base as `config.base` wants it.
    """
    if config.init_from is not None:
        directory = local_path(config.init_from)
        return open_bundle(directory, trainable=True, precision=config.base, device=device)[0]
    base = open_base(config.base.path, config.template, config.base, device)
    # Every rank draws the same initial adapters; FSDP2 then keeps each rank's part of them.
    torch.manual_seed(config.seed)
    attach_lora(base, config.lora, train_projector=config.projector.train)
    return base


def run(
    config: TrainConfig,
    output: Path,
    stream: Callable[[TrainingOrder, Base], Iterator[Batch]],
    ranks: Ranks,
    report: Report,
) -> None:
    """Train, validate after every epoch, keep the best and the last bundle under `output/epochs`.

    `stream` gives this rank's micro-batches of the whole run. Raises DivergedError, with no step taken, where loss or
    gradient is not finite, DataError for shards that are not what their manifest says, and what `prepare_model` raises.
    """
    base = prepare_model(config, ranks.device)
    check_features(config, base.path)
    order = TrainingOrder.of(rows_of(config, "train"), config)
    validation = ValidationSet.load(rows_of(config, "validation"), config, base.renderer, ranks)
    learning = what_learns(base)
    if ranks.rank == 0:
        write_json(output / WHAT_LEARNS_FILE, learning)
    if config.data.feature_cache is not None:
        del base.model.vision_tower  # a `pefomed` base, as check_features says; it would only take memory
    ranks.shard(base)
    optimizer = build_optimizer(base.model, config.optimizer, config.lora.loraplus_lr_ratio)
    torch.manual_seed(config.seed + ranks.rank)
    base.model.train()
    progress = Progress([])
    batches = stream(order, base)
    steps: list[Step] = []
    clock = _Clock()
    for step in range(order.total_steps):
        micro_batches = [clock.wait(batches).to(ranks.device) for _ in range(order.micro_batches_per_step)]
        learning_rate = learning_rate_at(step, order.total_steps, config.optimizer)
        steps.append(
            train_step(
                base.model,
                optimizer,
                micro_batches,
                base.renderer,
                learning_rate,
                config.optimizer.max_grad_norm,
                world_size=ranks.world_size,
                sum_over_ranks=ranks.sum,
            )
        )
        if (step + 1) % order.steps_per_epoch and step + 1 < order.total_steps:
            continue
        timing = clock.lap()
        row = _epoch_row(order, steps, timing) | validation.measure(base.model, base.renderer, ranks)
        row |= {name: learning[name] for name in ("trainable_parameters", "parameters")}
        steps = []
        progress.add(row, config.validation.metric)
        trained = ranks.trained_tensors(base.model)
        if ranks.rank == 0:
            _save(output, base, config, trained, progress)
        clock = _Clock()
        report(row)


class _Clock:
    """Seconds since the start, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.waited_s = 0.0

    def wait(self, batches: Iterator[Batch]) -> Batch:
        before = time.monotonic()
        batch = next(batches)
        self.waited_s += time.monotonic() - before
        return batch

    def lap(self) -> dict[str, float]:
        seconds = time.monotonic() - self.started
        return {"train_s": seconds, "data_wait_share": self.waited_s / seconds}


def _epoch_row(order: TrainingOrder, steps: list[Step], timing: dict[str, float]) -> dict[str, Any]:
    tokens = sum(step.answer_tokens for step in steps)
    return {
        "train_loss": sum(step.loss * step.answer_tokens for step in steps) / tokens,
        "grad_norm": steps[-1].grad_norm,
        "learning_rate": steps[-1].learning_rate,
        "answer_tokens": tokens,
        "steps": len(steps),
        "rows_per_s": len(steps) * order.batch_size / timing["train_s"],
        **timing,
    }


def _data_lineage(config: TrainConfig) -> dict[str, Any]:
    parts = config.data.shards
    found = [load_shard_manifest(part.shards) for part in parts]
    said = {
        "licence": "restricted" if any(manifest.licence == "restricted" for manifest in found) else "open",
        "rows": sum(manifest.rows["train"] for manifest in found),
    }
    if len(parts) == 1:
        return said | {"shards": found[0].digest, "source": found[0].source}
    mixture = [
        {"shards": manifest.digest, "source": manifest.source, "weight": part.weight}
        for part, manifest in zip(parts, found, strict=True)
    ]
    return said | {
        "shards": digest_of(mixture),
        "source": " + ".join(manifest.source for manifest in found),
        "mixture": mixture,
    }


def _save(output: Path, base: Base, config: TrainConfig, trained: dict[str, Any], progress: Progress) -> None:
    row = progress.epochs[-1]
    features = features_of(config)
    lineage = _data_lineage(config) | {
        "split": "train",
        "base_digest": base_digest(base.path),
        "template": base.renderer.digest,
        "epoch": len(progress.epochs),
        "init_from": config.init_from,
        "feature_cache": features.manifest.digest if features else None,
        "code_version": __version__,
    }
    n = int(row["n"])
    metrics = {
        name: {"value": row[name], "n": n, "unscored": 0, "ci95": None} for name in ("exact_match", "rougeL")
    } | {"split": "validation", "loss": row["loss"]}
    folder = output / "epochs"
    folder.mkdir(exist_ok=True)
    save_bundle(folder / f"{len(progress.epochs):03d}", base, config, trained, lineage, metrics)
    for position in range(len(progress.epochs) - 1):
        if position != progress.best:
            shutil.rmtree(folder / f"{position + 1:03d}", ignore_errors=True)
    write_json(output / "epochs.json", {"best": progress.best + 1, "epochs": progress.epochs})
