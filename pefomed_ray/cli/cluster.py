"""Being on a Ray cluster: the one named by RAY_ADDRESS, else one of our own on this machine."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pefomed_ray.cli.environment import own_cluster

MIN_LOGICAL_CPUS = 2
"""Training and Ray Data need a CPU each to get anywhere; on one real CPU they share it."""


@contextmanager
def cluster() -> Iterator[None]:
    """Ray, connected; a cluster that was started here ends with the block, and its log folder with it."""
    if not own_cluster():
        ray.init(log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A socket's path may have 107 characters, so the folder is short and not below the user's.
    folder = tempfile.mkdtemp(prefix="pfr-", dir="/tmp")
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, MIN_LOGICAL_CPUS),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
