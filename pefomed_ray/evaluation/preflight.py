"""What can be wrong with an evaluation before Ray starts; answers in a second, so nothing here imports torch or Ray."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pefomed_ray.artifacts.base import EMBEDDED, EMBEDDED_FOLDER, base_folder, family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import (
    BUNDLE_FILE,
    FeaturesKey,
    load_bundle_manifest,
    load_shard_manifest,
    verify_bundle,
)
from pefomed_ray.artifacts.precision import check_has_gpu
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import check_output_is_free, local_path, read_json
from pefomed_ray.data.feature_cache import check_cache
from pefomed_ray.data.plan import open_index
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.answers import answers_folder
from pefomed_ray.evaluation.endpoint import Endpoint, check_may_send
from pefomed_ray.metrics.vqa import normalizer_named
from pefomed_ray.rendering.key import features_key

MERGED_FILE = "merged.json"
"""As `model.merge` writes it, which imports torch."""
TEXT_COLUMNS = ["id", "source", "task", "image_sha256", "question", "answer", "answer_type", "question_type", "group"]


def check_evaluation(
    model: str | Path | Endpoint,
    shards: Path,
    split: str,
    target: Path,
    normalizer: str,
    feature_cache: Path | None = None,
    *,
    use_gpu: bool = False,
    resume: bool = False,
) -> Task:
    """All that can be checked without Ray, before it is started; answers the task of the split's rows.

    `model` is the folder of a bundle or of a base, `embedded`, or an endpoint. Raises ConfigError where there is none,
    `target` or the answers beside it are there and `resume` was not said, the normaliser is not known, the feature
    cache is stale or the bundle needs a GPU; DataError where a file of the bundle does not match its sha256, the split
    has no rows, its rows are of several tasks, or the feature cache lacks an image; RefusedError where the pictures may
    not go to the endpoint.
    """
    normalizer_named(normalizer)
    _check_output(target, resume=resume)
    if isinstance(model, Endpoint):
        manifest = load_shard_manifest(shards)
        check_may_send(model, manifest.licence, manifest.source)
        if feature_cache is not None:
            raise ConfigError("--feature-cache: an endpoint is sent pictures, not features; leave it out")
    else:
        _check_model(model, shards, split, feature_cache, use_gpu=use_gpu)
    tasks: list[Task] = sorted({row["task"] for row in read_texts(shards, split)})
    if len(tasks) != 1:
        raise DataError(
            f"shards {str(shards)!r}, split {split!r}: rows of {', '.join(tasks) or 'no task'} in one evaluation have "
            "no common metric; prepare each task as shards of its own"
        )
    return tasks[0]


def is_bundle(model: str | Path) -> bool:
    """Whether this is an adapter bundle, and not a base alone."""
    return str(model) != EMBEDDED and (local_path(model) / BUNDLE_FILE).is_file()


def is_base(model: str | Path) -> bool:
    """Whether this is a base model without adapter."""
    return str(model) == EMBEDDED or (not is_bundle(model) and (local_path(model) / "config.json").is_file())


def is_finished(target: Path) -> bool:
    """Whether an evaluation stands in `target`."""
    return (target / "metrics.json").is_file()


def base_template(folder: Path) -> str:
    """Name of the template a base without adapter is asked under, as `model.load.open_any` chooses it."""
    if (folder / MERGED_FILE).is_file():
        return str(read_json(folder / MERGED_FILE)["template"])
    return "short" if family_of(folder).model_type == PEFOMED else "chat"


def _check_output(target: Path, *, resume: bool) -> None:
    kept = answers_folder(target)
    if resume and (is_finished(target) or kept.is_dir()):
        return
    check_output_is_free(target)
    if kept.exists():
        raise ConfigError(
            f"{str(kept)!r} holds the answers of an evaluation that was interrupted; the same command with --resume "
            "goes on with them. To begin anew, remove that folder"
        )


def _check_model(model: str | Path, shards: Path, split: str, feature_cache: Path | None, *, use_gpu: bool) -> None:
    folder = EMBEDDED_FOLDER if str(model) == EMBEDDED else local_path(model)
    if is_base(model):
        base_folder(str(folder))
    else:
        verify_bundle(folder)
        check_has_gpu(folder, use_gpu=use_gpu)
    if feature_cache is not None:
        check_cache(feature_cache, _features_key(model, folder), shards, [split])


def _features_key(model: str | Path, folder: Path) -> FeaturesKey:
    if not is_bundle(model):
        return features_key(folder, base_template(folder))
    manifest = load_bundle_manifest(folder)
    return features_key(base_folder(manifest.base), manifest.template)


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
