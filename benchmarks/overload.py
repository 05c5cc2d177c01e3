"""What the endpoint does with more than it can answer: half, three times and ten times its capacity, open loop.

Everything is the real thing but the model, which is a pause of SERVICE_S: two replicas that answer four requests at
once, so 20 a second at best. `nominal` is the goodput at that rate, which is what this machine's processes let through;
`kept_at_3x` is the goodput at three times the nominal rate over it. Asserted at every rate: nothing hangs, every answer
is 200, 429 or 503, every refusal says when to come back. The load comes from this process, on the same cores.
"""

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import typer

from benchmarks._load import Sent, open_loop, percentile
from benchmarks._measure import JsonOption, QuickOption, finish, spread
from benchmarks._ray import ray_workers, scratch_with_ray
from benchmarks.serve import Server, body_of, make_bundles, ours
from pefomed_ray.config import ServeConfig
from pefomed_ray.config.schema import Precision
from pefomed_ray.serving import app
from pefomed_ray.serving.contract import AdapterRef, Ask, Completion, Stats

SERVICE_S = 0.4
"""A request costs Ray Serve and us about 20 ms of CPU time on its way through four processes, so two cores carry 60 to
100 a second and no more. With this service time, what is measured at three times the capacity is not that."""
REPLICAS, AT_ONCE, QUEUED = 2, 4, 8
NOMINAL_PER_S = REPLICAS * AT_ONCE / SERVICE_S
TIMES = (0.5, 1.0, 3.0, 10.0)


class Pause:
    """In place of `ModelReplica`."""

    def __init__(self, base: str, template: str, precision: Precision, config: ServeConfig) -> None:
        self._answered = 0

    async def answer(self, ask: Ask) -> Completion:
        """The same each time."""
        await asyncio.sleep(SERVICE_S)
        self._answered += 1
        return Completion("yes", "stop", 1, 1, ask.adapter.digest if ask.adapter else None)

    async def load(self, ref: AdapterRef) -> None:
        """There is nothing to read."""

    async def ready(self) -> None:
        """Returns."""

    async def stats(self) -> Stats:
        """Requests answered, as tokens."""
        return Stats(0, 0, 0, 0, self._answered, 0, 0)


@dataclass(frozen=True)
class Seen:
    """A rate and what became of it."""

    times_capacity: float
    sent: int
    goodput_per_s: float
    """200 within what a full queue and two services take."""
    shed: int
    accepted_p50_s: float
    accepted_p99_s: float
    shed_p99_s: float
    rss_growth: float


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    seconds, rounds = (5.0, 1) if quick else (20.0, 3)
    app.ModelReplica = Pause  # type: ignore[misc, assignment]
    found: list[list[Seen]] = []
    with (
        scratch_with_ray(2) as folder,
        ours(
            folder,
            make_bundles(folder)[:1],
            replicas=REPLICAS,
            max_ongoing_requests=AT_ONCE,
            max_queued_requests=QUEUED,
        ) as server,
    ):
        measure(server, 1.0, 5.0)  # what is done once
        for number in range(rounds):
            found.append([measure(server, times, seconds) for times in TIMES])
            found[-1].append(recovery(server, seconds / 2))
            for seen in found[-1]:
                print(f"overload: round {number + 1}: {asdict(seen)}", flush=True)
    at = {times: [seen for one in found for seen in one[:-1] if seen.times_capacity == times] for times in TIMES}
    kept = [three.goodput_per_s / one.goodput_per_s for three, one in zip(at[3.0], at[1.0], strict=True)]
    finish(
        "overload",
        {"kept_at_3x": spread(kept)},
        {"p99_after_vs_before": spread([one[-1].accepted_p99_s / one[0].accepted_p99_s for one in found])},
        {
            "service_s": SERVICE_S,
            "nominal_per_s": NOMINAL_PER_S,
            "allowed_accepted_p99_s": (QUEUED / AT_ONCE + 2) * SERVICE_S,
            "rounds": [[asdict(seen) for seen in one] for one in found],
        },
        as_json=json_,
        quick=quick,
    )


def measure(server: Server, times: float, seconds: float) -> Seen:
    """One rate for so long."""
    rss = _rss()
    url = f"{server.url}/chat/completions"
    sent = asyncio.run(
        open_loop(url, server.key, lambda number: _small_body(server, number), times * NOMINAL_PER_S, seconds, 30.0)
    )
    check(sent)
    accepted = [one.seconds for one in sent if one.status == 200]
    shed = [one.seconds for one in sent if one.status != 200]
    allowed_s = (QUEUED / AT_ONCE + 2) * SERVICE_S
    return Seen(
        times_capacity=times,
        sent=len(sent),
        goodput_per_s=round(sum(one <= allowed_s for one in accepted) / seconds, 2),
        shed=len(shed),
        accepted_p50_s=round(percentile(accepted, 50), 3),
        accepted_p99_s=round(percentile(accepted, 99), 3),
        shed_p99_s=round(percentile(shed, 99), 3) if shed else 0.0,
        rss_growth=round(_rss() / rss - 1, 3),
    )


def recovery(server: Server, seconds: float) -> Seen:
    """Half the capacity again, two seconds after the worst."""
    time.sleep(2.0)
    return measure(server, 0.5, seconds)


def check(sent: list[Sent]) -> None:
    """Nothing hangs, and what is refused is refused well."""
    odd = {one.status for one in sent} - {200, 429, 503}
    if odd:
        raise AssertionError(f"answers of other statuses, or none (0), or hanging (-1): {odd}")
    if any(one.status != 200 and not one.retry_after for one in sent):
        raise AssertionError("a refusal does not say when to come back")


def _small_body(server: Server, number: int) -> dict[str, Any]:
    body = body_of(server.names, number)
    return body | {"messages": [{"role": "user", "content": "Is it normal?"}]}


def _rss() -> int:
    """Bytes of Ray's workers together."""
    return sum(process.memory_info().rss for process in ray_workers() if process.status() != psutil.STATUS_ZOMBIE)


if __name__ == "__main__":
    typer.run(main)
