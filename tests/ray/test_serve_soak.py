"""Half an hour of load with reloads and bad requests: nothing grows, nothing slows down, nothing is lost.

PEFOMED_SOAK_S makes it shorter, to see that it runs.
"""

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks._load import open_loop, percentile
from pefomed_ray.artifacts.registry import promote
from tests.served_here import QUESTION, Served, messages, serving
from tests.tiny_served import png

pytestmark = [pytest.mark.ray, pytest.mark.long]

SOAK_S = float(os.environ.get("PEFOMED_SOAK_S", "1800"))
RATE_PER_S = 8.0
"""About 0.7 of what two cores answer with the tests' tiny base, this process's own part included."""
BAD_EVERY = 20
LOOK_EVERY_S = 5.0
WARM_SHARE = 0.2
"""Of the time, at its beginning: caches fill, allocators settle."""
MAX_GROWTH_MB_PER_MIN = 1.0
SHADES = 8


@dataclass(frozen=True)
class Look:
    """At Serve's processes together."""

    at_s: float
    rss_mb: float
    files: int
    threads: int


def look(began: float) -> Look:
    children = psutil.Process().children(recursive=True)
    serve = [child for child in children if "Serve" in " ".join(child.cmdline())]
    return Look(
        time.monotonic() - began,
        sum(child.memory_info().rss for child in serve) / 1e6,
        sum(child.num_fds() for child in serve),
        sum(child.num_threads() for child in serve),
    )


def body(number: int) -> dict[str, Any]:
    good = {"model": "champion", "messages": messages(png(number % SHADES), QUESTION), "max_tokens": 12}
    if number % BAD_EVERY:
        return good
    bad: list[dict[str, Any]] = [
        {"model": "none"},
        {"max_tokens": 10**9},
        {"messages": messages(png(1)[:40], QUESTION)},
        {"messages": messages(png(1), "x" * 400)},
        {"chat_template": "x"},
    ]
    return good | bad[number // BAD_EVERY % len(bad)]


def reload_each_minute(served: Served, over: threading.Event) -> None:
    turn = 0
    while not over.wait(min(60.0, SOAK_S / 10)):
        turn += 1
        promote(served.registry, "champion", Path(served.bundles[turn % 2].bundle))


@pytest.mark.timeout(SOAK_S + 600)
def test_half_an_hour() -> None:
    over, looks = threading.Event(), []
    with serving(adapters=2, max_adapters=1, max_rank=16) as served:
        began = time.monotonic()

        def keep_looking() -> None:
            while not over.wait(LOOK_EVERY_S):
                looks.append(look(began))

        watching = [
            threading.Thread(target=keep_looking),
            threading.Thread(target=reload_each_minute, args=(served, over)),
        ]
        for thread in watching:
            thread.start()
        try:
            sent = asyncio.run(
                open_loop(f"{served.endpoint.url}/chat/completions", served.key, body, RATE_PER_S, SOAK_S)
            )
        finally:
            over.set()
            for thread in watching:
                thread.join()
    assert {one.status for one in sent if one.number % BAD_EVERY} == {200}
    assert {one.status for one in sent if one.number % BAD_EVERY == 0} == {400, 404}
    settled = [one for one in looks if one.at_s > WARM_SHARE * SOAK_S]
    minutes = [one.at_s / 60 for one in settled]
    growth_mb = float(np.polyfit(minutes, [one.rss_mb for one in settled], 1)[0])
    first, last = (
        percentile([o.seconds for o in sent if o.number % BAD_EVERY and low <= o.due_s / SOAK_S < high], 99)
        for low, high in ((WARM_SHARE, WARM_SHARE + 1 / 6), (5 / 6, 1.0))
    )
    files = [one.files for one in settled]
    threads = [one.threads for one in settled]
    print(
        f"\nsoak: {len(sent)} requests in {SOAK_S:.0f} s; growth {growth_mb:.2f} MB/min; p99 {first:.3f} s at first, "
        f"{last:.3f} s at last; files {min(files)} to {max(files)}, threads {min(threads)} to {max(threads)}"
    )
    assert growth_mb < MAX_GROWTH_MB_PER_MIN or SOAK_S < 600
    assert max(files[-3:]) <= max(files[:3]) + 10
    assert max(threads[-3:]) <= max(threads[:3]) + 10
