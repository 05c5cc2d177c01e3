"""`prepare` on a real local Ray: nothing lost, nothing published by halves, the same bytes twice."""

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.plan import epoch_order, open_index, read_rows
from pefomed_ray.data.shards import prepare
from pefomed_ray.errors import ConfigError, DataError

pytestmark = pytest.mark.ray


def make_corpus(root: Path, bad_rows: list[dict[str, Any]]) -> Path:
    """200 questions about 10 images, 20 of them for test; then the bad rows, in train."""
    root.mkdir()
    for number in range(10):
        buffer = BytesIO()
        Image.frombytes("L", (64, 64), random.Random(number).randbytes(64 * 64)).save(buffer, "PNG")
        (root / f"i{number}.png").write_bytes(buffer.getvalue())
    rows = [{"id": f"q{n}", "query": f"Where {n}?", "response": "Left", "image": f"i{n % 10}.png"} for n in range(200)]
    for split, part in (("train", rows[:180] + bad_rows), ("test", rows[180:])):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


BAD_ROWS = [
    {"id": "b1", "query": "?", "response": "", "image": "i0.png"},
    {"id": "b2", "query": "?", "response": "Left\ud800", "image": "i0.png"},
    {"id": "b3", "query": "?", "response": "Left", "image": "gone.png"},
    {"id": "q1", "query": "?", "response": "Left", "image": "i1.png"},
]


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_in_is_out_plus_quarantined(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", BAD_ROWS)
    seen: list[tuple[int, int]] = []
    options = DataOptions(max_bad_fraction=0.05, shard_bytes=10_000, validation_fraction=0)
    manifest = prepare(corpus, tmp_path / "out", options, lambda done, total: seen.append((done, total)))
    assert manifest == load_shard_manifest(tmp_path / "out")
    assert manifest.rows == {"train": 180, "validation": 0, "test": 20}
    assert manifest.quarantined == {"duplicate_id": 1, "empty_answer": 1, "missing_image": 1, "text_encoding": 1}
    assert sum(manifest.made_by["rows_in"].values()) == sum(manifest.rows.values()) + sum(manifest.quarantined.values())
    assert manifest.image_overlap["train/test"] == 10
    assert len(manifest.files) > 2
    assert seen[-1] == (203, 203)  # all but the row that repeats an id, which no task sees
    entries = [json.loads(line) for line in (tmp_path / "out/quarantine/train.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["line"], entry["reason_code"]) for entry in entries] == [
        ("b1", "train.jsonl:181", "empty_answer"),
        ("b2", "train.jsonl:182", "text_encoding"),
        ("b3", "train.jsonl:183", "missing_image"),
        ("q1", "train.jsonl:184", "duplicate_id"),
    ]
    for file in manifest.files:
        path = tmp_path / "out" / file.path
        assert (sha256_file(path), path.stat().st_size) == (file.sha256, file.bytes)
        assert pq.read_metadata(path).num_rows == file.rows
    index = open_index(tmp_path / "out", "train")
    records = read_rows(index, epoch_order(index.sizes, seed=0, epoch=0))
    assert {record["id"] for record in records} == {f"q{n}" for n in range(180)}
    assert all(
        record["images"][0]["bytes"] == (corpus / record["images"][0]["path"]).read_bytes() for record in records
    )


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", BAD_ROWS[:1])
    for name in ("a", "b"):
        prepare(corpus, tmp_path / name, DataOptions(shard_bytes=10_000))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    prepare(corpus, tmp_path / "c", DataOptions(shard_bytes=10_000, seed=1))
    assert contents(tmp_path / "a") != contents(tmp_path / "c")  # the control: the comparison can fail


def test_too_much_dirt_publishes_nothing(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", BAD_ROWS)
    with pytest.raises(DataError, match=r"'train': 4 of 184 .*b1 \(empty_answer\), b2 \(text_encoding\)"):
        prepare(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        prepare(corpus, tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "keep"


def test_real_slake_in_english(data_dir: Path, tmp_path: Path) -> None:
    manifest = prepare(data_dir / "slake", tmp_path / "out", DataOptions(language="en"))
    assert manifest.rows == {"train": 4918, "validation": 1053, "test": 1061}
    assert manifest.quarantined == {"empty_answer": 1}
    assert manifest.made_by["rows_in"] == {"train": 4919, "validation": 1053, "test": 1061}
    (entry,) = [json.loads(line) for line in (tmp_path / "out/quarantine/train.jsonl").read_text().splitlines()]
    assert (entry["id"], entry["line"]) == ("1622", "train.json[1622]")
    assert set(manifest.image_overlap.values()) == {0}
    # Ten questions an image, each image stored about once.
    corpus = sum(path.stat().st_size for path in (data_dir / "slake/imgs").rglob("*.jpg"))
    assert sum(manifest.bytes.values()) < 1.3 * corpus
