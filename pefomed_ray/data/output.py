"""Where shards are made until they are published, on disk or on S3: whole or not at all, and resumable until then.

On disk the work is a hidden sibling, `.NAME.unfinished`, that one rename turns into the output folder. S3 has no
rename: shards lie in their final place from the start, and nobody takes them for anything before `manifest.json` is
there, which is created last and only if nobody else created one (If-None-Match).
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pefomed_ray.artifacts.folders import Folder, LocalFolder, S3Folder
from pefomed_ray.artifacts.storage import check_output_is_free
from pefomed_ray.data.shard_file import UNFINISHED
from pefomed_ray.errors import ConfigError, PefomedError

MANIFEST = "manifest.json"
RUN = f"{UNFINISHED}/run"
"""Holds the digest of the inputs that the unfinished work is of."""
LOCK = ".lock"


class Output(ABC):
    """An output folder that is not published yet."""

    work: Folder
    """Where tasks write."""

    @abstractmethod
    def publish(self, documents: Mapping[str, bytes], shards: Mapping[str, int], manifest: bytes) -> None:
        """Make the output appear: `shards` (name -> bytes) that lie in `work`, some documents, and the manifest."""

    @abstractmethod
    def discard(self) -> None:
        """Remove the unfinished work."""

    def check_shards(self, shards: Mapping[str, int]) -> None:
        """Raise PefomedError where a shard (name -> bytes) is not there whole."""
        names = list(shards)
        for name, entry in zip(names, self.work.entries(names), strict=True):
            if entry is None or entry.size != shards[name]:
                raise PefomedError(
                    f"{self.work.url_of(name)!r} was written and is not there whole any more; something else writes to "
                    "this folder. Prepare into another one"
                )


def check_is_free(target: Folder) -> None:
    """Raise ConfigError where `target` holds anything but work that can be gone on with."""
    if isinstance(target, LocalFolder):
        check_output_is_free(target.path)
    elif target.exists() and not target.is_file(RUN):
        raise ConfigError(f"output {str(target)!r} already exists and is not empty; name another one or remove it")


@contextmanager
def unfinished(target: Folder, inputs: str) -> Iterator[Output]:
    """The work for `target` from inputs with this digest; what an earlier run of the same inputs did is kept.

    Raises ConfigError where `target` is taken, or is being made by another process, or (on S3, where nobody can tell
    whether that one still runs) was begun from other inputs.
    """
    check_is_free(target)
    if isinstance(target, LocalFolder):
        with _locked(target) as lock:
            yield _LocalOutput(target, inputs, lock)
    elif isinstance(target, S3Folder):
        yield _S3Output(target, inputs)


@contextmanager
def _locked(target: LocalFolder) -> Iterator[FileLock]:
    work = work_folder(target.path)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"output {str(target)!r} is being made by another process; wait for it, or end it") from None
    try:
        yield lock
    finally:
        lock.release()


def work_folder(target: Path) -> Path:
    """Where the work for a local output lies."""
    return target.with_name(f".{target.name}.unfinished")


class _LocalOutput(Output):
    def __init__(self, target: LocalFolder, inputs: str, lock: FileLock) -> None:
        self.target = target.path
        self.lock = lock
        self.work: LocalFolder = LocalFolder(work_folder(target.path))
        if not (self.work.is_file(RUN) and self.work.read_bytes(RUN) == inputs.encode()):
            self._clear()
            self.work.write_bytes(RUN, inputs.encode())

    def publish(self, documents: Mapping[str, bytes], shards: Mapping[str, int], manifest: bytes) -> None:
        self.check_shards(shards)
        for name, data in documents.items():
            self.work.write_bytes(name, data)
        wanted = {*documents, *shards, LOCK}
        self.work.remove([name for name in self.work.files() if name not in wanted and not name.startswith(UNFINISHED)])
        self.work.write_bytes(MANIFEST, manifest)
        shutil.rmtree(self.work.path / UNFINISHED)
        (self.work.path / LOCK).unlink()
        os.replace(self.work.path, self.target)

    def discard(self) -> None:
        shutil.rmtree(self.work.path, ignore_errors=True)

    def _clear(self) -> None:
        for path in self.work.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


class _S3Output(Output):
    def __init__(self, target: S3Folder, inputs: str) -> None:
        self.work: S3Folder = target
        try:
            target.create(RUN, inputs.encode())
        except FileExistsError:
            if target.read_bytes(RUN) != inputs.encode():
                raise ConfigError(
                    f"output {str(target)!r} holds unfinished work of other inputs; remove it, or name another output"
                ) from None

    def publish(self, documents: Mapping[str, bytes], shards: Mapping[str, int], manifest: bytes) -> None:
        self.check_shards(shards)
        for name, data in documents.items():
            self.work.write_bytes(name, data)
        try:
            self.work.create(MANIFEST, manifest)
        except FileExistsError:
            raise ConfigError(f"output {str(self.work)!r} was published by another run meanwhile") from None
        finally:
            self.work.remove(self.work.files(UNFINISHED))

    def discard(self) -> None:
        self.work.remove(self.work.files())
