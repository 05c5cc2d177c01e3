"""`prepare` on a real local Ray: nothing lost, nothing published by halves, the same bytes twice."""

import json
import random
import threading
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.folders import s3 as file_system
from pefomed_ray.artifacts.manifests import ShardManifest, load_shard_manifest
from pefomed_ray.artifacts.storage import sha256_bytes, sha256_file
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


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", BAD_ROWS[:1])
    options = DataOptions(shard_bytes=10_000)

    def cut_off(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "a", options, cut_off)
    assert not (tmp_path / "a").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / ".a.unfinished/train").iterdir()}
    assert finished
    prepare(corpus, tmp_path / "a", options)
    kept = [path for path, at in finished.items() if (tmp_path / "a/train" / path.name).stat().st_mtime_ns == at]
    assert kept == list(finished)
    prepare(corpus, tmp_path / "b", options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "corpus"]


def make_large_corpus(root: Path) -> Path:
    """Sixty images of noise, some of them torn: shards that take long enough to be killed in."""
    root.mkdir()
    for number in range(60):
        noise = Image.frombytes("RGB", (512, 512), random.Random(number).randbytes(3 * 512 * 512))
        noise.save(root / f"i{number}.png", compress_level=1)
    for number in range(0, 60, 20):
        path = root / f"i{number}.png"
        path.write_bytes(path.read_bytes()[:-1000])
    rows = [{"id": f"q{n}", "query": "?", "response": "Left", "image": f"i{n % 60}.png"} for n in range(600)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def kill_a_data_worker(killed: list[int], done: threading.Event) -> None:
    """SIGKILL to the first worker process of this Ray that is at a shard."""
    while not done.wait(0.005):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "_task" in " ".join(process.cmdline()) and not killed:
                    process.kill()
                    killed.append(process.pid)


def test_a_killed_data_worker_changes_nothing(tmp_path: Path) -> None:
    corpus = make_large_corpus(tmp_path / "corpus")
    options = DataOptions(shard_bytes=2 << 20, max_bad_fraction=0.1)
    clean = prepare(corpus, tmp_path / "clean", options)
    assert clean.quarantined == {"corrupt_image": 30}
    killed: list[int] = []
    done = threading.Event()
    killer = threading.Thread(target=kill_a_data_worker, args=(killed, done))
    killer.start()
    try:
        prepare(corpus, tmp_path / "killed", options)
    finally:
        done.set()
        killer.join()
    assert killed  # the control: somebody was killed while at work
    assert contents(tmp_path / "killed") == contents(tmp_path / "clean")
    entries = [line for path in (tmp_path / "killed/quarantine").iterdir() for line in path.read_text().splitlines()]
    assert len(entries) == len(set(entries)) == 30


@pytest.mark.parametrize(
    ("corpus", "options", "rows"),
    [
        ("slake", {"language": "en"}, {"train": 4918, "validation": 1053, "test": 1061}),
        ("rocov2", {}, {"train": 400, "validation": 60, "test": 60}),
    ],
)
def test_real_corpora_are_the_same_from_disk_and_from_s3(
    corpus: str, options: dict[str, Any], rows: dict[str, int], data_dir: Path, s3: str, tmp_path: Path
) -> None:
    chosen = DataOptions(**options)
    local = prepare(data_dir / corpus, tmp_path / "out", chosen)
    assert local.rows == rows
    file_system().put(f"{data_dir / corpus}/", f"{s3}/{corpus}/", recursive=True)
    prepare(f"{s3}/{corpus}", f"{s3}/out", chosen)
    remote = open_folder(f"{s3}/out")
    assert {name: sha256_bytes(remote.read_bytes(name)) for name in remote.files()} == contents(tmp_path / "out")
    if corpus == "slake":
        check_slake(local, data_dir / "slake", tmp_path / "out")


def check_slake(manifest: ShardManifest, corpus: Path, output: Path) -> None:
    assert manifest.quarantined == {"empty_answer": 1}
    assert manifest.made_by["rows_in"] == {"train": 4919, "validation": 1053, "test": 1061}
    (entry,) = [json.loads(line) for line in (output / "quarantine/train.jsonl").read_text().splitlines()]
    assert (entry["id"], entry["line"]) == ("1622", "train.json[1622]")
    assert set(manifest.image_overlap.values()) == {0}
    # Ten questions an image, each image stored about once.
    images = sum(path.stat().st_size for path in (corpus / "imgs").rglob("*.jpg"))
    assert sum(manifest.bytes.values()) < 1.3 * images
