"""`pefomed-ray estimate`: memory, hours and cost of a run or a search before anything is spent. No torch, no Ray."""

from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer

from pefomed_ray.cli.console import exits_with_code, finish, say, table
from pefomed_ray.cli.limits import accept
from pefomed_ray.config import SearchConfig, TrainConfig, build_config
from pefomed_ray.config.load import parse_words, read_yaml, set_key
from pefomed_ray.config.schema import Dimension
from pefomed_ray.jobs.estimate import Estimate, Range, Way, estimate_run, estimate_search
from pefomed_ray.jobs.memory import CONTEXT_BYTES, GIB, MARGIN
from pefomed_ray.jobs.prices import CPU, DEFAULT_GPU, Device, device_named, read_prices
from pefomed_ray.search.space import check_space, preset_values, trial_config, why_not_packed

COSTLY = (
    "lora.rank",
    "lora.dropout",
    "training.epochs",
    "training.micro_batch_size",
    "training.batch_size",
)
"""Keys of a space on which memory or time depend, and more of them with more; the largest value is estimated."""


@exits_with_code
def estimate(
    config: Annotated[str, typer.Argument(help="A training config, or a search space.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, applied over the file.")] = None,
    device: Annotated[
        str | None, typer.Option(help=f"Of the table of prices; default {DEFAULT_GPU}, or {CPU} without use_gpu.")
    ] = None,
    prices: Annotated[str | None, typer.Option(help="YAML file of devices laid over the table.")] = None,
    limit_usd: Annotated[float | None, typer.Option(help="Ask where it may cost more.", min=0)] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Memory of a device, hours and cost of a run or a search, packed and not, before anything starts."""
    values = read_yaml(config)
    for key, value in parse_words(overrides or []).items():
        set_key(values, key, value)
    devices = read_prices(Path(prices) if prices else None)
    if "space" in values:
        search = build_config(SearchConfig, values, config)
        preset = preset_values(search, Path(config))
        check_space(search, preset)
        largest = trial_config(preset, _largest(search))
        reason = why_not_packed(search, preset)
        found = estimate_search(search, largest, _device(devices, device, largest), can_pack=reason is None)
        title = f"search {search.name}: {search.trials} trials"
    else:
        run = build_config(TrainConfig, values, config)
        found, reason = estimate_run(run, _device(devices, device, run)), None
        title = f"run {run.name}: {run.resources.workers} workers"
    _show(title, found, reason)
    finish(_as_json(found, reason), as_json=json)
    most = found.best.cost_usd[1]
    if limit_usd is not None and most > limit_usd and not yes:
        accept(title.partition(":")[0], f"up to ${_amount(most)}, over --limit-usd {limit_usd:g}", "accept that")


def _largest(search: SearchConfig) -> dict[str, Any]:
    """Parameters of the trial that needs most; those that times another are left as the preset has them."""
    return {
        key: max(_values(search.space[key])) for key in COSTLY if key in search.space and not search.space[key].times
    }


def _values(dimension: Dimension) -> tuple[Any, ...]:
    (values,) = dimension.model_dump(exclude={"times"}).values()
    return tuple(values)


def _device(devices: dict[str, Device], name: str | None, config: TrainConfig) -> Device:
    """What one worker has: a device, or of cores as many as it reserves, rounded up."""
    name = name or (DEFAULT_GPU if config.resources.use_gpu else CPU)
    found = device_named(devices, name)
    return found.times(ceil(config.resources.cpus_per_worker)) if name == CPU else found


def _show(title: str, found: Estimate, reason: str | None) -> None:
    ways = [way for way in (found.alone, found.packed) if way is not None]
    heads = ["one by one", f"packed, {found.packed.adapters} at once"] if found.packed else ["one at a time"]
    rows: list[tuple[str, list[str]]] = [
        (f"frozen base: {part}", [_gib(way.memory.base.get(part, 0.0)) for way in ways])
        for part in found.alone.memory.base
    ]
    rows += [
        ("adapters, gradients, moments", [_gib(way.memory.learning) for way in ways]),
        ("a step: activations", [_gib(way.memory.activations) for way in ways]),
        ("a step: logits", [_gib(way.memory.logits) for way in ways]),
        ("a step: tower, before these", [_gib(way.memory.tower) for way in ways]),
        ("validation, after a step", [_gib(way.memory.validation) for way in ways]),
        (f"largest of these x {1 + MARGIN:g}, context {_gib(CONTEXT_BYTES)}", ["" for _ in ways]),
        ("in all, GiB a device", [_gib(way.memory.total) for way in ways]),
        (f"fits into {found.device.memory_gib:g} GiB", ["yes" if way.fits else "NO" for way in ways]),
        ("device hours", [_range(way.device_hours) for way in ways]),
        ("cost, USD", [_range(way.cost_usd) for way in ways]),
    ]
    table(f"{title}\non {found.device.name}", ["", *heads], [(name, *cells) for name, cells in rows])
    if reason:
        say(f"not packed: {reason}")
    texts = found.texts
    say(
        f"rows of {texts.lengths.mean():.0f} tokens on average and {texts.longest} at most, "
        f"{texts.rows['train']:,} of them to train on, {texts.images_per_row:.2g} images each. "
        "Hours leave out starting, loading and decoding; utilisation and time to begin an operation are assumed"
    )
    say(f"price: an example, ${found.device.usd_per_hour:.2f}/h ({found.device.price_from}); give your own by --prices")


def _as_json(found: Estimate, reason: str | None) -> dict[str, Any]:
    return {
        "device": found.device.name,
        "usd_per_hour": found.device.usd_per_hour,
        "alone": _way(found.alone),
        "packed": _way(found.packed) if found.packed else None,
        "not_packed_because": reason,
        "longest_row_tokens": found.texts.longest,
    }


def _way(way: Way) -> dict[str, Any]:
    memory = way.memory
    return {
        "adapters": way.adapters,
        "fits": way.fits,
        "memory_gib": round(memory.total / GIB, 3),
        "memory_bytes": {
            **{f"base_{part}": round(taken) for part, taken in memory.base.items()},
            "learning": round(memory.learning),
            "activations": round(memory.activations),
            "logits": round(memory.logits),
            "tower": round(memory.tower),
            "validation": round(memory.validation),
        },
        "device_hours": [round(hours, 4) for hours in way.device_hours],
        "cost_usd": [round(cost, 4) for cost in way.cost_usd],
    }


def _gib(taken: float) -> str:
    return f"{taken / GIB:,.2f}"


def _range(values: Range) -> str:
    least, most = (_amount(value) for value in values)
    return most if least == most else f"{least} .. {most}"


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"
