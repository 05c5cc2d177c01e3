"""Search spaces: what a trial's parameters make of a preset, and whether the space can be searched at all.

What is drawn and what a trial is given differ where a key `times` another: of `lora.alpha: {times: lora.rank, ...}` the
factor is drawn, under the name `lora.alpha per lora.rank`, and the trial is given the product. Points name the product.

Imports neither torch, Ray nor Optuna: a mistake is answered in a second.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from math import isclose
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.storage import check_output_is_free, local_path
from pefomed_ray.config import SearchConfig, TrainConfig, build_config, save_config
from pefomed_ray.config.load import read_yaml, set_key
from pefomed_ray.config.schema import Choice, Dimension
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.lock import check_not_running
from pefomed_ray.training.preflight import check_packable, check_run, with_absolute_paths

SEARCH_FILE = "search.yaml"
PRESET_FILE = "preset.yaml"
"""What the search is, in its output folder; PRESET_FILE is written last."""
PACKABLE = ("lora.", "optimizer.")
"""What packed trials may differ in."""
MAY_CHANGE = frozenset(
    {
        "preset",
        "output_dir",
        "points",
        "trials",
        "time_budget_s",
        "plateau_trials",
        "max_concurrent",
        "packing",
        "storage",
        "choice",
    }
)
"""Keys of a search that another invocation may give otherwise; what `preset` leads to may not change."""


def preset_values(search: SearchConfig, config_path: Path) -> dict[str, Any]:
    """The preset as plain values, the search's fixed overrides applied; the metric that is searched for is the one that
    a trial's best epoch is chosen by."""
    values = read_yaml(config_path.parent / search.preset)
    for key, value in search.overrides.items():
        set_key(values, key, value)
    set_key(values, "validation.metric", search.metric)
    return values


def trial_config(values: Mapping[str, Any], params: Mapping[str, Any], **fixed: Any) -> TrainConfig:
    """The training config of one trial: preset, then its parameters, then `fixed` top-level keys.

    Raises ConfigError naming the key where a parameter is not one of the training config's.
    """
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in {**params, **fixed}.items():
        set_key(merged, key, value)
    return build_config(TrainConfig, merged, "trial")


def drawn_name(key: str, dimension: Dimension) -> str:
    """What the parameter that is drawn for a key is called in the study."""
    return f"{key} per {dimension.times}" if dimension.times else key


