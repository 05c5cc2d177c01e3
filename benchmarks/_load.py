"""An open-loop load: requests leave when they are due, whether or not earlier ones were answered, and their time
counts from when they were due. A generator that waits for answers would not see a queue."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp

NO_ANSWER = 0
"""Status of a request whose connection broke."""
HUNG = -1
"""Status of a request that was not answered in time."""


@dataclass(frozen=True)
class Sent:
    """A request and what became of it."""

    number: int
    due_s: float
    """After the start of the load."""
    status: int
    seconds: float
    """From when it was due to the last byte of its answer."""
    retry_after: str | None
    body: dict[str, Any] | None
    """What was answered, where it is JSON."""


async def open_loop(
    url: str,
    key: str,
    make_body: Callable[[int], dict[str, Any]],
    rate_per_s: float,
    duration_s: float,
    timeout_s: float = 60.0,
    seed: int = 0,
) -> list[Sent]:
    """POST `make_body(number)` at exponentially distributed intervals; returns once the last one is answered."""
    draw = random.Random(seed)
    headers = {"Authorization": f"Bearer {key}"}
    started = perf_counter()

    async def one(session: aiohttp.ClientSession, number: int, due_s: float) -> Sent:
        def sent(status: int, retry_after: str | None = None, body: Any = None) -> Sent:
            return Sent(number, due_s, status, perf_counter() - started - due_s, retry_after, body)

        try:
            async with asyncio.timeout(timeout_s), session.post(url, json=make_body(number)) as response:
                body = await response.json() if response.content_type == "application/json" else None
                return sent(response.status, response.headers.get("Retry-After"), body)
        except TimeoutError:
            return sent(HUNG)
        except (aiohttp.ClientError, OSError):
            return sent(NO_ANSWER)

    tasks: list[asyncio.Task[Sent]] = []
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None)
    ) as session:
        due_s = 0.0
        while due_s < duration_s:
            await asyncio.sleep(max(due_s - (perf_counter() - started), 0.0))
            tasks.append(asyncio.create_task(one(session, len(tasks), due_s)))
            due_s += draw.expovariate(rate_per_s)
        return await asyncio.gather(*tasks)


def percentile(seconds: Sequence[float], percent: float) -> float:
    """Nearest rank; NaN of nothing."""
    if not seconds:
        return float("nan")
    ordered = sorted(seconds)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]
