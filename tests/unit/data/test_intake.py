"""Which rows are usable, what is counted, and what a quarantine entry may say; without Ray."""

import base64
import json
import random
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.records import RECORD_SCHEMA, Reference
from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.data.check import check
from pefomed_ray.data.intake import image_order, take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.shard_file import UNFINISHED, ShardResult, ShardSpec, plan_shards, write_shard
from pefomed_ray.errors import ConfigError, DataError

SECRET = "Jane Roe, MRN 4711"


def image(seed: int) -> bytes:
    buffer = BytesIO()
    Image.frombytes("RGB", (48, 48), random.Random(seed).randbytes(48 * 48 * 3)).save(buffer, "JPEG")
    return buffer.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    base = {"id": f"q{number}", "query": "Where?", "response": "Left", "image": f"i{number % 7}.jpg", "task": "vqa"}
    return base | {"answer_type": "open"} | changes


def make_corpus(root: Path, train: list[Any], test: list[Any] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(7):
        (root / f"i{number}.jpg").write_bytes(image(number))
    for split, rows in (("train", train), ("test", test or [])):
        if rows:
            lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
            (root / f"{split}.jsonl").write_bytes(b"\n".join(lines))
    return root


FAULTS: dict[str, dict[str, Any]] = {
    "bad_id": {"id": SECRET},
    "duplicate_id": {"id": "q0"},
    "text_encoding": {"response": f"{SECRET}\0"},
    "text_too_long": {"response": SECRET * 10_000},
    "empty_question": {"query": " "},
    "empty_answer": {"response": " \n"},
    "no_image": {"image": None},
    "image_not_local": {"image": "file:///etc/passwd"},
    "missing_image": {"image": f"{SECRET}.jpg"},
    "path_escape": {"image": "../i0.jpg"},
    "corrupt_image": {"image": "torn.jpg"},
    "image_format": {"image": "page.jpg"},
    "malformed_row": {"response": [SECRET]},
    "symlink_escape": {"image": "outside.jpg"},
    "image_frames": {"image": "moving.png"},
    "image_too_large": {"image": "bomb.png"},
    "trailing_bytes": {"image": "polyglot.jpg"},
    "several_turns": {"history": [[SECRET, SECRET]]},
}
OTHER_FACES: dict[str, dict[str, Any]] = {
    "corrupt_image": {"image": "empty.jpg"},
    "image_format": {"image": "really-a-gif.jpg"},
    "text_encoding": {"response": f"{SECRET}\ud8ff"},
    "image_not_local": {"image": "http://127.0.0.1/x.jpg"},
    "path_escape": {"image": "/etc/passwd"},
}
"""The same reasons by other ways."""


def dirty_corpus(root: Path, good: int = 40, each: int = 5) -> Path:
    rows = [row(number) for number in range(good)]
    for kind, changes in enumerate([*FAULTS.values(), *OTHER_FACES.values()]):
        for number in range(each):
            bad = row(1000 + 100 * kind + number) | changes
            rows.append(bad | {"id": f"{SECRET} {number}"} if changes == FAULTS["bad_id"] else bad)
    make_corpus(root, rows)
    (root / "torn.jpg").write_bytes(image(1)[:-300])
    (root / "page.jpg").write_bytes(b"<html></html>")
    (root / "empty.jpg").touch()
    (root / "polyglot.jpg").write_bytes(image(1) + b"PK\x03\x04 and what follows")
    (root.parent / "outside.jpg").write_bytes(image(1))
    (root / "outside.jpg").symlink_to(root.parent / "outside.jpg")
    Image.new("L", (9000, 9000)).convert("1").save(root / "bomb.png")
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 200)]
    frames[0].save(root / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(root / "really-a-gif.jpg", "GIF")
    return root


def test_every_fault_gets_its_reason_and_no_good_row_is_lost(tmp_path: Path) -> None:
    report = check(dirty_corpus(tmp_path / "c"), DataOptions(max_bad_fraction=0.9, validation_fraction=0))
    assert report["rows"] == {"train": 40, "validation": 0, "test": 0}
    assert report["quarantined"] == {kind: 10 if kind in OTHER_FACES else 5 for kind in sorted(FAULTS)}
    assert report["problem"] is None
    kinds = [*FAULTS, *OTHER_FACES]
    lines = [f"train.jsonl:{n}" for n in range(41, 41 + 5 * len(kinds))]
    expected = dict(zip(lines, [kind for kind in kinds for _ in range(5)], strict=True))
    assert {bad["line"]: bad["reason_code"] for bad in report["bad_rows"]} == expected
    assert set(report["bad_rows"][0]) == {"id", "source", "line", "reason_code", "sha256"}
    assert "Roe" not in json.dumps(report)
    assert "4711" not in json.dumps(report)


def test_a_clean_corpus_has_nothing_in_quarantine(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [row(n) for n in range(9)], [row(n) for n in range(20, 22)])
    report = check(tmp_path / "c", DataOptions(validation_fraction=0))
    assert report["rows"] == {"train": 9, "validation": 0, "test": 2}
    assert report["quarantined"] == {}
    assert report["image_overlap"] == {"train/validation": 0, "train/test": 2, "validation/test": 0}
    assert report["answer_types"] == {"open": 11}
    assert report["licence"] == "restricted"


def test_too_much_dirt_names_the_split_and_the_first_five(tmp_path: Path) -> None:
    problem = check(dirty_corpus(tmp_path / "c"))["problem"]
    assert "split 'train': 115 of 155 rows" in problem
    assert problem.count("(bad_id)") == 5
    assert "duplicate_id" not in problem


def test_the_limit_is_a_share_of_a_split(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [row(n) for n in range(100)] + [row(200, response="")])
    assert check(tmp_path / "c")["problem"] is None
    make_corpus(tmp_path / "c", [row(n) for n in range(100)] + [row(200, response=""), row(201, response="")])
    assert "max_bad_fraction" in check(tmp_path / "c")["problem"]


def test_a_split_that_lost_every_row_is_refused_whatever_the_limit(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [row(n) for n in range(9)], [row(50, image="none.jpg")])
    assert "split 'test'" in check(tmp_path / "c", DataOptions(max_bad_fraction=1.0))["problem"]


def test_an_empty_split_file_is_an_error(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [row(1)])
    (tmp_path / "c/test.jsonl").touch()
    with pytest.raises(DataError, match=r"'test' is empty.*test\.jsonl"):
        take_in(open_folder(tmp_path / "c"), DataOptions())


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [row(1)])
    with pytest.raises(ConfigError, match="slake"):
        take_in(open_folder(tmp_path / "c"), DataOptions(language="en"))
    assert take_in(open_folder(tmp_path / "c"), DataOptions(licence="open")).licence == "open"
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        DataOptions(max_bad_fraction=2)


