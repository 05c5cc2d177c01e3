"""Some trials' adapters over one base, in both forms: each in a PEFT model of its own, and all in one pack.

The separate arm is what a user writes: `get_peft_model` on a model whose `forward` is as those of transformers are,
with logits at all positions, AdamW over what learns, `clip_grad_norm_`. Its models share the frozen weights' memory, so
that many fit; in time that can only help them.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks._measure import Sample, timed
from benchmarks._small import ANSWERS, QUESTIONS, make_batches
from benchmarks.step import AllLogits, plain_name, put_back
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import Precision
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.pack import Adapter, Pack, take_off
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.checkpoint import WEIGHT
from pefomed_ray.training.packed_step import FEATURES, PackedOptimizer, Turn, packed_step
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import Step

VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 16,
}
"""22 million parameters, 49 visual tokens."""
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
"""27 million parameters: a step costs the language model about as much as the tower."""
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
"""5 million parameters: the tower costs most of a step."""
VOCABULARY = {"vocab_size": 1536, "tie_word_embeddings": True}
"""The tokenizer's own, and no more: logits at all positions cost next to nothing."""
RANKS = (16, 8, 32, 4)
LEARNING_RATES = (1e-3, 5e-4, 7e-4, 1.5e-3)
DISTINCT = len(RANKS)
"""More trials than these are the same ones over again: what each of them comes to is known from its first."""


@dataclass(frozen=True)
class Trained:
    """What some steps of some trials gave."""

    losses: list[list[float]]
    """By trial and step."""
    weights: list[Tensor]
    """By trial: all that learns, in the order of its names."""


Arm = Callable[[], tuple[Trained, Sample]]


def trials(count: int) -> list[TrainConfig]:
    """As of a search: ranks and learning rates differ. Neither dropout nor decay nor schedule."""
    return [
        build_config(
            TrainConfig,
            {
                "name": "trial",
                "task": "vqa",
                "data": {"shards": "none"},
                "lora": {"rank": rank, "alpha": rank, "dropout": 0.0, "target_modules": ["all-linear"]},
                "optimizer": {"learning_rate": learning_rate, "weight_decay": 0.0},
            },
            "benchmark",
        )
        for rank, learning_rate in islice(zip(cycle(RANKS), cycle(LEARNING_RATES), strict=False), count)
    ]


def open_bare(folder: Path, dtype: str) -> Base:
    """The base, frozen, without an adapter, in training mode."""
    base = open_base(str(folder), "short", Precision(dtype=dtype))
    base.model.requires_grad_(False)
    base.model.train()
    return base


def fresh_adapters(base: Base, configs: Sequence[TrainConfig]) -> list[Adapter]:
    """An adapter for each of the `trials`; the base is left as it was."""
    made = []
    for number, config in enumerate(configs):
        torch.manual_seed(number % DISTINCT)
        attach_lora(base, config.lora, train_projector=True)
        made.append(take_off(base))
    return made


def one_batch(base: Base, rows: int) -> Batch:
    """Pictures with questions and answers."""
    return make_batches(base, 1, rows, QUESTIONS, ANSWERS)[0]


@torch.no_grad()
def with_features(base: Base, batch: Batch) -> Batch:
    """The same rows, with what the tower makes of their pictures in place of these, as a feature cache has it."""
    model: Any = base.model
    return replace(batch, tensors={FEATURES: model.patch_features(base.renderer.inputs(batch)["pixel_values"])})


def packed(
    base: Base, configs: Sequence[TrainConfig], adapters: Sequence[Adapter], batch: Batch, steps: int
) -> tuple[Trained, Sample]:
    """All trials at once."""
    pack = Pack(base, adapters, torch.device("cpu"))
    try:
        start = [{f"{WEIGHT}.{name}": value for name, value in adapter.tensors.items()} for adapter in adapters]
        optimizer = PackedOptimizer(pack, configs, start, [0] * len(configs))

        def run() -> list[list[float]]:
            return [packed_losses(pack, optimizer, configs, batch, base, step) for step in range(steps)]

        by_step, sample = timed(run)
        weights = [flat(pack.take(row_P, k)) for k, row_P in enumerate(pack.weights_KP)]
    finally:
        pack.remove()
    return Trained([list(losses) for losses in zip(*by_step, strict=True)], weights), sample


