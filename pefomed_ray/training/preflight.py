"""What can be wrong with a run before Ray starts; answers in a second, so nothing here imports torch or Ray."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from pefomed_ray.artifacts.base import EMBEDDED, base_folder, check_lora_targets, check_not_quantised, family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import load_bundle_manifest, load_shard_manifest
from pefomed_ray.artifacts.storage import check_output_is_free, local_path
from pefomed_ray.config import TrainConfig
from pefomed_ray.data.feature_cache import check_cache
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.rendering.key import features_key
from pefomed_ray.rendering.templates import template_for

SPLITS_USED = ("train", "validation")


def output_dir(config: TrainConfig) -> Path:
    """Where a run writes: `output_dir`, else `runs/<name>`."""
    return local_path(config.output_dir or f"runs/{config.name}")


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same run from any folder: what is relative to this process's is lost on workers, which run in their own."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(local_path(path))

    parts = tuple(part.model_copy(update={"shards": open_folder(part.shards).url}) for part in config.data.shards)
    changes = {"shards": parts, "feature_cache": absolute(config.data.feature_cache)}
    base = config.base.path
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=changes),
            "base": config.base.model_copy(update={"path": base if base == EMBEDDED else absolute(base)}),
            "init_from": absolute(config.init_from),
        }
    )


def check_run(config: TrainConfig, *, resume: bool = False) -> None:
    """Raise ConfigError for a missing base, template, target module, tracker, taken output or a stale feature cache,
    DataError for shards that are not there or hold no training or validation rows and for a cache that lacks some
    image."""
    check_trackers(config)
    base = base_folder(config.base.path)
    check_not_quantised(base)
    template_for(config.template, family_of(base))
    check_lora_targets(base, config.lora.target_modules)
    check_shards(config)
    if config.init_from is not None:
        load_bundle_manifest(local_path(config.init_from))
    if not resume:
        check_output_is_free(output_dir(config))
    check_features(config, base)


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError where a tracker of `report_to` is not installed."""
    if missing := [name for name in config.report_to if find_spec(name) is None]:
        raise ConfigError(
            f"report_to: {', '.join(missing)} is not installed; `pip install 'pefomed-ray[trackers]'`, or leave it out"
        )


def check_shards(config: TrainConfig) -> None:
    """Raise ConfigError for shards that are not there, DataError for a part of the mixture without training rows, or
    where no part has validation rows."""
    rows = Counter[str]()
    for part in config.data.shards:
        folder = open_folder(part.shards)
        if not folder.exists():
            raise ConfigError(f"data.shards: {str(folder)!r} does not exist; make it with `pefomed-ray data prepare`")
        found = load_shard_manifest(folder).rows
        rows += Counter({split: found.get(split, 0) for split in SPLITS_USED})
        if not found.get("train"):
            raise DataError(f"shards {str(folder)!r} hold no rows for split 'train'")
    if not rows["validation"]:
        where = ", ".join(repr(part.shards) for part in config.data.shards)
        raise DataError(f"shards {where} hold no rows for split 'validation'; training needs both")


def check_features(config: TrainConfig, base: Path) -> None:
    """Raise ConfigError or DataError where the run's feature cache does not fit the base in this folder, the template
    or the shards; nothing without a cache."""
    if config.data.feature_cache is not None:
        if family_of(base).model_type != PEFOMED:
            raise ConfigError(f"data.feature_cache: only {PEFOMED} bases read one; leave it out for {str(base)!r}")
        key = features_key(base, config.template)
        for part in config.data.shards:
            rows = load_shard_manifest(part.shards).rows
            used = [split for split in SPLITS_USED if rows.get(split)]
            check_cache(local_path(config.data.feature_cache), key, part.shards, used)


def check_packable(config: TrainConfig) -> None:
    """Raise ConfigError for what cannot be packed."""
    if config.lora.use_dora:
        raise ConfigError("lora.use_dora cannot be packed: its norms are of the whole weight; take packing: off")
    if config.training.gradient_checkpointing and config.lora.dropout:
        raise ConfigError(
            "training.gradient_checkpointing with lora.dropout cannot be packed: layers that are computed again would "
            "drop out otherwise; set lora.dropout=0, or packing: off"
        )