def shards_of(root: Path, output: Path) -> list[ShardResult]:
    options = DataOptions(validation_fraction=0)
    folder = open_folder(root)
    intake = take_in(folder, options)
    specs = plan_shards(intake.references, folder, seed=3, shard_bytes=4000)
    again = [ShardSpec.from_json(spec.to_json()) for spec in specs]
    assert again == specs
    return [write_shard(spec.to_json(), folder, open_folder(output), "jsonl", options) for spec in again]


def test_good_rows_are_the_same_bytes_with_and_without_the_bad_ones(tmp_path: Path) -> None:
    dirty = dirty_corpus(tmp_path / "dirty")
    clean = tmp_path / "clean"
    shutil.copytree(dirty, clean)
    lines = (dirty / "train.jsonl").read_bytes().split(b"\n")
    (clean / "train.jsonl").write_bytes(b"\n".join(lines[:40]))
    tables = []
    for root in (dirty, clean):
        folder, output = open_folder(root), open_folder(tmp_path / f"{root.name}-out")
        specs = plan_shards(take_in(folder, DataOptions()).references, folder, seed=3, shard_bytes=1 << 30)
        for spec in specs:
            write_shard(spec.to_json(), folder, output, "jsonl", DataOptions())
        tables.append({spec.path: output.read_bytes(spec.path) for spec in specs})
    assert sorted(tables[0]) == ["train/part-00000.parquet", "validation/part-00000.parquet"]
    assert tables[0] == tables[1]


def test_shards_repeat_to_the_byte_and_keep_each_image_in_one_of_them(tmp_path: Path) -> None:
    root = make_corpus(tmp_path / "c", [row(n) for n in range(70)])
    first, second = (shards_of(root, tmp_path / name) for name in ("a", "b"))
    assert len(first) > 1
    assert [result.file for result in first] == [result.file for result in second]
    assert [path.name for path in (tmp_path / "a").rglob(".*")] == [UNFINISHED]
    assert all(path.suffix == ".json" for path in (tmp_path / "a" / UNFINISHED).iterdir())
    digests = [result.tally.images["train"] for result in first]
    assert sum(len(found) for found in digests) == 7
    tables = [pq.read_table(tmp_path / "a" / result.file.path) for result in first if result.file]
    assert sorted(name for table in tables for name in table["id"].to_pylist()) == sorted(f"q{n}" for n in range(70))
    assert all(table.schema.equals(RECORD_SCHEMA) for table in tables)
    assert all(table.schema.metadata == RECORD_SCHEMA.metadata for table in tables)
    size = sum(result.file.bytes for result in first if result.file)
    images = sum((root / f"i{n}.jpg").stat().st_size for n in range(7))
    assert size < images + 10_000 * len(first)  # ten rows an image, stored once


