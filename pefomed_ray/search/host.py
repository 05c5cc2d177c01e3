"""Hosts of packed trials: Ray actors that hold the open base, so that a trial need not.

A trial asks its host for one epoch after the other. The host waits until all whom it has places for have asked, or
nobody has for a moment, and lets them do it together (`training.packed`). It keeps nothing that is not on disk: Ray
starts a lost host again and asks once more what had no answer, and the runs come from their newest checkpoints.

A host of several ranks is an actor for each; the first takes the questions and tells the others.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import PefomedError, original_error
from pefomed_ray.jobs.estimate import most_adapters
from pefomed_ray.training.outcome import record_failure
from pefomed_ray.training.packed import Outcome, PackedTrainer
from pefomed_ray.training.ranks import Ranks, device_bytes

GATHERING_S = 15.0
"""How long the first to come wait for the others: their processes start one after the other."""
LINGER_S = 1.0
"""How long, later on, after the last one came. Between two epochs Tune decides who goes on."""

START_TIMEOUT_S = 1800.0
"""To open the largest base from the slowest disk."""
RENDERING_CPUS = 0.4
"""Beside a rank that computes on CPUs; with half a one for computing, two fit two CPUs and leave room for clients."""
CLIENT_CPUS = 0.001
"""Of a trial that asks a host; Tune refuses one that reserves nothing."""
MOST_ASKING = 1000
"""Questions at once."""

Question = tuple[dict[str, Any], str, int]
"""A run's config as plain values, its output folder, and the epoch it is to do, from 1."""


@dataclass(frozen=True)
class Plan:
    """`hosts` of `places` trials each, for adapters of `largest_rank` at most."""

    hosts: int
    places: int
    largest_rank: int

    @property
    def at_once(self) -> int:
        """Trials that run at the same time."""
        return self.hosts * self.places


@dataclass
class _Asked:
    question: Question
    answer: "asyncio.Future[tuple[dict[str, Any], bool]]"


class Host:
    """The first rank. An async actor: `advance` may be asked by many at once."""

    def __init__(self, values: dict[str, Any], places: int, largest_rank: int, group: PlacementGroup, at: str) -> None:
        """`values`: the config that all trials start from; `places`: how many it trains at once, or as many adapters of
        `largest_rank` as its device holds, if those are fewer; `at`: folder for what goes wrong.

        Raises PefomedError where the device does not hold one.
        """
        config = build_config(TrainConfig, values, "trial")
        self._at = Path(at)
        self._size = group.bundle_count
        self._others = _start_others(config, group) if self._size > 1 else []
        ranks = _join(config, 0, self._size, *self._rendezvous())
        self._places = min(places, _room(config, largest_rank, ranks))
        self._trainer = PackedTrainer(config, ranks)
        self._asked: list[_Asked] = []
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self._work: asyncio.Task[None] | None = None

    def _rendezvous(self) -> tuple[str, int]:
        address, port = ray.util.get_node_ip_address(), _free_port()
        for rank, other in enumerate(self._others, start=1):
            other.follow.remote(rank, self._size, address, port)
        return address, port

    async def ready(self) -> bool:
        """Answers once the base is open."""
        return True

    async def advance(self, question: Question) -> tuple[dict[str, Any], bool]:
        """Let a run do an epoch: its row of `epochs.json`, and whether it was the run's last.

        Raises what is wrong with the run, which Ray does not try again: it does so for a lost host only.
        """
        if self._work is None:
            self._work = asyncio.create_task(self._serve())
        asked = _Asked(question, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._came.set()
        return await asked.answer

    async def _serve(self) -> None:
        patience_s = GATHERING_S
        while True:
            cohort = await self._cohort(patience_s)
            patience_s = LINGER_S
            questions = [asked.question for asked in cohort]
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._train, questions)
            for asked, outcome in zip(cohort, outcomes, strict=True):
                if isinstance(outcome, PefomedError):
                    asked.answer.set_exception(outcome)
                else:
                    asked.answer.set_result((outcome.row, outcome.is_over))

    async def _cohort(self, patience_s: float) -> list[_Asked]:
        """Those who ask: as many as there are places, or all that came until nobody did for a while."""
        while len(self._asked) < self._places:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), patience_s if self._asked else None)
            except TimeoutError:
                break
        cohort, self._asked = self._asked[: self._places], self._asked[self._places :]
        return cohort

    def _train(self, questions: list[Question]) -> list[Outcome]:
        try:
            if self._size > 1:
                dist.broadcast_object_list([questions])
            return self._trainer.advance([_understood(question) for question in questions])
        except PefomedError as error:
            return [error] * len(questions)
        except Exception as error:
            record_failure(self._at, 0, error)
            os._exit(1)  # nobody knows in what state it is: Ray starts it again, with what is on disk


