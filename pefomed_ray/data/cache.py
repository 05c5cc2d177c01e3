"""`data cache`: Ray Data runs the frozen tower once over every distinct image of some shards.

An actor fills one file at a time: it reads the images from the shards, runs the tower on fixed batches and writes the
file under a temporary name first. A file that is written twice is the same file, whatever the number of workers, and
the folder is published by one rename, its manifest written last.
"""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import astuple
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from safetensors.torch import save_file
from torch import Tensor

from pefomed_ray import __version__, errors
from pefomed_ray.artifacts.manifests import FeatureCacheManifest, FeatureFile, FeaturesKey, save_document
from pefomed_ray.artifacts.storage import publishing, sha256_bytes, sha256_file
from pefomed_ray.config.schema import FeatureCacheConfig
from pefomed_ray.data.cache_plan import CachePlan, ImagePlace
from pefomed_ray.data.feature_cache import INDEX_FILE, INDEX_SCHEMA, TENSOR
from pefomed_ray.data.plan import RowIndex, read_rows
from pefomed_ray.data.quiet import quiet_ray_data
from pefomed_ray.errors import ConfigError, DataError, PefomedError

Tower = Callable[[list[bytes]], Tensor]
"""Encoded images -> float32 features [N, V, W] on the CPU."""
OpenTower = Callable[[], Tower]
"""Opens the tower in a worker; must pickle."""
MADE_BY = {"base", "use_gpu", "cpus_per_worker", "batch_size"}
"""Settings that may show in the last bits of a feature."""


