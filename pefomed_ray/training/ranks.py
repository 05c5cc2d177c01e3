"""The processes that train together: on their own, or a torch process group under FSDP2.

The model is sharded layer by layer: frozen and trainable weights of a decoder layer live in one group; the tower, the
projector, embeddings and head belong to the root, so that the root's forward (or generate) gathers them first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from pefomed_ray.model.base import Base

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`; `device` is where its tensors live."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

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

    def shard(self, base: Base) -> None:
        """FSDP2 over all ranks, in place; nothing for one process. Call before the optimizer is made."""
        model: Any = base.model
        model.to(self.device)
        if self.world_size == 1:
            return
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for layer in base.decoder_layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "generate")

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Full tensors, on the CPU, of what learns; every rank must call, only rank 0 receives them."""
        if self.world_size == 1:
            return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        found = get_model_state_dict(model, options=options)
        # A head that is tied to the embeddings comes along though it is frozen: torch knows it by its other name.
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in found.items() if name in learning}
