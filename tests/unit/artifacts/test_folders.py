"""The same folder on disk and on S3: what it lists, reads, writes, and what it says when the store fails."""

import pickle
from pathlib import Path

import pytest

from pefomed_ray.artifacts.folders import Entry, Folder, LocalFolder, S3Folder, open_folder
from pefomed_ray.errors import ConfigError


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return open_folder(tmp_path / "corpus")
    return open_folder(request.getfixturevalue("s3") + "/some/corpus")


def filled(folder: Folder) -> Folder:
    """Opened again, because an S3 folder remembers what it once listed."""
    for name, data in {"a.json": b"{}", "imgs/x1/s.jpg": b"one", "imgs/x2/s.jpg": b"two", "imgs/n.txt": b""}.items():
        folder.write_bytes(name, data)
    return open_folder(folder.url)


def test_what_is_there(folder: Folder) -> None:
    assert not folder.exists()
    folder = filled(folder)
    assert folder.exists()
    assert folder.names() == ["a.json", "imgs/"]
    assert folder.names("imgs") == ["n.txt", "x1/", "x2/"]
    assert folder.names("imgs/") == folder.names("imgs")
    assert folder.names("none") == []
    assert folder.is_file("a.json")
    assert folder.is_file("imgs/x1/s.jpg")
    assert not folder.is_file("imgs/x1")
    assert not folder.is_file("imgs/x9/s.jpg")
    assert folder.is_dir("imgs")
    assert folder.is_dir("imgs/x1/")
    assert not folder.is_dir("a.json")
    assert folder.matching("imgs", "*.txt") == ["imgs/n.txt"]
    assert folder.matching("", "*.json") == ["a.json"]
    assert folder.files() == ["a.json", "imgs/n.txt", "imgs/x1/s.jpg", "imgs/x2/s.jpg"]
    assert folder.files("imgs/x1") == ["imgs/x1/s.jpg"]


def test_reading_and_writing(folder: Folder, tmp_path: Path) -> None:
    folder = filled(folder)
    assert folder.read_bytes("imgs/x1/s.jpg") == b"one"
    with folder.open("imgs/x2/s.jpg") as file:
        file.seek(1)
        assert file.read() == b"wo"
    folder.write_bytes("lines.txt", b"one\ntwo\n")
    with folder.open("lines.txt") as file:
        assert list(file) == [b"one\n", b"two\n"]
    assert folder.read_range("lines.txt", 4, 3) == b"two"
    assert folder.read_range("lines.txt", 6, 99) == b"o\n"
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("none.txt")
    with pytest.raises(FileNotFoundError):
        folder.read_range("none.txt", 0, 1)
    with pytest.raises(FileNotFoundError):
        folder.open("none.txt")
    (tmp_path / "new").write_bytes(b"new")
    folder.put(tmp_path / "new", "deep/new.txt")
    assert folder.read_bytes("deep/new.txt") == b"new"
    folder.remove(["deep/new.txt", "a.json", "lines.txt"])
    assert open_folder(folder.url).files() == ["imgs/n.txt", "imgs/x1/s.jpg", "imgs/x2/s.jpg"]


def test_a_replaced_file_has_another_version(folder: Folder) -> None:
    folder = filled(folder)
    before = folder.entries(["a.json", "none", "imgs/x1/s.jpg"])
    assert [entry and entry.size for entry in before] == [2, None, 3]
    assert before == open_folder(folder.url).entries(["a.json", "none", "imgs/x1/s.jpg"])
    folder.write_bytes("a.json", b"[]")
    after = open_folder(folder.url).entries(["a.json", "none", "imgs/x1/s.jpg"])
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_a_task_on_another_node_opens_it_again(folder: Folder) -> None:
    again = pickle.loads(pickle.dumps(filled(folder)))
    assert again.url == folder.url
    assert again.read_bytes("a.json") == b"{}"


def test_what_the_driver_listed_is_not_asked_again(s3: str) -> None:
    folder = open_folder(f"{s3}/corpus")
    folder.remember({"a.jpg": Entry(3, "v")})
    assert folder.entries(["a.jpg", "b.jpg"]) == [Entry(3, "v"), None]


def test_only_one_of_two_creates_a_file(s3: str) -> None:
    first, second = S3Folder(f"{s3}/out"), S3Folder(f"{s3}/out")
    first.create("manifest.json", b"first")
    with pytest.raises(FileExistsError):
        second.create("manifest.json", b"second")
    assert second.read_bytes("manifest.json") == b"first"


def test_a_missing_bucket_is_an_empty_folder(s3_server: str) -> None:
    assert not open_folder("s3://no-such-bucket/x").exists()


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://host/x", "s3://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_folder(url)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = open_folder("corpus")
    assert isinstance(folder, LocalFolder)
    assert folder.path == tmp_path / "corpus"
