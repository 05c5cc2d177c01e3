"""Small shards written without Ray."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.artifacts.records import RECORD_SCHEMA
from pefomed_ray.artifacts.storage import sha256_bytes, sha256_file

COLOURS = ("red", "green", "blue", "white")


def record(number: int, split: str, task: str) -> dict[str, Any]:
    """Question `number` about one of four pictures of different colour and size; the answer is its colour."""
    colour = COLOURS[number % 4]
    file = io.BytesIO()
    Image.new("RGB", (10 + number % 4, 8), colour).save(file, format="PNG")
    data = file.getvalue()
    return {
        "id": f"{split}-{number}",
        "source": "colours",
        "split": split,
        "task": task,
        "images": [{"bytes": data, "path": f"{colour}.png"}],
        "image_sha256": [sha256_bytes(data)],
        "question": "Which colour is it?" if number % 2 else "What is <b>seen</b>?",
        "answer": colour,
        "answer_type": "open",
        "question_type": "Colour" if number % 2 else None,
        "group": colour,
        "meta": "{}",
    }


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """A function (licence, rows by split, task) -> folder with shards, two files a split, row groups of two rows."""

    def make(licence: str = "open", rows: dict[str, int] | None = None, task: str = "vqa") -> Path:
        folder = tmp_path / "shards"
        files = []
        rows = {"train": 6, "test": 7} if rows is None else rows
        for split, count in rows.items():
            records = [record(number, split, task) for number in range(count)]
            for part, some in enumerate((records[:4], records[4:])):
                path = folder / split / f"part-{part}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(some, RECORD_SCHEMA), path, row_group_size=2)
                name = path.relative_to(folder).as_posix()
                size, digest = path.stat().st_size, sha256_file(path)
                files.append(ShardFile(path=name, split=split, rows=len(some), bytes=size, sha256=digest))
        manifest = ShardManifest(
            source="colours",
            licence=licence,  # type: ignore[arg-type]
            rows=rows,
            tasks={task: sum(rows.values())},
            answer_types={"open": sum(rows.values())},
            bytes={},
            quarantined={},
            image_overlap={"train/test": 4, "train/validation": 0},
            files=tuple(files),
            made_by={},
        )
        save_document(manifest, folder / "manifest.json")
        return folder

    return make