class _Other:
    """A rank that is not the first."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._config = build_config(TrainConfig, values, "trial")

    def follow(self, rank: int, size: int, address: str, port: int) -> None:
        """Do what the first rank does, until it is gone."""
        trainer = PackedTrainer(self._config, _join(self._config, rank, size, address, port))
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told)
            trainer.advance([_understood(question) for question in told[0]])


def host_bundle(config: TrainConfig) -> dict[str, float]:
    """What each rank of a host reserves: a CPU beside its GPU, or its CPUs and what rendering rows takes."""
    resources = config.resources
    return {"GPU": 1.0, "CPU": 1.0} if resources.use_gpu else {"CPU": resources.cpus_per_worker + RENDERING_CPUS}


@contextmanager
def hosts_of(config: TrainConfig, plan: Plan, at: Path) -> Iterator[list[Any]]:
    """Hosts for runs like this one, open and ready; gone when the block ends.

    Raises what a host raises when it opens the base.
    """
    resources, bundle = config.resources, host_bundle(config)
    groups = [ray.util.placement_group([bundle] * resources.workers) for _ in range(plan.hosts)]
    handles = [
        ray.remote(Host)
        .options(
            **_reserved(bundle),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            max_restarts=resources.max_failures,
            max_task_retries=resources.max_failures,
            max_concurrency=MOST_ASKING,
        )
        .remote(config.model_dump(mode="json"), plan.places, plan.largest_rank, group, str(at))
        for group in groups
    ]
    try:
        ray.get([handle.ready.remote() for handle in handles], timeout=START_TIMEOUT_S)
        yield handles
    except ray.exceptions.RayError as error:
        raise original_error(error) from error
    finally:
        for handle in handles:
            ray.kill(handle)
        for group in groups:
            ray.util.remove_placement_group(group)


def _start_others(config: TrainConfig, group: PlacementGroup) -> list[Any]:
    """Actors of this process: they end with it."""
    bundle = host_bundle(config)
    return [
        ray.remote(_Other)
        .options(
            **_reserved(bundle),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        )
        .remote(config.model_dump(mode="json"))
        for rank in range(1, group.bundle_count)
    ]


def _reserved(bundle: dict[str, float]) -> dict[str, Any]:
    return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}


def _room(config: TrainConfig, largest_rank: int, ranks: Ranks) -> int:
    """How many adapters fit, by estimate; what does not after all is trained in halves (`PackedTrainer`)."""
    have = device_bytes(ranks.device)
    fit = most_adapters(config, largest_rank, have)
    if fit < 1:
        raise PefomedError(
            f"by estimate one adapter of rank {largest_rank} and its base take more than the {have / 2**30:.1f} GiB of "
            "a device; take base.dtype=bfloat16, a smaller training.micro_batch_size or validation.batch_size, or "
            "resources.strategy=fsdp with more workers (`pefomed-ray estimate` shows what takes how much)"
        )
    return fit


def _join(config: TrainConfig, rank: int, size: int, address: str, port: int) -> Ranks:
    """This process among a host's ranks, once all have come."""
    resources = config.resources
    device = torch.device("cuda" if resources.use_gpu else "cpu")
    if not resources.use_gpu:
        torch.set_num_threads(ceil(resources.cpus_per_worker))
    if size > 1:
        dist.init_process_group(
            "nccl" if resources.use_gpu else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=resources.collective_timeout_s),
        )
    return Ranks(rank, size, device, resources.strategy, getattr(torch, resources.reduce_dtype), resources.cpu_offload)


def _understood(question: Question) -> tuple[TrainConfig, Path, int]:
    values, output, epoch = question
    return build_config(TrainConfig, values, "trial"), Path(output), epoch


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
