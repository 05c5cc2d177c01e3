"""Words of the command line to the rooms' own settings."""

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches

from pefomed_ray.artifacts.records import SPLITS, TASKS, Task
from pefomed_ray.config import ServeConfig, build_config
from pefomed_ray.config.load import parse_words
from pefomed_ray.config.schema import FeatureCacheConfig, JudgeConfig
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError


def data_options(words: Sequence[str] | None) -> DataOptions:
    """`language=en max_bad_fraction=0.02 ...`. Raises ConfigError for a key that is none, with the nearest one."""
    values = parse_words(words or [])
    allowed = [field.name for field in fields(DataOptions)]
    for key in values:
        if key not in allowed:
            near = get_close_matches(key, allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown option {key!r}{hint} (allowed: {', '.join(allowed)})")
    return DataOptions(**values)


def serve_config(words: Sequence[str]) -> ServeConfig:
    """`replicas=2 port=8001 ...`. Raises ConfigError as any config does."""
    return build_config(ServeConfig, parse_words(words), "serve")


def feature_cache_config(words: Sequence[str]) -> FeatureCacheConfig:
    """`base=embedded template=short ...`. Raises ConfigError as any config does."""
    return build_config(FeatureCacheConfig, parse_words(words), "data cache")


def judge_config(words: Sequence[str] | None) -> JudgeConfig:
    """`model=NAME base_url=URL ...`. Raises ConfigError as any config does."""
    return build_config(JudgeConfig, parse_words(words or []), "judge")


def split_named(name: str) -> str:
    """A split's name, or ConfigError with those there are."""
    if name not in SPLITS:
        raise ConfigError(f"split {name!r} is not one of {', '.join(SPLITS)}")
    return name


def task_named(name: str) -> Task:
    """A task's name, or ConfigError with those there are."""
    for task in TASKS:
        if task == name:
            return task
    raise ConfigError(f"task {name!r} is not one of {', '.join(TASKS)}")