def params_of(search: SearchConfig, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial is given, by dotted key, of what was drawn, by `drawn_name`."""
    params = {}
    for key, dimension in search.space.items():
        value = drawn[drawn_name(key, dimension)]
        params[key] = value * drawn[dimension.times] if dimension.times else value
    return params


def drawn_of(search: SearchConfig, point: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be drawn for a trial to be given a point; the other way round than `params_of`.

    Raises ConfigError for a key that is not in the space, a value that the space does not hold, and a product without
    what it is a multiple of.
    """
    if unknown := sorted(set(point) - set(search.space)):
        raise ConfigError(f"{', '.join(unknown)} is not in space ({', '.join(search.space)})")
    drawn = {}
    for key, value in point.items():
        dimension = search.space[key]
        if dimension.times and dimension.times not in point:
            raise ConfigError(f"{key} is a multiple of {dimension.times}, which the point leaves out")
        held = _held(dimension, value / point[dimension.times] if dimension.times else value)
        if held is None:
            of = f" / {dimension.times} = {value / point[dimension.times]:g}" if dimension.times else f" = {value!r}"
            raise ConfigError(f"{key}{of} lies outside its range in space")
        drawn[drawn_name(key, dimension)] = held
    return drawn


def output_dir(search: SearchConfig) -> Path:
    """Where a search writes: `output_dir`, else `runs/<name>`."""
    return local_path(search.output_dir or f"runs/{search.name}")


def check_search(search: SearchConfig, values: Mapping[str, Any], *, resume: bool = False) -> TrainConfig:
    """Everything that can be wrong before Ray starts; the config every trial starts from, paths absolute.

    Raises ConfigError where another process runs this search, where its output is taken, or with `resume` is another
    search's; ConfigError or DataError as `check_space` and `check_run` do; what `check_judge` raises.
    """
    check_space(search, values)
    output = output_dir(search)
    check_not_running(output)
    first = trial_config(values, {}, output_dir=str(output))
    check_run(first, resume=True)  # the folder is looked at here
    first = with_absolute_paths(first)
    if search.choice.judge is not None:
        from pefomed_ray.search.judged import check_judge  # brings torch with it, which a packed trial is spared

        check_judge(search.choice.judge, first)
    if is_begun(output):
        if not resume:
            raise ConfigError(
                f"{str(output)!r} holds a search already; go on with it by --resume, or name another output_dir"
            )
        check_same_search(search, first)
    elif not resume:
        check_output_is_free(output)
    return first


def is_begun(output: Path) -> bool:
    """Whether the folder holds a search to go on with."""
    return (output / PRESET_FILE).is_file()


def record_search(search: SearchConfig, first: TrainConfig) -> None:
    """Write down what the search in `output_dir` is, without the storage's URL, which may hold a password."""
    output = output_dir(search)
    save_config(search.model_copy(update={"storage": None}), output / SEARCH_FILE)
    save_config(first, output / f".{PRESET_FILE}")
    (output / f".{PRESET_FILE}").replace(output / PRESET_FILE)


def check_same_search(search: SearchConfig, first: TrainConfig) -> None:
    """Raise ConfigError where the search in `output_dir` is another one, naming what differs."""
    output = output_dir(search)
    found = _flat({k: v for k, v in read_yaml(output / SEARCH_FILE).items() if k not in MAY_CHANGE})
    wanted = _flat(search.model_dump(mode="json", exclude=set(MAY_CHANGE)))
    found |= _flat(read_yaml(output / PRESET_FILE), "preset.")
    wanted |= _flat(first.model_dump(mode="json"), "preset.")
    different = [
        key for key in sorted(found | wanted) if found.get(key) != wanted.get(key) and key != "preset.output_dir"
    ]
    if different:
        what = "; ".join(f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}" for key in different[:3])
        raise ConfigError(
            f"the search in {str(output)!r} cannot be gone on with as another one: {what}. Take that back, or begin "
            "anew in another output_dir"
        )


def check_space(search: SearchConfig, values: Mapping[str, Any]) -> None:
    """Build a config at both ends of every dimension and at every point.

    Raises ConfigError before Ray starts: a key that does not exist, an end or a point that does not validate or lies
    outside the space, what `packing: on` cannot be, or a preset that needs several workers where trials are not packed
    (a trial by itself trains on one).
    """
    unpacked = why_not_packed(search, values)
    for key, dimension in search.space.items():
        for params in extremes(search, key, dimension):
            config = trial_config(values, params)
            if unpacked and config.resources.workers != 1:
                raise ConfigError(
                    f"preset {search.preset!r}: resources.workers is {config.resources.workers}, but a trial by itself "
                    f"trains on one worker ({unpacked}); set `overrides: {{resources.workers: 1}}`"
                )
    for number, point in enumerate(search.points):
        try:
            drawn_of(search, point)
        except ConfigError as error:
            raise ConfigError(f"points[{number}]: {error}") from None
        trial_config(values, point)


def why_not_packed(search: SearchConfig, values: Mapping[str, Any]) -> str | None:
    """Why the trials of a search cannot be packed; None where they can. `values`: those of the preset.

    Raises ConfigError where `packing: on` asks for what cannot be.
    """
    if search.packing == "off":
        return "packing: off"
    reason = _not_packable(search, values)
    if reason and search.packing == "on":
        raise ConfigError(f"packing: on, but {reason}")
    return reason


def _not_packable(search: SearchConfig, values: Mapping[str, Any]) -> str | None:
    if apart := [key for key in search.space if not key.startswith(PACKABLE)]:
        return f"trials that differ in {', '.join(apart)} cannot be packed, only in {' and '.join(PACKABLE)}"
    try:
        for key, dimension in search.space.items():
            for params in extremes(search, key, dimension):
                check_packable(trial_config(values, params))
    except ConfigError as error:
        return str(error)
    return None


def extremes(search: SearchConfig, key: str, dimension: Dimension) -> Iterator[dict[str, Any]]:
    """What a trial is given at both ends of a dimension; of a choice, at each of its values."""
    if dimension.times is None:
        yield from ({key: value} for value in _ends(dimension))
        return
    for factor, other in product(_ends(dimension), _ends(search.space[dimension.times])):
        yield {dimension.times: other, key: factor * other}


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    """The lowest and the highest value; of a choice, all."""
    (values,) = dimension.model_dump(exclude={"times"}).values()
    return tuple(values)


def _held(dimension: Dimension, value: Any) -> Any:
    """The value as the dimension holds it; None where it does not."""
    if isinstance(dimension, Choice):
        return next((held for held in dimension.choice if _equal(held, value)), None)
    low, high = _ends(dimension)
    return value if isinstance(value, int | float) and low <= value <= high else None


def _equal(one: Any, other: Any) -> bool:
    """Up to what a division has rounded."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
