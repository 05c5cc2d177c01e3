"""One shard: which rows it holds, and how they become one Parquet file. Nothing here knows Ray.

A shard that is finished leaves a result beside it, `.unfinished/<split>-<number>.json`, with the digest of what it was
made from. Whoever is to write the same shard again, after a crash or in a second run, finds it and writes nothing.
"""

import errno
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pefomed_ray import __version__
from pefomed_ray.artifacts.folders import Entry, Folder, LocalFolder
from pefomed_ray.artifacts.manifests import ShardFile
from pefomed_ray.artifacts.records import RECORD_SCHEMA, SPLITS, Reference, Split
from pefomed_ray.artifacts.storage import digest_of, sha256_bytes, sha256_file
from pefomed_ray.data.images import split_path
from pefomed_ray.data.inline import inline_file
from pefomed_ray.data.intake import Quarantined, RecordMaker, Tally, image_order, images_ahead, quarantine
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DiskFullError

UNFINISHED = ".unfinished"
"""Folder of results beside the shards; gone once the manifest is there."""
SHARD_ROWS = 1024
"""A shard is cut here too, so that a corpus of many questions about few images still feeds several workers."""
ROW_GROUP_ROWS = 64
"""Training reads row groups in random order: small ones, so that what it reads is what it uses."""
ROW_GROUP_BYTES = 16 << 20
"""Of image bytes, repeated ones counted each time: what a reader of one row group holds in memory."""

IMAGE_BYTES = "images.list.element.bytes"
OTHER_COLUMNS = (
    "images.list.element.path",
    "image_sha256.list.element",
    *(field.name for field in RECORD_SCHEMA if field.name not in ("images", "image_sha256")),
)
COMPRESSION = {IMAGE_BYTES: "none"} | dict.fromkeys(OTHER_COLUMNS, "zstd")
"""By column: JPEG and PNG are compressed already, trying again costs as much CPU as checking them."""


@dataclass(frozen=True)
class ShardSpec:
    """What one task is to write."""

    split: Split
    index: int
    rows: list[tuple[int, Reference]]
    entries: dict[str, Entry | None]
    """The image files that the rows name, as they were listed."""

    @property
    def path(self) -> str:
        """Relative to the output folder."""
        return f"{self.split}/part-{self.index:05d}.parquet"

    @property
    def result_path(self) -> str:
        """Relative to the output folder."""
        return f"{UNFINISHED}/{self.split}-{self.index:05d}.json"

    def to_json(self) -> str:
        """As text, because rows may hold characters that an Arrow string cannot."""
        rows = [(position, vars(reference)) for position, reference in self.rows]
        entries = {name: entry and [entry.size, entry.version] for name, entry in self.entries.items()}
        return json.dumps([self.split, self.index, rows, entries])

    @classmethod
    def from_json(cls, text: str) -> "ShardSpec":
        """The reverse of `to_json`."""
        split, index, rows, entries = json.loads(text)
        references = [(at, Reference(**(row | {"image_paths": tuple(row["image_paths"])}))) for at, row in rows]
        return cls(split, index, references, {name: entry and Entry(*entry) for name, entry in entries.items()})


