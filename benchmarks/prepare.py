"""A corpus to shards: Ray Data on two CPUs, beside a plain loop in one process and Hugging Face `datasets`.

10,000 rows name a 512 px JPEG file each; 1,000 pictures are distinct, the other files are hard links to them. All arms
read each file, check it as `check_image` does, hash it and write Parquet with the bytes inside; the first two give the
same files byte for byte. Ray's workers and the pictures are there before the clock starts. The largest worker process
is sampled in runs of their own, with 10,000 and with 100,000 rows.
"""

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow.parquet as pq
import typer

from benchmarks._measure import JsonOption, QuickOption, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks._pictures import write_corpus
from benchmarks._ray import ray_workers, scratch_with_ray
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.storage import sha256_bytes, sha256_file
from pefomed_ray.data.images import check_image
from pefomed_ray.data.intake import RecordMaker, take_in, usable_image
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.shard_file import plan_shards, write_parquet
from pefomed_ray.data.shards import prepare

SIDE_PX = 512
WORKERS = 2
ROWS = 10_000
MANY_ROWS = 100_000
DISTINCT = 1_000
OPTIONS = DataOptions(validation_fraction=0)
SAMPLE_INTERVAL_S = 0.2


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    datasets.disable_progress_bars()
    rows, many_rows, distinct = (300, 900, 50) if quick else (ROWS, MANY_ROWS, DISTINCT)
    with scratch_with_ray(WORKERS) as folder:
        corpus, output = folder / "corpus", folder / "output"
        write_corpus(corpus, rows, SIDE_PX, distinct)
        in_one_process(corpus, output)
        expected = digests(output)
        images = Counter(sha256_file(path) for path in corpus.glob("*.jpg"))
        shutil.rmtree(output)
        with_ray(corpus, output)  # Ray starts its workers
        shutil.rmtree(output)

        def check(arm: str, _: None) -> None:
            if arm == "datasets_map":
                table = pq.read_table(output / "train.parquet", columns=["image_sha256"])
                right = Counter(table.column("image_sha256").to_pylist()) == images
            else:
                right = digests(output) == expected
            if not right:
                raise AssertionError(f"{arm}: other rows than one process wrote")
            shutil.rmtree(output)

        arms: dict[str, Callable[[Path, Path], None]] = {
            "ours": with_ray,
            "one_process": in_one_process,
            "datasets_map": with_datasets,
        }
        timed_arms = {name: partial(timed, partial(arm, corpus, output)) for name, arm in arms.items()}
        rounds = run_rounds(timed_arms, check, rounds=1 if quick else 3)
        peaks = {rows: peak_rss_mib(corpus, output)}
        write_corpus(folder / "many", many_rows, SIDE_PX, distinct)
        peaks[many_rows] = peak_rss_mib(folder / "many", output)
    finish(
        "prepare",
        {
            "vs_one_process": ratio(rounds, "one_process", "wall_s"),
            "vs_datasets_map": ratio(rounds, "datasets_map", "wall_s"),
        },
        {"wall": a_a(rounds, "wall_s"), "cpu": a_a(rounds, "cpu_s")},
        {
            "rows": rows,
            "distinct_pictures": distinct,
            "rows_per_s": {arm: round(rows / took["wall_s"], 1) for arm, took in per_arm(rounds).items()},
            "seconds": per_arm(rounds),
            "peak_rss_mib": {str(count): round(peak, 1) for count, peak in peaks.items()},
        },
        as_json=json_,
        quick=quick,
    )


def with_ray(corpus: Path, output: Path) -> None:
    """What `pefomed-ray data prepare` does."""
    prepare(corpus, output, OPTIONS)


def in_one_process(corpus: Path, output: Path) -> None:
    """The same shards by a plain loop in one thread: read, check, hash, write. No manifest."""
    root = open_folder(corpus)
    intake = take_in(root, OPTIONS)
    maker = RecordMaker(lru_cache(maxsize=8)(partial(usable_image, root=root, options=OPTIONS)), intake.source)
    for spec in plan_shards(intake.references, root, OPTIONS.seed, OPTIONS.shard_bytes):
        path = output / spec.path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, (maker.make(row) for _, row in spec.rows))
        sha256_file(path)


def with_datasets(corpus: Path, output: Path) -> None:
    """`datasets` with as many processes as Ray has CPUs; one Parquet file."""
    rows = datasets.load_dataset(
        "json", data_files=str(corpus / "train.jsonl"), split="train", cache_dir=str(output / "cache")
    )
    rows = rows.map(partial(_row, corpus), num_proc=WORKERS)
    rows.to_parquet(str(output / "train.parquet"))


def _row(corpus: Path, row: dict[str, Any]) -> dict[str, Any]:
    data = (corpus / row["image"]).read_bytes()
    check_image(data)
    return {"bytes": data, "image_sha256": sha256_bytes(data)}


def digests(output: Path) -> dict[str, str]:
    """sha256 by name of the shards; of those with a manifest, that it says the same is checked."""
    found = {path.relative_to(output).as_posix(): sha256_file(path) for path in output.rglob("part-*.parquet")}
    if (output / "manifest.json").is_file():
        assert {file.path: file.sha256 for file in load_shard_manifest(open_folder(output)).files} == found
    return found


def peak_rss_mib(corpus: Path, output: Path) -> float:
    """Of the largest Ray worker process during one `prepare`; memory it shares with others counts in full."""
    with sampling(ray_workers) as peak:
        with_ray(corpus, output)
    shutil.rmtree(output)
    return peak[0] / 2**20


@contextmanager
def sampling(processes: Callable[[], list[psutil.Process]]) -> Iterator[list[int]]:
    """Yield a list whose only entry is the largest resident size in bytes that any of the processes has had so far."""
    peak = [0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_INTERVAL_S):
            for process in processes():
                try:
                    peak[0] = max(peak[0], process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    typer.run(main)
