"""Keys are random, named, hashed at rest, and taken away by name."""

from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError
from pefomed_ray.serving.keys import (
    KEY_VARIABLE,
    add_key,
    client_key,
    ensure_key,
    hash_key,
    name_of,
    read_keys,
    revoke_key,
)


def test_the_first_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    ensure_key(tmp_path)
    key = client_key(tmp_path)
    assert len(key) >= 32
    ensure_key(tmp_path)
    assert client_key(tmp_path) == key
    assert read_keys(tmp_path) == {"first": hash_key(key)}
    assert key not in (tmp_path / "server.keys").read_text()
    assert (tmp_path / "client.key").stat().st_mode & 0o777 == 0o600


def test_a_new_key_replaces_an_old_client_key_of_any_mode(tmp_path: Path) -> None:
    old = tmp_path / "client.key"
    old.write_text("x" * 100)
    old.chmod(0o644)
    ensure_key(tmp_path)
    assert name_of(client_key(tmp_path), read_keys(tmp_path)) == "first"
    assert old.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("on_s3", [False, True])
def test_keys_are_added_and_revoked_by_name(on_s3: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    registry = f"{request.getfixturevalue('s3')}/registry" if on_s3 else str(tmp_path)
    ward, lab = add_key(registry, "ward-7"), add_key(registry, "lab")
    assert (name_of(ward, read_keys(registry)), name_of(lab, read_keys(registry))) == ("ward-7", "lab")
    with pytest.raises(ConfigError, match="'lab' already"):
        add_key(registry, "lab")
    with pytest.raises(ConfigError, match="there are: ward-7, lab"):
        revoke_key(registry, "other")
    revoke_key(registry, "ward-7")
    assert (name_of(ward, read_keys(registry)), name_of(lab, read_keys(registry))) == (None, "lab")
    revoke_key(registry, "lab")
    assert read_keys(registry) == {}


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "-a", "x" * 65])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name"):
        add_key(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_on_s3_the_first_key_is_made_by_hand(s3: str) -> None:
    with pytest.raises(ConfigError, match="keys add NAME"):
        ensure_key(f"{s3}/registry")


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_key(tmp_path)
    monkeypatch.setenv(KEY_VARIABLE, "mine")
    assert client_key(tmp_path) == "mine"


def test_only_whole_keys_are_known() -> None:
    known = {"a": hash_key("a" * 43), "b": hash_key("b" * 43)}
    assert (name_of("a" * 43, known), name_of("b" * 43, known)) == ("a", "b")
    assert not any(name_of(key, known) for key in ("", "a" * 42, "a" * 44, "A" * 43, known["a"], "ä", "\udcff"))


@pytest.mark.parametrize("content", [None, "not a hash\n", "a" * 64, "name " + "a" * 43])
def test_a_key_file_that_holds_no_hashes(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "server.keys").write_text(content)
    with pytest.raises(ConfigError, match=r"server\.keys"):
        read_keys(tmp_path)


def test_no_key_to_ask_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        client_key(tmp_path)