@dataclass
class ShardResult:
    """What one task wrote; `file` is None where no row was usable."""

    file: ShardFile | None
    tally: Tally
    quarantined: list[Quarantined]

    @property
    def rows_in(self) -> int:
        """Rows that were looked at, good and bad."""
        return self.tally.rows.total() + len(self.quarantined)

    def to_json(self) -> str:
        """As text, small: what goes back to the driver."""
        tally = self.tally
        return json.dumps(
            {
                "file": self.file.model_dump() if self.file else None,
                "rows": tally.rows,
                "tasks": tally.tasks,
                "answer_types": tally.answer_types,
                "images": {split: sorted(images) for split, images in tally.images.items()},
                "quarantined": [asdict(row) for row in self.quarantined],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "ShardResult":
        """The reverse of `to_json`."""
        found = json.loads(text)
        images = {split: set(digests) for split, digests in found["images"].items()}
        tally = Tally(Counter(found["rows"]), Counter(found["tasks"]), Counter(found["answer_types"]), images)
        file = ShardFile(**found["file"]) if found["file"] else None
        return cls(file, tally, [Quarantined(**row) for row in found["quarantined"]])


def plan_shards(rows: list[tuple[int, Reference]], root: Folder, seed: int, shard_bytes: int) -> list[ShardSpec]:
    """Cut every split, in `image_order`, into shards of at most `shard_bytes` of images and about 1024 rows."""
    names = sorted({split_path(path)[0] for _, row in rows for path in row.image_paths})
    entries = dict(zip(names, root.entries(names), strict=True))
    specs = []
    for split in SPLITS:
        shard: list[tuple[int, Reference]] = []
        size = 0
        index = 0
        for group in image_order([row for row in rows if row[1].split == split], seed):
            group_size = sum(_image_bytes(path, entries) for path in group[0][1].image_paths)
            if shard and (size + group_size > shard_bytes or len(shard) + len(group) > SHARD_ROWS):
                specs.append(_spec(split, index, shard, entries))
                shard, size, index = [], 0, index + 1
            shard.extend(group)
            size += group_size
        if shard:
            specs.append(_spec(split, index, shard, entries))
    return specs


def inputs_digest(spec_json: str, source: str, options: DataOptions) -> str:
    """Of everything that the bytes of a shard follow from."""
    return digest_of([spec_json, source, asdict(options), __version__])


def write_shard(spec_json: str, root: Folder, output: Folder, source: str, options: DataOptions) -> ShardResult:
    """Check the rows of one shard and write the good ones to `output / spec.path`, whole or not at all.

    `spec_json` is a ShardSpec as text. Raises DiskFullError where the disk is full, with the path and the bytes needed.
    """
    spec = ShardSpec.from_json(spec_json)
    digest = inputs_digest(spec_json, source, options)
    if (found := _finished(spec, output, digest)) is not None:
        return found
    root.remember(spec.entries)
    result = ShardResult(None, Tally(), [])
    with _scratch(output) as scratch, _full_disk_named(output, spec):
        file = scratch / "shard.parquet"
        with images_ahead(root, (row for _, row in spec.rows), options) as image:
            write_parquet(file, _good_records(spec, RecordMaker(image, source), result))
        rows = result.tally.rows[spec.split]
        if rows:
            size, sha256 = file.stat().st_size, sha256_file(file)
            output.put(file, spec.path)
            result.file = ShardFile(path=spec.path, split=spec.split, rows=rows, bytes=size, sha256=sha256)
        output.write_bytes(spec.result_path, json.dumps({"digest": digest, "result": result.to_json()}).encode())
    return result


def _spec(split: Split, index: int, rows: list[tuple[int, Reference]], entries: dict[str, Entry | None]) -> ShardSpec:
    names = {split_path(path)[0] for _, row in rows for path in row.image_paths}
    return ShardSpec(split, index, rows, {name: entries[name] for name in sorted(names)})


def _image_bytes(path: str, entries: dict[str, Entry | None]) -> int:
    """Of a file; 0 of a row inside a larger one, whose size nobody knows yet, and of one that is missing."""
    if (inline := inline_file(path)) is not None:
        return inline[1]
    name, number = split_path(path)
    entry = entries[name]
    return entry.size if entry and number is None else 0


def _finished(spec: ShardSpec, output: Folder, digest: str) -> ShardResult | None:
    """The result of an earlier run, if it is of the same inputs and its file is whole."""
    try:
        found = json.loads(output.read_bytes(spec.result_path))
        if found["digest"] != digest:
            return None
        result = ShardResult.from_json(found["result"])
        if result.file and sha256_bytes(output.read_bytes(spec.path)) != result.file.sha256:
            return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return result


@contextmanager
def _scratch(output: Folder) -> Iterator[Path]:
    """A folder for a file that is not whole yet: on the output's own disk, from where it can be moved in one step."""
    parent = output.path / UNFINISHED if isinstance(output, LocalFolder) else None
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="shard-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _full_disk_named(output: Folder, spec: ShardSpec) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = sum(entry.size for entry in spec.entries.values() if entry)
        raise DiskFullError(
            f"no space left for {output.url_of(spec.path)!r}: its images alone take {needed:,} bytes; free some space "
            "and run the same command again"
        ) from None


def write_parquet(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as a shard's file; the same records give the same bytes."""
    # Images repeat from row to row; a dictionary as large as the row group stores each once. No column statistics:
    # they would copy texts into the file's footer.
    with pq.ParquetWriter(
        file,
        RECORD_SCHEMA,
        compression=COMPRESSION,
        dictionary_pagesize_limit=2 * ROW_GROUP_BYTES,
        write_statistics=False,
    ) as writer:
        for group in _row_groups(records):
            writer.write_table(pa.Table.from_pylist(group, schema=RECORD_SCHEMA))


def _good_records(spec: ShardSpec, maker: RecordMaker, result: ShardResult) -> Iterator[dict[str, Any]]:
    for position, reference in spec.rows:
        try:
            record = maker.make(reference)
        except RowError as error:
            result.quarantined.append(quarantine(position, reference, error.reason))
            continue
        result.tally.add(record)
        yield record


def _row_groups(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        record_size = sum(len(image["bytes"]) for image in record["images"])
        if group and (len(group) == ROW_GROUP_ROWS or size + record_size > ROW_GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(record)
        size += record_size
    if group:
        yield group
