"""The processes that train together: on their own, or a torch process group under FSDP2 or data parallelism.

FSDP2 shards the model layer by layer: frozen and trainable weights of a decoder layer live in one group; the tower, the
projector, embeddings and head belong to the root, so that the root's forward (or generate) gathers them first. A root
that has seen a forward without a backward stays whole until the next one.

Plain data parallelism keeps the base whole on every rank and averages the gradients of what learns, in one message a
step. Torch's own wrapper would rename the model's parameters, and hide `generate`, to do the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pefomed_ray.model.base import Base

CPU = torch.device("cpu")
Strategy = Literal["auto", "fsdp", "ddp"]


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`; `device` is where its tensors live."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    strategy: Strategy = "auto"

    def sum(self, value: float) -> float:
        """The sum over all ranks; every rank must call."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def gather(self, items: list[Any]) -> list[Any]:
        """The ranks' lists put together, in rank order; every rank must call."""
        if self.world_size == 1:
            return items
        lists: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def distribute(self, base: Base) -> "Traffic":
        """Spread the model over the ranks by the strategy, in place; call before the optimizer is made.

        Returns what a step will send, by either way, and which of them it is.
        """
        traffic = Traffic.of(base.model, self)
        model: Any = base.model
        model.to(self.device)
        if traffic.strategy == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for layer in base.decoder_layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            register_fsdp_forward_method(model, "generate")
        return traffic

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """The mean of the ranks' gradients, in place; nothing where FSDP2 has done it. Every rank must call."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.world_size == 1 or not gradients or isinstance(gradients[0], DTensor):
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimizer step with one micro-batch, by ring algorithms; 0 for one alone."""

    strategy: Literal["alone", "fsdp", "ddp"]
    """The one that was chosen."""
    fsdp_bytes: int
    """Every weight gathered for the forward and again for the backward pass, gradients of what learns scattered."""
    ddp_bytes: int
    """Gradients of what learns, reduced to all."""

    @classmethod
    def of(cls, model: nn.Module, ranks: Ranks) -> "Traffic":
        """What a model on these ranks would send."""
        sent = (ranks.world_size - 1) / ranks.world_size
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        learnt = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        fsdp_bytes, ddp_bytes = round(sent * (2 * held + learnt)), round(2 * sent * learnt)
        if ranks.world_size == 1:
            return cls("alone", fsdp_bytes, ddp_bytes)
        if ranks.strategy != "auto":
            return cls(ranks.strategy, fsdp_bytes, ddp_bytes)
        return cls("ddp" if held <= _device_bytes(ranks.device) / 2 else "fsdp", fsdp_bytes, ddp_bytes)


def _device_bytes(device: torch.device) -> int:
    """Memory of a rank's device; ranks on CPUs may all stand on one machine, and share its."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (os.cpu_count() or 1)
