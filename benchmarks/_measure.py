"""How the benchmarks measure: arms side by side, ratios inside a round, an arm against itself beside every ratio.

Wall time on a shared machine drifts by half between two runs of the same code, so no time is compared with one from
another round: each round runs every arm once, in random order, and gives one ratio; what is reported is the median
over the rounds and its interquartile range. One arm runs twice a round under two names (A/A): nothing that lies inside
the range of that ratio is a result. CPU time of the process and all its children is kept beside wall time; where the
work is the same it is the steadier of the two.
"""

import json
import os
import platform
import random
import re
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Literal, TypeVar

import psutil
import typer

from pefomed_ray.artifacts.storage import write_json

RESULTS = Path(__file__).parent / "results"
AGAIN = " again"
"""Ends the name under which an arm runs a second time in each round."""

T = TypeVar("T")
Clock = Literal["cpu_s", "wall_s"]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A small size, to see that it runs; no result is written.")]


@dataclass(frozen=True)
class Sample:
    """What one run of an arm took."""

    wall_s: float
    cpu_s: float
    """Of this process and all its children, those that ended included."""


@dataclass(frozen=True)
class Spread:
    """A ratio over all rounds; larger than 1 where ours is better."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int


Round = dict[str, Sample]
"""Samples of one round by arm."""


def cpu_seconds() -> float:
    """CPU time of this process, its children and theirs, dead ones included once their parent has waited for them."""
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + waited_for.ru_utime + waited_for.ru_stime  # microseconds; psutil has hundredths
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def timed(run: Callable[[], T]) -> tuple[T, Sample]:
    """What `run` returns, and what it took."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    value = run()
    wall = time.perf_counter() - wall
    return value, Sample(wall_s=wall, cpu_s=cpu_seconds() - cpu)


def run_rounds(
    arms: Mapping[str, Callable[[], tuple[T, Sample]]],
    check: Callable[[str, T], None],
    rounds: int,
    ours: str = "ours",
    seed: int = 0,
) -> list[Round]:
    """Run every arm once a round, and `ours` twice, in random order.

    An arm returns its result and what it took: `partial(timed, work)` where that is all of `work`. `check(arm, result)`
    raises where a result is not what it has to be: a fast arm that does something else is no arm.
    """
    names = [*arms, ours + AGAIN]
    chance = random.Random(seed)
    results: list[Round] = []
    for _ in range(rounds):
        samples: Round = {}
        for name in chance.sample(names, len(names)):
            arm = name.removesuffix(AGAIN)
            result, samples[name] = arms[arm]()
            check(arm, result)
        results.append(samples)
    return results


def ratio(rounds: list[Round], other: str, clock: Clock, ours: str = "ours") -> Spread:
    """How many times as long `other` takes as `ours`, inside each round."""
    return spread([getattr(samples[other], clock) / getattr(samples[ours], clock) for samples in rounds])


def a_a(rounds: list[Round], clock: Clock, ours: str = "ours") -> Spread:
    """`ours` against itself: what the ratio of two equal arms looks like here and now."""
    return ratio(rounds, ours + AGAIN, clock, ours)


def spread(values: list[float]) -> Spread:
    """Median and quartiles; one value is its own."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Spread(median(values), low, high, len(values))


def per_arm(rounds: list[Round]) -> dict[str, dict[str, float]]:
    """Median seconds of each arm by clock."""
    return {
        arm: {
            clock: round(median(getattr(samples[arm], clock) for samples in rounds), 6) for clock in ("wall_s", "cpu_s")
        }
        for arm in rounds[0]
    }


def finish(
    name: str,
    ratios: Mapping[str, Spread],
    aa: Mapping[str, Spread],
    detail: Mapping[str, Any],
    *,
    as_json: bool,
    quick: bool,
) -> None:
    """Print the result, and write it to `results/<name>.json` unless it is a quick one.

    `ratios` and `aa` are reduced to their medians; their quartiles go into the detail.
    """
    spreads = {**ratios, **{f"aa {key}": value for key, value in aa.items()}}
    document = {
        "name": name,
        "ratios": {key: round(value.median, 3) for key, value in ratios.items()},
        "aa": {key: round(value.median, 3) for key, value in aa.items()},
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "detail": {
            "spread": {key: _rounded(value) for key, value in spreads.items()},
            "load_average": [round(value, 2) for value in os.getloadavg()],
            **detail,
        },
    }
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{name}.json", document)
    for key, value in spreads.items():
        print(f"{name}: {key} {value.median:.2f} [{value.low:.2f}, {value.high:.2f}], {value.rounds} rounds")
    if as_json:
        print(json.dumps(document))


def machine() -> str:
    """CPU model and cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (names := re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)):
        model = names[0]
    return f"{model}, {os.cpu_count()} cores"


def _rounded(value: Spread) -> dict[str, float]:
    return {key: round(number, 3) for key, number in asdict(value).items()}
