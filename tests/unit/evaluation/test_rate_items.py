"""What there is to rate: the right picture beside the right texts, nobody's name, an order of each rater's own."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.evaluation.rate.items import open_items, order_of

Make = Callable[..., Path]
ROWS = 7


def rows(shards: Path) -> list[dict[str, Any]]:
    return pq.read_table(shards / "test").to_pylist()


def predictions(
    shards: Path, path: Path, answer: Callable[[int], str | None] = str, made: dict[str, Any] | None = None
) -> Path:
    own = [
        Prediction(row["id"], row["question"], row["answer"], answer(number)) for number, row in enumerate(rows(shards))
    ]
    write_predictions(path, own, made or {})
    return path


def test_an_item_is_the_shards_row_and_its_picture(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    items = open_items([predictions(shards, tmp_path / "one.jsonl", lambda n: f"answer {n}")], shards, "test")
    assert (items.task, len(items.by_key), items.unanswered) == ("vqa", ROWS, 0)
    by_id = {answer.id: items.by_key[answer.item] for answer in items.answers}
    for number, row in enumerate(rows(shards)):
        item = by_id[row["id"]]
        assert (item.question, item.reference, item.answer) == (row["question"], row["answer"], f"answer {number}")
        assert items.image(item.key, 0) == row["images"][0]["bytes"]


def test_equal_answers_of_two_models_are_one_item_and_keys_name_no_model(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    one = predictions(shards, tmp_path / "one.jsonl", lambda n: "same" if n < 3 else f"a{n}")
    two = predictions(shards, tmp_path / "two.jsonl", lambda n: "same" if n < 3 else f"b{n}")
    items = open_items([one, two], shards, "test")
    assert (len(items.by_key), len(items.answers)) == (3 + 4 + 4, 14)
    assert {answer.model for answer in items.answers} == {"one", "two"}
    alone = open_items([two], shards, "test")
    assert set(alone.by_key) < set(items.by_key)
    assert not any(name in str(asdict(item)) for item in items.by_key.values() for name in ("one.jsonl", "two.jsonl"))


def test_models_are_named_by_what_made_them(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    made: list[dict[str, Any]] = [
        {"bundle": "0123456789abcdef", "model": {"kind": "bundle"}, "given": "image"},
        {"bundle": "0123456789abcdef", "model": {"kind": "bundle"}, "given": "noise_image"},
        {"bundle": None, "model": {"kind": "endpoint", "name": "gpt"}, "given": "image"},
        {"model": "plain"},
        {},
    ]
    files = [predictions(shards, tmp_path / f"f{number}.jsonl", lambda n: "x", one) for number, one in enumerate(made)]
    found = {answer.model for answer in open_items(files, shards, "test").answers}
    assert found == {"0123456789ab", "0123456789ab-noise_image", "gpt", "plain", "f4"}
    (tmp_path / "other").mkdir()
    again = predictions(shards, tmp_path / "other" / "f4.jsonl")
    with pytest.raises(ConfigError, match="both of 'f4'"):
        open_items([files[4], again], shards, "test")


def test_a_larger_sample_has_the_smaller_ones_rows(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(rows={"test": 40})
    file = predictions(shards, tmp_path / "one.jsonl")

    def sampled(count: int, seed: int = 0) -> set[str]:
        return {answer.id for answer in open_items([file], shards, "test", count, seed).answers}

    assert (len(sampled(5)), len(sampled(20)), len(sampled(100))) == (5, 20, 40)
    assert sampled(5) < sampled(20)
    assert sampled(5) == sampled(5)
    assert sampled(5) != sampled(5, seed=1)


def test_a_sample_is_of_rows_that_every_file_has(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    one = predictions(shards, tmp_path / "one.jsonl")
    two = predictions(shards, tmp_path / "two.jsonl")
    lines = two.read_text().splitlines(keepends=True)
    two.write_text("".join(lines[:2]))
    assert {answer.id for answer in open_items([one, two], shards, "test", 5).answers} == {"test-0", "test-1"}
    one.write_text("".join(lines[2:]))
    with pytest.raises(DataError, match="no row that all files"):
        open_items([one, two], shards, "test", 5)


def test_each_rater_has_an_order_fixed_by_name_and_seed(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards(rows={"test": 40})
    items = open_items([predictions(shards, tmp_path / "one.jsonl")], shards, "test")
    anna = order_of(items, "Anna", 0)
    assert sorted(anna) == sorted(items.by_key)
    assert anna == order_of(items, "Anna", 0)
    assert anna != order_of(items, "Anna", 1)
    assert anna != order_of(items, "Bela", 0)
    assert anna != list(items.by_key)


def test_rows_without_an_answer_are_left_out_and_counted(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    file = predictions(shards, tmp_path / "one.jsonl", lambda n: None if n < 2 else f"{n}")
    items = open_items([file], shards, "test")
    assert (len(items.by_key), items.unanswered) == (ROWS - 2, 2)
    predictions(shards, file, lambda n: None)
    with pytest.raises(DataError, match="not one of 7 rows has an answer"):
        open_items([file], shards, "test")


def test_predictions_about_other_rows_are_refused_without_their_text(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    file = predictions(shards, tmp_path / "one.jsonl")
    good = [json.loads(line) for line in file.read_text().splitlines()]

    def refusal(key: str, value: str) -> str:
        file.write_text(
            "".join(json.dumps(row | ({key: value} if at == 1 else {})) + "\n" for at, row in enumerate(good))
        )
        with pytest.raises(DataError) as caught:
            open_items([file], shards, "test")
        return str(caught.value)

    assert "1 of 7 ids are not in split 'test' of the shards ('elsewhere-1')" in refusal("id", "elsewhere-1")
    for key in ("answer", "question"):
        assert "another question or reference" in (message := refusal(key, "SECRET"))
        assert "'test-1'" in message
        assert "SECRET" not in message
    # What tools for captions take off is no other text, and a file need not have questions.
    reworked = [row | {"answer": row["answer"].upper() + " .", "question": ""} for row in good]
    file.write_text("".join(json.dumps(row) + "\n" for row in reworked))
    assert {item.reference for item in open_items([file], shards, "test").by_key.values()} == {
        row["answer"] for row in good
    }


def test_a_row_without_picture_and_a_split_without_rows_are_refused(make_shards: Make, tmp_path: Path) -> None:
    shards = make_shards()
    file = predictions(shards, tmp_path / "one.jsonl")
    with pytest.raises(DataError, match="no rows for split 'validation'"):
        open_items([file], shards, "validation")
    part = shards / "test" / "part-0.parquet"
    table = pq.read_table(part)
    bare = [row | ({"images": [], "image_sha256": []} if row["id"] == "test-2" else {}) for row in table.to_pylist()]
    pq.write_table(table.from_pylist(bare, table.schema), part)
    with pytest.raises(DataError, match=r"1 rows of the shards have no picture to show \('test-2'\)"):
        open_items([file], shards, "test")
