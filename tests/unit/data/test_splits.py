"""Splits that the publisher does not give: by group, with a seed, whatever else is in the corpus."""

import json
import random
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.check import check
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.splits import missing_splits, take_splits
from pefomed_ray.errors import ConfigError


def rows(groups: int, each: int = 3, split: str = "train") -> list[tuple[int, Reference]]:
    return [
        (n, Reference(f"q{n}", split, "vqa", ("i",), "?", "a", None, None, f"g{n % groups}", "l", {}))  # type: ignore[arg-type]
        for n in range(groups * each)
    ]


def split_of_group(found: list[tuple[int, Reference]]) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = {}
    for _, row in found:
        splits.setdefault(row.group, set()).add(row.split)
    return splits


def test_what_is_missing() -> None:
    options = DataOptions(validation_fraction=0.1, test_fraction=0.2)
    train, test = rows(5), rows(5, split="test")
    assert missing_splits(train, official=False, options=options) == {"validation": 0.1, "test": 0.2}
    assert missing_splits(train, official=True, options=options) == {"validation": 0.1}
    assert missing_splits([*train, *rows(2, split="validation")], official=True, options=options) == {}
    assert missing_splits(test, official=True, options=options) == {}
    assert missing_splits(train, official=True, options=DataOptions(validation_fraction=0)) == {}


def test_no_group_stands_on_two_sides_and_the_shares_are_about_right() -> None:
    found = split_of_group(take_splits(rows(1000), {"validation": 0.1, "test": 0.2}, seed=0))
    assert all(len(splits) == 1 for splits in found.values())
    counts = {name: sum(splits == {name} for splits in found.values()) for name in ("train", "validation", "test")}
    assert 75 < counts["validation"] < 125
    assert 160 < counts["test"] < 240
    assert sum(counts.values()) == 1000


def test_the_seed_decides_and_other_groups_do_not() -> None:
    shares = {"validation": 0.3}
    few = split_of_group(take_splits(rows(50), shares, seed=0))  # type: ignore[arg-type]
    many = split_of_group(take_splits(rows(500), shares, seed=0))  # type: ignore[arg-type]
    assert all(many[group] == few[group] for group in few)
    assert split_of_group(take_splits(rows(50), shares, seed=1)) != few  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_a_small_corpus_gets_a_validation_split_and_keeps_a_training_one(groups: int) -> None:
    for seed in range(20):
        found = split_of_group(take_splits(rows(groups), {"validation": 0.1}, seed))
        assert {"train"} in found.values()
        assert {"validation"} in found.values()
        most = split_of_group(take_splits(rows(groups), {"validation": 0.98}, seed))
        assert {"train"} in most.values()


def test_one_group_stays_whole() -> None:
    assert split_of_group(take_splits(rows(1), {"validation": 0.5}, seed=0)) == {"g0": {"train"}}


def test_rows_of_other_splits_stay_where_they_are() -> None:
    given = [*rows(20), *rows(20, split="test")]
    moved = take_splits(given, {"validation": 0.4}, seed=0)
    assert [row for _, row in moved[60:]] == [row for _, row in given[60:]]


def make_corpus(root: Path, bad: int = 0) -> Path:
    """100 questions about 20 images, no validation file; then rows without an answer, of images of their own."""
    root.mkdir()
    for number in range(20 + bad):
        buffer = BytesIO()
        Image.frombytes("L", (32, 32), random.Random(number).randbytes(1024)).save(buffer, "PNG")
        (root / f"i{number}.png").write_bytes(buffer.getvalue())
    lines = [{"id": f"q{n}", "query": "?", "response": "Left", "image": f"i{n % 20}.png"} for n in range(100)]
    lines += [{"id": f"b{n}", "query": "?", "response": "", "image": f"i{20 + n}.png"} for n in range(bad)]
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_validation_comes_out_of_train_by_image(tmp_path: Path) -> None:
    report = check(make_corpus(tmp_path / "c"))
    assert report["rows"]["train"] + report["rows"]["validation"] == 100
    assert 0 < report["rows"]["validation"] < 40
    assert report["rows"]["test"] == 0
    assert set(report["image_overlap"].values()) == {0}
    intake = take_in(open_folder(tmp_path / "c"), DataOptions())
    assert intake.taken_splits == {"validation": 0.1}


def test_bad_rows_move_no_good_one(tmp_path: Path) -> None:
    clean = take_in(open_folder(make_corpus(tmp_path / "clean")), DataOptions())
    dirty = take_in(open_folder(make_corpus(tmp_path / "dirty", bad=9)), DataOptions())
    assert {row.id: row.split for _, row in clean.references}.items() <= {
        row.id: row.split for _, row in dirty.references
    }.items()


def test_a_taken_split_is_judged_together_with_the_one_it_was_taken_from(tmp_path: Path) -> None:
    options = DataOptions(max_bad_fraction=0.09)
    report = check(make_corpus(tmp_path / "c", bad=9), options)
    assert report["problem"] is None  # 9 of 109, wherever they fell
    refused = check(tmp_path / "c", DataOptions(max_bad_fraction=0.08))
    assert "split 'train': 9 of 109 rows" in refused["problem"]


@pytest.mark.parametrize(
    "changes",
    [{"validation_fraction": 1.5}, {"test_fraction": -0.1}, {"validation_fraction": 0.6, "test_fraction": 0.5}],
)
def test_shares_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        DataOptions(**changes)  # type: ignore[arg-type]
