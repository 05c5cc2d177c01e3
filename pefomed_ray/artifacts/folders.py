"""A folder on local disk or on S3, seen through names relative to it: `imgs/xmlab1/source.jpg`.

Credentials, region and endpoint of S3 come from the usual AWS variables and files (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, ...). Every request has a time-out; what is transient is tried
again by s3fs and botocore, what is not ends as an error that names the object.
"""

import io
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from pefomed_ray.artifacts.storage import local_path, write_bytes
from pefomed_ray.errors import ConfigError, PefomedError

SCHEME = "s3://"
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 20
ATTEMPTS = 3
"""Of botocore, for each of as many attempts of s3fs."""
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A file as its folder lists it."""

    size: int
    """Bytes."""
    version: str
    """Another one when the content was replaced: the modification time on disk, the ETag on S3."""


class Folder(ABC):
    """What both kinds of folder can do. Pickles small, so that a task on another node can open it again."""

    url: str
    """Absolute path or `s3://bucket/prefix`, without a slash at its end."""

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return open_folder, (self.url,)

    def url_of(self, name: str) -> str:
        """Path or URL of something in it."""
        return f"{self.url}/{name}"

    def matching(self, folder: str, pattern: str) -> list[str]:
        """Names of the files in `folder` (not below) that a shell pattern matches, sorted."""
        prefix = f"{folder}/" if folder else ""
        names = [name for name in self.names(folder) if not name.endswith("/") and fnmatch(name, pattern)]
        return [prefix + name for name in names]

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is such a folder; on S3: whether any object lies below."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """What lies in it, or in a folder of it, sorted; folders end with a slash. Nothing where there is none."""

    @abstractmethod
    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def is_dir(self, name: str) -> bool:
        """Whether there is a folder of this name."""

    @abstractmethod
    def entries(self, names: Sequence[str]) -> list[Entry | None]:
        """Size and version of files; None for one that is not there."""

    @abstractmethod
    def remember(self, entries: Mapping[str, Entry | None]) -> None:
        """Take these for what `entries` would find, without asking: a task gets them from the driver's listing."""

    @abstractmethod
    def files(self, folder: str = "") -> list[str]:
        """Every file below `folder`, at any depth, sorted."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A seekable file to read from. Raises FileNotFoundError."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file, 1 or more, or what there is of them. Raises FileNotFoundError."""

    @abstractmethod
    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not be there yet, whole or not at all; of two at once, one wins.

        Raises FileExistsError for the other.
        """

    @abstractmethod
    def put(self, file: Path, name: str) -> None:
        """Bring a local file here, whole or not at all; it may be moved."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove files."""


def open_folder(path: str | Path) -> Folder:
    """The folder of a path or an `s3://bucket/prefix` URL, which need not exist yet.

    Raises ConfigError for another kind of URL.
    """
    text = str(path)
    if text.startswith(SCHEME):
        return S3Folder(text)
    if "://" in text:
        raise ConfigError(f"{text!r} is neither a local path nor an s3:// URL; other stores are not supported")
    return LocalFolder(local_path(text))


