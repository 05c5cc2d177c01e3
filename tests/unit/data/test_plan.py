"""The training order: a permutation, the same everywhere, local, and padded to equal steps."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.artifacts.records import RECORD_SCHEMA
from pefomed_ray.data.plan import (
    WINDOW_GROUPS,
    Part,
    RowIndex,
    epoch_order,
    epoch_rows,
    epoch_windows,
    first_rows,
    open_index,
    open_mixture,
    read_rows,
    text_lengths,
)
from pefomed_ray.errors import DataError

SIZES = np.array([64] * 40 + [17])


@pytest.mark.parametrize("sizes", [SIZES, np.array([1]), np.array([3, 1, 4, 1, 5]), np.array([], dtype=np.int64)])
def test_every_row_comes_once_an_epoch(sizes: np.ndarray) -> None:
    order = epoch_order(sizes, seed=5, epoch=2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sizes.sum()))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(SIZES, seed=5, epoch=2)
    assert np.array_equal(first, epoch_order(SIZES, seed=5, epoch=2))
    for other in (epoch_order(SIZES, 5, 3), epoch_order(SIZES, 6, 2)):
        assert not np.array_equal(first, other)


def test_a_window_touches_no_more_row_groups_than_it_says() -> None:
    order = epoch_order(SIZES, seed=0, epoch=0, window_groups=4)
    group_of = np.repeat(np.arange(len(SIZES)), SIZES)
    runs = np.array_split(group_of[order], np.arange(4 * 64, len(order), 4 * 64))
    # The short row group shifts the windows behind it, so that a stretch of 256 rows may touch two windows.
    assert all(len(set(run)) <= 8 for run in runs)
    assert len(set(runs[0])) == 4
    assert not np.array_equal(order[:256], np.sort(order[:256]))  # and it is mixed inside
    whole = epoch_order(SIZES, seed=0, epoch=0, window_groups=1000)
    assert len(set(group_of[whole][:256])) > 30  # the control: one window over everything is a full shuffle


def make_shards(folder: Path) -> list[str]:
    """Two files of 10 and 7 rows in row groups of 4."""
    files, ids = [], []
    (folder / "train").mkdir()
    for number, rows in enumerate((10, 7)):
        path = folder / f"train/part-{number:05d}.parquet"
        names = [f"{number}-{row}" for row in range(rows)]
        texts = ["ä" * row for row in range(rows)]
        records = [
            {
                "id": name,
                "source": "s",
                "split": "train",
                "task": "vqa",
                "images": [{"bytes": name.encode(), "path": "p"}],
                "image_sha256": ["0"],
                "question": text,
                "answer": "a",
                "answer_type": None,
                "question_type": None,
                "group": "g",
                "meta": "{}",
            }
            for name, text in zip(names, texts, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(records, schema=RECORD_SCHEMA), path, row_group_size=4)
        files.append(ShardFile(path=f"train/{path.name}", split="train", rows=rows, bytes=1, sha256="0"))
        ids += names
    empty: dict[str, int] = {}
    manifest = ShardManifest(
        source="s", licence="open", rows={"train": 17}, tasks=empty, answer_types=empty, bytes=empty,
        quarantined=empty, image_overlap=empty, files=tuple(files), made_by={},
    )  # fmt: skip
    save_document(manifest, folder / "manifest.json")
    return ids


def test_rows_are_read_where_the_index_says(tmp_path: Path) -> None:
    ids = make_shards(tmp_path)
    index = open_index(tmp_path, "train")
    assert (index.rows, index.sizes.tolist()) == (17, [4, 4, 2, 4, 3])
    assert index.locate(9) == (str(tmp_path / "train/part-00000.parquet"), 2, 1)
    order = epoch_order(index.sizes, seed=1, epoch=0)
    records = read_rows(index, order)
    assert [record["id"] for record in records] == [ids[row] for row in order]
    assert records[0]["images"] == [{"bytes": records[0]["id"].encode(), "path": "p"}]
    assert set(records[0]) == set(RECORD_SCHEMA.names)
    for row in (-1, 17):
        with pytest.raises(IndexError):
            read_rows(index, np.array([row]))


def test_lengths_of_texts_are_their_bytes(tmp_path: Path) -> None:
    make_shards(tmp_path)
    lengths = text_lengths(open_index(tmp_path, "train"))
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [2 * row + 1 for row in (*range(10), *range(7))]  # two bytes a letter; and "a"


def test_an_absent_split_and_a_changed_file_are_named(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with pytest.raises(DataError, match="'test'"):
        open_index(tmp_path, "test")
    path = tmp_path / "train/part-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DataError, match=r"part-00001.*6 rows.*7"):
        open_index(tmp_path, "train")
    path.write_bytes(b"torn")
    with pytest.raises(DataError, match="part-00001"):
        open_index(tmp_path, "train")


def mixture(tmp_path: Path, weights: list[float]) -> RowIndex:
    """As many shard folders of 17 rows."""
    folders = [(tmp_path / f"corpus-{number}", weight) for number, weight in enumerate(weights)]
    for folder, _ in folders:
        folder.mkdir()
        make_shards(folder)
    return open_mixture(folders, "train")


def test_each_corpus_of_a_mixture_has_its_share_of_every_epoch(tmp_path: Path) -> None:
    index = mixture(tmp_path, [3, 1])
    assert index.rows == 34
    for epoch in range(5):
        rows = epoch_rows(index, seed=1, epoch=epoch)
        assert rows.shape == (34,)
        assert [int((rows < 17).sum()), int((rows >= 17).sum())] == [26, 8]  # 25.5 and 8.5, in whole numbers
        assert np.array_equal(rows, epoch_rows(index, seed=1, epoch=epoch))
    assert not np.array_equal(epoch_rows(index, 1, 0), epoch_rows(index, 1, 1))
    assert not np.array_equal(epoch_rows(index, 1, 0), epoch_rows(index, 2, 0))


def test_every_row_of_a_mixture_gets_its_turn(tmp_path: Path) -> None:
    index = mixture(tmp_path, [3, 1])
    # 17 epochs deal out 26 shuffles of the first corpus and 8 of the second, whole ones.
    counts = np.bincount(np.concatenate([epoch_rows(index, seed=0, epoch=epoch) for epoch in range(17)]))
    assert counts.tolist() == [26] * 17 + [8] * 17


def test_a_mixture_is_mixed(tmp_path: Path) -> None:
    rows = epoch_rows(mixture(tmp_path, [1, 1]), seed=0, epoch=0)
    sides = rows >= 17
    assert 8 < int(np.abs(np.diff(sides.astype(int))).sum()) < 26  # one after the other would be 1


def rows_in_windows(index: RowIndex, epoch: int) -> list[np.ndarray]:
    rows, begins = epoch_windows(index, 1, epoch)
    assert begins[0]
    assert np.array_equal(rows, epoch_rows(index, 1, epoch))
    return np.split(rows, np.flatnonzero(begins)[1:])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_between_two_beginnings_a_reader_needs_one_window(parts: int) -> None:
    of_each = [Part(40, weight) for weight in (1.0, 3.0, 0.5)[:parts]]
    groups = 40 * parts
    index = RowIndex("train", (("f", 0),) * groups, tuple(range(0, 64 * groups + 1, 64)), tuple(of_each))
    for epoch in range(3):
        windows = rows_in_windows(index, epoch)
        assert len(windows) >= groups // WINDOW_GROUPS
        assert all(len(set(window // 64)) <= WINDOW_GROUPS for window in windows)
        joined = [set(np.concatenate(pair) // 64) for pair in pairwise(windows)]
        assert max(map(len, joined)) > WINDOW_GROUPS // parts  # the control: two windows are more than one


def test_weights_are_relative_and_one_corpus_needs_none(tmp_path: Path) -> None:
    index = mixture(tmp_path, [0.3, 0.1])
    again = open_mixture([(tmp_path / "corpus-0", 6.0), (tmp_path / "corpus-1", 2.0)], "train")
    assert np.array_equal(epoch_rows(index, 0, 3), epoch_rows(again, 0, 3))
    alone = open_index(tmp_path / "corpus-0", "train")
    assert np.array_equal(epoch_rows(alone, 0, 3), epoch_order(alone.sizes, 0, 3))


def test_the_first_rows_of_a_mixture_come_from_each_corpus(tmp_path: Path) -> None:
    index = mixture(tmp_path, [3, 1])
    assert first_rows(index, 8).tolist() == [0, 1, 2, 3, 4, 5, 17, 18]
    assert first_rows(index, 1000).tolist() == [*range(17), *range(17, 25)]
    alone = open_index(tmp_path / "corpus-0", "train")
    assert first_rows(alone, 1000).tolist() == list(range(17))


def test_a_corpus_without_the_split_is_left_out_of_the_mixture(tmp_path: Path) -> None:
    mixture(tmp_path, [1, 1])
    with pytest.raises(DataError, match=r"corpus-0.*corpus-1.*'test'"):
        open_mixture([(tmp_path / "corpus-0", 1.0), (tmp_path / "corpus-1", 1.0)], "test")


def test_shards_are_read_from_s3_too(tmp_path: Path, s3: str) -> None:
    names = make_shards(tmp_path)
    remote = open_folder(f"{s3}/shards")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            remote.write_bytes(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    index = open_index(remote.url, "train")
    order = epoch_rows(index, seed=3, epoch=0)
    assert read_rows(index, order) == read_rows(open_index(tmp_path, "train"), order)
    assert np.array_equal(text_lengths(index), text_lengths(open_index(tmp_path, "train")))
    assert {record["id"] for record in read_rows(index, order)} == set(names)
