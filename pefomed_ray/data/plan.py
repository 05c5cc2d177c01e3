"""The training order: which row of a split comes when, the same for any number of workers, and reading those rows.

An epoch shuffles the row groups, then the rows inside windows of 16 row groups: a reader that keeps the row groups of
one window in memory reads each of them once. Resuming needs no state but (seed, epoch, rows consumed).

A mixture of corpora gives each a share of every epoch, whatever its size (what the published `sample_ratio` was meant
to do and did not): an epoch has as many rows as all corpora together, and each corpus deals out its part from one
endless row of shuffles of its own, so that a small one repeats and of a large one every row gets its turn.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pefomed_ray.artifacts.folders import Folder, open_folder
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.errors import DataError

WINDOW_GROUPS = 16


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture: its row groups follow those of the part before."""

    row_groups: int
    weight: float
    """Relative to the other parts'."""


@dataclass(frozen=True)
class RowIndex:
    """Where every row of one split stands. Rows are numbered from 0 in the order of the files. Pickles small."""

    split: str
    row_groups: tuple[tuple[str, int], ...]
    """Absolute path or URL of the file, and number of the row group in it."""
    starts: tuple[int, ...]
    """First row of each row group, and after the last one the number of rows: one entry more than `row_groups`."""
    parts: tuple[Part, ...]

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
    return open_mixture([(directory, 1.0)], split)


def open_mixture(directories: Sequence[tuple[str | Path, float]], split: str) -> RowIndex:
    """Index a split of several shard directories, each with its weight; those without rows of it are left out.

    Raises DataError as `open_index` does; where the split has no rows in any of them.
    """
    row_groups: list[tuple[str, int]] = []
    starts = [0]
    parts = []
    for directory, weight in directories:
        before = len(row_groups)
        for path, number, rows in _row_groups_of(open_folder(directory), split):
            row_groups.append((path, number))
            starts.append(starts[-1] + rows)
        if len(row_groups) > before:
            parts.append(Part(len(row_groups) - before, weight))
    if not parts:
        where = ", ".join(repr(str(directory)) for directory, _ in directories)
        raise DataError(f"shards {where} hold no rows for split {split!r}")
    return RowIndex(split, tuple(row_groups), tuple(starts), tuple(parts))


def _row_groups_of(folder: Folder, split: str) -> Iterator[tuple[str, int, int]]:
    """Path of the file, number of the row group in it, and its rows."""
    for file in load_shard_manifest(folder).files:
        if file.split != split:
            continue
        path = folder.url_of(file.path)
        try:
            with folder.open(file.path) as opened:
                metadata = pq.read_metadata(opened)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"shard {path!r} cannot be read ({type(error).__name__}); prepare it again") from None
        if metadata.num_rows != file.rows:
            raise DataError(f"shard {path!r} holds {metadata.num_rows} rows, its manifest says {file.rows}")
        for number in range(metadata.num_row_groups):
            yield path, number, metadata.row_group(number).num_rows


