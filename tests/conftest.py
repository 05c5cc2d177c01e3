"""Where the reference files lie; a test that needs one is skipped where there are none."""

import os
from pathlib import Path

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
