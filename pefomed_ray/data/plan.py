"""The training order: which row of a split comes when, the same for any number of workers, and reading those rows.

An epoch shuffles the row groups, then the rows inside windows of 16 row groups: a reader that keeps the row groups of
one window in memory reads each of them once. Resuming needs no state but (seed, epoch, rows consumed).
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.errors import DataError

WINDOW_GROUPS = 16


@dataclass(frozen=True)
class RowIndex:
    """Where every row of one split stands. Rows are numbered from 0 in the order of the files. Pickles small."""

    split: str
    row_groups: tuple[tuple[str, int], ...]
    """Absolute path or URL of the file, and number of the row group in it."""
    starts: tuple[int, ...]
    """First row of each row group, and after the last one the number of rows: one entry more than `row_groups`."""

    @property
    def rows(self) -> int:
        """Rows in the split."""
        return self.starts[-1]

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each row group, int64."""
        return np.diff(np.asarray(self.starts, dtype=np.int64))

    def locate(self, row: int) -> tuple[str, int, int]:
        """File, row group, and row inside the row group. Raises IndexError outside 0..rows-1."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not in split {self.split!r} of {self.rows} rows")
        group = bisect_right(self.starts, row) - 1
        path, number = self.row_groups[group]
        return path, number, row - self.starts[group]


def open_index(directory: str | Path, split: str) -> RowIndex:
    """Index a split of a shard directory, a local path or an `s3://` URL, from its manifest and the files' footers.

    Raises DataError where the split has no rows, or a file does not hold what the manifest says.
    """
    folder = open_folder(directory)
    files = [file for file in load_shard_manifest(folder).files if file.split == split]
    if not files:
        raise DataError(f"shards {str(folder)!r} hold no rows for split {split!r}")
    row_groups: list[tuple[str, int]] = []
    starts = [0]
    for file in files:
        path = folder.url_of(file.path)
        try:
            with folder.open(file.path) as opened:
                metadata = pq.read_metadata(opened)
        except (OSError, ValueError) as error:
            raise DataError(f"shard {path!r} cannot be read ({type(error).__name__}); prepare it again") from None
        if metadata.num_rows != file.rows:
            raise DataError(f"shard {path!r} holds {metadata.num_rows} rows, its manifest says {file.rows}")
        for number in range(metadata.num_row_groups):
            row_groups.append((path, number))
            starts.append(starts[-1] + metadata.row_group(number).num_rows)
    return RowIndex(split, tuple(row_groups), tuple(starts))


def epoch_order(sizes: np.ndarray, seed: int, epoch: int, window_groups: int = WINDOW_GROUPS) -> np.ndarray:
    """A permutation of all rows, int64 of shape (sum(sizes),), determined by (seed, epoch) alone.

    `sizes` are the rows of each row group, int64 of shape (groups,). Each run of `window_groups` shuffled row groups
    fills one contiguous stretch of the order; `read_rows` keeps as many in memory as the default.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    generator = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = generator.permutation(len(sizes))
    windows = [np.empty(0, dtype=np.int64)]
    for first in range(0, len(groups), window_groups):
        rows = [np.arange(starts[group], starts[group + 1]) for group in groups[first : first + window_groups]]
        windows.append(generator.permutation(np.concatenate(rows)))
    return np.concatenate(windows)


def read_rows(index: RowIndex, rows: np.ndarray) -> list[dict[str, Any]]:
    """Records (dicts of RECORD_SCHEMA) of these rows, in their order. Raises IndexError for a row that is not there."""
    records = []
    for row in rows:
        path, number, at = index.locate(int(row))
        records.extend(_row_group(path, number).slice(at, 1).to_pylist())
    return records


@lru_cache(maxsize=WINDOW_GROUPS)
def _row_group(path: str, number: int) -> pa.Table:
    folder, name = path.rsplit("/", 1)
    with open_folder(folder).open(name) as opened, pq.ParquetFile(opened) as file:
        return file.read_row_group(number)
