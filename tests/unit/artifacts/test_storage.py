"""Files appear whole or not at all."""

import json
from pathlib import Path

import pytest

from pefomed_ray.artifacts.storage import digest_of, local_path, publishing, read_json, sha256_file, write_json
from pefomed_ray.errors import ConfigError


def test_publishing_renames_on_success_only(tmp_path: Path) -> None:
    with publishing(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    with pytest.raises(RuntimeError):
        fail_while_publishing(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def fail_while_publishing(target: Path) -> None:
    with publishing(target) as folder:
        (folder / "x").write_text("1")
        raise RuntimeError


def test_publishing_refuses_a_taken_folder_but_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with publishing(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(ConfigError, match="not empty"), publishing(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty" / "x").exists()


def test_write_json_replaces_whole_or_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"]


def test_digests(tmp_path: Path) -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of(json.loads('{"b": 2, "a": 1}'))
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f").startswith("ba7816bf")


def test_urls_are_refused_rather_than_made_folders() -> None:
    with pytest.raises(ConfigError, match="only local paths"):
        local_path("s3://bucket/x")
