"""One optimizer step of K runs at once, over one frozen base: `step.train_step`, for all adapters of a pack.

What one run would do alone is done here for each row of the pack's arrays: its own loss over its own answer tokens, its
own clipping, learning rate, moments and dropout. Rows never meet: a run whose loss or gradient is not finite leaves the
others as they would have been without it. Ranks of a group take parts of each run's global batch, and add their
gradients up once a step.

Letters: K adapters, B rows of one, T tokens, S columns in which some row has a label, V vocabulary, P numbers of an
adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import DivergedError
from pefomed_ray.model.loss import answer_logits
from pefomed_ray.model.pack import Draw, Pack
from pefomed_ray.rendering.batches import IGNORED_LABEL, OF_TOKENS, Batch
from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.training.checkpoint import MOMENTS, WEIGHT, of_kind
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import Step, count_answer_tokens, dropout_seed, not_finite

FEATURES = "patch_features"
"""The keyword that no tower stands behind."""


@dataclass(frozen=True)
class Turn:
    """What a run brings to a step: how many it has taken, and the learning rate."""

    config: TrainConfig
    step: int
    learning_rate: float
    takes_part: bool = True
    """Whether it may step: not one that has diverged."""


@dataclass(frozen=True)
class BadStep:
    """A step that was not taken, because loss or gradient norm is not finite."""

    loss: float
    grad_norm: float
    record_ids: tuple[str, ...]
    """Of this rank's rows with such a loss; all of its rows where only the gradient is at fault."""

    def error(self, number: int, turn: Turn) -> DivergedError:
        """What it is to the run, as `train_step` says it; `number` counts steps from 1."""
        return DivergedError(
            f"step {number}: {not_finite(self.loss, self.grad_norm, turn.learning_rate, self.record_ids)}"
        )


class PackedOptimizer:
    """AdamW for every adapter of a pack, each on its own row; what `step.build_optimizer` gives one alone."""

    def __init__(
        self,
        pack: Pack,
        configs: Sequence[TrainConfig],
        tensors: Sequence[Mapping[str, Tensor]],
        steps: Sequence[int],
    ) -> None:
        """`tensors`: each adapter's, as `checkpoint.gather` gives them; `steps`: how many its moments are of."""
        self.pack = pack
        self.moments = {kind: torch.zeros_like(pack.weights_KP) for kind in MOMENTS}
        for k, own in enumerate(tensors):
            for kind, moments_KP in self.moments.items():
                pack.put(moments_KP[k], of_kind(own, kind))
        self.rows = [self._row(k, config) for k, config in enumerate(configs)]
        self.optimizer = torch.optim.AdamW([group for row in self.rows for group in row], fused=True)
        for row, count in zip(self.rows, steps, strict=True):
            for group in row:
                (parameter,) = group["params"]
                taken = torch.tensor(float(count), device=parameter.device)
                self.optimizer.state[parameter] = {"step": taken} | group["moments"]

    def step(self, learning_rates: Sequence[float], taken: Sequence[bool]) -> None:
        """Step the adapters that are to take one; clear all gradients."""
        for row, learning_rate, is_taken in zip(self.rows, learning_rates, taken, strict=True):
            for group in row:
                (parameter,) = group["params"]
                parameter.grad = group["gradient"] if is_taken else None
                group["lr"] = learning_rate * group["lr_ratio"]
        self.optimizer.step()
        self.pack.gradients_KP.zero_()

    def take(self, adapter: int) -> dict[str, Tensor]:
        """An adapter's tensors as `checkpoint.gather` gives them."""
        arrays = {WEIGHT: self.pack.weights_KP, **self.moments}
        return {
            f"{kind}.{name}": tensor
            for kind, array_KP in arrays.items()
            for name, tensor in self.pack.take(array_KP[adapter], adapter).items()
        }

    def _row(self, k: int, config: TrainConfig) -> list[dict[str, Any]]:
        groups = []
        for part in self.pack.parts:
            stretch = slice(part.start, part.end)
            groups.append(
                {
                    "params": [self.pack.weights_KP[k, stretch].detach().requires_grad_()],
                    "gradient": self.pack.gradients_KP[k, stretch],
                    "moments": {kind: array_KP[k, stretch] for kind, array_KP in self.moments.items()},
                    "lr_ratio": config.lora.loraplus_lr_ratio or 1.0 if part.is_up else 1.0,
                    "weight_decay": config.optimizer.weight_decay if part.decays else 0.0,
                    "betas": config.optimizer.betas,
                }
            )
        return groups


