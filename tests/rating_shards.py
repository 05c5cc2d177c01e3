"""Shards of phantoms written without Ray, and predictions about them: what `rate` is given."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.artifacts.records import RECORD_SCHEMA, Task
from pefomed_ray.artifacts.storage import sha256_bytes, sha256_file
from pefomed_ray.data.phantom import draw, make_scene, questions, report, second_view
from pefomed_ray.evaluation.predictions import Prediction, write_predictions

SIZE_PX = 320


def write_shards(folder: Path, task: Task, rows: int) -> list[dict[str, Any]]:
    """A test split: reports on two views, or a question about one picture each. Answers the records."""
    records = [_record(number, task) for number in range(rows)]
    path = folder / "test" / "part-0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records, RECORD_SCHEMA), path, row_group_size=8)
    size, digest = path.stat().st_size, sha256_file(path)
    manifest = ShardManifest(
        source="phantoms",
        licence="open",
        rows={"test": rows},
        tasks={task: rows},
        answer_types={},
        bytes={},
        quarantined={},
        image_overlap={},
        files=(ShardFile(path="test/part-0.parquet", split="test", rows=rows, bytes=size, sha256=digest),),
        made_by={},
    )
    save_document(manifest, folder / "manifest.json")
    return records


def write_answers(path: Path, records: list[dict[str, Any]], shift: int = 0) -> Path:
    """Predictions: each row is answered with the reference `shift` rows further on."""
    rows = [
        Prediction(row["id"], row["question"], row["answer"], records[(number + shift) % len(records)]["answer"])
        for number, row in enumerate(records)
    ]
    write_predictions(path, rows, {})
    return path


def _record(number: int, task: Task) -> dict[str, Any]:
    generator = np.random.default_rng([7, number])
    scene = make_scene(generator)
    views = [scene, second_view(scene, generator)] if task == "report" else [scene]
    pictures = [_png(draw(view, SIZE_PX)) for view in views]
    asked = questions(scene, generator, "slake")[0]
    return {
        "id": f"row-{number}",
        "source": "phantoms",
        "split": "test",
        "task": task,
        "images": [{"bytes": data, "path": f"{number}-{view}.png"} for view, data in enumerate(pictures)],
        "image_sha256": [sha256_bytes(data) for data in pictures],
        "question": "" if task == "report" else asked.question,
        "answer": report(scene, generator) if task == "report" else asked.answer,
        "answer_type": None if task == "report" else asked.answer_type.lower(),
        "question_type": None,
        "group": str(number),
        "meta": "{}",
    }


def _png(pixels_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, format="PNG")
    return file.getvalue()
