"""Shards to batches through Ray Data, beside a torch DataLoader over the same files.

Both arms have two worker processes that decode, resize to 448 px and tokenise with our renderer, and hand batches of
uint8 pixels to this process, which normalises them. A third arm is the DataLoader with Pillow and numpy in its workers.
Throughput is taken while the stream runs, since starting actors is slower than forking; the time to the first batch is
reported beside it. `fraction_of_decode_limit` is throughput over what the cores could decode if
they did nothing else, measured in the same run.
"""

import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks._measure import (
    JsonOption,
    QuickOption,
    Sample,
    a_a,
    cpu_seconds,
    finish,
    per_arm,
    ratio,
    run_rounds,
    spread,
    timed,
)
from benchmarks._pictures import write_corpus
from benchmarks._ray import ray_workers, scratch_with_ray
from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.plan import open_index
from pefomed_ray.data.shards import prepare
from pefomed_ray.rendering.batches import IGNORED_LABEL, Batch, Rendered, training_batch
from pefomed_ray.rendering.images import ImageSpec, normalise
from pefomed_ray.rendering.renderer import IMAGE_SPEC_FILE, Renderer
from pefomed_ray.training.feed import RenderSettings, execution_options, micro_batches, training_dataset
from pefomed_ray.training.order import BLOCK_ROWS, TrainingOrder

SOURCE_PX = 1024
SIZE_PX = 448
WORKERS = 2
BATCH_ROWS = 8
MAX_ANSWER_TOKENS = 32
EDGE_ROWS = WORKERS * BLOCK_ROWS
"""Left out of the throughput at the beginning and at the end. Our workers deliver blocks, all of them at about the same
time: a stretch of whole blocks begins and ends at the same point of that beat."""


@dataclass(frozen=True)
class Pass:
    """One pass over all pictures."""

    first_batch_s: float
    rows: Counter[int]
    """Of each row's tokens and some of its pixels: no row may be lost, repeated or changed."""


@dataclass(frozen=True)
class Corpus:
    """The same examples as files and as shards."""

    folder: Path
    examples: list[tuple[str, str, str]]
    """Picture, question, answer."""
    settings: RenderSettings
    shards: Path


class Files(Dataset[Rendered]):
    """The corpus as anybody's map-style dataset."""

    def __init__(self, corpus: Corpus, decode: Callable[[bytes, Renderer], Tensor]) -> None:
        self.corpus = corpus
        self.renderer = corpus.settings.open()
        self.decode = decode

    def __len__(self) -> int:
        return len(self.corpus.examples)

    def __getitem__(self, row: int) -> Rendered:
        picture, question, answer = self.corpus.examples[row]
        images = {"pixel_values": self.decode((self.corpus.folder / picture).read_bytes(), self.renderer)}
        return self.renderer.render("vqa", question, images, answer, MAX_ANSWER_TOKENS)


def our_decode(data: bytes, renderer: Renderer) -> Tensor:
    """uint8 [1, 3, H, W]."""
    return renderer.pixels([data])


def pillow_decode(data: bytes, renderer: Renderer) -> Tensor:
    """The same by Pillow alone."""
    size = (renderer.image_spec.size_px, renderer.image_spec.size_px)
    image = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    with scratch_with_ray(WORKERS) as folder:
        corpus = make_corpus(folder, pictures=(3 if quick else 8) * EDGE_ROWS)
        measure(corpus, rounds=1 if quick else 3, as_json=json_, quick=quick)


def measure(corpus: Corpus, rounds: int, *, as_json: bool, quick: bool) -> None:
    """All arms, and the limit."""
    expected = one_pass(lambda: loader(corpus, our_decode, workers=0), corpus)[0].rows
    first_batches: dict[str, list[float]] = {}

    def check(arm: str, result: Pass) -> None:
        first_batches.setdefault(arm, []).append(result.first_batch_s)
        if result.rows.total() != len(corpus.examples):
            raise AssertionError(f"{arm}: {result.rows.total()} rows of {len(corpus.examples)}")
        if arm != "dataloader_pil" and result.rows != expected:  # Pillow's pixels may be one level off
            raise AssertionError(f"{arm}: rows are lost, repeated or changed")

    arms = {
        "ours": partial(one_pass, lambda: ray_data(corpus), corpus),
        "dataloader": partial(one_pass, lambda: loader(corpus, our_decode, WORKERS), corpus),
        "dataloader_pil": partial(one_pass, lambda: loader(corpus, pillow_decode, WORKERS), corpus),
    }
    rounds_run = run_rounds(arms, check, rounds)
    limit = (os.cpu_count() or 1) * decode_rate(corpus)
    finish(
        "ingest",
        {
            "vs_dataloader": ratio(rounds_run, "dataloader", "wall_s"),
            "vs_dataloader_pil": ratio(rounds_run, "dataloader_pil", "wall_s"),
            "fraction_of_decode_limit": spread([1 / samples["ours"].wall_s / limit for samples in rounds_run]),
        },
        {"wall": a_a(rounds_run, "wall_s"), "cpu": a_a(rounds_run, "cpu_s")},
        {
            "pictures": len(corpus.examples),
            "images_per_s": {arm: round(1 / took["wall_s"], 1) for arm, took in per_arm(rounds_run).items()},
            "cpu_s_per_image": {arm: took["cpu_s"] for arm, took in per_arm(rounds_run).items()},
            "first_batch_s": {arm: round(median(times), 2) for arm, times in first_batches.items()},
            "decode_limit_images_per_s": round(limit, 1),
        },
        as_json=as_json,
        quick=quick,
    )


