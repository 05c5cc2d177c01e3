"""The feature cache on a real Ray: equal to the tower, the same bytes with any workers, training as without it."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER, features_shape
from pefomed_ray.artifacts.manifests import FeatureCacheManifest, verify_bundle
from pefomed_ray.artifacts.storage import digest_of, read_json, sha256_file, write_json
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import FeatureCacheConfig
from pefomed_ray.data.cache import OpenTower, build_cache
from pefomed_ray.data.cache_plan import plan_cache
from pefomed_ray.data.feature_cache import FeatureCache
from pefomed_ray.data.plan import open_index, read_rows
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.predict import GenerationSettings
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.model.tower import open_tower
from pefomed_ray.rendering.key import features_key
from pefomed_ray.training.alone import train_alone
from pefomed_ray.training.trainer import TrainResult, publish, train

pytestmark = pytest.mark.ray

OPEN_TOWER = partial(open_tower, "embedded", "short", "cpu")
IMAGES = 13


def build(
    shards: Path, output: Path, open_tower: OpenTower = OPEN_TOWER, each: int = 5, **options: Any
) -> FeatureCacheManifest:
    plan = plan_cache([shards], output, features_shape(EMBEDDED_FOLDER), images_per_file=each)
    key = features_key(EMBEDDED_FOLDER, "short")
    return build_cache(plan, output, key, open_tower, FeatureCacheConfig(**options))


@pytest.fixture(scope="module")
def cache(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "fp16"
    manifest = build(phantom_shards, folder)
    assert (manifest.images, len(manifest.files), manifest.shape) == (IMAGES, 3, (36, 512))
    return folder


def images_of(shards: Path) -> dict[str, bytes]:
    found = {}
    for split in ("train", "validation", "test"):
        index = open_index(shards, split)
        for record in read_rows(index, np.arange(index.rows)):
            found[record["image_sha256"][0]] = record["images"][0]["bytes"]
    return found


@pytest.fixture
def single_thread() -> Any:
    """As in a worker of half a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_features_are_the_towers_rounded(dtype: str, cache: Path, phantom_shards: Path, tmp_path: Path) -> None:
    if dtype == "bfloat16":
        build(phantom_shards, tmp_path / "bf16", dtype=dtype)
        cache = tmp_path / "bf16"
    images = images_of(phantom_shards)
    assert len(images) == IMAGES
    expected = OPEN_TOWER()(list(images.values()))
    found = FeatureCache(cache).features(list(images))
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, expected.to(found.dtype))
    assert not torch.equal(found.float(), expected)  # the control: storing does round


@pytest.mark.long
def test_two_workers_write_the_bytes_of_one(cache: Path, phantom_shards: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = plan_cache([phantom_shards], tmp_path / "two", (36, 512), images_per_file=5)
    config = FeatureCacheConfig(workers=2)
    key = features_key(EMBEDDED_FOLDER, "short")
    build_cache(plan, tmp_path / "two", key, OPEN_TOWER, config, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (IMAGES, IMAGES)
    assert {p.name: sha256_file(p) for p in cache.iterdir()} == {
        p.name: sha256_file(p) for p in (tmp_path / "two").iterdir()
    }


def too_large() -> Any:
    return lambda images: torch.full((len(images), 36, 512), 1e5)


def test_a_feature_that_does_not_fit_is_an_error_of_ours_and_nothing_is_published(
    phantom_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"1e\+05 does not fit float16.*dtype=bfloat16"):
        build(phantom_shards, tmp_path / "out", too_large)
    assert list(tmp_path.iterdir()) == []
    build(phantom_shards, tmp_path / "out", too_large, dtype="bfloat16")  # the control
    with pytest.raises(ConfigError, match="no GPU"):
        build(phantom_shards, tmp_path / "gpu", use_gpu=True)


def config(shards: Path, output: Path, cache: Path | None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "test",
        "task": "vqa",
        "template": "short",
        "output_dir": str(output),
        "data": {"shards": str(shards), "feature_cache": str(cache) if cache else None},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["all-linear"]},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4},
        "validation": {"rows": 5, "max_new_tokens": 4},
    }
    return build_config(TrainConfig, values | changes, "test")


def alone(config: TrainConfig) -> TrainResult:
    output = Path(str(config.output_dir))
    train_alone(config, output, lambda row: None)
    return publish(output)


def weights(result: TrainResult) -> dict[str, Tensor]:
    names = ("adapter_model.safetensors", "projector.safetensors")
    return {f"{name}/{key}": value for name in names for key, value in load_file(result.bundle / name).items()}


