"""Typed, frozen settings; see `schema` for every key, its default and the default's source."""

from pefomed_ray.config.load import build_config, load_config, save_config
from pefomed_ray.config.schema import SearchConfig, Section, ServeConfig, TrainConfig

__all__ = ["SearchConfig", "Section", "ServeConfig", "TrainConfig", "build_config", "load_config", "save_config"]
