"""One shard: which rows it holds, and how they become one Parquet file. Nothing here knows Ray."""

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pefomed_ray.artifacts.manifests import ShardFile
from pefomed_ray.artifacts.records import RECORD_SCHEMA, SPLITS, Reference, Split
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.data.intake import Quarantined, RecordMaker, Tally, image_order, quarantine
from pefomed_ray.data.reasons import RowError

SHARD_ROWS = 1024
"""A shard is cut here too, so that a corpus of many questions about few images still feeds several workers."""
ROW_GROUP_ROWS = 64
"""Training reads row groups in random order: small ones, so that what it reads is what it uses."""
ROW_GROUP_BYTES = 16 << 20
"""Of image bytes, repeated ones counted each time: what a reader of one row group holds in memory."""


@dataclass(frozen=True)
class ShardSpec:
    """What one task is to write."""

    split: Split
    index: int
    rows: list[tuple[int, Reference]]

    @property
    def path(self) -> str:
        """Relative to the output folder."""
        return f"{self.split}/part-{self.index:05d}.parquet"

    def to_json(self) -> str:
        """As text, because rows may hold characters that an Arrow string cannot."""
        return json.dumps([self.split, self.index, [(position, vars(reference)) for position, reference in self.rows]])

    @classmethod
    def from_json(cls, text: str) -> "ShardSpec":
        """The reverse of `to_json`."""
        split, index, rows = json.loads(text)
        references = [(at, Reference(**(row | {"image_paths": tuple(row["image_paths"])}))) for at, row in rows]
        return cls(split, index, references)


@dataclass
class ShardResult:
    """What one task wrote; `file` is None where no row was usable."""

    file: ShardFile | None
    tally: Tally
    quarantined: list[Quarantined]

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


def plan_shards(rows: list[tuple[int, Reference]], root: Path, seed: int, shard_bytes: int) -> list[ShardSpec]:
    """Cut every split, in `image_order`, into shards of at most `shard_bytes` of images and about 1024 rows."""
    specs = []
    for split in SPLITS:
        shard: list[tuple[int, Reference]] = []
        size = index = 0
        for group in image_order([row for row in rows if row[1].split == split], seed):
            group_size = sum(file_size(root, path) for path in group[0][1].image_paths)
            if shard and (size + group_size > shard_bytes or len(shard) + len(group) > SHARD_ROWS):
                specs.append(ShardSpec(split, index, shard))
                shard, size, index = [], 0, index + 1
            shard.extend(group)
            size += group_size
        if shard:
            specs.append(ShardSpec(split, index, shard))
    return specs


def write_shard(spec: ShardSpec, root: Path, output: Path, source: str) -> ShardResult:
    """Check the rows of one shard and write the good ones to `output / spec.path`, whole or not at all."""
    result = ShardResult(None, Tally(), [])
    path = output / spec.path
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Images repeat from row to row; a dictionary as large as the row group stores each once. No column statistics:
        # they would copy texts into the file's footer.
        with pq.ParquetWriter(
            temporary,
            RECORD_SCHEMA,
            compression="zstd",
            dictionary_pagesize_limit=2 * ROW_GROUP_BYTES,
            write_statistics=False,
        ) as writer:
            for group in _row_groups(_good_records(spec, RecordMaker(root, source), result)):
                writer.write_table(pa.Table.from_pylist(group, schema=RECORD_SCHEMA))
        rows = result.tally.rows[spec.split]
        if rows:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            digest, size = sha256_file(temporary), temporary.stat().st_size
            os.replace(temporary, path)
            result.file = ShardFile(path=spec.path, split=spec.split, rows=rows, bytes=size, sha256=digest)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def file_size(root: Path, path: str) -> int:
    """Bytes of an image file; 0 where there is none: the task that reads it says so."""
    try:
        return os.path.getsize(root / path)
    except (OSError, ValueError):  # missing, or no path at all
        return 0


def _good_records(spec: ShardSpec, maker: RecordMaker, result: ShardResult) -> Iterator[dict[str, Any]]:
    for position, reference in spec.rows:
        try:
            record = maker.make(reference)
        except RowError as error:
            result.quarantined.append(quarantine(position, reference, error.reason))
            continue
        result.tally.add(record)
        yield record


def _row_groups(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
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
