"""What can be wrong with an evaluation before Ray starts; answers in a second, so nothing here imports torch or Ray."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pefomed_ray.artifacts.base import base_folder
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.precision import check_has_gpu
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import check_output_is_free
from pefomed_ray.data.feature_cache import check_cache
from pefomed_ray.data.plan import open_index
from pefomed_ray.errors import DataError
from pefomed_ray.metrics.vqa import normalizer_named
from pefomed_ray.rendering.key import features_key

TEXT_COLUMNS = ["id", "source", "task", "image_sha256", "question", "answer", "answer_type", "question_type", "group"]


def check_evaluation(
    bundle: Path,
    shards: Path,
    split: str,
    target: Path,
    normalizer: str,
    feature_cache: Path | None = None,
    *,
    use_gpu: bool = False,
) -> Task:
    """All that can be checked without Ray, before it is started; answers the task of the split's rows.

    Raises ConfigError where `target` holds anything, the normaliser is not known, the feature cache is stale or the
    bundle needs a GPU; DataError where a file of the bundle does not match its sha256, the split has no rows, its rows
    are of several tasks, or the feature cache lacks an image.
    """
    normalizer_named(normalizer)
    check_output_is_free(target)
    manifest = verify_bundle(bundle)
    check_has_gpu(bundle, use_gpu=use_gpu)
    if feature_cache is not None:
        key = features_key(base_folder(manifest.base), manifest.template)
        check_cache(feature_cache, key, shards, [split])
    tasks: list[Task] = sorted({row["task"] for row in read_texts(shards, split)})
    if len(tasks) != 1:
        raise DataError(
            f"shards {str(shards)!r}, split {split!r}: rows of {', '.join(tasks) or 'no task'} in one evaluation have "
            "no common metric; prepare each task as shards of its own"
        )
    return tasks[0]


def read_texts(shards: str | Path, split: str, rows_limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a split of shards on disk or on S3 without their images, in row order.

    Raises DataError where there are none.
    """
    index = open_index(shards, split)
    rows: list[dict[str, Any]] = []
    for path in dict.fromkeys(path for path, _ in index.row_groups):
        folder, name = path.rsplit("/", 1)
        with open_folder(folder).open(name) as opened, pq.ParquetFile(opened) as file:
            rows += file.read(columns=TEXT_COLUMNS).to_pylist()
        if rows_limit is not None and len(rows) >= rows_limit:
            return rows[:rows_limit]
    return rows
