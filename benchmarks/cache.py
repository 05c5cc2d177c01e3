"""Training steps from a feature cache, beside the same steps with decoding and the frozen tower.

Both arms are one epoch of our own plain training step in this process, from the same initial adapters: `ours` reads
mapped features, `no_cache` decodes each picture once, keeps its pixels for the picture's other questions, and runs the
tower for every row. The tower has 22 million parameters (224 px), the language model 28 million, both with random
weights: what a step costs does not depend on what they know. The larger the language model beside the tower, the
smaller the ratio: by arithmetic 1.25 at the paper's sizes.

`vs_no_cache` leaves filling the cache out; `with_filling` counts it, for runs (or searches) of so many epochs in all.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
import typer
from transformers import Blip2VisionConfig, LlamaConfig

from benchmarks._measure import JsonOption, QuickOption, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks._pictures import write_corpus
from pefomed_ray.artifacts.base import EMBEDDED_FOLDER, IMAGE_SPEC_FILE, features_shape
from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.config.schema import FeatureCacheConfig, LoraConfig, OptimizerConfig
from pefomed_ray.data.cache import build_cache
from pefomed_ray.data.cache_plan import plan_cache
from pefomed_ray.data.feature_cache import FeatureCache
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.plan import open_index, read_rows
from pefomed_ray.data.shards import prepare
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from pefomed_ray.model.tower import open_tower
from pefomed_ray.rendering.batches import training_batch
from pefomed_ray.rendering.images import ImageSpec
from pefomed_ray.rendering.key import features_key
from pefomed_ray.training.feed import RecordRenderer
from pefomed_ray.training.step import build_optimizer, train_step, trainable

SOURCE_PX = 512
SIZE_PX = 224
QUESTIONS = 3
"""About each picture."""
BATCH_ROWS = 8
MAX_ANSWER_TOKENS = 32
LEARNING_RATE = 1e-3
MAX_LOSS_DIFFERENCE = 1e-3
"""Nats: what float16 features may change after an epoch of steps."""
EPOCHS = (1, 2, 5, 50)


@dataclass(frozen=True)
class Setting:
    """What both arms work on."""

    base: Base
    records: list[dict[str, Any]]
    features: FeatureCache
    fill_cpu_s: float
    """CPU seconds that filling the cache took, the tower already open."""


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        setting = make_setting(folder, pictures=8 if quick else 32)
        measure(setting, rounds=1 if quick else 5, as_json=json_, quick=quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(setting: Setting, rounds: int, *, as_json: bool, quick: bool) -> None:
    """Both arms; each must learn, and both the same."""
    start = [parameter.detach().clone() for parameter in trainable(setting.base.model)]
    expected = epoch(setting, start, cached=False)
    if not np.mean(expected[-3:]) < expected[0]:
        raise AssertionError(f"the steps do not learn: losses {expected}")

    def check(arm: str, losses: list[float]) -> None:
        if not np.allclose(losses, expected, rtol=0, atol=MAX_LOSS_DIFFERENCE):
            raise AssertionError(f"{arm}: losses {losses}, expected {expected}")

    arms: dict[str, Callable[[], Any]] = {
        "ours": partial(timed, partial(epoch, setting, start, cached=True)),
        "no_cache": partial(timed, partial(epoch, setting, start, cached=False)),
    }
    done = run_rounds(arms, check, rounds)
    cached, plain = (median(samples[arm].cpu_s for samples in done) for arm in ("ours", "no_cache"))
    manifest = setting.features.manifest
    finish(
        "cache",
        {"vs_no_cache": ratio(done, "no_cache", "cpu_s"), "vs_no_cache_wall": ratio(done, "no_cache", "wall_s")},
        {"cpu": a_a(done, "cpu_s"), "wall": a_a(done, "wall_s")},
        {
            "with_filling": {n: round(n * plain / (setting.fill_cpu_s + n * cached), 2) for n in EPOCHS},
            "fill_cpu_s": round(setting.fill_cpu_s, 3),
            "epoch": per_arm(done),
            "pictures": manifest.images,
            "rows": len(setting.records),
            "steps": len(expected),
            "bytes_per_image": manifest.bytes // manifest.images,
            "parameters": {
                "tower": count(setting.base.model.vision_tower),
                "language_model": count(setting.base.model.language_model),
            },
        },
        as_json=as_json,
        quick=quick,
    )


def epoch(setting: Setting, start: list[torch.Tensor], *, cached: bool) -> list[float]:
    """The losses of one pass over all rows, from the adapters in `start`."""
    base = setting.base
    with torch.no_grad():
        for parameter, value in zip(trainable(base.model), start, strict=True):
            parameter.copy_(value)
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=LEARNING_RATE))
    renderer = RecordRenderer(base.renderer, MAX_ANSWER_TOKENS, setting.features if cached else None)
    losses = []
    for first in range(0, len(setting.records), BATCH_ROWS):
        rows = [renderer.render(record) for record in setting.records[first : first + BATCH_ROWS]]
        batch = training_batch(rows, base.renderer.pad_token_id)
        done = train_step(base.model, optimizer, [batch], base.renderer, LEARNING_RATE, 1.0)
        losses.append(done.loss)
    return losses


def make_setting(folder: Path, pictures: int) -> Setting:
    """Base, shards and cache; the cached features are checked to be the tower's, bit for bit."""
    base_folder = make_base(folder / "base")
    write_corpus(folder / "corpus", QUESTIONS * pictures, SOURCE_PX, distinct=pictures)
    tower = partial(open_tower, str(base_folder), "short", "cpu")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder / "ray"),
    )
    try:
        prepare(folder / "corpus", folder / "shards", DataOptions(validation_fraction=0))
        plan = plan_cache([folder / "shards"], folder / "cache", features_shape(base_folder))
        key = features_key(base_folder, "short")
        build_cache(plan, folder / "cache", key, tower, FeatureCacheConfig(base=str(base_folder)))
    finally:
        ray.shutdown()
    index = open_index(folder / "shards", "train")
    records = read_rows(index, np.arange(index.rows))
    images = {record["image_sha256"][0]: record["images"][0]["bytes"] for record in records}
    features = FeatureCache(folder / "cache")
    opened = tower()
    exact, filling = timed(lambda: opened([images[place.sha256] for place in plan.images]))
    if not torch.equal(features.features([place.sha256 for place in plan.images]), exact.half()):
        raise AssertionError("the cached features are not the tower's")
    base = open_base(str(base_folder), "short")
    attach_lora(base, LoraConfig(rank=16, alpha=16, dropout=0.0), train_projector=True)
    base.model.train()
    return Setting(base, records, features, filling.cpu_s)


def make_base(folder: Path) -> Path:
    """A base with random weights and the embedded one's tokenizer."""
    torch.manual_seed(0)
    embedded = PefomedConfig.from_pretrained(EMBEDDED_FOLDER)
    vision = Blip2VisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=SIZE_PX,
        patch_size=16,
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=embedded.text_config.vocab_size,
        pad_token_id=embedded.text_config.pad_token_id,
        tie_word_embeddings=True,
    )
    config = PefomedConfig(vision_config=vision, text_config=text, image_token_id=embedded.image_token_id)
    PefomedForConditionalGeneration(config).save_pretrained(folder)
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", folder)
    write_json(folder / IMAGE_SPEC_FILE, ImageSpec(SIZE_PX).to_json())
    return folder


def count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    typer.run(main)
