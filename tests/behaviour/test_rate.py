"""`pefomed-ray rate` as a rater uses it: a real browser, keys alone, on the screens of a desk and of a phone."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pefomed_ray.evaluation.ratings import Rating, read_ratings
from tests.rating_shards import write_answers, write_shards

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

TIMEOUT_S = 60
ITEMS = 20
DESK = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
Rate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip(reason="there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `vqa` and `report` shards and predictions about them."""
    folder = tmp_path_factory.mktemp("rated")
    vqa = write_shards(folder / "vqa", "vqa", ITEMS)
    write_answers(folder / "vqa.jsonl", vqa)
    reports = write_shards(folder / "report", "report", ITEMS // 2)
    write_answers(folder / "right.jsonl", reports)
    write_answers(folder / "wrong.jsonl", reports, shift=1)
    return folder


def words(corpus: Path, task: str, *more: str) -> list[str]:
    files = ["vqa.jsonl"] if task == "vqa" else ["right.jsonl", "wrong.jsonl"]
    given = [*(str(corpus / file) for file in files), "--data", str(corpus / task), "--json", *more]
    return [sys.executable, "-m", "pefomed_ray", "rate", *given]


def run(corpus: Path, task: str, *more: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = words(corpus, task, *more)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@contextmanager
def served(corpus: Path, task: str, cwd: Path, *more: str) -> Iterator[dict[str, Any]]:
    """What the verb prints once it serves; ended by Ctrl-C, after which `stderr` is there too."""
    process = subprocess.Popen(
        words(corpus, task, *more), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            pytest.fail(process.communicate()[1])
        told: dict[str, Any] = json.loads(line)
        yield told
        process.send_signal(signal.SIGINT)
        _, told["stderr"] = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, told["stderr"]
        assert "Traceback" not in told["stderr"]
    finally:
        process.kill()
        process.wait()


@contextmanager
def opened(browser: Browser, url: str, screen: dict[str, int] = DESK) -> Iterator[Page]:
    """The page, in a browser of its own; nothing may be asked of anyone but this machine, nothing may go wrong."""
    context = browser.new_context(viewport=screen)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert len(asked) > 3
    assert {urlsplit(one).hostname for one in asked} == {"127.0.0.1"}
    assert wrong == []


def begin(page: Page, name: str) -> None:
    expect(page.locator("#name")).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    expect(page.locator("#name-dialog")).to_be_hidden()


def at_item(page: Page, number: int) -> None:
    expect(page.locator("#place")).to_have_text(re.compile(f"^Item {number} of "))


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def until(page: Page, condition: str) -> None:
    """Wait for a condition; playwright's own way would have the page evaluate text, which its policy forbids."""
    end = time.monotonic() + TIMEOUT_S
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def exported(corpus: Path, task: str, cwd: Path) -> list[Rating]:
    done = run(corpus, task, "--export", "out.csv", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return read_ratings(cwd / "out.csv")


def test_twenty_items_by_keyboard_with_a_reload_in_the_middle(browser: Browser, corpus: Path, tmp_path: Path) -> None:
    given: dict[str, int] = {}
    with served(corpus, "vqa", tmp_path) as told, opened(browser, told["url"]) as page:
        assert (told["task"], told["items"]) == ("vqa", ITEMS)
        begin(page, "Anna")
        assert "token" not in page.url
        for number in range(1, ITEMS + 1):
            at_item(page, number)
            score = number % 2
            given[page.locator("#question").inner_text()] = score
            page.keyboard.press(str(score))
            if number == 11:
                at_item(page, 12)
                page.keyboard.press("c")
                page.keyboard.type("not yet saved")
                page.reload()
                at_item(page, 12)
                expect(page.locator("#rater")).to_have_text("Anna")
                expect(page.locator("#done")).to_have_text("11 rated")
                expect(page.locator("#comment")).to_have_value("not yet saved")
        expect(page.locator("#end-title")).to_have_text("All done. Thank you!")
        expect(page.locator("#done")).to_have_text(f"{ITEMS} rated")
    assert f"Anna: {ITEMS} rated, 0 skipped" in told["stderr"]
    assert str(tmp_path / "ratings.sqlite") in told["stderr"]
    ratings = exported(corpus, "vqa", tmp_path)
    assert sum(rating.score or 0 for rating in ratings) == sum(given.values()) == ITEMS // 2
    assert len({rating.id for rating in ratings}) == ITEMS
    assert [rating.comment for rating in ratings if rating.comment] == ["not yet saved"]
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "rater,id,score,skipped,comment,rated_at"


@pytest.mark.long
def test_skip_undo_comment_and_moving(browser: Browser, corpus: Path, tmp_path: Path) -> None:
    with served(corpus, "report", tmp_path) as told, opened(browser, told["url"]) as page:
        begin(page, "Anna")
        at_item(page, 1)
        press(page, "s", "4", "3")
        at_item(page, 4)
        expect(page.locator("#done")).to_have_text("2 rated, 1 skipped")
        press(page, "u")
        at_item(page, 3)
        expect(page.locator("#scores [aria-pressed=true]")).to_have_count(0)
        press(page, "u", "u", "u")
        at_item(page, 1)
        expect(page.locator("#status")).to_have_text("Nothing to undo.")
        expect(page.locator("#done")).to_have_text("0 rated")
        press(page, "c")
        page.keyboard.type("4 is a digit, ? and s are text")
        press(page, "Escape")
        expect(page.locator("#status")).to_have_text("Comment saved.")
        at_item(page, 1)
        press(page, "2")
        at_item(page, 2)
        press(page, "9", "Control+1", "Alt+1")  # no keys of this page
        press(page, "ArrowLeft")
        at_item(page, 1)
        expect(page.locator("#scores [aria-pressed=true]")).to_have_attribute("data-score", "2")
        expect(page.locator("#comment")).to_have_value("4 is a digit, ? and s are text")
        press(page, "?")
        expect(page.locator("#help")).to_be_visible()
        press(page, "1")
        press(page, "Escape")
        expect(page.locator("#help")).to_be_hidden()
        press(page, "ArrowRight", "ArrowRight")
        at_item(page, 3)
    (rating,) = {(row.score, row.skipped, row.comment) for row in exported(corpus, "report", tmp_path)}
    assert rating == (2, False, "4 is a digit, ? and s are text")


@pytest.mark.long
def test_two_raters_at_once_each_in_their_own_order(browser: Browser, corpus: Path, tmp_path: Path) -> None:
    with (
        served(corpus, "report", tmp_path) as told,
        opened(browser, told["url"]) as anna,
        opened(browser, told["url"], PHONE) as bela,
    ):
        begin(anna, "Anna")
        begin(bela, "Bela")
        seen: dict[str, list[str]] = {"Anna": [], "Bela": []}
        for number in range(1, told["items"] + 1):
            for page, name, key in ((anna, "Anna", "4"), (bela, "Bela", "0")):
                at_item(page, number)
                seen[name].append(page.locator("#reference").inner_text() + page.locator("#answer").inner_text())
                page.keyboard.press(key)
        for page in (anna, bela):
            expect(page.locator("#end-title")).to_have_text("All done. Thank you!")
    assert sorted(seen["Anna"]) == sorted(seen["Bela"])
    assert seen["Anna"] != seen["Bela"]
    ratings = exported(corpus, "report", tmp_path)
    assert {(row.rater, row.score) for row in ratings} == {("Anna", 4), ("Bela", 0)}
    assert {row.model for row in ratings} == {"right", "wrong"}
    assert len(ratings) == 2 * ITEMS


@pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
def test_everything_needed_is_on_the_screen_and_in_reach_of_the_keyboard(
    browser: Browser, corpus: Path, tmp_path: Path, screen: dict[str, int]
) -> None:
    with served(corpus, "report", tmp_path) as told, opened(browser, told["url"], screen) as page:
        begin(page, "Anna")
        at_item(page, 1)
        expect(page.locator("#images img")).to_have_count(2)
        until(page, "[...document.images].slice(0, 2).every(image => image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"]
        for name in ("#images img >> nth=0", "#scores button >> nth=0", "#scores button >> nth=4", "#answer", "#skip"):
            expect(page.locator(name)).to_be_in_viewport(ratio=0.99)
        covered = page.evaluate("answer.getBoundingClientRect().bottom - bar.getBoundingClientRect().top")
        assert covered <= 0
        press(page, "c")
        expect(page.locator("#comment")).to_be_focused()
        covered = page.evaluate("comment.getBoundingClientRect().bottom - bar.getBoundingClientRect().top")
        assert covered <= 0
        press(page, "Escape")
        expect(page.locator("#warning")).to_have_text("Not for diagnosis.")
        expect(page.locator("#warning")).to_be_in_viewport(ratio=0.99)
        reached: list[str] = []
        for _ in range(20):
            press(page, "Tab")
            reached.append(
                page.evaluate(
                    "(at => at.id || at.dataset.score || at.getAttribute('aria-label') || '')(document.activeElement)"
                )
            )
            if reached[-1] and page.evaluate("document.activeElement !== document.body"):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", reached[-1]
        for name in ("rater", "open-help", "Enlarge image 1 of 2", "4", "0", "comment", "undo", "skip", "next"):
            assert name in reached
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, input, textarea, img')].filter(at => "
            "!(at.textContent.trim() || at.ariaLabel || at.labels?.length || at.alt || at.id === 'zoom-image'))"
            ".map(at => at.outerHTML)"
        )
        assert unnamed == []


@pytest.mark.long
def test_a_picture_is_enlarged_by_key_and_by_click(browser: Browser, corpus: Path, tmp_path: Path) -> None:
    with served(corpus, "report", tmp_path) as told, opened(browser, told["url"]) as page:
        begin(page, "Anna")
        at_item(page, 1)
        press(page, "z")
        expect(page.locator("#zoom-place")).to_have_text("1 of 2")
        picture = page.locator("#zoom-image")
        until(page, "document.getElementById('zoom-image').offsetHeight > 500")
        fitting = picture.bounding_box()
        press(page, "+", "+")
        until(page, f"document.getElementById('zoom-image').offsetHeight > {1.9 * fitting['height']}")
        before = page.evaluate("document.getElementById('zoom-view').scrollTop")
        press(page, "ArrowDown")
        until(page, f"document.getElementById('zoom-view').scrollTop > {before}")
        press(page, "4")  # rates nothing while a picture is looked at
        press(page, "z")
        expect(page.locator("#zoom-place")).to_have_text("2 of 2")
        press(page, "z")
        expect(page.locator("#zoom")).to_be_hidden()
        at_item(page, 1)
        page.locator("#images button").nth(1).click()
        expect(page.locator("#zoom-place")).to_have_text("2 of 2")
        press(page, "Escape")
        expect(page.locator("#zoom")).to_be_hidden()
        expect(page.locator("#done")).to_have_text("0 rated")


@pytest.mark.long
def test_when_the_program_is_gone_the_page_says_so_and_keeps_its_place(
    browser: Browser, corpus: Path, tmp_path: Path
) -> None:
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    with served(corpus, "vqa", tmp_path) as told:
        page.goto(told["url"])
        begin(page, "Anna")
        press(page, "1")
        at_item(page, 2)
    press(page, "1")
    expect(page.locator("#trouble")).to_contain_text("nothing is saved")
    expect(page.locator("#trouble")).to_be_in_viewport(ratio=0.99)
    at_item(page, 2)
    expect(page.locator("#done")).to_have_text("1 rated")
    port = str(urlsplit(told["url"]).port)
    with served(corpus, "vqa", tmp_path, "--port", port) as told:
        press(page, "1")
        expect(page.locator("#trouble")).to_contain_text("Open the address that it printed")
        page.goto(told["url"])  # in the same tab: its name and place are known
        at_item(page, 2)
        expect(page.locator("#done")).to_have_text("1 rated")
        press(page, "1")
        at_item(page, 3)
    context.close()
    assert [rating.score for rating in exported(corpus, "vqa", tmp_path)] == [1, 1]


def test_ratings_go_out_and_come_in_as_csv(corpus: Path, tmp_path: Path) -> None:
    text = "rater,id,score,skipped,comment,rated_at,model\nAnna,row-1,3,false,fine,2026-01-31T12:00:00+00:00,right\n"
    (tmp_path / "in.csv").write_text(text)
    done = run(corpus, "report", "--import", "in.csv", "--export", "out.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "store": str(tmp_path / "ratings.sqlite"),
        "new": 1,
        "same": 0,
        "conflicts": [],
        "ratings": str(tmp_path / "out.csv"),
        "rows": 1,
        "raters": {"Anna": {"rated": 1, "skipped": 0}},
    }
    assert (tmp_path / "out.csv").read_text() == text
    (tmp_path / "in.csv").write_text(text.replace(",3,", ",1,").replace("2026", "2027"))
    done = run(corpus, "report", "--import", "in.csv", cwd=tmp_path)
    (conflict,) = json.loads(done.stdout.splitlines()[-1])["conflicts"]
    assert conflict == {"rater": "Anna", "id": "row-1", "model": "right", "in_store": 3, "in_file": 1, "kept": "file"}


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--split", "testing"], 2, "split 'testing' is not one of train, validation, test"),
        (["--split", "train"], 3, "hold no rows for split 'train'"),
        (["--import", "none.csv"], 2, "'none.csv' does not exist"),
        (["--store", "none/ratings.sqlite"], 2, "does not exist; make it first"),
        (["--export", "none/out.csv"], 2, "cannot be written"),
        (["--data", "nowhere"], 3, "does not hold shards"),
        (["--port", "70000"], 2, "65535"),
    ],
)
def test_what_is_wrong_is_named_with_its_exit_code(
    corpus: Path, tmp_path: Path, more: list[str], code: int, named: str
) -> None:
    done = run(corpus, "vqa", *more, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert named in " ".join(done.stderr.split()).replace(f"{tmp_path}/", ""), done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(corpus: Path, tmp_path: Path) -> None:
    with served(corpus, "vqa", tmp_path) as told:
        port = str(urlsplit(told["url"]).port)
        done = run(corpus, "vqa", "--port", port, cwd=tmp_path)
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in " ".join(done.stderr.split())
