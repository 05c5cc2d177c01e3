"""Search spaces: what a trial's parameters make of a preset, and whether the space can be searched at all.

Imports neither torch nor Ray: a mistake is answered in a second.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.storage import check_output_is_free, local_path
from pefomed_ray.config import SearchConfig, TrainConfig, build_config
from pefomed_ray.config.load import read_yaml, set_key
from pefomed_ray.config.schema import Choice, Dimension, Section
from pefomed_ray.errors import ConfigError
from pefomed_ray.training.preflight import check_run


def preset_values(search: SearchConfig, config_path: Path) -> dict[str, Any]:
    """The preset as plain values, the search's fixed overrides applied."""
    values = read_yaml(config_path.parent / search.preset)
    for key, value in search.overrides.items():
        set_key(values, key, value)
    return values


def trial_config(values: Mapping[str, Any], params: Mapping[str, Any], **fixed: Any) -> TrainConfig:
    """The training config of one trial: preset, then its parameters, then `fixed` top-level keys.

    Raises ConfigError naming the key where a parameter is not one of the training config's.
    """
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in {**params, **fixed}.items():
        set_key(merged, key, value)
    return build_config(TrainConfig, merged, "trial")


def output_dir(search: SearchConfig) -> Path:
    """Where a search writes: `output_dir`, else `runs/<name>`."""
    return local_path(search.output_dir or f"runs/{search.name}")


def check_search(search: SearchConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Everything that can be wrong before Ray starts; the config every trial starts from.

    Raises ConfigError or DataError as `check_space` and `check_run` do.
    """
    check_space(search, values)
    first = trial_config(values, {}, output_dir=str(output_dir(search)))
    check_output_is_free(output_dir(search))
    check_run(first)
    return first


def check_space(search: SearchConfig, values: Mapping[str, Any]) -> None:
    """Build a config at both ends of every dimension and at every point.

    Raises ConfigError before Ray starts: a key that does not exist, an end or a point that does not validate or lies
    outside the space, or a preset that needs several workers (a trial trains on one).
    """
    for key, dimension in search.space.items():
        for value in _ends(dimension):
            config = trial_config(values, {key: value})
            if config.resources.workers != 1:
                raise ConfigError(
                    f"preset {search.preset!r}: resources.workers is {config.resources.workers}, but a trial trains on "
                    "one worker; set `overrides: {resources.workers: 1}`"
                )
    for number, point in enumerate(search.points):
        unknown = sorted(set(point) - set(search.space))
        if unknown:
            raise ConfigError(f"points[{number}]: {', '.join(unknown)} is not in space ({', '.join(search.space)})")
        for key, value in point.items():
            if not _contains(search.space[key], value):
                raise ConfigError(f"points[{number}]: {key} = {value!r} lies outside its range in space")
        trial_config(values, point)


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    (value,) = _values(dimension)
    return tuple(value)


def _contains(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.choice
    low, high = _ends(dimension)
    return isinstance(value, int | float) and low <= value <= high


def _values(section: Section) -> list[Any]:
    return list(section.model_dump().values())
