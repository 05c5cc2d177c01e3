"""Which images a feature cache will hold, in which file, and how large it gets: all that is known before Ray starts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.records import SPLITS
from pefomed_ray.artifacts.storage import check_output_is_free
from pefomed_ray.data.feature_cache import image_digests
from pefomed_ray.data.plan import RowIndex, open_mixture
from pefomed_ray.errors import DataError, PefomedError

FILE_BYTES = 256 << 20
"""Of a file at most: what a worker that fills one holds in memory, and what a reader hashes at its first look."""
FILE_IMAGES = 512
"""A file is cut here too, so that a small tower's features still give several workers something to do."""
VALUE_BYTES = 2
"""Of float16 and bfloat16."""
GB = 1e9


@dataclass(frozen=True)
class ImagePlace:
    """Where an image's encoded bytes stand first."""

    sha256: str
    split: str
    row: int
    position: int
    """Among the row's images."""


@dataclass(frozen=True)
class CachePlan:
    """The distinct images of some splits, in the order of the shards: neighbours lie in one row group."""

    shards: tuple[str, ...]
    """Digests."""
    indexes: dict[str, RowIndex]
    """By split."""
    images: list[ImagePlace]
    shape: tuple[int, int]
    """Of one image's features."""
    images_per_file: int

    @property
    def bytes(self) -> int:
        """Of all features."""
        tokens, width = self.shape
        return len(self.images) * tokens * width * VALUE_BYTES

    @property
    def files(self) -> list[list[ImagePlace]]:
        """The images of each file, in row order."""
        each = self.images_per_file
        return [self.images[start : start + each] for start in range(0, len(self.images), each)]

    def describe(self) -> str:
        """The size as a sum that a person can check."""
        tokens, width = self.shape
        return (
            f"{len(self.images):,} images x {tokens} visual tokens x {width} x {VALUE_BYTES} bytes = "
            f"{self.bytes / GB:,.3g} GB"
        )


def plan_cache(
    shards: Sequence[str | Path],
    output: Path,
    shape: tuple[int, int],
    splits: tuple[str, ...] | None = None,
    images_per_file: int | None = None,
) -> CachePlan:
    """Plan a cache of these splits (default: all with rows) in `output`, a folder that must not hold anything yet.

    `shards` are local paths or `s3://` URLs, several for a mixture; `shape` is that of one image's features.

    Raises ConfigError for a taken output, DataError where there are no shards or none has rows of a split, PefomedError
    where the disk has too little space.
    """
    check_output_is_free(output)
    manifests = [load_shard_manifest(folder) for folder in shards]
    chosen = splits or tuple(split for split in SPLITS if any(manifest.rows.get(split) for manifest in manifests))
    indexes = {split: open_mixture([(folder, 1.0) for folder in shards], split) for split in chosen}
    images = _distinct_images(indexes)
    if not images:
        where = ", ".join(repr(str(folder)) for folder in shards)
        raise DataError(f"shards {where}: no row of {', '.join(chosen) or 'any split'} has an image")
    image_bytes = shape[0] * shape[1] * VALUE_BYTES
    each = images_per_file or max(1, min(FILE_BYTES // image_bytes, FILE_IMAGES))
    plan = CachePlan(tuple(manifest.digest for manifest in manifests), indexes, images, shape, each)
    _check_space(plan, output)
    return plan


def _distinct_images(indexes: dict[str, RowIndex]) -> list[ImagePlace]:
    places: dict[str, ImagePlace] = {}
    for split, index in indexes.items():
        for row, digests in enumerate(image_digests(index)):
            for position, digest in enumerate(digests):
                if digest not in places:
                    places[digest] = ImagePlace(digest, split, row, position)
    return list(places.values())


def _check_space(plan: CachePlan, output: Path) -> None:
    parent = next(folder for folder in output.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if plan.bytes > free:
        raise PefomedError(
            f"{str(parent)!r} has {free:,} bytes free, the features take {plan.bytes:,}; free some space, or cache "
            "fewer splits"
        )
