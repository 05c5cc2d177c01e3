"""A run's paths before it leaves this process."""

from pathlib import Path

import pytest

from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.training.preflight import with_absolute_paths


def test_a_run_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"name": "a", "task": "vqa", "init_from": "b/bundle", "base": {"path": "base"}}
    data = {"shards": [{"shards": "x", "weight": 0.5}, {"shards": "s3://y/z"}], "feature_cache": "cache"}
    found = with_absolute_paths(build_config(TrainConfig, values | {"data": data}, "f"))
    assert [(part.shards, part.weight) for part in found.data.shards] == [(f"{tmp_path}/x", 0.5), ("s3://y/z", 1.0)]
    assert found.data.feature_cache == f"{tmp_path}/cache"
    assert (found.base.path, found.init_from) == (f"{tmp_path}/base", f"{tmp_path}/b/bundle")
    assert with_absolute_paths(found) == found
    embedded = build_config(TrainConfig, {"name": "a", "task": "vqa", "data": {"shards": "x"}}, "f")
    assert with_absolute_paths(embedded).base.path == "embedded"
    assert with_absolute_paths(embedded).data.feature_cache is None
