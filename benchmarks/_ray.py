"""A Ray of the benchmark's own on this machine, with a scratch folder; both are gone afterwards."""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import ray

from benchmarks._measure import Sample

T = TypeVar("T")

LOOK_EVERY_S = 0.5


@contextmanager
def scratch_with_ray(num_cpus: int) -> Iterator[Path]:
    """Start Ray with so many logical CPUs; yield a folder for files. A socket's path is short, so the folder is."""
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder / "ray"),
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def ray_workers() -> list[psutil.Process]:
    """Ray's worker processes, idle ones and actors included."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def timed_with_workers(run: Callable[[], T]) -> tuple[T, Sample]:
    """As `timed`, with the CPU time of Ray's workers that end meanwhile: their parent keeps no account of them, so all
    processes are looked at twice a second. What one did since the last look is missed where it ends."""
    before, over = _cpu_by_process(), threading.Event()
    seen = dict(before)

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            seen.update(_cpu_by_process())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        began = time.perf_counter()
        value = run()
        wall_s = time.perf_counter() - began
    finally:
        over.set()
        looking.join()
    seen.update(_cpu_by_process())
    return value, Sample(wall_s, sum(spent - before.get(process, 0.0) for process, spent in seen.items()))


def _cpu_by_process() -> dict[tuple[int, float], float]:
    """CPU seconds of this process and all below it, by pid and start: a pid may be given out again."""
    found = {}
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            with process.oneshot():
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found
