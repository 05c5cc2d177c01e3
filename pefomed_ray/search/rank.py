"""What a host of packed trials computes with: a process group, a device, the open base."""

import socket
from collections.abc import Sequence
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import PefomedError
from pefomed_ray.jobs.estimate import most_adapters
from pefomed_ray.training.packed import Outcome, PackedTrainer
from pefomed_ray.training.ranks import Ranks, device_bytes

Question = tuple[dict[str, Any], str, int]
"""A run's config as plain values, its output folder, and the epoch it is to do, from 1."""


class Rank:
    """One process of a host. Make and use it in one thread: torch counts its threads apart for each."""

    def __init__(self, config: TrainConfig, number: int, size: int, address: str, port: int) -> None:
        """Opens the base, once all `size` ranks have come to this address."""
        self._trainer = PackedTrainer(config, _join(config, number, size, address, port))
        self._size = size
        self.worth_packing = self._trainer.worth_packing()
        """How many runs at once are not slower than one after the other."""

    def lead(self, questions: Sequence[Question]) -> list[Outcome]:
        """Let these runs do an epoch, on all ranks: what `PackedTrainer.advance` gives. For the first rank."""
        if self._size > 1:
            dist.broadcast_object_list([questions])
        return self._advance(questions)

    def follow(self) -> NoReturn:
        """Do what the first rank does, until it is gone."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told)
            self._advance(told[0])

    def _advance(self, questions: Sequence[Question]) -> list[Outcome]:
        return self._trainer.advance(
            [(build_config(TrainConfig, values, "trial"), Path(output), epoch) for values, output, epoch in questions]
        )


def room(config: TrainConfig, largest_rank: int) -> int:
    """How many adapters fit, by estimate; what does not after all is trained in halves (`PackedTrainer`).

    Raises PefomedError where none does.
    """
    have = device_bytes(_device(config))
    fit = most_adapters(config, largest_rank, have)
    if fit < 1:
        raise PefomedError(
            f"by estimate one adapter of rank {largest_rank} and its base take more than the {have / 2**30:.1f} GiB of "
            "a device; take base.dtype=bfloat16, a smaller training.micro_batch_size or validation.batch_size, or "
            "resources.strategy=fsdp with more workers (`pefomed-ray estimate` shows what takes how much)"
        )
    return fit


def free_port() -> int:
    """For the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _device(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if config.resources.use_gpu else "cpu")


def _join(config: TrainConfig, number: int, size: int, address: str, port: int) -> Ranks:
    """This process among a host's ranks, once all have come."""
    resources = config.resources
    if not resources.use_gpu:
        torch.set_num_threads(ceil(resources.cpus_per_worker))
    if size > 1:
        dist.init_process_group(
            "nccl" if resources.use_gpu else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=number,
            world_size=size,
            timeout=timedelta(seconds=resources.collective_timeout_s),
        )
    reduce_dtype = getattr(torch, resources.reduce_dtype)
    return Ranks(number, size, _device(config), resources.strategy, reduce_dtype, resources.cpu_offload)