def packed_step(
    pack: Pack,
    optimizer: PackedOptimizer,
    turns: Sequence[Turn],
    micro_batches: Mapping[int, Sequence[Batch]],
    renderer: AnyRenderer,
    ranks: Ranks,
) -> list[Step | BadStep]:
    """Accumulate each run's micro-batches and let it take its step, but for those whose numbers are not finite.

    `micro_batches`: this rank's, by their numbers in the global batch, for each run one. Runs that stand at the same
    step hold the very same batch.
    """
    tokens_K = torch.tensor([[count_answer_tokens(batch) for batch in each] for each in micro_batches.values()]).sum(0)
    tokens_K = ranks.add_up(tokens_K.double().to(ranks.device))
    losses_K = torch.zeros_like(tokens_K)
    suspects: list[tuple[str, ...]] = [()] * pack.size
    for number, batches in micro_batches.items():
        pack.draws = _draws(pack, turns, number, batches)
        parts_K = packed_losses(pack, batches, renderer) / tokens_K
        parts_K.sum().backward()
        losses_K += parts_K.detach()
        for k in (~parts_K.isfinite()).nonzero()[:, 0].tolist():
            suspects[k] += batches[k].record_ids
    pack.draws = None
    losses_K = ranks.add_up(losses_K)
    ranks.add_up(pack.gradients_KP)
    norms_K = pack.gradients_KP.norm(dim=1)
    most_K = torch.tensor([turn.config.optimizer.max_grad_norm for turn in turns], device=ranks.device)
    # As torch's clip_grad_norm_ does.
    pack.gradients_KP.mul_((most_K / (norms_K + 1e-6)).clamp_(max=1.0)[:, None])
    finite_K = losses_K.isfinite() & norms_K.isfinite()
    taken = [turn.takes_part and ok for turn, ok in zip(turns, finite_K.tolist(), strict=True)]
    optimizer.step([turn.learning_rate for turn in turns], taken)
    every_row = [
        tuple(i for batches in micro_batches.values() for i in batches[k].record_ids) for k in range(pack.size)
    ]
    return [
        Step(loss, norm, turn.learning_rate, int(count))
        if is_taken
        else BadStep(loss, norm, suspects[k] or every_row[k])
        for k, (turn, loss, norm, count, is_taken) in enumerate(
            zip(turns, losses_K.tolist(), norms_K.tolist(), tokens_K.tolist(), taken, strict=True)
        )
    ]


def packed_losses(pack: Pack, batches: Sequence[Batch], renderer: AnyRenderer) -> Tensor:
    """float64 [K]: nats summed over each adapter's answer tokens in its own batch."""
    pack.shared = all(batch is batches[0] for batch in batches)
    joined = tiled(batches[0], pack.size) if pack.shared else joined_batches(batches, renderer.pad_token_id)
    pack.images = [len(batch.tensors.get(FEATURES, ())) for batch in batches]
    logits_BSV, targets_BS = answer_logits(pack.base.model, renderer.inputs(joined), joined.labels_BT)
    losses_N = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses_N.view(pack.size, -1).double().sum(dim=1)


def moved(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """On a device; those that are the very same stay the very same."""
    there = {id(batch): batch.to(device) for batch in batches}
    return [there[id(batch)] for batch in batches]


def tiled(batch: Batch, adapters: int) -> Batch:
    """The same batch for every adapter. Features stay single: the projector reads them for all (`Pack.shared`)."""
    tensors = {
        name: tensor if name == FEATURES else tensor.repeat(adapters, *[1] * (tensor.ndim - 1))
        for name, tensor in batch.tensors.items()
    }
    return Batch(
        batch.ids_BT.repeat(adapters, 1),
        batch.mask_BT.repeat(adapters, 1),
        batch.labels_BT.repeat(adapters, 1),
        tensors,
        batch.record_ids,
    )


def joined_batches(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """Several batches with as many rows each, one after the other, padded on the right; images as features only."""
    longest = max(batch.ids_BT.shape[1] for batch in batches)

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(tensor, (0, longest - tensor.shape[1]), value=value) for tensor in tensors])

    return Batch(
        padded([batch.ids_BT for batch in batches], pad_token_id),
        padded([batch.mask_BT for batch in batches], 0),
        padded([batch.labels_BT for batch in batches], IGNORED_LABEL),
        {
            name: padded([b.tensors[name] for b in batches], 0)
            if name in OF_TOKENS
            else torch.cat([b.tensors[name] for b in batches])
            for name in batches[0].tensors
        },
    )


def _draws(pack: Pack, turns: Sequence[Turn], number: int, batches: Sequence[Batch]) -> list[Draw] | None:
    """Each run's dropout, as it would draw it alone; None where no run drops anything."""
    if not any(adapter.dropout for adapter in pack.adapters):
        return None
    device = pack.weights_KP.device
    return [
        Draw(
            adapter.dropout,
            torch.Generator(device).manual_seed(dropout_seed(turn.config.seed, turn.step, number)),
            batch.ids_BT.shape[1],
        )
        for adapter, turn, batch in zip(pack.adapters, turns, batches, strict=True)
    ]
