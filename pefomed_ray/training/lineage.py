"""What a run says of itself: what it is, for its checkpoints, and where it comes from, for its bundles."""

from typing import Any

from pefomed_ray import __version__
from pefomed_ray.artifacts.base import base_digest
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.config import TrainConfig
from pefomed_ray.model.base import Base
from pefomed_ray.training.feed import features_of


def run_identity(config: TrainConfig, base: Base) -> dict[str, Any]:
    """What must not change when a run goes on: everything that its steps follow from, whatever they run on."""
    apart = {"name", "output_dir", "report_to", "resources", "data", "validation", "base"}
    values = config.model_dump(mode="json", exclude=apart)
    for name in ("micro_batch_size", "checkpoint_steps", "max_bad_steps", "gradient_checkpointing"):
        del values["training"][name]
    return values | {
        "data.max_answer_tokens": config.data.max_answer_tokens,
        "data.shards": _data_lineage(config)["shards"],
        "base.dtype": config.base.dtype,
        "base.quantization": config.base.quantization,
        "base.digest": base_digest(base.path),
        "template.digest": base.renderer.digest,
    }


def lineage_of(config: TrainConfig, base: Base, epoch: int) -> dict[str, Any]:
    """Where the bundle of an epoch, counted from 1, comes from: `lineage.json`."""
    features = features_of(config)
    return _data_lineage(config) | {
        "split": "train",
        "base_digest": base_digest(base.path),
        "template": base.renderer.digest,
        "epoch": epoch,
        "init_from": config.init_from,
        "feature_cache": features.manifest.digest if features else None,
        "code_version": __version__,
    }


def _data_lineage(config: TrainConfig) -> dict[str, Any]:
    parts = config.data.shards
    found = [load_shard_manifest(part.shards) for part in parts]
    said = {
        "licence": "restricted" if any(manifest.licence == "restricted" for manifest in found) else "open",
        "rows": sum(manifest.rows["train"] for manifest in found),
    }
    if len(parts) == 1:
        return said | {"shards": found[0].digest, "source": found[0].source}
    mixture = [
        {"shards": manifest.digest, "source": manifest.source, "weight": part.weight}
        for part, manifest in zip(parts, found, strict=True)
    ]
    return said | {
        "shards": digest_of(mixture),
        "source": " + ".join(manifest.source for manifest in found),
        "mixture": mixture,
    }
