"""Keys are random, hashed at rest, and private to their owner."""

from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError
from pefomed_ray.serving.keys import KEY_VARIABLE, client_key, ensure_key, hash_key, is_known, read_hashes


def test_a_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    path = tmp_path / "registry" / "server.keys"
    key = ensure_key(path)
    assert key is not None
    assert len(key) >= 32
    assert ensure_key(path) is None
    assert client_key(path.parent) == key
    assert read_hashes(path) == (hash_key(key),)
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
    assert key not in path.read_text()


def test_a_new_key_replaces_an_old_client_key_of_any_mode(tmp_path: Path) -> None:
    old = tmp_path / "client.key"
    old.write_text("x" * 100)
    old.chmod(0o644)
    assert ensure_key(tmp_path / "server.keys") == old.read_text().strip()
    assert old.stat().st_mode & 0o777 == 0o600


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_key(tmp_path / "server.keys")
    monkeypatch.setenv(KEY_VARIABLE, "mine")
    assert client_key(tmp_path) == "mine"


def test_only_whole_keys_are_known() -> None:
    hashes = (hash_key("a" * 43), hash_key("b" * 43))
    assert is_known("a" * 43, hashes)
    assert is_known("b" * 43, hashes)
    assert not any(is_known(key, hashes) for key in ("", "a" * 42, "a" * 44, "A" * 43, hashes[0], "ä"))


@pytest.mark.parametrize("content", [None, "", "not a hash\n", "a" * 43])
def test_a_key_file_that_holds_no_hashes(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "server.keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="key file"):
        read_hashes(path)


def test_no_key_to_ask_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        client_key(tmp_path)
