"""Errors cross Ray's process boundaries with their message and exit code."""

import pickle

import pytest

from pefomed_ray.errors import ConfigError, DataError, DivergedError, PefomedError, RefusedError


@pytest.mark.parametrize(
    ("kind", "code"), [(PefomedError, 1), (ConfigError, 2), (DataError, 3), (DivergedError, 4), (RefusedError, 5)]
)
def test_errors_pickle_and_have_the_documented_exit_code(kind: type[PefomedError], code: int) -> None:
    error = pickle.loads(pickle.dumps(kind("what was seen")))
    assert type(error) is kind
    assert str(error) == "what was seen"
    assert error.exit_code == code
