"""One process at a time runs a search: it holds a lock in the output folder that ends with it, however it ends."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pefomed_ray.errors import ConfigError

LOCK_FILE = "search.lock"
"""Says who holds it: the lock is the system's (`flock`), so that a killed process leaves none behind."""


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of the search in `output`, a folder that exists. Raises ConfigError where another process does."""
    lock = FileLock(output / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"the search in {str(output)!r} is already running as {_owner(output)}; wait for it, or end that process "
            "and go on with --resume"
        ) from None
    try:
        (output / LOCK_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def check_not_running(output: Path) -> None:
    """Raise ConfigError where another process runs the search in `output`."""
    if (output / LOCK_FILE).is_file():
        with locked(output):
            pass


def _owner(output: Path) -> str:
    return (output / LOCK_FILE).read_text(encoding="utf-8") or "another process"
