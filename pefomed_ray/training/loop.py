"""The training loop over steps and epochs, the same alone in a process and on every rank of a worker group."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pefomed_ray import __version__
from pefomed_ray.artifacts.base import base_digest
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.storage import digest_of, local_path, write_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import DivergedError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.lora import attach_lora, what_learns
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.checkpoint import Progress, gather, newest, restore, save_checkpoint, weights
from pefomed_ray.training.feed import features_of
from pefomed_ray.training.journal import Journal
from pefomed_ray.training.order import TrainingOrder, rows_of
from pefomed_ray.training.preflight import check_features
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import Step, build_optimizer, learning_rate_at, train_step
from pefomed_ray.training.trackers import Trackers
from pefomed_ray.training.validation import ValidationSet

START_FILE = "start.json"
"""What learns and what a step will send (`model.lora.what_learns`, `ranks.Traffic`); written before the first step."""

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after each epoch with that epoch's row of `epochs.json`."""
MustSave = Callable[[], bool]
"""Asked by every rank after each step, with the same answer on all: whether a checkpoint is wanted at once."""


def prepare_model(config: TrainConfig, device: torch.device) -> Base:
    """The base with fresh adapters, or with those of the bundle the run starts from.

    Raises ConfigError where the device cannot hold the base as `config.base` wants it.
    """
    if config.init_from is not None:
        directory = local_path(config.init_from)
        base = open_bundle(directory, trainable=True, precision=config.base, device=device)[0]
    else:
        base = open_base(config.base.path, config.template, config.base, device)
        # Every rank draws the same initial adapters; FSDP2 then keeps each rank's part of them.
        torch.manual_seed(config.seed)
        attach_lora(base, config.lora, train_projector=config.projector.train)
    if config.training.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def run(
    config: TrainConfig,
    output: Path,
    stream: Callable[[TrainingOrder, Base], Iterator[Batch]],
    ranks: Ranks,
    report: Report,
    must_save: MustSave = lambda: False,
) -> None:
    """Train, validate after every epoch, keep the best and the last bundle under `output/epochs`.

    Goes on from the newest checkpoint in `output` that is whole. `stream` gives this rank's micro-batches from the
    order's first step on. Raises DivergedError, with no step taken, where loss or gradient is not finite, DataError for
    shards that are not what their manifest says, and what `prepare_model` and `newest` raise.
    """
    base = prepare_model(config, ranks.home)
    check_features(config, base.path)
    index = rows_of(config, "train")
    validation = ValidationSet.load(rows_of(config, "validation"), config, base.renderer, ranks)
    learning = what_learns(base)
    if config.data.feature_cache is not None:
        del base.model.vision_tower  # a `pefomed` base, as check_features says; it would only take memory
    traffic = ranks.distribute(
        base, config.training.batch_size // (ranks.world_size * config.training.micro_batch_size)
    )
    if ranks.rank == 0:
        write_json(output / START_FILE, learning | {"traffic": asdict(traffic)})
    optimizer = build_optimizer(base.model, config.optimizer, config.lora.loraplus_lr_ratio)
    identity = run_identity(config, base)
    progress = Progress()
    if (found := newest(output, identity)) is not None:
        restore(base.model, optimizer, found)
        progress = found.progress
    order = TrainingOrder.of(index, config, progress.step)
    journal = Journal(output, order, progress, Trackers(config, output)) if ranks.rank == 0 else None
    batches = stream(order, base)
    base.model.train()
    clock, steps_here = _Clock(), 0
    while progress.step < order.total_steps and not _is_enough(config, progress):
        micro_batches = [clock.wait(batches).to(ranks.device) for _ in range(order.micro_batches_per_step)]
        step = _step(config, base, optimizer, micro_batches, progress, order, ranks)
        progress.step += 1
        steps_here += 1
        timing = clock.step()
        if step:
            progress.steps.append(asdict(step))
            if journal:
                journal.step(progress.step, asdict(step) | timing)
        row = {}
        if progress.step % order.steps_per_epoch == 0 or progress.step == order.total_steps:
            row = _epoch_row(order, progress, clock.epoch(), steps_here)
            row |= validation.measure(base.model, base.renderer, ranks)
            row |= {name: learning[name] for name in ("trainable_parameters", "parameters")}
            progress.end_epoch(row, config.validation.metric)
            clock, steps_here = _Clock(), 0
        if row or progress.step % config.training.checkpoint_steps == 0 or must_save():
            tensors = gather(base.model, optimizer)
            if journal:
                if row:
                    _save_bundle(output, base, config, weights(tensors), progress)
                    journal.epoch(progress)
                save_checkpoint(output, progress, tensors, identity)
        if row:
            report(row)
    if journal:
        journal.close()


