"""Where the reference files lie, and an S3 server of the tests' own.

A test that needs a reference file is skipped where there are none.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from uuid import uuid4

import pytest

from pefomed_ray.cli.environment import set_defaults

# Ray reads its environment when it is first imported, which may be while tests are collected.
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("PEFOMED_API_KEY", None)
set_defaults()


def _directory_named_by(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(reason=f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Reference numbers of the published code."""
    return _directory_named_by("PEFOMED_PARITY")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real corpora in their original layouts."""
    return _directory_named_by("PEFOMED_DATA")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of a server that speaks S3's protocol on loopback; the AWS variables point at it until the tests end.

    Processes that tests start afterwards, Ray's among them, inherit the variables.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield os.environ["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> str:
    """A new bucket, as `s3://NAME`."""
    from pefomed_ray.artifacts.folders import s3 as file_system

    bucket = f"bucket-{uuid4().hex}"
    file_system().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: name of a Hugging Face family -> folder of a tiny random base of it, made once a session."""
    from tests.tiny_bases import make_base

    return cache(lambda family: make_base(family, tmp_path_factory.mktemp(family)))