def build_cache(
    plan: CachePlan,
    output: Path,
    key: FeaturesKey,
    open_tower: OpenTower,
    config: FeatureCacheConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureCacheManifest:
    """Publish the planned features, as `open_tower` makes them, in `output`.

    Ray must have been started; shards and output must be visible to every node. `on_progress(done, total)` counts
    images. Raises ConfigError where the cluster has no GPU and one is asked for, DataError where an image is not what
    its sha256 says or a feature does not fit the dtype; nothing is published then.
    """
    if not ray.is_initialized():
        raise PefomedError("build_cache needs Ray: call ray.init() first")
    if config.use_gpu and not ray.cluster_resources().get("GPU"):
        raise ConfigError("use_gpu=true: the cluster has no GPU; start one with GPUs, or leave use_gpu out")
    with publishing(output) as partial:
        files = _write_files(plan, partial, open_tower, config, on_progress)
        for leftover in partial.glob(".*"):  # of a task that was cut off and run again
            leftover.unlink()
        pq.write_table(_index(plan), partial / INDEX_FILE)
        manifest = FeatureCacheManifest(
            key=key,
            shards=plan.shards,
            splits=tuple(plan.indexes),
            dtype=config.dtype,
            shape=plan.shape,
            images=len(plan.images),
            index_sha256=sha256_file(partial / INDEX_FILE),
            files=tuple(files),
            made_by=config.model_dump(include=MADE_BY) | {"version": __version__},
        )
        save_document(manifest, partial / "cache.json")
    return manifest


def _write_files(
    plan: CachePlan,
    folder: Path,
    open_tower: OpenTower,
    config: FeatureCacheConfig,
    on_progress: Callable[[int, int], None] | None,
) -> list[FeatureFile]:
    """One Ray Data row and block per file; the files in order."""
    items = [
        {"number": number, "places": json.dumps([astuple(place) for place in places])}
        for number, places in enumerate(plan.files)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False  # the command line draws its own
    dataset = dataset.map_batches(
        FileWriter,
        fn_constructor_args=(plan.indexes, plan.shape, str(folder), open_tower, config),
        batch_size=1,
        # One actor is enough to begin with: where the cluster is smaller than asked for, it is slow and does not hang.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=1 if config.use_gpu else 0,
    )
    files: dict[int, FeatureFile] = {}
    with quiet_ray_data():
        for found in dataset.iter_rows():
            if found["error_kind"]:
                raise getattr(errors, found["error_kind"])(found["error"])
            files[found["number"]] = FeatureFile.model_validate_json(found["file"])
            if on_progress:
                on_progress(sum(file.images for file in files.values()), len(plan.images))
    if sorted(files) != list(range(len(items))):
        raise PefomedError(f"{len(items)} files were asked for and {len(files)} came back")
    return [files[number] for number in range(len(items))]


class FileWriter:
    """A Ray Data actor that opens the tower once and writes a file for each item."""

    def __init__(
        self,
        indexes: dict[str, RowIndex],
        shape: tuple[int, int],
        folder: str,
        open_tower: OpenTower,
        config: FeatureCacheConfig,
    ) -> None:
        torch.set_num_threads(max(1, ceil(config.cpus_per_worker)))
        self.indexes = indexes
        self.shape = shape
        self.folder = Path(folder)
        self.open_tower = open_tower
        self.config = config
        self.tower: Tower | None = None

    def __call__(self, items: dict[str, np.ndarray]) -> dict[str, Any]:
        """Columns `number`, `places` -> `number`, `file`, `error_kind`, `error`, all of one row.

        Our own errors come back as rows: raised here, Ray would wrap them, and their exit code would be lost.
        """
        number = int(items["number"][0])
        places = [ImagePlace(*place) for place in json.loads(items["places"][0])]
        file, kind, message = "", "", ""
        try:
            file = self._write(f"features-{number:05d}.safetensors", places).model_dump_json()
        except PefomedError as error:
            kind, message = type(error).__name__, str(error)
        return {"number": [number], "file": [file], "error_kind": [kind], "error": [message]}

    def _write(self, name: str, places: list[ImagePlace]) -> FeatureFile:
        path = self.folder / name
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}")
        try:
            save_file({TENSOR: self._features(places)}, temporary)
            temporary.chmod(0o644)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            digest, size = sha256_file(temporary), temporary.stat().st_size
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return FeatureFile(path=name, images=len(places), bytes=size, sha256=digest)

    def _features(self, places: list[ImagePlace]) -> Tensor:
        """[N, V, W] in the cache's dtype."""
        if self.tower is None:
            self.tower = self.open_tower()
        stored_NVW = torch.empty(len(places), *self.shape, dtype=getattr(torch, self.config.dtype))
        for start in range(0, len(places), self.config.batch_size):
            batch = places[start : start + self.config.batch_size]
            features_NVW = self.tower([self._encoded(place) for place in batch])
            if tuple(features_NVW.shape) != (len(batch), *self.shape):
                raise PefomedError(f"the tower gives features of {list(features_NVW.shape[1:])}, not {self.shape}")
            stored_NVW[start : start + len(batch)] = features_NVW
            self._check_range(stored_NVW[start : start + len(batch)], features_NVW)
        return stored_NVW

    def _encoded(self, place: ImagePlace) -> bytes:
        (record,) = read_rows(self.indexes[place.split], np.array([place.row]))
        data: bytes = record["images"][place.position]["bytes"]
        if sha256_bytes(data) != place.sha256:
            raise DataError(
                f"row {record['id']!r} of split {place.split!r}: an image does not match its sha256 {place.sha256}; "
                "prepare the shards again"
            )
        return data

    def _check_range(self, stored_NVW: Tensor, features_NVW: Tensor) -> None:
        if not stored_NVW.isfinite().all():
            largest = float(features_NVW.abs().max())
            raise DataError(
                f"a feature of {largest:.3g} does not fit {self.config.dtype}; make the cache with dtype=bfloat16, or "
                "look at the base where it is not finite"
            )


def _index(plan: CachePlan) -> pa.Table:
    places = [
        {"image_sha256": place.sha256, "file": number, "row": row}
        for number, file in enumerate(plan.files)
        for row, place in enumerate(file)
    ]
    return pa.Table.from_pylist(places, INDEX_SCHEMA)