@pytest.fixture(scope="module")
def cached_run(cache: Path, phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return alone(config(phantom_shards, tmp_path_factory.mktemp("cached") / "run", cache))


def test_a_run_from_the_cache_is_a_run_whose_features_were_rounded(
    cached_run: TrainResult, phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: what the cache changes is the rounding and nothing else."""
    exact = PefomedForConditionalGeneration.patch_features
    monkeypatch.setattr(
        PefomedForConditionalGeneration, "patch_features", lambda model, pixels: exact(model, pixels).half()
    )
    rounded = alone(config(phantom_shards, tmp_path / "rounded", None))
    for name in ("train_loss", "loss", "exact_match", "parameters", "trainable_parameters"):
        assert rounded.epochs[0][name] == cached_run.epochs[0][name]
    found, expected = weights(cached_run), weights(rounded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def shuffled_copy(cache: Path, folder: Path) -> Path:
    """Every image with the features of another one; checksums made right again."""
    shutil.copytree(cache, folder)
    manifest = read_json(folder / "cache.json")
    for file in manifest["files"]:
        path = folder / file["path"]
        save_file({"features": load_file(path)["features"].roll(1, dims=0)}, path)
        file["sha256"] = sha256_file(path)
    write_json(folder / "cache.json", manifest)
    return folder


def test_a_run_from_the_cache_is_one_without_within_its_precision(
    cached_run: TrainResult, cache: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    plain = alone(config(phantom_shards, tmp_path / "plain", None))
    assert plain.epochs[0]["train_loss"] == pytest.approx(cached_run.epochs[0]["train_loss"], abs=1e-3)
    assert plain.epochs[0]["loss"] == pytest.approx(cached_run.epochs[0]["loss"], abs=1e-3)

    def difference(other: TrainResult) -> Tensor:
        ours, theirs = weights(plain), weights(other)
        return torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])

    # Adam turns a gradient that is rounding noise into a full step, so the bulk is compared.
    assert difference(cached_run).quantile(0.9) < 1e-4
    others = alone(config(phantom_shards, tmp_path / "others", shuffled_copy(cache, tmp_path / "shuffled")))
    # The control: features of other pictures show.
    assert abs(others.epochs[0]["train_loss"] - plain.epochs[0]["train_loss"]) > 1e-3
    assert difference(others).quantile(0.9) > 1e-4


@pytest.mark.long
def test_two_workers_train_from_the_cache_what_one_does(
    cached_run: TrainResult, cache: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    two = train(config(phantom_shards, tmp_path / "two", cache, resources={"workers": 2}))
    assert two.epochs[0]["train_loss"] == pytest.approx(cached_run.epochs[0]["train_loss"], abs=2e-4)
    verify_bundle(two.bundle)
    lineage = json.loads((two.bundle / "lineage.json").read_text())
    manifest = read_json(cache / "cache.json")
    assert lineage["feature_cache"] == digest_of([manifest["index_sha256"], *(f["sha256"] for f in manifest["files"])])


@pytest.mark.long
def test_a_bundle_is_evaluated_from_the_cache_as_without(
    cached_run: TrainResult, cache: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    settings = [GenerationSettings(max_new_tokens=4, feature_cache=folder) for folder in (str(cache), None)]
    cached, plain = (
        evaluate(cached_run.bundle, phantom_shards, "test", tmp_path / str(number), settings=chosen)
        for number, chosen in enumerate(settings)
    )
    assert cached["values"] == plain["values"]
    assert read_json(Path(cached["metrics"]))["feature_cache"] == FeatureCache(cache).manifest.digest
    assert read_json(Path(plain["metrics"]))["feature_cache"] is None
    for found in (cached, plain):
        assert read_json(Path(found["metrics"]))["controls"]["blank_image"]["exact_match"]["n"] == 6


@pytest.mark.parametrize("stale", ["tower", "image spec", "template"])
def test_a_stale_cache_is_refused_by_preflight_and_by_the_run_itself(
    stale: str, cache: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {}
    if stale == "template":
        changes["template"] = "paper"
    else:
        base = tmp_path / "base"
        shutil.copytree(EMBEDDED_FOLDER, base)
        changes["base"] = {"path": str(base)}
    if stale == "tower":
        tensors = load_file(base / "model.safetensors")
        tensors["vision_tower.post_layernorm.bias"][0] += 1
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    if stale == "image spec":
        spec = read_json(base / "preprocessor_config.json")
        write_json(base / "preprocessor_config.json", spec | {"mean": [0.5, 0.5, 0.5]})
    wrong = config(phantom_shards, tmp_path / "wrong", cache, **changes)
    with pytest.raises(ConfigError, match=f"stale: its (vision )?{stale} is"):
        train(wrong)
    with pytest.raises(ConfigError, match=f"stale: its (vision )?{stale} is"):
        train_alone(wrong, tmp_path / "wrong", lambda row: None)
