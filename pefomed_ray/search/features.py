"""The feature cache of a packed search: what the frozen tower makes of each image, once for all trials and epochs."""

from functools import partial
from pathlib import Path

from pefomed_ray.artifacts.base import base_folder, family_of, features_shape
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.config import TrainConfig
from pefomed_ray.config.schema import FeatureCacheConfig
from pefomed_ray.data.cache import build_cache
from pefomed_ray.data.cache_plan import plan_cache
from pefomed_ray.model.tower import open_tower
from pefomed_ray.rendering.key import features_key
from pefomed_ray.training.preflight import SPLITS_USED, check_features

FOLDER = "features"


def with_cached_features(first: TrainConfig, output: Path, workers: int) -> TrainConfig:
    """The config with a cache in `<output>/features`, made now by so many processes or there already.

    As it is where it names a cache itself, its base reads none, or the cache would be larger than FeatureCacheConfig's
    limit: hosts then run the tower, once a batch for all trials that stand at the same step.
    """
    base = base_folder(first.base.path)
    if first.data.feature_cache is not None or family_of(base).model_type != PEFOMED:
        return first
    folder = output / FOLDER
    cached = first.model_copy(update={"data": first.data.model_copy(update={"feature_cache": str(folder)})})
    if not folder.exists():
        config = FeatureCacheConfig(
            base=first.base.path,
            template=first.template,
            splits=SPLITS_USED,
            workers=workers,
            use_gpu=first.resources.use_gpu,
        )
        plan = plan_cache([part.shards for part in first.data.shards], folder, features_shape(base), config.splits)
        if plan.bytes > config.limit_gb * 1e9:
            return first
        tower = partial(open_tower, str(base), first.template, "cuda" if config.use_gpu else "cpu")
        build_cache(plan, folder, features_key(base, first.template), tower, config)
    check_features(cached, base)
    return cached
