"""Keys of the endpoint: named, revocable, kept as sha256 on the serving side, compared in constant time.

`server.keys` in the registry holds a line for each key: its name and its sha256 in hex. Keys are random and 43
characters long, so a plain hash is not open to guessing. A running endpoint reads the file again every `refresh_s`:
a key that is added or revoked works, or does not, from then on.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from pefomed_ray.artifacts.folders import LocalFolder, open_folder
from pefomed_ray.errors import ConfigError

KEY_VARIABLE = "PEFOMED_API_KEY"
KEY_FILE = "server.keys"
CLIENT_KEY_FILE = "client.key"
"""In a local registry, readable by its owner alone: the first key itself, for `pefomed-ray query` on this machine."""
FIRST = "first"
"""Name of the key that `pefomed-ray serve` makes where there is none."""
KEY_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


def ensure_key(registry: str | Path) -> None:
    """Make the first key of a local registry where it has none, and keep it beside for this machine's own queries.

    Raises ConfigError where the registry is on S3 and has none: a key is made by hand there, and shown once.
    """
    folder = open_folder(registry)
    if folder.is_file(KEY_FILE):
        return
    if not isinstance(folder, LocalFolder):
        raise ConfigError(f"{folder.url!r} has no keys yet; make one: pefomed-ray keys add NAME --registry {folder}")
    try:
        key = add_key(registry, FIRST)
    except ConfigError:  # of two processes that start at once, one makes the key
        return
    _write_private(folder.path / CLIENT_KEY_FILE, key)


def add_key(registry: str | Path, name: str) -> str:
    """Make a key; it is known nowhere but in what this returns.

    Raises ConfigError for a name that is taken or is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError("a key's name has up to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter or a digit")
    folder = open_folder(registry)
    key = secrets.token_urlsafe(KEY_BYTES)
    if not folder.is_file(KEY_FILE):
        try:
            folder.create(KEY_FILE, _lines({name: hash_key(key)}))
            return key
        except FileExistsError:
            pass
    known = read_keys(registry)
    if name in known:
        raise ConfigError(f"there is a key named {name!r} already; revoke it first or choose another name")
    folder.write_bytes(KEY_FILE, _lines({**known, name: hash_key(key)}))
    return key


def revoke_key(registry: str | Path, name: str) -> None:
    """Take a key away. Raises ConfigError where there is none of this name."""
    known = dict(read_keys(registry))
    if known.pop(name, None) is None:
        raise ConfigError(f"there is no key named {name!r}; there are: {', '.join(known) or 'none'}")
    open_folder(registry).write_bytes(KEY_FILE, _lines(known))


def read_keys(registry: str | Path) -> dict[str, str]:
    """Name -> sha256 of each key. Raises ConfigError where there is no file of keys or a line is none."""
    folder = open_folder(registry)
    try:
        lines = folder.read_bytes(KEY_FILE).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        raise ConfigError(
            f"{folder.url_of(KEY_FILE)!r} does not exist; `pefomed-ray serve` or `pefomed-ray keys add` makes it"
        ) from None
    words = [line.split() for line in lines]
    if not all(len(pair) == 2 and _NAME.fullmatch(pair[0]) and _HASH.fullmatch(pair[1]) for pair in words):
        raise ConfigError(f"{folder.url_of(KEY_FILE)!r}: a line is not a name and a sha256 in lower-case hex")
    return {pair[0]: pair[1] for pair in words}


def client_key(registry: str | Path) -> str:
    """The key to ask with: $PEFOMED_API_KEY, else `client.key` of a local registry; ConfigError where there is none."""
    key = os.environ.get(KEY_VARIABLE)
    if key:
        return key
    folder = open_folder(registry)
    if not folder.is_file(CLIENT_KEY_FILE):
        where = folder.url_of(CLIENT_KEY_FILE)
        raise ConfigError(f"no key: set {KEY_VARIABLE}, or serve from this machine first ({where!r} is not there)")
    return folder.read_bytes(CLIENT_KEY_FILE).decode().strip()


def hash_key(key: str) -> str:
    """sha256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def name_of(key: str, known: Mapping[str, str]) -> str | None:
    """Name of a key; None where it is none. Each is compared, in constant time."""
    given = hash_key(key)
    found = [name for name, digest in known.items() if hmac.compare_digest(given, digest)]
    return found[0] if found else None


def _lines(keys: Mapping[str, str]) -> bytes:
    return "".join(f"{name} {digest}\n" for name, digest in keys.items()).encode()


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        # An older file keeps its mode when it is opened again.
        os.fchmod(file.fileno(), 0o600)
        file.write(text + "\n")