def run_identity(config: TrainConfig, base: Base) -> dict[str, Any]:
    """What must not change when a run goes on: everything that its steps follow from, whatever they run on."""
    apart = {"name", "output_dir", "report_to", "resources", "data", "validation", "base"}
    values = config.model_dump(mode="json", exclude=apart)
    for name in ("micro_batch_size", "checkpoint_steps", "max_bad_steps", "gradient_checkpointing"):
        del values["training"][name]
    return values | {
        "data.max_answer_tokens": config.data.max_answer_tokens,
        "data.shards": _data_lineage(config)["shards"],
        "base.dtype": config.base.dtype,
        "base.quantization": config.base.quantization,
        "base.digest": base_digest(base.path),
        "template.digest": base.renderer.digest,
    }


def _step(
    config: TrainConfig,
    base: Base,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    progress: Progress,
    order: TrainingOrder,
    ranks: Ranks,
) -> Step | None:
    """One step; None where it was left out because loss or gradient was not finite."""
    # Dropout follows from the step alone, so that a run which goes on draws what an unbroken one would.
    torch.manual_seed(int(digest_of([config.seed, progress.step, ranks.rank])[:15], 16))
    try:
        return train_step(
            base.model,
            optimizer,
            micro_batches,
            base.renderer,
            learning_rate_at(progress.step, order.total_steps, config.optimizer),
            config.optimizer.max_grad_norm,
            world_size=ranks.world_size,
            sum_over_ranks=ranks.sum,
            average_gradients=ranks.average_gradients,
            sync_gradients=ranks.sync_gradients,
        )
    except DivergedError as error:
        progress.bad_steps += 1
        if progress.bad_steps <= config.training.max_bad_steps:
            return None
        raise DivergedError(f"step {progress.step + 1}: {error}") from None


def _is_enough(config: TrainConfig, progress: Progress) -> bool:
    """Whether the metric has not become better for as long as the config allows."""
    patience = config.training.early_stopping_patience
    return patience is not None and len(progress.epochs) - 1 - progress.best >= patience > 0 and progress.best >= 0


class _Clock:
    """Seconds of an epoch, or of what this process has done of it, and how many were spent waiting for data."""

    def __init__(self) -> None:
        self.started = self.step_started = time.monotonic()
        self.waited_s = self.waited_in_step_s = 0.0

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch."""
        before = time.monotonic()
        batch = next(batches)
        self.waited_in_step_s += time.monotonic() - before
        return batch

    def step(self) -> dict[str, float]:
        """Of the step that has just ended."""
        now = time.monotonic()
        step_s, waited_s = now - self.step_started, self.waited_in_step_s
        self.step_started, self.waited_in_step_s = now, 0.0
        self.waited_s += waited_s
        return {"step_s": step_s, "data_wait_share": waited_s / step_s}

    def epoch(self) -> dict[str, float]:
        """So far."""
        train_s = time.monotonic() - self.started
        return {"train_s": train_s, "data_wait_share": self.waited_s / train_s}


def _epoch_row(order: TrainingOrder, progress: Progress, timing: dict[str, float], steps_here: int) -> dict[str, Any]:
    """`steps_here`: those that `timing` is of; after an interruption not all of the epoch's."""
    steps = progress.steps
    if not steps:
        raise DivergedError("no step of a whole epoch could be taken; lower optimizer.learning_rate or lora.alpha")
    tokens = sum(step["answer_tokens"] for step in steps)
    return {
        "train_loss": sum(step["loss"] * step["answer_tokens"] for step in steps) / max(tokens, 1),
        "grad_norm": steps[-1]["grad_norm"],
        "learning_rate": steps[-1]["learning_rate"],
        "answer_tokens": tokens,
        "steps": len(steps),
        "bad_steps": progress.bad_steps,
        "rows_per_s": steps_here * order.batch_size / timing["train_s"],
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


def _save_bundle(output: Path, base: Base, config: TrainConfig, trained: dict[str, Tensor], progress: Progress) -> None:
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
    target = folder / f"{len(progress.epochs):03d}"
    shutil.rmtree(target, ignore_errors=True)  # what a run left that ended here, before its checkpoint was there
    save_bundle(target, base, config, trained, lineage, metrics)
    for position in range(len(progress.epochs) - 1):
        if position != progress.best:
            shutil.rmtree(folder / f"{position + 1:03d}", ignore_errors=True)
