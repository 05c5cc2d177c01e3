"""What `data check` finds in dirty corpora, does not find in clean ones, and never repeats of what rows say."""

import base64
import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data import intake
from pefomed_ray.data.check import check
from pefomed_ray.data.check_page import Pictures
from pefomed_ray.data.dirt import WHY, WHY_QUARANTINED
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import Reason
from pefomed_ray.errors import ConfigError

SECRET = "Jane Roe, MRN 4711"
OPEN = DataOptions(licence="open", validation_fraction=0, max_bad_fraction=0.9)

Rows = Sequence[tuple[str, Mapping[str, Any]]]
"""Split, and how a row differs from a clean one."""


def picture(seed: int, side: int = 24, **saving: Any) -> bytes:
    buffer = BytesIO()
    image = Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(side * side * 3))
    image.save(buffer, saving.pop("format", "PNG"), **saving)
    return buffer.getvalue()


def write_corpus(root: Path, odd: Rows = (), clean: int = 12) -> Path:
    """A JSONL corpus of clean rows (two thirds train, one third test) and then odd ones, called q100, q101, ..."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    kinds = [("test" if number % 3 == 2 else "train", number, {}) for number in range(clean)]
    kinds += [(split, 100 + number, changes) for number, (split, changes) in enumerate(odd)]
    root.mkdir(parents=True)
    for split, number, changes in kinds:
        row = {"id": f"q{number}", "query": f"Where is {number}?", "response": "Left", "image": f"i{number}.png"}
        row |= {"answer_type": "open", **changes}
        rows[split].append(row)
        name = str(row["image"])
        (root / name).write_bytes(picture(int(re.sub(r"\D", "", name))))
    for split, written in rows.items():
        if written:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
            (root / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return root


def caption(text: str, task: str = "caption") -> dict[str, Any]:
    return {"query": "", "response": text, "task": task, "answer_type": None}


SAME_IMAGE = {"image": "i0.png"}
ASKED_BEFORE = {"image": "i0.png", "query": "WHERE is 0?"}
SENTENCE = "No acute disease is seen in this chest."
ODD: dict[str, Rows] = {
    "integer_answer": [
        ("train", {"response": 4}),
        (
            "test",
            {"query": None, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": 4.5}]},
        ),
    ],
    "odd_answer_type": [("train", {"answer_type": "CLOSED "}), ("test", {"answer_type": "Open"})],
    "edge_spaces": [("train", {"response": " Left"}), ("test", {"response": "Left\n"})],
    "tabs_or_line_ends": [("train", {"response": "Heart\tlungs"}), ("test", {"query": "Where\nnow?"})],
    "double_spaces": [("train", {"response": "Left  lung"}), ("test", caption("A  caption of an image."))],
    "non_ascii": [("train", {"response": "5 µm"}), ("test", {"query": "在哪里？"})],
    "mojibake": [("train", {"response": "It\u00e2\u0080\u0099s Ã©"}), ("test", {"query": "What is \ufffd?"})],
    "redaction": [("train", caption(f"XXXX-year-old. {SENTENCE}", "report")), ("test", {"response": "seen by ___"})],
    "trivial_text": [("train", caption("Preop CT.")), ("test", caption("Normal.", "report"))],
    "duplicate_question": [("train", ASKED_BEFORE | {"response": "left"}), ("train", ASKED_BEFORE)],
    "contradicting_answers": [("train", ASKED_BEFORE | {"response": "Right"})],
    "question_in_train": [("test", ASKED_BEFORE | {"response": "Right", "group": "own"})],
    "image_in_earlier_split": [("test", SAME_IMAGE | {"group": "own"}), ("validation", SAME_IMAGE | {"group": "own"})],
    "group_in_earlier_split": [("train", {"group": "patient"}), ("test", {"group": "patient"})],
    "text_repeated_verbatim": [("train", caption(SENTENCE, "report")), ("test", caption(SENTENCE, "report"))],
}
"""Rows that have a finding, next to some that only make it one for others."""
NOT_THEMSELVES = {"group_in_earlier_split": {"q100"}, "text_repeated_verbatim": {"q100"}}
ALONG_WITH = {
    "mojibake": {"non_ascii"},
    "question_in_train": {"image_in_earlier_split"},
    # The same group in validation and in test.
    "image_in_earlier_split": {"group_in_earlier_split"},
}


def test_every_finding_and_every_reason_is_explained_and_tested() -> None:
    assert set(ODD) == set(WHY)
    assert set(WHY_QUARANTINED) == set(get_args(Reason)), "explain each reason of reasons.py in dirt.WHY_QUARANTINED"


def test_a_clean_corpus_has_no_finding(tmp_path: Path) -> None:
    report = check(write_corpus(tmp_path / "c"), OPEN)
    assert report["findings"] == report["quarantined"] == {}
    assert report["problem"] is None
    assert report["rows_by"] == {"train": {"vqa": {"open": 8}}, "test": {"vqa": {"open": 4}}}
    assert (report["layout"], report["licence"], report["taken_from_train"]) == ("jsonl", "open", {})
    assert report["images_in_several_splits"] == 0
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.png"))
    assert report["images"] == {
        "distinct": 12,
        "by_split": {"train": 8, "validation": 0, "test": 4},
        "bytes": size,
        "formats": {"PNG": 12},
        "modes": {"RGB": 12},
        "width_px": [24, 24],
        "height_px": [24, 24],
        "unreferenced": 0,
    }


@pytest.mark.parametrize("code", ODD)
def test_each_oddity_is_found_where_it_is_and_only_there(code: str, tmp_path: Path) -> None:
    found = check(write_corpus(tmp_path / "c", ODD[code]), OPEN)
    assert found["quarantined"] == {}
    assert set(found["findings"]) == {code} | ALONG_WITH.get(code, set())
    finding = found["findings"][code]
    expected = [(split, f"q{100 + n}") for n, (split, _) in enumerate(ODD[code])]
    expected = [(split, name) for split, name in expected if name not in NOT_THEMSELVES.get(code, ())]
    assert sorted((row["split"], row["id"]) for row in finding["examples"]) == sorted(expected)
    assert finding["count"] == len(expected) == sum(finding["by_split"].values())
    assert {split: count for split, count in finding["by_split"].items() if count} == {
        split: sum(other == split for other, _ in expected) for split, _ in expected
    }
    assert finding["why"] == WHY[code]
    assert not finding["quarantined"]


def test_lines_and_tabs_are_usual_in_reports_and_two_words_in_answers(tmp_path: Path) -> None:
    odd = [("train", caption(f"FINDINGS:\n\t{SENTENCE}", "report")), ("train", {"response": "Left lung"})]
    assert check(write_corpus(tmp_path / "c", odd), OPEN)["findings"] == {}


def test_examples_are_the_first_six_in_the_publishers_order_whatever_the_seed(tmp_path: Path) -> None:
    odd = [("train", {"response": " Left", "image": f"i{n % 2}.png"}) for n in range(20)]
    odd += [("train", {"response": "", "image": f"i{n % 2}.png"}) for n in range(9)]
    root = write_corpus(tmp_path / "c", odd)
    first, second = (
        check(root, DataOptions(seed=seed, validation_fraction=0, max_bad_fraction=0.9)) for seed in (0, 5)
    )
    assert first == second
    assert list(first["findings"]) == ["empty_answer", "edge_spaces"]
    assert [row["id"] for row in first["findings"]["edge_spaces"]["examples"]] == [f"q{n}" for n in range(100, 106)]
    assert [row["id"] for row in first["findings"]["empty_answer"]["examples"]] == [f"q{n}" for n in range(120, 126)]
    assert first["findings"]["empty_answer"]["by_split"] == {"train": 9, "validation": 0, "test": 0}
    assert first["quarantined"] == {"empty_answer": 9}


def test_vqa_rad_as_its_publisher_left_it(tmp_path: Path) -> None:
    """In small: every test image occurs in train too, and the oddities of the real file."""
    images = tmp_path / "c/VQA_RAD Image Folder"
    images.mkdir(parents=True)
    for number in range(11):  # the last one is named by no row
        (images / f"synpic{number}.jpg").write_bytes(picture(number, format="JPEG"))
    odd: dict[int, dict[str, Any]] = {
        0: {"answer": 4},
        1: {"answer": 12},
        2: {"answer_type": "CLOSED "},
        3: {"answer": "Heart \tlungs"},
        4: {"answer": " Left"},
    }
    rows = [
        {
            "qid": number,
            "phrase_type": "test_freeform" if number >= 24 else "para",
            "image_name": f"synpic{number % 10}.jpg",
            "question": f"Question {number}?",
            "question_type": "POS",
            "answer": "Left",
            "answer_type": "OPEN",
        }
        | odd.get(number, {})
        for number in range(30)
    ]
    rows[29]["question"] = rows[9]["question"]
    (tmp_path / "c/VQA_RAD Dataset Public.json").write_text(json.dumps(rows), encoding="utf-8")
    found = check(tmp_path / "c", DataOptions(validation_fraction=0))
    counts = {code: finding["count"] for code, finding in found["findings"].items()}
    assert counts == {
        "integer_answer": 2,
        "odd_answer_type": 1,
        "edge_spaces": 1,
        "tabs_or_line_ends": 1,
        "question_in_train": 1,
        "image_in_earlier_split": 6,
        "group_in_earlier_split": 6,
    }
    assert found["rows"] == {"train": 24, "validation": 0, "test": 6}
    assert found["image_overlap"] == {"train/validation": 0, "train/test": 6, "validation/test": 0}
    assert (found["images_in_several_splits"], found["images"]["by_split"]["test"]) == (6, 6)
    assert found["images"]["unreferenced"] == 1
    assert check(tmp_path / "c")["taken_from_train"] == {"validation": 0.1}


def test_real_slake_in_both_languages(data_dir: Path) -> None:
    found = check(data_dir / "slake")
    assert (found["images_in_several_splits"], found["images"]["distinct"]) == (298, 642)
    assert found["findings"]["image_in_earlier_split"]["by_split"]["train"] == 0
    assert found["findings"]["empty_answer"]["examples"] == [
        {"id": "1622", "split": "train", "line": "train.json[1622]"}
    ]
    assert found["images"]["unreferenced"] == 0  # its masks are no images that rows might name
    assert found["problem"] is None


def test_real_slake_in_one_language(data_dir: Path) -> None:
    found = check(data_dir / "slake", DataOptions(language="en"))
    assert found["images_in_several_splits"] == 0
    assert not {"image_in_earlier_split", "group_in_earlier_split", "non_ascii"} & set(found["findings"])
    assert found["rows_by"]["test"] == {"vqa": {"open": 645, "closed": 416}}


def test_an_image_is_decoded_once_however_many_rows_ask_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_corpus(tmp_path / "c", [("train", {"image": f"i{n % 3}.png"}) for n in range(30)])
    decoded: list[bytes] = []
    monkeypatch.setattr(intake, "check_image", decoded.append)
    seen: list[tuple[int, int]] = []
    check(root, OPEN, lambda done, total: seen.append((done, total)))
    assert len(decoded) == len(set(decoded)) == 12
    assert seen[-1] == (42, 42)
    assert seen == sorted(seen)


def test_a_corpus_on_s3_has_the_same_dirt(s3: str, tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "c", [*ODD["edge_spaces"], ("train", {"response": ""}), *ODD["question_in_train"]])
    (root / "i3.png").unlink()
    bucket = open_folder(s3)
    for path in root.iterdir():
        bucket.write_bytes(f"c/{path.name}", path.read_bytes())
    assert check(f"{s3}/c", OPEN) == check(root, OPEN)
    assert check(root, OPEN)["quarantined"] == {"empty_answer": 1, "missing_image": 1}


# The page.


def dirty_corpus(root: Path) -> Path:
    """Six rows whose text or picture is odd, four of which have no picture that could be shown."""
    torn, web, gone = ({"image": f"i20{n}.png", "query": SECRET} for n in range(3))
    blank, spaced = {"response": " ", "query": SECRET}, {"response": f" {SECRET}"}
    write_corpus(root, [("train", row) for row in (torn, web, gone, blank, spaced, {"id": "q0"})])
    (root / "i200.png").write_bytes(picture(200)[:-100])
    (root / "i201.png").write_bytes(b"<html></html>")
    (root / "i202.png").unlink()
    return root


def pictures_on(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)]


def test_the_page_shows_each_kind_of_dirt_with_the_pictures_that_decode(tmp_path: Path) -> None:
    found = check(dirty_corpus(tmp_path / "c"), OPEN, page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(found["findings"]) == {
        *("corrupt_image", "image_format", "missing_image", "empty_answer", "duplicate_id", "edge_spaces")
    }
    for code, finding in found["findings"].items():
        assert f"<code>{code}</code>" in page
        for row in finding["examples"]:
            assert row["id"] in page
            assert row["line"] in page
    assert len(pictures_on(page)) == 2  # of the row without an answer, and of the one with a space before it
    assert all(Image.open(BytesIO(data)).size == (24, 24) for data in pictures_on(page))
    for instead in ("corrupt image", "image format", "missing image", "no picture"):
        assert f'<div class="picture">{instead}</div>' in page


def test_what_rows_say_is_neither_on_the_page_nor_in_the_report(tmp_path: Path) -> None:
    report = json.dumps(check(dirty_corpus(tmp_path / "c"), OPEN, page=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Roe" in (tmp_path / "c/train.jsonl").read_text(encoding="utf-8")
    assert "Roe" not in report + page
    assert "4711" not in report + page


def test_a_restricted_corpus_gets_a_page_without_pictures(tmp_path: Path) -> None:
    options = DataOptions(validation_fraction=0, max_bad_fraction=0.9)
    check(dirty_corpus(tmp_path / "c"), options, page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data:image" not in page
    assert '<div class="picture">' not in page
    assert "no picture is on this page" in page
    assert "train.jsonl:" in page


def test_the_page_says_why_a_corpus_is_refused_and_escapes_what_it_names(tmp_path: Path) -> None:
    root = tmp_path / "<script>c"
    found = check(dirty_corpus(root), DataOptions(licence="open"), page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Too dirty to prepare:" in page
    assert found["problem"][:30] in page.replace("&#39;", "'")
    assert "<script>" not in page
    assert "&lt;script&gt;c" in page


def test_a_page_is_never_overwritten_and_that_is_said_before_anything_is_read(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        check(tmp_path / "nowhere", page=page)
    with pytest.raises(ConfigError, match="no folder"):
        check(tmp_path / "nowhere", page=tmp_path / "none/page.html")
    assert page.read_text() == "mine"


def test_thumbnails_are_small_show_16_bits_and_carry_nothing_else(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = SECRET
    (tmp_path / "small.jpg").write_bytes(picture(1, format="JPEG", comment=SECRET, exif=exif))
    (tmp_path / "large.jpg").write_bytes(picture(1, side=300, format="JPEG"))
    ramp = Image.new("I;16", (64, 1))
    ramp.putdata([64 * level for level in range(64)])
    ramp.resize((64, 64)).save(tmp_path / "deep.png")
    pictures = Pictures(open_folder(tmp_path), OPEN)
    thumbnails = {
        name: base64.b64decode(pictures.thumbnail(name).split(",")[1])
        for name in ("small.jpg", "large.jpg", "deep.png")
    }
    assert b"Roe" in (tmp_path / "small.jpg").read_bytes()
    assert b"Roe" not in thumbnails["small.jpg"]
    assert Image.open(BytesIO(thumbnails["large.jpg"])).size == (128, 128)
    levels = list(Image.open(BytesIO(thumbnails["deep.png"])).convert("L").crop((0, 32, 64, 33)).tobytes())
    assert max(levels) > 245
    assert min(levels) < 10
    assert 100 < levels[32] < 155


ASKING = """<pre id="asked"></pre><script>addEventListener("load", () => {
  const widths = [...document.images].map((image) => image.naturalWidth);
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.getElementById("asked").textContent = JSON.stringify({widths, fetched});
});</script>"""


def asked_of_a_browser(page: str, tmp_path: Path) -> dict[str, Any]:
    """Widths of the pictures as a browser decodes them, and what it tried to fetch where nothing forbids it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium is installed")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", ASKING + "</body>")
    (tmp_path / "asking.html").write_text(page, encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *words, str(tmp_path / "asking.html")], capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="asked">(.+?)</pre>', done.stdout)
    assert found, done.stderr
    asked: dict[str, Any] = json.loads(found[1])
    return asked


def test_a_browser_shows_the_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    check(dirty_corpus(tmp_path / "c"), OPEN, page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert asked_of_a_browser(page, tmp_path) == {"widths": [24, 24], "fetched": []}
    broken = page.replace(
        "</main>", '<img src="http://127.0.0.1:9/x.png"><img src="data:image/jpeg;base64,AAAA"></main>'
    )
    asked = asked_of_a_browser(broken, tmp_path)
    assert asked == {"widths": [24, 24, 0, 0], "fetched": ["http://127.0.0.1:9/x.png"]}