class LocalFolder(Folder):
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.path.is_dir()

    def names(self, folder: str = "") -> list[str]:
        """See Folder."""
        try:
            with os.scandir(self.path / folder) as found:
                return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in found)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def is_file(self, name: str) -> bool:
        """See Folder."""
        return (self.path / name).is_file()

    def is_dir(self, name: str) -> bool:
        """See Folder."""
        return (self.path / name).is_dir()

    def entries(self, names: Sequence[str]) -> list[Entry | None]:
        """See Folder."""
        return [self._entry(name) for name in names]

    def _entry(self, name: str) -> Entry | None:
        try:
            found = os.stat(f"{self.url}/{name}")
        except (OSError, ValueError):  # missing, or no path at all
            return None
        return Entry(found.st_size, str(found.st_mtime_ns))

    def remember(self, entries: Mapping[str, Entry | None]) -> None:
        """See Folder; a disk is asked all the same, that costs nothing."""

    def files(self, folder: str = "") -> list[str]:
        """See Folder."""
        below = (path for path in (self.path / folder).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.path).as_posix() for path in below)

    def open(self, name: str) -> BinaryIO:
        """See Folder."""
        return open(self.path / name, "rb")

    def read_bytes(self, name: str) -> bytes:
        """See Folder."""
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """See Folder."""
        with self.open(name) as file:
            file.seek(start)
            return file.read(length)

    def write_bytes(self, name: str, data: bytes) -> None:
        """See Folder; durable once this returns."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)

    def create(self, name: str, data: bytes) -> None:
        """See Folder; durable once this returns."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.link(temporary, path)  # refused where there is one; a rename would replace it
        finally:
            os.unlink(temporary)

    def put(self, file: Path, name: str) -> None:
        """See Folder; `file` must lie on the same file system and is moved."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        os.replace(file, target)

    def remove(self, names: Sequence[str]) -> None:
        """See Folder."""
        for name in names:
            (self.path / name).unlink()


class S3Folder(Folder):
    """A prefix of an S3 bucket. What it lists is remembered: a corpus is not expected to change while it is read."""

    def __init__(self, url: str) -> None:
        self._root = url.removeprefix(SCHEME).strip("/")
        self.url = SCHEME + self._root
        if not self._root:
            raise ConfigError(f"{url!r} names no bucket; write s3://BUCKET/PREFIX")
        self._fs = s3()
        self._names: dict[str, list[str]] = {}
        self._entries: Mapping[str, Entry | None] | None = None

    def exists(self) -> bool:
        """Whether any object lies below."""
        return bool(self.names())

    def names(self, folder: str = "") -> list[str]:
        """See Folder."""
        folder = folder.rstrip("/")
        if folder not in self._names:
            self._names[folder] = self._list(folder)
        return self._names[folder]

    def _list(self, folder: str) -> list[str]:
        path = f"{self._root}/{folder}" if folder else self._root
        try:
            with storage_errors(self.url_of(folder)):
                found = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        below = f"{path}/"
        # An object named like a folder (`imgs/`) is what some tools leave for an empty one; a key equal to `path` is
        # that of a file.
        children = [entry for entry in found if entry["name"].startswith(below) and entry["name"] != below]
        return sorted(
            entry["name"].removeprefix(below).rstrip("/") + ("/" if entry["type"] == "directory" else "")
            for entry in children
        )

    def is_file(self, name: str) -> bool:
        """See Folder."""
        parent, _, last = name.rpartition("/")
        return last in self.names(parent)

    def is_dir(self, name: str) -> bool:
        """See Folder."""
        parent, _, last = name.rstrip("/").rpartition("/")
        return f"{last}/" in self.names(parent)

    def entries(self, names: Sequence[str]) -> list[Entry | None]:
        """See Folder; one listing of everything, whatever the number of names."""
        if self._entries is None:
            self._entries = self._find("")
        return [self._entries.get(name) for name in names]

    def remember(self, entries: Mapping[str, Entry | None]) -> None:
        """See Folder."""
        self._entries = entries

    def files(self, folder: str = "") -> list[str]:
        """See Folder; listed anew each time."""
        return sorted(self._find(folder))

    def _find(self, folder: str) -> dict[str, Entry]:
        with storage_errors(self.url_of(folder)):
            found = self._fs.find(f"{self._root}/{folder}".rstrip("/"), detail=True)
        return {
            path.removeprefix(f"{self._root}/"): Entry(int(info["size"]), str(info.get("ETag")))
            for path, info in found.items()
        }

    def open(self, name: str) -> BinaryIO:
        """See Folder."""
        with storage_errors(self.url_of(name)):
            opened = self._fs.open(f"{self._root}/{name}", "rb")
        # fsspec's own readline copies a whole block, 50 MB, for each line.
        return io.BufferedReader(_Guarded(opened, self.url_of(name)), BUFFER_BYTES)

    def read_bytes(self, name: str) -> bytes:
        """See Folder."""
        with storage_errors(self.url_of(name)):
            # In one piece: in several, each file would cost a request for its size first.
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", max_concurrency=1)
        return data

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """See Folder; one request of just these bytes."""
        with storage_errors(self.url_of(name)):
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=start + length)
        return data

    def write_bytes(self, name: str, data: bytes) -> None:
        """See Folder."""
        with storage_errors(self.url_of(name)):
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        """See Folder (If-None-Match)."""
        with storage_errors(self.url_of(name)):
            self._fs.pipe_file(f"{self._root}/{name}", data, mode="create")

    def put(self, file: Path, name: str) -> None:
        """See Folder; an upload that fails leaves no part of it."""
        with storage_errors(self.url_of(name)):
            self._fs.put_file(str(file), f"{self._root}/{name}")

    def remove(self, names: Sequence[str]) -> None:
        """See Folder."""
        if names:
            with storage_errors(self.url):
                self._fs.rm([f"{self._root}/{name}" for name in names])


class _Guarded(io.RawIOBase):
    """A file of s3fs whose errors are ours, also those that come while it is read."""

    def __init__(self, file: Any, url: str) -> None:
        super().__init__()
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def close(self) -> None:
        self._file.close()
        super().close()


def s3() -> Any:
    """The S3 file system of this process, as the environment configures it."""
    logging.getLogger("aiobotocore").setLevel(logging.ERROR)  # it tells each time where it found the credentials
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    system = fsspec.filesystem(
        "s3", config_kwargs=timeouts | {"retries": {"max_attempts": ATTEMPTS}}, use_listings_cache=False
    )
    system.retries = ATTEMPTS
    return system


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what S3 says into an error of ours that names the object; a missing one stays a FileNotFoundError.

    Raises ConfigError where access is denied or no credentials are found, PefomedError where the store does not answer
    as it should.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except (FileNotFoundError, FileExistsError, PefomedError):
        raise
    except (PermissionError, NoCredentialsError) as error:
        raise ConfigError(
            f"{url!r}: access denied ({_said(error)}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and "
            "AWS_ENDPOINT_URL here and on every node, and what the key may do"
        ) from None
    except (OSError, ClientError, BotoCoreError, TimeoutError) as error:
        if _is_precondition(error):
            raise FileExistsError(url) from None
        raise PefomedError(
            f"{url!r}: the object store failed ({_said(error)}) after {ATTEMPTS} attempts; try again once it answers"
        ) from None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _is_precondition(error: BaseException) -> bool:
    causes = (error, error.__cause__, error.__context__)
    return any("PreconditionFailed" in str(cause) or "pre-conditions" in str(cause) for cause in causes if cause)
