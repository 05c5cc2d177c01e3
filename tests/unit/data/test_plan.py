"""The training order: a permutation, the same everywhere, local, and padded to equal steps."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.artifacts.records import RECORD_SCHEMA
from pefomed_ray.data.plan import epoch_order, open_index, read_rows
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
        records = [
            {
                "id": name,
                "source": "s",
                "split": "train",
                "task": "vqa",
                "images": [{"bytes": name.encode(), "path": "p"}],
                "image_sha256": ["0"],
                "question": "q",
                "answer": "a",
                "answer_type": None,
                "question_type": None,
                "group": "g",
                "meta": "{}",
            }
            for name in names
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
