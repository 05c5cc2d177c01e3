"""The feature cache: what the frozen tower made of every image, stored once and read by training and evaluation.

    CACHE/cache.json                    what it was made from and with (FeatureCacheManifest), written last
    CACHE/index.parquet                 image_sha256 -> file, row
    CACHE/features-00000.safetensors    one tensor `features` [images, V, W] in float16 or bfloat16, mapped into memory

Features are those before the trained projector. They are keyed by the sha256 of the encoded image; the manifest's key
says tower, image spec and template, and a cache with another key than a run's is refused.

Letters: N images, V visual tokens an image, W numbers the projector reads for one.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import (
    FeatureCacheManifest,
    FeaturesKey,
    load_feature_cache_manifest,
    load_shard_manifest,
)
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.data.plan import RowIndex, open_index
from pefomed_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "index.parquet"
TENSOR = "features"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_sha256", pa.string(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ],
    metadata={"schema_version": "1"},
)


class FeatureCache:
    """Features by image. Opening reads manifest and index; a file is hashed when it is first read from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = load_feature_cache_manifest(folder)
        index = _read_index(folder, self.manifest)
        places = zip(index["file"].to_pylist(), index["row"].to_pylist(), strict=True)
        self._places = dict(zip(index["image_sha256"].to_pylist(), places, strict=True))
        self._files: dict[int, Tensor] = {}

    def features(self, digests: Sequence[str]) -> "Tensor":
        """[N, V, W] of these images, in order, in the cache's dtype; of a single one without a copy.

        Raises DataError for an image that is not in the cache, and where a file does not match its sha256.
        """
        import torch

        views = [self._view(digest) for digest in digests]
        if len(views) == 1:
            return views[0][None]
        if not views:
            return torch.empty(0, *self.manifest.shape, dtype=getattr(torch, self.manifest.dtype))
        return torch.stack(views)

    def _view(self, digest: str) -> "Tensor":
        if digest not in self._places:
            raise _missing(self.folder, [digest])
        number, row = self._places[digest]
        if number not in self._files:
            self._files[number] = self._open(number)
        return self._files[number][row]

    def _open(self, number: int) -> "Tensor":
        """The tensor of a file, mapped: what is not used is not kept in memory."""
        file = self.manifest.files[number]
        path = self.folder / file.path
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise _damaged(path)
        try:
            with safe_open(path, "pt") as opened:
                return opened.get_tensor(TENSOR)
        except SafetensorError:
            raise _damaged(path) from None


def open_cache(folder: Path) -> FeatureCache:
    """The cache in `folder`, one for the whole process, so that each file is hashed and mapped once.

    Raises DataError where there is none, or its index is damaged.
    """
    return _opened(folder, load_feature_cache_manifest(folder).digest)


@lru_cache(maxsize=1)
def _opened(folder: Path, digest: str) -> FeatureCache:
    return FeatureCache(folder)


def check_cache(folder: Path, key: FeaturesKey, shards: str | Path, splits: Iterable[str]) -> FeatureCacheManifest:
    """Whether a run with this key on these splits can use the cache; needs no torch.

    Raises ConfigError where the key differs (the tower, the image spec, the way images are decoded or the template is
    another one), DataError where there is no cache, a file is missing or of another size, or an image of a split is
    not in it.
    """
    manifest = load_feature_cache_manifest(folder)
    _check_key(folder, manifest.key, key)
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise _damaged(path)
    known = set(_read_index(folder, manifest)["image_sha256"].to_pylist())
    same_shards = load_shard_manifest(shards).digest in manifest.shards
    for split in splits:
        if same_shards and split in manifest.splits:
            continue
        missing = {digest for row in image_digests(open_index(shards, split)) for digest in row} - known
        if missing:
            raise _missing(folder, sorted(missing), f"split {split!r} of shards {str(shards)!r}")
    return manifest


def image_digests(index: RowIndex) -> list[list[str]]:
    """sha256 of the images of every row of a split, in row order; reads that column alone."""
    digests: list[list[str]] = []
    for path in dict.fromkeys(path for path, _ in index.row_groups):
        folder, name = path.rsplit("/", 1)
        with open_folder(folder).open(name) as opened, pq.ParquetFile(opened) as file:
            digests += file.read(columns=["image_sha256"])["image_sha256"].to_pylist()
    return digests


def _read_index(folder: Path, manifest: FeatureCacheManifest) -> pa.Table:
    path = folder / INDEX_FILE
    if not path.is_file() or sha256_file(path) != manifest.index_sha256:
        raise _damaged(path)
    return pq.read_table(path)


def _check_key(folder: Path, found: FeaturesKey, wanted: FeaturesKey) -> None:
    pairs = (
        ("vision tower", found.tower_digest[:16], wanted.tower_digest[:16]),
        ("image spec", found.image_spec, wanted.image_spec),
        ("way of decoding and resizing", f"version {found.pixels_version}", f"version {wanted.pixels_version}"),
        ("template", _template(found), _template(wanted)),
    )
    for what, seen, expected in pairs:
        if seen != expected:
            raise ConfigError(
                f"feature cache {str(folder)!r} is stale: its {what} is {seen}, the run's is {expected}. "
                f"Make one for this run: {_command(wanted)}"
            )


def _template(key: FeaturesKey) -> str:
    return f"{key.template!r} ({key.template_digest[:16]})"


def _command(key: FeaturesKey | None = None) -> str:
    template = key.template if key else "TEMPLATE"
    return f"`pefomed-ray data cache SHARDS OUTPUT base=BASE template={template}`"


def _missing(folder: Path, digests: Sequence[str], where: str = "it") -> DataError:
    return DataError(
        f"feature cache {str(folder)!r} lacks {len(digests)} image(s) of {where}, first sha256 {digests[0]}; "
        f"make one from these shards: {_command()}"
    )


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{str(path)!r} is missing or does not match its sha256; remove the feature cache and make it again: "
        f"{_command()}"
    )
