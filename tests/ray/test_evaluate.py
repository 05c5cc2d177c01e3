"""Predictions through a real Ray Data pipeline: rows in their own order, and errors that stay ours."""

import shutil
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pefomed_ray.artifacts.base import EMBEDDED
from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.artifacts.records import RECORD_SCHEMA
from pefomed_ray.artifacts.storage import read_json, sha256_bytes, sha256_file
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation import evaluate as evaluate_module
from pefomed_ray.evaluation.answers import Answered, Question
from pefomed_ray.evaluation.controls import blank_image
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.predict import GenerationSettings, generate, predict
from pefomed_ray.model.base import open_base
from pefomed_ray.model.generate import Prompt
from pefomed_ray.model.load import open_generator

pytestmark = pytest.mark.ray

ROWS = 25
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base with random weights: what it says means nothing, and differs from row to row."""
    base = open_base(EMBEDDED, "short")
    folder = tmp_path_factory.mktemp("base") / "random"
    shutil.copytree(base.path, folder)
    torch.manual_seed(0)
    for parameter in base.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    base.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about 5 pictures of noise, in row groups of 4 rows."""
    folder = tmp_path_factory.mktemp("shards")
    records = []
    for number in range(ROWS):
        pixels = np.random.default_rng(number % 5).integers(0, 256, (32, 32), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        image = file.getvalue()
        records.append(
            dict.fromkeys(RECORD_SCHEMA.names)
            | {"id": f"q{number}", "source": "noise", "split": "test", "task": "vqa", "answer": "lung", "meta": "{}"}
            | {"question": f"Is it number {number * 7919}?", "group": str(number % 5)}
            | {"images": [{"bytes": image, "path": "i.png"}], "image_sha256": [sha256_bytes(image)]}
        )
    path = folder / "test" / "part-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(records, RECORD_SCHEMA), path, row_group_size=4)
    file = ShardFile(path="test/part-0.parquet", split="test", rows=ROWS, bytes=1, sha256=sha256_file(path))
    manifest = ShardManifest(
        source="noise",
        licence="open",
        rows={"test": ROWS},
        tasks={"vqa": ROWS},
        answer_types={},
        bytes={},
        quarantined={},
        image_overlap={},
        files=(file,),
        made_by={},
    )
    save_document(manifest, folder / "manifest.json")
    return folder


def test_equal_to_asking_one_by_one(model: Path, shards: Path) -> None:
    settings = GenerationSettings(workers=2, batch_size=4, max_new_tokens=NEW_TOKENS)
    done: list[tuple[int, int]] = []
    found = predict(model, shards, "test", settings, on_progress=lambda *at: done.append(at))
    assert done[-1] == (4 * ROWS, 4 * ROWS)
    assert {variant: [row.id for row in rows] for variant, rows in found.items()} == {
        variant: [f"q{number}" for number in range(ROWS)]
        for variant in ("image", "blank_image", "noise_image", "shuffled_image")
    }
    generator = open_generator(model)
    for number, record in enumerate(pq.read_table(shards / "test").to_pylist()):
        image = record["images"][0]["bytes"]
        for variant, shown in (("image", image), ("blank_image", blank_image(image))):
            (alone,) = generator.answer([Prompt("vqa", record["question"], (shown,))], NEW_TOKENS)
            assert found[variant][number].prediction == alone.text
    # Or else rows or images could be mixed up and nobody would notice.
    assert len({row.prediction for row in found["image"]}) > ROWS // 2
    assert (
        sum(a.prediction != b.prediction for a, b in zip(found["image"], found["blank_image"], strict=True)) > ROWS // 2
    )


@pytest.mark.long
def test_an_evaluation_killed_in_the_middle_asks_only_what_is_missing(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base without adapter, killed after its first answers; the page is that of an evaluation that was not."""
    asked: list[int] = []

    def counted(questions: Sequence[Question], *words: Any, **named: Any) -> Iterator[Answered]:
        asked.append(len(questions))
        yield from generate(questions, *words, **named)

    monkeypatch.setattr(evaluate_module, "generate", counted)
    settings = GenerationSettings(batch_size=2, max_new_tokens=NEW_TOKENS)

    def killed(done: int, total: int) -> None:
        if done >= ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, shards, "test", tmp_path / "out", settings=settings, on_progress=killed)
    assert not (tmp_path / "out").exists()
    resumed = evaluate(model, shards, "test", tmp_path / "out", settings=settings, resume=True)
    whole = evaluate(model, shards, "test", tmp_path / "whole", settings=settings)
    assert asked == [4 * ROWS, 3 * ROWS, 4 * ROWS]
    for key in ("predictions", "metrics", "report"):
        assert Path(resumed[key]).read_bytes() == Path(whole[key]).read_bytes()
    assert read_json(Path(whole["metrics"]))["model"]["name"] == "random"


def test_more_workers_than_the_cluster_holds_do_not_hang(model: Path, shards: Path) -> None:
    settings = GenerationSettings(workers=8, cpus_per_worker=1.5, batch_size=4, max_new_tokens=1)
    found = predict(model, shards, "test", settings, variants=["image"], rows_limit=6)
    assert len(found["image"]) == 6
    assert all(isinstance(row.prediction, str) for row in found["image"])


def test_an_error_in_a_worker_is_still_ours(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        predict(tmp_path / "no-such-bundle", shards, "test", GenerationSettings(), variants=["image"], rows_limit=2)
