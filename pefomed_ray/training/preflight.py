"""What can be wrong with a run before Ray starts; answers in a second, so nothing here imports torch or Ray."""

from pathlib import Path

from pefomed_ray.artifacts.base import base_folder, check_lora_targets
from pefomed_ray.artifacts.manifests import load_bundle_manifest, load_shard_manifest
from pefomed_ray.artifacts.storage import check_output_is_free, local_path
from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.rendering.templates import template_named


def output_dir(config: TrainConfig) -> Path:
    """Where a run writes: `output_dir`, else `runs/<name>`."""
    return local_path(config.output_dir or f"runs/{config.name}")


def check_run(config: TrainConfig) -> None:
    """Raise ConfigError for a missing base, template, target module or taken output, DataError for shards that are
    not there or hold no training or validation rows."""
    template_named(config.template)
    check_lora_targets(base_folder(config.base.path), config.lora.target_modules)
    shards = local_path(config.data.shards)
    if not shards.is_dir():
        raise ConfigError(f"data.shards: {str(shards)!r} does not exist; make it with `pefomed-ray data prepare`")
    rows = load_shard_manifest(shards).rows
    for split in ("train", "validation"):
        if not rows.get(split):
            raise DataError(f"shards {str(shards)!r} hold no rows for split {split!r}; training needs both")
    if config.init_from is not None:
        load_bundle_manifest(local_path(config.init_from))
    check_output_is_free(output_dir(config))
