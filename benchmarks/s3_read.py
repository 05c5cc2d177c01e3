"""Shards on S3 beside shards on local disk: reading rows in training order, and preparing a corpus.

The S3 is moto's server on loopback, in a process of its own: no network, but every request, signature and copy is
there, and the server's own CPU time is spent on the same cores. The ratios are rates on S3 over rates on disk, so 1
means that S3 costs nothing. `bare_gets_per_s` is what this server gives to a client that only fetches the pictures: no
way of preparing can be faster.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import s3fs
import typer

from benchmarks._measure import JsonOption, QuickOption, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks._pictures import write_corpus
from benchmarks._ray import scratch_with_ray
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.data import plan
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.plan import epoch_order, open_index, read_rows
from pefomed_ray.data.shards import prepare

SIDE_PX = 512
ROWS = 2_000
DISTINCT = 500
WORKERS = 2
OPTIONS = DataOptions(validation_fraction=0, shard_bytes=8 << 20)
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
BUCKET = "benchmark"


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    rows = 200 if quick else ROWS
    with s3_server(), scratch_with_ray(WORKERS) as folder:  # the server first: Ray's workers inherit its address
        disk, s3 = folder / "corpus", f"s3://{BUCKET}/corpus"
        write_corpus(disk, rows, SIDE_PX, min(DISTINCT, rows))
        upload(disk, s3)
        prepared = {"disk": prepare_to(disk, str(folder / "shards")), "s3": prepare_to(s3, f"s3://{BUCKET}/shards")}
        assert prepared["disk"] == prepared["s3"]
        expected = read_epoch(str(folder / "shards"))

        def check_read(arm: str, found: list[str]) -> None:
            if found != expected or len(found) != rows:
                raise AssertionError(f"{arm}: other rows, or another order, than on disk")

        def check_prepared(arm: str, found: dict[str, str]) -> None:
            if found != prepared["disk"]:
                raise AssertionError(f"{arm}: other shards than on disk")
            shutil.rmtree(folder / "again", ignore_errors=True)
            remove(f"s3://{BUCKET}/again")

        count = 2 if quick else 5
        reading = {
            "ours": partial(timed, lambda: read_epoch(f"s3://{BUCKET}/shards")),
            "disk": partial(timed, lambda: read_epoch(str(folder / "shards"))),
        }
        read_rounds = run_rounds(reading, check_read, rounds=count)
        preparing: dict[str, Callable[[], dict[str, str]]] = {
            "ours": lambda: prepare_to(s3, f"s3://{BUCKET}/again"),
            "disk": lambda: prepare_to(disk, str(folder / "again")),
        }
        prepare_rounds = run_rounds(
            {name: partial(timed, arm) for name, arm in preparing.items()}, check_prepared, rounds=1 if quick else 3
        )
        store = s3fs.S3FileSystem()
        pictures = store.glob(f"{BUCKET}/corpus/*.jpg")
        _, bare = timed(lambda: store.cat(pictures))
    finish(
        "s3_read",
        {
            "read_vs_local_disk": ratio(read_rounds, "disk", "wall_s"),
            "prepare_vs_local_disk": ratio(prepare_rounds, "disk", "wall_s"),
        },
        {"read": a_a(read_rounds, "wall_s"), "prepare": a_a(prepare_rounds, "wall_s")},
        {
            "rows": rows,
            "read_rows_per_s": {arm: round(rows / took["wall_s"], 1) for arm, took in per_arm(read_rounds).items()},
            "prepare_rows_per_s": {
                arm: round(rows / took["wall_s"], 1) for arm, took in per_arm(prepare_rounds).items()
            },
            "bare_gets_per_s": round(rows / bare.wall_s, 1),
        },
        as_json=json_,
        quick=quick,
    )


def read_epoch(shards: str) -> list[str]:
    """Image digests of all rows, in the order of a first epoch. No row group is left over from an earlier call."""
    plan._row_group.cache_clear()
    index = open_index(shards, "train")
    order = epoch_order(index.sizes, seed=0, epoch=0)
    digests = []
    for first in range(0, len(order), 64):
        for record in read_rows(index, order[first : first + 64]):
            assert record["images"][0]["bytes"]
            digests += record["image_sha256"]
    return digests


def prepare_to(corpus: Path | str, output: str) -> dict[str, str]:
    """Prepare; sha256 of the shards by name."""
    prepare(corpus, output, OPTIONS)
    return {file.path: file.sha256 for file in load_shard_manifest(open_folder(output)).files}


@contextmanager
def s3_server() -> Iterator[None]:
    """A server with an empty bucket; the AWS variables of this process point at it."""
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, stderr=quiet) as server:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield
        finally:
            server.kill()


def upload(folder: Path, url: str) -> None:
    """All files of a flat folder."""
    target = open_folder(url)
    for path in sorted(folder.iterdir()):
        target.write_bytes(path.name, path.read_bytes())


def remove(url: str) -> None:
    """Everything below, if there is anything."""
    folder = open_folder(url)
    folder.remove(folder.files())


if __name__ == "__main__":
    typer.run(main)
