"""Keys of the endpoint: made here, kept as sha256 on the serving side, compared in constant time.

The key file holds one sha256 in hex a line; a line more admits one key more (`printf %s KEY | sha256sum`). Keys are
random and 43 characters long, so a plain hash is not open to guessing.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from pefomed_ray.errors import ConfigError

KEY_VARIABLE = "PEFOMED_API_KEY"
KEY_FILE = "server.keys"
"""In the registry folder, unless another is named."""
CLIENT_KEY_FILE = "client.key"
"""Beside the key file: the key itself, for `pefomed-ray query` on the same machine."""
KEY_BYTES = 32

_HASH = re.compile(r"[0-9a-f]{64}")


def ensure_key(path: Path) -> str | None:
    """Make a key where the key file does not exist yet and return it; None where it does.

    Both files are readable by their owner alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    key = secrets.token_urlsafe(KEY_BYTES)
    try:
        # Exclusive: of two processes that start at once, one makes the key.
        _write_private(path, hash_key(key), os.O_EXCL)
    except FileExistsError:
        return None
    _write_private(path.parent / CLIENT_KEY_FILE, key, os.O_TRUNC)
    return key


def read_hashes(path: Path) -> tuple[str, ...]:
    """The hashes in a key file. Raises ConfigError where there is no file, no hash, or a line that is not one."""
    if not path.is_file():
        raise ConfigError(f"key file {str(path)!r} does not exist; `pefomed-ray serve` makes one")
    lines = path.read_text(encoding="utf-8").split()
    if not lines or not all(_HASH.fullmatch(line) for line in lines):
        raise ConfigError(f"key file {str(path)!r} must hold one sha256 in lower-case hex a line")
    return tuple(lines)


def client_key(folder: Path) -> str:
    """The key to ask with: $PEFOMED_API_KEY, else `client.key` in the folder; ConfigError where there is neither."""
    key = os.environ.get(KEY_VARIABLE)
    if key:
        return key
    path = folder / CLIENT_KEY_FILE
    if not path.is_file():
        raise ConfigError(f"no key: set {KEY_VARIABLE}, or serve from this machine first ({str(path)!r} is not there)")
    return path.read_text(encoding="utf-8").strip()


def hash_key(key: str) -> str:
    """sha256 of a key, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_known(key: str, hashes: Sequence[str]) -> bool:
    """Whether a key is one of the hashed ones; each is compared, in constant time."""
    given = hash_key(key)
    return sum(hmac.compare_digest(given, known) for known in hashes) > 0


def _write_private(path: Path, text: str, flag: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        # An older file keeps its mode when it is opened again.
        os.fchmod(file.fileno(), 0o600)
        file.write(text + "\n")
