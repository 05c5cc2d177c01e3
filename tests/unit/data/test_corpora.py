"""Which reader a folder gets, and what a person is told where none or several would do. The readers have own tests."""

import json
from pathlib import Path

import pytest

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data.corpora import READERS, open_corpus
from pefomed_ray.data.options import DataOptions
from pefomed_ray.errors import ConfigError, DataError

SLAKE_ROW = {"img_name": "xmlab1/source.jpg", "question": "?", "answer": "Lung", "q_lang": "en", "qid": 1}


def make_slake(root: Path) -> None:
    for name in ("train", "validate", "test"):
        (root / f"{name}.json").write_text(json.dumps([SLAKE_ROW]))
    (root / "imgs").mkdir()


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        open_corpus(open_folder(tmp_path / "nowhere"))


def test_an_unknown_layout_says_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError) as error:
        open_corpus(open_folder(tmp_path))
    assert "pictures/" in str(error.value)
    assert all(f"  {name}: {reader.LAYOUT}" in str(error.value) for name, reader in READERS.items())


def test_two_layouts_in_one_folder_name_both_and_one_can_be_chosen(tmp_path: Path) -> None:
    make_slake(tmp_path)
    root = open_folder(tmp_path)
    assert open_corpus(root).NAME == "slake"
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"slake and jsonl.*corpus=NAME"):
        open_corpus(root)
    assert open_corpus(root, "jsonl").NAME == "jsonl"


def test_a_named_layout_has_to_be_known_and_there(tmp_path: Path) -> None:
    make_slake(tmp_path)
    with pytest.raises(ConfigError, match=r"'slak'.*slake"):
        open_corpus(open_folder(tmp_path), "slak")
    with pytest.raises(DataError, match=r"layout of roco: data/"):
        open_corpus(open_folder(tmp_path), "roco")


@pytest.mark.parametrize("content", [b"[{]", b'{"a": 1}', b"[]", b"[" * 100_000])
def test_an_unreadable_or_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    make_slake(tmp_path)
    root = open_folder(tmp_path)
    assert list(open_corpus(root).read(root, DataOptions()))
    (tmp_path / "test.json").write_bytes(content)
    with pytest.raises(DataError, match=r"test\.json"):
        list(open_corpus(root).read(root, DataOptions()))