def one_pass(batches: Callable[[], Iterable[Batch]], corpus: Corpus) -> tuple[Pass, Sample]:
    """Take every batch and normalise it. The sample is of one image, while the stream runs."""
    wait_for_workers_to_end()
    spec = corpus.settings.open().image_spec
    started = time.perf_counter()
    first_batch_s, images, rows = 0.0, 0, Counter[int]()
    stamps: list[tuple[int, float, float]] = []
    marks = [EDGE_ROWS, len(corpus.examples) - EDGE_ROWS]
    for batch in batches():
        normalise(batch.tensors["pixel_values"], spec)
        first_batch_s = first_batch_s or time.perf_counter() - started
        images += len(batch.ids_BT)
        rows.update(row_digests(batch))
        if images in marks:
            stamps.append((images, time.perf_counter(), cpu_seconds()))
    begin, end = stamps
    measured = end[0] - begin[0]
    return Pass(first_batch_s, rows), Sample((end[1] - begin[1]) / measured, (end[2] - begin[2]) / measured)


def wait_for_workers_to_end() -> None:
    """Ray ends the actors of a stream some time after its last row; they would run beside the next arm."""
    deadline = time.monotonic() + 60
    while any("RenderBlocks" in process.name() for process in ray_workers()):
        if time.monotonic() > deadline:
            raise RuntimeError("the data workers of the arm before are still there after 60 s")
        time.sleep(0.1)


def row_digests(batch: Batch) -> list[int]:
    """One number for each row that counts: of its tokens, and of every 32nd pixel."""
    return [
        hash(
            (
                tuple(ids[mask.bool()].tolist()),
                tuple(labels[mask.bool()].tolist()),
                pixels[:, ::32, ::32].numpy().tobytes(),
            )
        )
        for ids, mask, labels, pixels in zip(
            batch.ids_BT, batch.mask_BT, batch.labels_BT, batch.tensors["pixel_values"], strict=True
        )
        if (labels != IGNORED_LABEL).any()
    ]


def ray_data(corpus: Corpus) -> Iterator[Batch]:
    """Our stream, as a run of one rank takes it."""
    config = build_config(
        TrainConfig,
        {
            "name": "ingest",
            "task": "vqa",
            "data": {"shards": str(corpus.shards)},
            "training": {"epochs": 1, "batch_size": BATCH_ROWS, "micro_batch_size": BATCH_ROWS},
        },
        "ingest",
    )
    order = TrainingOrder.of(open_index(corpus.shards, "train"), config)
    dataset = training_dataset(order, corpus.settings, data_workers=WORKERS)
    dataset.context.execution_options = execution_options()
    return micro_batches(dataset.iterator(), order, 1, corpus.settings.open(), features=None)


def loader(corpus: Corpus, decode: Callable[[bytes, Renderer], Tensor], workers: int) -> DataLoader[Batch]:
    """The same batches from files, in another order."""
    files = Files(corpus, decode)
    return DataLoader(
        files,
        batch_size=BATCH_ROWS,
        shuffle=True,
        num_workers=workers,
        collate_fn=partial(training_batch, pad_token_id=files.renderer.pad_token_id),
    )


def decode_rate(corpus: Corpus) -> float:
    """JPEGs a second that one core decodes, and does nothing else."""
    pictures = [(corpus.folder / name).read_bytes() for name, _, _ in corpus.examples[:96]]
    _, took = timed(lambda: [simplejpeg.decode_jpeg(data, "RGB") for data in pictures])
    return len(pictures) / took.cpu_s


def make_corpus(folder: Path, pictures: int) -> Corpus:
    """Distinct pictures with a question each, as files and as shards, and a base that wants them at SIZE_PX."""
    files, base = folder / "corpus", folder / "base"
    examples = write_corpus(files, pictures, SOURCE_PX)
    prepare(files, folder / "shards", DataOptions(validation_fraction=0))
    base.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(EMBEDDED_FOLDER / name, base)
    (base / IMAGE_SPEC_FILE).write_text(json.dumps(ImageSpec(SIZE_PX).to_json()))
    return Corpus(files, examples, RenderSettings(str(base), "short", MAX_ANSWER_TOKENS), folder / "shards")


if __name__ == "__main__":
    typer.run(main)