def test_results_survive_the_way_back_to_the_driver(tmp_path: Path) -> None:
    (root := tmp_path / "c").mkdir()
    for result in shards_of(make_corpus(root, [row(n) for n in range(10)] + [row(99, response="")]), tmp_path / "o"):
        assert ShardResult.from_json(result.to_json()) == result


def test_the_order_of_images_follows_the_seed_and_keeps_the_rows_of_one_image_together() -> None:
    rows = [
        (n, Reference(f"q{n}", "train", "caption", (f"i{n % 20}",), "", "a", None, None, "g", "l", {}))
        for n in range(60)
    ]
    order = [[position for position, _ in group] for group in image_order(rows, 0)]
    assert all(len({position % 20 for position in group}) == 1 and group == sorted(group) for group in order)
    assert order == [[position for position, _ in group] for group in image_order(rows, 0)]
    assert order != [[position for position, _ in group] for group in image_order(rows, 1)]
    assert order != sorted(order)


def test_images_inside_parquet_files_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, images in (("train", [image(1), image(2), image(1), b"torn"]), ("test", [image(1)])):
        columns = {
            "image": [{"bytes": data, "path": None} for data in images],
            "question": ["where?"] * len(images),
            "answer": ["left"] * len(images),
        }
        pq.write_table(pa.table(columns), tmp_path / f"data/{split}-0.parquet")
    report = check(tmp_path, DataOptions(max_bad_fraction=0.5, validation_fraction=0))
    assert report["rows"] == {"train": 3, "validation": 0, "test": 1}
    assert [(bad["id"], bad["reason_code"]) for bad in report["bad_rows"]] == [("train-3", "image_format")]
    assert report["image_overlap"]["train/test"] == 1


def test_missing_images_of_roco_are_counted_and_allowed_up_to_the_limit(tmp_path: Path) -> None:
    folder = tmp_path / "data/train/radiology"
    (folder / "images").mkdir(parents=True)
    (folder / "captions.txt").write_text("".join(f"ROCO_0000{n}\t A caption.\n" for n in range(4)))
    for number in range(3):
        (folder / f"images/ROCO_0000{number}.jpg").write_bytes(image(number))
    assert check(tmp_path)["problem"]
    report = check(tmp_path, DataOptions(max_bad_fraction=0.5, validation_fraction=0))
    assert (report["rows"]["train"], report["quarantined"], report["problem"]) == (3, {"missing_image": 1}, None)


def test_real_slake(data_dir: Path) -> None:
    report = check(data_dir / "slake", DataOptions(language="en"))
    assert report["rows"] == {"train": 4918, "validation": 1053, "test": 1061}
    assert [(bad["id"], bad["reason_code"]) for bad in report["bad_rows"]] == [("1622", "empty_answer")]
    assert set(report["image_overlap"].values()) == {0}
    assert report["problem"] is None


def test_a_corpus_may_be_named_by_its_owner(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source is 'a b'"):
        DataOptions(source="a b")
    image = tmp_path / "x.png"
    Image.new("L", (8, 8)).save(image)
    row = '{"id": "1", "query": "?", "response": "Left", "image": "x.png"}\n'
    (tmp_path / "train.jsonl").write_text(row, encoding="utf-8")
    assert check(tmp_path, DataOptions(source="hospital-7"))["source"] == "hospital-7"
    assert check(tmp_path, DataOptions())["source"] == "jsonl"


def test_images_inside_jsonl_rows_are_read_and_checked(tmp_path: Path) -> None:
    def url(data: bytes) -> str:
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()

    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Where?"},
                        {"type": "image_url", "image_url": {"url": url(data)}},
                    ],
                },
                {"role": "assistant", "content": "Left"},
            ]
        }
        for data in (image(1), image(2), image(1)[:-200])
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(tmp_path, DataOptions(max_bad_fraction=0.5, validation_fraction=0))
    assert (report["rows"]["train"], report["quarantined"]) == (2, {"corrupt_image": 1})


def test_images_are_made_smaller_on_request(tmp_path: Path) -> None:
    root = make_corpus(tmp_path / "c", [row(n) for n in range(7)])
    sides = {}
    for limit in (None, 24):
        options = DataOptions(max_side_px=limit, validation_fraction=0, licence="open")
        folder, output = open_folder(root), open_folder(tmp_path / f"out-{limit}")
        (spec,) = plan_shards(take_in(folder, options).references, folder, 0, options.shard_bytes)
        write_shard(spec.to_json(), folder, output, "jsonl", options)
        table = pq.read_table(tmp_path / f"out-{limit}" / spec.path)
        found = [image["bytes"] for images in table["images"].to_pylist() for image in images]
        sides[limit] = {max(Image.open(BytesIO(data)).size) for data in found}
        digests = [digest for digests in table["image_sha256"].to_pylist() for digest in digests]
        assert digests == [sha256_bytes(data) for data in found]
    assert sides == {None: {48}, 24: {24}}
