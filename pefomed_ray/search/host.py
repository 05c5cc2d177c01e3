"""Hosts of packed trials: Ray actors that hold the open base, so that a trial need not.

A trial asks its host for one epoch after the other. The host waits until all whom it has places for have asked, or
nobody has for a moment, and lets them do it together (`training.packed`). It keeps nothing that is not on disk: Ray
starts a lost host again and asks once more what had no answer, and the runs come from their newest checkpoints.

A host of several ranks is an actor for each; the first takes the questions and tells the others.

Ray loads this module in every trial's process too, since the handle of an actor brings its class along: so what loads
torch is in `rank`, and is imported by the actors themselves.
"""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import PefomedError, original_error
from pefomed_ray.training.outcome import record_failure

if TYPE_CHECKING:
    from pefomed_ray.search.rank import Question, Rank
    from pefomed_ray.training.packed import Outcome

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
IN_RESERVE = 1
"""Trials of a host beyond its places, so that it need not wait until Tune has started another."""
MOST_ASKING = 1000
"""Questions at once."""


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
    question: "Question"
    answer: "asyncio.Future[tuple[dict[str, Any], bool]]"


class Host:
    """The first rank. An async actor: `advance` may be asked by many at once."""

    def __init__(self, values: dict[str, Any], places: int, largest_rank: int, group: PlacementGroup, at: str) -> None:
        """`values`: the config that all trials start from; `places`: how many it trains at once, or fewer if its device
        does not hold so many adapters of `largest_rank` or is not faster with them; `at`: folder for what goes wrong.

        Raises PefomedError where the device does not hold one.
        """
        self._at = Path(at)
        self._asked: list[_Asked] = []
        self._came = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        opening = self._thread.submit(self._open, values, largest_rank, group)
        room, self._rank = opening.result()
        self._places = min(places, room, self._rank.worth_packing)

    def _open(self, values: dict[str, Any], largest_rank: int, group: PlacementGroup) -> tuple[int, "Rank"]:
        from pefomed_ray.search.rank import Rank, free_port, room

        config = build_config(TrainConfig, values, "trial")
        fit = room(config, largest_rank)
        self._others = _start_others(values, group)
        size, address, port = group.bundle_count, ray.util.get_node_ip_address(), free_port()
        for number, other in enumerate(self._others, start=1):
            other.follow.remote(number, size, address, port)
        return fit, Rank(config, 0, size, address, port)

    async def places(self) -> int:
        """How many runs it trains at once; answers once the base is open."""
        return self._places

    async def advance(self, question: "Question") -> tuple[dict[str, Any], bool]:
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

    def _train(self, questions: "list[Question]") -> "list[Outcome]":
        try:
            return self._rank.lead(questions)
        except PefomedError as error:
            return [error] * len(questions)
        except Exception as error:
            record_failure(self._at, 0, error)
            os._exit(1)  # nobody knows in what state it is: Ray starts it again, with what is on disk


class _Other:
    """A rank that is not the first."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._config = build_config(TrainConfig, values, "trial")

    def follow(self, number: int, size: int, address: str, port: int) -> None:
        """Do what the first rank does, until it is gone."""
        from pefomed_ray.search.rank import Rank

        Rank(self._config, number, size, address, port).follow()


def host_bundle(config: TrainConfig) -> dict[str, float]:
    """What each rank of a host reserves: a CPU beside its GPU, or its CPUs and what rendering rows takes."""
    resources = config.resources
    return {"GPU": 1.0, "CPU": 1.0} if resources.use_gpu else {"CPU": resources.cpus_per_worker + RENDERING_CPUS}


@contextmanager
def hosts_of(config: TrainConfig, plan: Plan, at: Path) -> Iterator[tuple[list[Any], int]]:
    """Hosts for runs like this one, open and ready, gone when the block ends; and how many trials they keep busy.

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
        places = ray.get([handle.places.remote() for handle in handles], timeout=START_TIMEOUT_S)
        yield handles, min(plan.at_once, sum(places) + len(handles) * IN_RESERVE)
    except ray.exceptions.RayError as error:
        raise original_error(error) from error
    finally:
        for handle in handles:
            ray.kill(handle)
        for group in groups:
            ray.util.remove_placement_group(group)


def _start_others(values: dict[str, Any], group: PlacementGroup) -> list[Any]:
    """Actors of this process: they end with it."""
    return [
        ray.remote(_Other)
        .options(
            **_reserved(group.bundle_specs[number]),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
        )
        .remote(values)
        for number in range(1, group.bundle_count)
    ]


def _reserved(bundle: dict[str, float]) -> dict[str, Any]:
    return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
