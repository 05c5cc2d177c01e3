"""A person's own rows in the spellings of the usual fine-tuning tools, images beside them or inside them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.folders import Folder, open_folder
from pefomed_ray.artifacts.records import Reference
from pefomed_ray.data.corpora import open_corpus
from pefomed_ray.data.corpora.reading import BadRow, Row
from pefomed_ray.data.inline import inline_file, read_inline
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError
from pefomed_ray.errors import DataError


def read(path: Path | str) -> list[Row]:
    root = open_folder(path)
    reader = open_corpus(root)
    assert reader.NAME == "jsonl"
    return list(reader.read(root, DataOptions()))


def good(rows: list[Row]) -> dict[str, Reference]:
    return {row.id: row for row in rows if isinstance(row, Reference)}


def bad(rows: list[Row]) -> dict[str, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


def write_lines(path: Path, rows: list[Any]) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")


def parts(*content: dict[str, Any], images: list[str] | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "Left"}]
    return {"messages": turns} | ({"images": images} if images else {})


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


TEXT = {"type": "text", "text": "Where?"}
USER = {"role": "user", "content": "<image>Where?"}
ANSWER = {"role": "assistant", "content": "Left"}

GOOD: dict[str, dict[str, Any]] = {
    "LLaMA-Factory": {"messages": [USER, ANSWER], "images": ["a.png"]},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "Left"}],
        "system": "Be brief.",
        "images": ["a.png"],
    },
    "LLaVA": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Left"}],
    },
    "LLaVA, image last": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "Where?\n<image>"}, {"from": "gpt", "value": "Left"}],
    },
    "OpenAI": parts(image_url("a.png"), TEXT),
    "OpenAI, system": {"messages": [{"role": "system", "content": "Be brief."}, *parts(TEXT)["messages"]]}
    | {"images": ["a.png"]},
    "OpenAI, answer in parts": {
        "messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Left"}]}],
        "images": ["a.png"],
    },
    "ms-swift": {"query": "Where?", "response": "Left", "images": ["a.png"]},
    "ms-swift, system": {"system": "Be brief.", "query": "<image>Where?", "response": "Left", "images": ["a.png"]},
    "ms-swift, empty history": {"query": "Where?", "response": "Left", "history": [], "images": ["a.png"]},
    "Qwen": parts({"type": "image", "image": "a.png"}, TEXT),
    "TRL": parts({"type": "image"}, TEXT, images=["a.png"]),
    "one image as text": {"query": "Where?", "response": "Left", "images": None, "image": "a.png"},
    "null keys": {"id": None, "group": None, "query": "Where?", "response": "Left", "image": "a.png", "meta": None},
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_every_spelling_says_the_same(tmp_path: Path, suffix: str) -> None:
    rows = list(GOOD.values())
    if suffix == "jsonl":
        write_lines(tmp_path / "train.jsonl", rows)
    else:
        (tmp_path / "train.json").write_text(json.dumps(rows, indent=2))
    found = list(good(read(tmp_path)).values())
    assert len(found) == len(GOOD)
    for number, (spelling, row) in enumerate(zip(GOOD, found, strict=True), 1):
        assert (row.question, row.answer, row.task) == ("Where?", "Left", "vqa"), spelling
        assert (row.image_paths, row.group) == (("a.png",), "a.png"), spelling
        assert (row.id, row.answer_type, row.question_type) == (f"train-{number}", None, None), spelling
        assert row.meta == ({"system": "Be brief."} if "Be brief." in json.dumps(GOOD[spelling]) else {}), spelling


def test_optional_keys(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "query": "Where?",
        "response": 2,
        "images": ["a.png", "b.png"],
        "task": "report",
        "group": "patient-1",
    }
    row |= {"answer_type": "CLOSED ", "question_type": "POS", "meta": {"age": 40}}
    write_lines(tmp_path / "val.jsonl", [b"", row, {"response": "A caption.", "image": "a.png"}])
    found = good(read(tmp_path))
    assert set(found) == {"7", "validation-3"}
    first, caption = found.values()
    assert (first.split, first.task, first.group, first.answer) == ("validation", "report", "patient-1", "2")
    assert (first.image_paths, first.answer_type, first.question_type) == (("a.png", "b.png"), "closed", "POS")
    assert first.meta == {"age": 40}
    assert (caption.task, caption.question) == ("caption", "")


TURNS = [{"from": role, "value": "x"} for role in ("human", "gpt", "human", "gpt")]

BAD: list[tuple[Any, str]] = [
    ({"query": "?", "response": "x", "image": "https://example.org/a.png"}, "image_not_local"),
    ({"query": "?", "response": "x", "image": "file:///etc/passwd"}, "image_not_local"),
    (parts(image_url("http://example.org/a.png"), TEXT), "image_not_local"),
    ({"conversations": TURNS}, "several_turns"),
    ({"query": "?", "response": "x", "history": [["a", "b"]], "image": "a.png"}, "several_turns"),
    ({"messages": [ANSWER, USER]}, "malformed_row"),
    ({"messages": [USER]}, "malformed_row"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "malformed_row"),
    ({"messages": [USER, {"role": "assistant", "content": [image_url("a.png")]}]}, "malformed_row"),
    (parts({"type": "video", "video": "a.mp4"}), "malformed_row"),
    ({"query": "<image><image>?", "response": "x", "image": "a.png"}, "malformed_row"),
    ({"query": "?", "image": "a.png"}, "malformed_row"),
    ({"query": "?", "response": True, "image": "a.png"}, "malformed_row"),
    ({"query": "?", "response": "x", "image": 3}, "malformed_row"),
    ({"query": "?", "response": "x", "task": "poem"}, "malformed_row"),
    ({"query": "?", "response": "x", "answer_type": "maybe"}, "malformed_row"),
    ({"query": "?", "response": "x", "meta": "text"}, "malformed_row"),
    ([1, 2], "malformed_row"),
    (b'{"query": "torn', "malformed_row"),
    (b'{"query": ' + b"[" * 100_000, "malformed_row"),
    ({"query": "?", "response": "x", "image": "data:image/svg+xml,<svg/>"}, "corrupt_image"),
]


def test_dirt(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [*(row for row, _ in BAD), GOOD["LLaVA"]])
    rows = read(tmp_path)
    assert bad(rows) == {f"train.jsonl:{number}": reason for number, (_, reason) in enumerate(BAD, 1)}
    assert len(good(rows)) == 1
    # Only JSONL files hold images.
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.json").write_text(json.dumps([parts(TEXT, image_url("data:image/png;base64,AAAA"))]))
    assert bad(read(tmp_path)) == {"train.json[0]": "image_not_local"}


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"'test' is empty.*test\.jsonl"):
        read(tmp_path)


def test_a_split_in_two_files_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "validation.jsonl", [GOOD["LLaVA"]])
    write_lines(tmp_path / "val.jsonl", [GOOD["LLaVA"]])
    with pytest.raises(DataError, match=r"validation\.jsonl, val\.jsonl"):
        read(tmp_path)


def test_lists_of_rows_are_told_from_slake(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    slake = [{"img_id": 1, "img_name": "xmlab1/source.jpg", "question": 'Is "messages": here?', "qid": 1}]
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(slake))
    assert open_corpus(open_folder(tmp_path)).NAME == "slake"
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([GOOD["LLaVA"]], indent=4))
    assert len(read(tmp_path)) == 3


# Anything: whether it is a picture is not the reader's to judge. Both slashes and plus signs stand in its base64.
IMAGE = b"\xff\xef\xbe\xfb" * 300
OTHER = b"\0\0\0" * 100 + b"DICM"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def inline_rows() -> list[Any]:
    escaped = json.dumps(parts(TEXT, image_url(data_url(IMAGE)))).replace("/", r"\/").encode()
    longer = {"query": "Where?", "response": "Left", "images": [data_url(IMAGE + OTHER), data_url(IMAGE)]}
    return [
        parts(TEXT, image_url(data_url(IMAGE))),
        "器官".encode(),  # offsets are in bytes
        {"query": "Wo\u0308?", "response": "器官", "image": data_url(OTHER, "application/dicom")},
        longer,
        escaped,
        GOOD["LLaVA"],
    ]


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return open_folder(tmp_path if request.param == "disk" else request.getfixturevalue("s3") + "/corpus")


def test_images_inside_rows(folder: Folder, tmp_path: Path) -> None:
    write_lines(tmp_path / "local.jsonl", inline_rows())
    folder.write_bytes("train.jsonl", b"\xef\xbb\xbf" + (tmp_path / "local.jsonl").read_bytes())
    rows = good(read(folder.url))
    assert set(rows) == {"train-1", "train-3", "train-4", "train-5", "train-6"}
    images = {
        name: [read_inline(folder, path) for path in row.image_paths] for name, row in rows.items() if name[-1] < "6"
    }
    assert images == {"train-1": [IMAGE], "train-3": [OTHER], "train-4": [IMAGE + OTHER, IMAGE], "train-5": [IMAGE]}
    # Equal images share a place, so that their rows stay together and on one side of a split.
    assert rows["train-4"].image_paths[1:] == rows["train-1"].image_paths == rows["train-5"].image_paths
    assert rows["train-1"].group == rows["train-5"].group != rows["train-3"].group
    # The driver keeps every reference.
    assert all(len(str(vars(row))) < 600 for row in rows.values())
    assert inline_file(rows["train-1"].image_paths[0]) == ("train.jsonl", len(IMAGE))
    assert inline_file("a.png") is None
    assert inline_file("scan.dcm#3") is None


def test_an_image_whose_slashes_are_escaped_is_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [inline_rows()[4]])
    assert rb"\/" in (tmp_path / "train.jsonl").read_bytes()
    (row,) = good(read(tmp_path)).values()
    assert read_inline(open_folder(tmp_path), row.image_paths[0]) == IMAGE


@pytest.mark.parametrize(
    ("url", "reason"),
    [("data:image/png;base64,", "corrupt_image"), ("data:image/png;base64,A-_!", "corrupt_image")],
)
def test_what_is_not_base64_is_found_when_it_is_read(tmp_path: Path, url: str, reason: str) -> None:
    write_lines(tmp_path / "train.jsonl", [parts(TEXT, image_url(url))])
    (row,) = good(read(tmp_path)).values()
    with pytest.raises(RowError, match=reason):
        read_inline(open_folder(tmp_path), row.image_paths[0])


@pytest.mark.parametrize("place", ["../train.jsonl#1+2", "sub/train.jsonl#1+2", "gone.jsonl#1+2", "train.json#1+2"])
def test_a_place_leads_nowhere_else(tmp_path: Path, place: str) -> None:
    (tmp_path / "corpus/sub").mkdir(parents=True)
    for name in ("train.jsonl", "corpus/train.json", "corpus/sub/train.jsonl"):
        (tmp_path / name).write_bytes(b"AAAA")
    with pytest.raises(RowError, match="missing_image"):
        read_inline(open_folder(tmp_path / "corpus"), place)
