"""One optimizer step, read aloud: render, forward, backward, clip, step. No Ray, no process group needed.

Ranks of a process group call the same functions, with their `Ranks`: it sums numbers up and averages gradients.
Letters: B rows, T tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.config.schema import OptimizerConfig
from pefomed_ray.errors import DivergedError
from pefomed_ray.model.loss import answer_loss
from pefomed_ray.rendering.batches import IGNORED_LABEL, Batch
from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `loss` in nats an answer token, over the global batch."""

    loss: float
    grad_norm: float
    learning_rate: float
    answer_tokens: int


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, loraplus_lr_ratio: float | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as the published code groups them.

    LoRA+ (arXiv 2402.12354): LoRA's B matrices learn `loraplus_lr_ratio` times as fast as all else; each group's
    `lr_ratio` says how fast.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight_decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            lr_ratio = loraplus_lr_ratio or 1.0 if ".lora_B." in name else 1.0
            groups.setdefault((weight_decay, lr_ratio), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": decay, "lr": config.learning_rate * ratio, "lr_ratio": ratio}
            for (decay, ratio), params in groups.items()
        ],
        betas=config.betas,
    )


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step 0..total_steps-1: linear warm-up, then a cosine whose last step is the minimum.

    The peak is reached at the first step after warm-up. (The published schedule reaches neither end.)
    """
    warmup_steps = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    if step < warmup_steps:
        start = config.warmup_start_learning_rate
        return start + (config.learning_rate - start) * step / warmup_steps
    after = max(total_steps - 1 - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min((step - warmup_steps) / after, 1.0)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    renderer: AnyRenderer,
    learning_rate: float,
    max_grad_norm: float,
    ranks: Ranks = ALONE,
    dropout_seeds: Sequence[int] | None = None,
) -> Step:
    """Accumulate the micro-batches' gradients and take one step.

    The loss is averaged over the answer tokens of the global batch, not over ranks' or micro-batches' means. Gradients
    are averaged over ranks, hence the factor `ranks.world_size`. With `dropout_seeds`, one a micro-batch, what dropout
    draws follows from them; else from torch's state.
    Raises DivergedError, on every rank, before the optimizer is touched where the loss or a gradient is not finite.
    """
    tokens = ranks.sum(float(sum(count_answer_tokens(batch) for batch in micro_batches)))
    loss = 0.0
    suspects: list[str] = []
    for number, batch in enumerate(micro_batches):
        if dropout_seeds is not None:
            torch.manual_seed(dropout_seeds[number])
        part, _ = answer_loss(model, renderer.inputs(batch), batch.labels_BT, tokens / ranks.world_size)
        ranks.sync_gradients(model, last=number == len(micro_batches) - 1)
        part.backward()
        loss += float(part.detach()) / ranks.world_size
        if not math.isfinite(float(part.detach())):
            suspects += batch.record_ids
    loss = ranks.sum(loss)
    ranks.average_gradients(trainable(model))
    grad_norm = _full(nn.utils.clip_grad_norm_(trainable(model), max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        rows = suspects or [name for batch in micro_batches for name in batch.record_ids]
        raise DivergedError(not_finite(loss, grad_norm, learning_rate, rows))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss, grad_norm, learning_rate, int(tokens))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], renderer: AnyRenderer, ranks: Ranks = ALONE) -> float:
    """Nats an answer token over some batches, gradients off."""
    total = tokens = 0.0
    for batch in batches:
        total += float(answer_loss(model, renderer.inputs(batch), batch.labels_BT, 1)[0])
        tokens += count_answer_tokens(batch)
    return ranks.sum(total) / ranks.sum(tokens)


def count_answer_tokens(batch: Batch) -> int:
    """Labels that count."""
    return int((batch.labels_BT != IGNORED_LABEL).sum())


def dropout_seed(seed: int, step: int, number: int) -> int:
    """What dropout draws from in a micro-batch, by its number in the global batch of a step: so a run that goes on
    draws what an unbroken one would, and so does any number of workers."""
    return int(digest_of([seed, step, number])[:15], 16)


def not_finite(loss: float, grad_norm: float, learning_rate: float, record_ids: Sequence[str]) -> str:
    """What to say of a step that was not taken, for these rows' sake perhaps."""
    return (
        f"loss {loss} and gradient norm {grad_norm} at learning rate {learning_rate:.3g}: not finite, "
        f"no step was taken; lower optimizer.learning_rate or lora.alpha, or look at the records: {_some(record_ids)}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _full(norm: Any) -> float:
    """A norm as a number; under FSDP2 it is a DTensor that every rank must gather."""
    return float(norm.full_tensor()) if hasattr(norm, "full_tensor") else float(norm)
