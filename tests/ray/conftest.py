"""A local Ray of this tier's own, started once and ended with the tests; never anybody else's."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def local_ray(s3_server: str) -> Iterator[Path]:
    """Ray with two logical CPUs; its files lie in a folder of their own under /tmp (sockets allow 107 characters).

    Its workers inherit the variables that lead to the S3 server.
    """
    import ray

    folder = tempfile.mkdtemp(prefix="pfr-", dir="/tmp")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder, logging_level="error")
    yield Path(folder)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 training rows: the last batch of eight is a short one."""
    from pefomed_ray.data.phantom import write_slake
    from pefomed_ray.data.shards import prepare

    folder = tmp_path_factory.mktemp("phantom")
    write_slake(folder / "corpus", images=13, questions_per_image=3, seed=5, splits=(9, 2, 2))
    prepare(folder / "corpus", folder / "shards")
    return folder / "shards"