def epoch_rows(index: RowIndex, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order, int64 of shape (index.rows,), determined by (seed, epoch) alone.

    Of one corpus each row comes once. Of a mixture each part has its share of every epoch, evenly spread at random.
    """
    return epoch_windows(index, seed, epoch)[0]


def epoch_windows(index: RowIndex, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """`epoch_rows`, and where a window begins, of any part: bool of the same shape.

    Rows may change places between one beginning and the next, and a reader still keeps no more row groups in memory.
    """
    if len(index.parts) == 1:
        return _joined(_windows(index.sizes, np.random.default_rng([seed, epoch]), WINDOW_GROUPS))
    window_groups = max(WINDOW_GROUPS // len(index.parts), 1)
    counts = _apportion(index.rows, [part.weight for part in index.parts])
    turns = np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(counts)), counts))
    rows, begins = np.empty(index.rows, dtype=np.int64), np.empty(index.rows, dtype=bool)
    for number, (sizes, first_row) in enumerate(_part_sizes(index)):
        mine, begins[turns == number] = _deal(sizes, counts[number], seed, epoch, number, window_groups)
        rows[turns == number] = first_row + mine
    return rows, begins


def first_rows(index: RowIndex, count: int) -> np.ndarray:
    """`count` rows of a split, int64, always the same ones: the first of each part, by weight as far as it has them."""
    counts = _apportion(min(count, index.rows), [part.weight for part in index.parts])
    parts = [
        first_row + np.arange(min(wanted, int(sizes.sum())))
        for wanted, (sizes, first_row) in zip(counts, _part_sizes(index), strict=True)
    ]
    return np.concatenate(parts)


def epoch_order(sizes: np.ndarray, seed: int, epoch: int, window_groups: int = WINDOW_GROUPS) -> np.ndarray:
    """A permutation of all rows, int64 of shape (sum(sizes),), determined by (seed, epoch) alone.

    `sizes` are the rows of each row group, int64 of shape (groups,). Each run of `window_groups` shuffled row groups
    fills one contiguous stretch of the order; `read_rows` keeps as many in memory as the default.
    """
    return _joined(_windows(np.asarray(sizes, dtype=np.int64), np.random.default_rng([seed, epoch]), window_groups))[0]


def _windows(sizes: np.ndarray, generator: np.random.Generator, window_groups: int) -> list[np.ndarray]:
    """The rows of each window, shuffled."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = generator.permutation(len(sizes))
    windows = []
    for first in range(0, len(groups), window_groups):
        rows = [np.arange(starts[group], starts[group + 1]) for group in groups[first : first + window_groups]]
        windows.append(generator.permutation(np.concatenate(rows)))
    return windows


def _joined(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Windows one after the other, and where each begins."""
    rows = np.concatenate([np.empty(0, dtype=np.int64), *windows])
    begins = np.zeros(len(rows), dtype=bool)
    begins[np.cumsum([0, *(len(window) for window in windows)])[:-1]] = True
    return rows, begins


def _part_sizes(index: RowIndex) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of each row group of a part, and the part's first row."""
    group = 0
    for part in index.parts:
        yield index.sizes[group : group + part.row_groups], index.starts[group]
        group += part.row_groups


def _deal(
    sizes: np.ndarray, count: int, seed: int, epoch: int, part: int, window_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a part gives to an epoch, the next `count` of its shuffles, one after the other; where a window of
    them begins."""
    rows = int(sizes.sum())
    start, end = epoch * count, (epoch + 1) * count
    windows: list[np.ndarray] = []
    for number in range(start // rows, -(-end // rows)):
        windows += _windows(sizes, np.random.default_rng([seed, number, part]), window_groups)
    dealt, begins = (joined[start % rows :][:count] for joined in _joined(windows))
    begins[:1] = True  # the epoch begins
    return dealt, begins


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to the weights (largest remainders first)."""
    shares = np.round(np.asarray(weights) / sum(weights) * total, 9)  # what is left of binary fractions decides nothing
    counts = np.floor(shares).astype(int)
    for number in np.argsort(counts - shares, kind="stable")[: total - int(counts.sum())]:
        counts[number] += 1
    return [int(count) for count in counts]


def text_lengths(index: RowIndex) -> np.ndarray:
    """UTF-8 bytes of question and answer of every row, int32 of shape (index.rows,). Reads those two columns alone."""
    lengths = [np.empty(0, dtype=np.int32)]
    for path, row_groups in groupby(index.row_groups, key=lambda row_group: row_group[0]):
        folder, name = path.rsplit("/", 1)
        with open_folder(folder).open(name) as opened, pq.ParquetFile(opened) as file:
            texts = file.read_row_groups([number for _, number in row_groups], columns=["question", "answer"])
        lengths.append(pc.add(*(pc.binary_length(texts[column]) for column in texts.column_names)).to_numpy())
    return np.concatenate(lengths)


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
