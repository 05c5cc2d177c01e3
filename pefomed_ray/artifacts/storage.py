"""Files that appear whole or not at all: written under a temporary name, then published by one rename."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pefomed_ray.errors import ConfigError

CHUNK_BYTES = 1 << 20


def local_path(path: str | Path) -> Path:
    """The path as an absolute local one.

    Raises ConfigError for a URL such as ``s3://...``: this version reads and writes local paths only, and a folder
    named ``s3:`` would be worse than a refusal.
    """
    text = str(path)
    if "://" in text:
        raise ConfigError(
            f"{text!r} is a URL; only local paths are supported so far. Give a path on a disk all nodes see."
        )
    return Path(text).expanduser().resolve()


def sha256_bytes(data: bytes) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True)  # json.dumps would make one for each call


def digest_of(value: Any) -> str:
    """Digest of a JSON-able value, independent of key order."""
    return sha256_bytes(_CANONICAL.encode(value).encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the value as indented JSON, in one rename; durable once this returns."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The value as indented JSON, UTF-8, with a line end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by these bytes, in one rename; durable once this returns."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: Path) -> Any:
    """The value in a JSON file that this package wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_output_is_free(target: Path) -> None:
    """Raise ConfigError where `target` exists and holds anything; an empty folder is fine."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"output {str(target)!r} already exists and is not empty; name another one or remove it first"
        )


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `target` when the block ends well and vanishes when it does not.

    Raises ConfigError where `target` exists and is not an empty folder.
    """
    check_output_is_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
