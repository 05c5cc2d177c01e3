"""The processes that train together: on their own, or a torch process group under FSDP2 or data parallelism.

FSDP2 shards the model block by block: frozen and trainable weights of a decoder layer live in one group, so do those of
a block of the vision tower; projector, embeddings, head and what else there is belong to the root, so that the root's
forward (or generate) gathers them first. A root that has seen a forward without a backward stays whole until the next
one. The tower's blocks are gathered by all ranks or by none: every row of training and validation has an image.

Plain data parallelism keeps the base whole on every rank and averages the gradients of what learns, in one message a
step. Torch's own wrapper would rename the model's parameters, and hide `generate`, to do the same.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
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
    reduce_dtype: torch.dtype = torch.float32
    """What gradients travel in."""
    cpu_offload: bool = False
    """Whether weights under FSDP2, gradients and moments stay in the CPU's memory; `device` computes."""

    @property
    def home(self) -> torch.device:
        """Where the base's weights are between uses."""
        return CPU if self.cpu_offload else self.device

    def sum(self, value: float) -> float:
        """The sum over all ranks; every rank must call."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, on `device`; every rank must call."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, items: list[Any]) -> list[Any]:
        """The ranks' lists put together, in rank order; every rank must call."""
        if self.world_size == 1:
            return items
        lists: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def distribute(self, base: Base, micro_batches: int = 1) -> "Traffic":
        """Spread the model over the ranks by the strategy, in place; call before the optimizer is made.

        Returns what a step of so many micro-batches will send, by either way, and which of them it is.
        """
        traffic = Traffic.of(base, self, micro_batches)
        model: Any = base.model
        model.to(self.home)
        if traffic.strategy == "fsdp":
            self._shard(base)
        return traffic

    def _shard(self, base: Base) -> None:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policies: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype)}
        if self.cpu_offload:
            policies["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for block in base.tower_blocks:
            # Frozen, and no gradient goes through it; it would be prefetched for the backward pass all the same.
            fully_shard(block, mesh=mesh, **policies).set_unshard_in_backward(False)
        for module in (*base.decoder_layers, base.model):
            fully_shard(module, mesh=mesh, **policies)
        register_fsdp_forward_method(base.model, "generate")

    def sync_gradients(self, model: nn.Module, *, last: bool) -> None:
        """Say, before a micro-batch's backward pass, whether it is the last of its step; every rank must call.

        FSDP2 scatters gradients with each backward pass unless it is told to wait. Those that wait are added up in the
        type that they travel in, so only float32 ones do.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or not self.waits)

    @property
    def waits(self) -> bool:
        """Whether a step's gradients travel once, under FSDP2, and not with each micro-batch."""
        return self.reduce_dtype == torch.float32

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """The mean of the ranks' gradients, in place; nothing where FSDP2 has done it. Every rank must call."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.world_size == 1 or not gradients or isinstance(gradients[0], DTensor):
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(self.reduce_dtype)
        dist.all_reduce(flat)
        flat = flat.float() / self.world_size
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Ranks()
"""A process on its own, on a CPU."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimizer step, by ring algorithms; 0 for one alone."""

    strategy: Literal["alone", "fsdp", "ddp"]
    """The one that was chosen."""
    fsdp_bytes: int
    """For each micro-batch every weight gathered for the forward pass, a decoder layer's again for the backward pass;
    gradients of what learns scattered."""
    ddp_bytes: int
    """Gradients of what learns, reduced to all; once a step, however many its micro-batches."""

    @classmethod
    def of(cls, base: Base, ranks: Ranks, micro_batches: int = 1) -> "Traffic":
        """What a base on these ranks would send. The root stays gathered until the backward pass has ended, and the
        tower's blocks take no part in it."""
        sent = (ranks.world_size - 1) / ranks.world_size
        held = _bytes(base.model.parameters())
        gathered = held + _bytes(base.decoder_layers.parameters())
        learnt = ranks.reduce_dtype.itemsize * sum(p.numel() for p in base.model.parameters() if p.requires_grad)
        scattered = learnt if ranks.waits else micro_batches * learnt
        fsdp_bytes, ddp_bytes = round(sent * (micro_batches * gathered + scattered)), round(2 * sent * learnt)
        if ranks.world_size == 1:
            return cls("alone", fsdp_bytes, ddp_bytes)
        if ranks.strategy != "auto":
            return cls(ranks.strategy, fsdp_bytes, ddp_bytes)
        if ranks.cpu_offload:
            return cls("fsdp", fsdp_bytes, ddp_bytes)
        return cls("ddp" if held <= device_bytes(ranks.device) / 2 else "fsdp", fsdp_bytes, ddp_bytes)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def device_bytes(device: torch.device) -> int:
    """Memory of a rank's device; ranks on CPUs may all stand on one machine, and share its."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (os.cpu_count() or 1)