def packed_losses(
    pack: Pack, optimizer: PackedOptimizer, configs: Sequence[TrainConfig], batch: Batch, base: Base, step: int
) -> list[float]:
    """One step of all; NaN for a trial that did not take it."""
    turns = [Turn(config, step, config.optimizer.learning_rate) for config in configs]
    alone = Ranks(device=pack.weights_KP.device)
    done = packed_step(pack, optimizer, turns, {0: [batch] * pack.size}, base.renderer, alone)
    return [each.loss if isinstance(each, Step) else math.nan for each in done]


@dataclass(frozen=True)
class Separate:
    """One trial as a user has it."""

    model: Any
    config: TrainConfig
    start: list[Tensor]

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """What learns, by names without PEFT's wrappers."""
        return {plain_name(name): value for name, value in self.model.named_parameters() if value.requires_grad}


def separate_models(
    folder: Path, dtype: torch.dtype, configs: Sequence[TrainConfig], adapters: Sequence[Adapter]
) -> list[Separate]:
    """A PEFT model for each trial, with these adapters' weights; all over the same frozen weights."""
    plain = AllLogits.from_pretrained(folder, dtype=dtype)
    plain.projector.float()
    shared = {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()]}
    made = []
    for config, adapter in zip(configs, adapters, strict=True):
        wanted = PeftLoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=r"language_model\..*_proj",
            modules_to_save=["projector"],
        )
        model: Any = get_peft_model(copy.deepcopy(plain, dict(shared)), wanted)
        model.train()
        one = Separate(model, config, [])
        if set(one.learning) != set(adapter.tensors):
            raise AssertionError(f"other parameters learn: {sorted(set(one.learning) ^ set(adapter.tensors))[:3]}")
        one.start.extend(adapter.tensors[name] for name in one.learning)
        made.append(one)
    return made


def separate(models: Sequence[Separate], inputs: dict[str, Tensor], steps: int) -> tuple[Trained, Sample]:
    """One trial after the other. `inputs`: with labels."""
    for one in models:
        put_back(one.learning.values(), one.start)
    optimizers = [torch.optim.AdamW(each.learning.values(), weight_decay=0.0, fused=True) for each in models]
    for one, optimizer in zip(models, optimizers, strict=True):
        optimizer.param_groups[0]["lr"] = one.config.optimizer.learning_rate

    def run() -> list[list[float]]:
        return [
            [separate_step(one.model, optimizer, inputs) for _ in range(steps)]
            for one, optimizer in zip(models, optimizers, strict=True)
        ]

    losses, sample = timed(run)
    return Trained(losses, [flat(one.learning) for one in models]), sample


def separate_step(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> float:
    """One step as a user writes it."""
    loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def inputs_of(base: Base, batch: Batch) -> dict[str, Tensor]:
    """As the model's keyword arguments."""
    return base.renderer.inputs(batch) | {"labels": batch.labels_BT}


def flat(tensors: Any) -> Tensor:
    """All of them in one row, in the order of their names."""
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


@dataclass(frozen=True)
class Apart:
    """How far two arms' trials are apart at most; or may be."""

    losses: float
    """Nats."""
    way: float
    """Between their last weights, as a share of the way there from the first: 1 where one arm did not move."""


def apart(name: str, seen: Trained, expected: Trained, start: Sequence[Tensor]) -> Apart:
    """Of the first `DISTINCT` trials in `expected`. Raises AssertionError where a trial does not learn."""
    losses = way = 0.0
    for k, mine in enumerate(seen.losses):
        if not mine[-1] < mine[0]:
            raise AssertionError(f"{name}: trial {k} does not learn: losses {mine}")
        same = k % DISTINCT
        losses = max(losses, *(abs(a - b) for a, b in zip(mine, expected.losses[same], strict=True)))
        went = (expected.weights[same] - start[same]).norm()
        way = max(way, float((seen.weights[k] - expected.weights[same]).norm() / went))
    return Apart(losses, way)


def check_equal(name: str, seen: Trained, expected: Trained, start: Sequence[Tensor], most: Apart) -> Apart:
    """How far apart. Raises AssertionError where that is more than `most`, or a trial does not learn."""
    found = apart(name, seen, expected, start)
    if not (found.losses <= most.losses and found.way <= most.way):
        raise AssertionError(f"{name}: trials are not the same: {found}, at most {most}")
    return found
