"""A Ray of the benchmark's own on this machine, with a scratch folder; both are gone afterwards."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray


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
