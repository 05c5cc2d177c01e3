"""The endpoint's page as people use it: a real browser against the real application, over a stub that answers."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn

from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api_error import ApiError
from tests.dicom_files import dicom
from tests.served_stub import DIGEST, KEY, REPORTS, StubBackend, png, stub_api

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

pytestmark = pytest.mark.long

TIMEOUT_S = 30
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
QUESTION = " ".join(f"word{number}" for number in range(20))
ANSWER = " ".join([*QUESTION.split()[::-1], "(1)"])
FILE = {"name": "chest.png", "mimeType": "image/png", "buffer": png()}

HANDED_OVER = """(kind, target, bytes) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], "handed.png", { type: "image/png" }));
  const more = { bubbles: true, cancelable: true };
  const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: files, ...more })
    : new DragEvent(kind, { dataTransfer: files, ...more });
  return document.querySelector(target).dispatchEvent(event);
}"""
"""As the browser does when a file is dropped or pasted; false where the page took it."""
SEEN = """() => {
  window.seen = [];
  const look = () => window.seen.push(document.querySelector("#answers .text")?.textContent);
  new MutationObserver(look).observe(document.getElementById("answers"), { childList: true, subtree: true });
}"""
EVENTS = """async ([text, size]) => {
  const bytes = new TextEncoder().encode(text);
  const body = new ReadableStream({ start(controller) {
    for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
    controller.close();
  } });
  const found = [];
  for await (const data of eventData(body)) found.push(data);
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip(reason="there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(backend: StubBackend) -> Iterator[str]:
    """Address of the application over a stub."""
    app = stub_api(backend, ServeConfig(request_timeout_s=TIMEOUT_S))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            end = time.monotonic() + TIMEOUT_S
            while not server.started:
                assert time.monotonic() < end
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)


@contextmanager
def opened(browser: Browser, backend: StubBackend | None = None, screen: dict[str, int] = DESK) -> Iterator[Page]:
    """The page. Whatever a test did: nothing is stored, nothing was asked of another host, no script failed."""
    context = browser.new_context(viewport=screen)
    try:
        with served(backend or StubBackend(delay_s=0.02)) as url:
            page = context.new_page()
            page.set_default_timeout(TIMEOUT_S * 1000)
            asked: list[str] = []
            wrong: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.goto(url)
            yield page
            check_nothing_is_stored(page)
            assert len(asked) >= 3
            assert {urlsplit(one).netloc for one in asked if not one.startswith("data:")} == {urlsplit(url).netloc}
            assert [one for one in wrong if not one.startswith("Failed to load resource")] == []  # a refusal's status
    finally:
        context.close()


def check_nothing_is_stored(page: Page) -> None:
    kept = "[...Object.entries(localStorage), ...Object.entries(sessionStorage), document.cookie]"
    assert page.evaluate(kept) == [""]
    assert page.context.cookies() == []
    assert KEY not in page.url
    assert urlsplit(page.url).query == ""
    assert KEY not in page.content()


def give_key(page: Page, key: str = KEY) -> None:
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")


def choose(page: Page, *files: dict[str, Any]) -> None:
    """Through the file input, and wait until they are shown."""
    page.locator("#files").set_input_files(list(files))
    expect(page.locator("#images img")).to_have_count(len(files))


def prepared(page: Page) -> None:
    """A key and an image."""
    give_key(page)
    choose(page, FILE)


def ask(page: Page, question: str) -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")


def hand_over(page: Page, kind: str, target: str) -> None:
    taken = page.evaluate(f"([kind, target, bytes]) => !({HANDED_OVER})(kind, target, bytes)", [kind, target, [*png()]])
    assert taken


def tab_to(page: Page, name: str) -> None:
    for _ in range(20):
        if page.evaluate("document.activeElement.id") == name:
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab does not lead to {name}")


def sizes(page: Page) -> Sequence[int]:
    size: Sequence[int] = page.evaluate(
        "[...document.querySelectorAll('#images img')].flatMap(image => [image.naturalWidth, image.naturalHeight])"
    )
    return size


def test_a_wrong_key_is_refused_and_the_right_one_let_in(browser: Browser) -> None:
    with opened(browser) as page:
        expect(page).to_have_title("PeFoMed-Ray")
        expect(page.locator("#notice")).to_have_text("Research use. Not for diagnosis or any clinical use.")
        for wrong in ("wrong", "schlüssel€"):
            give_key(page, wrong)
            expect(page.locator("#key-trouble")).to_have_text("This key is not valid.")
            expect(page.locator("#asking")).to_be_hidden()
        give_key(page)
        expect(page.locator("#asking")).to_be_visible()
        assert page.locator("#model option").all_inner_texts() == [
            "champion (vqa)",
            "⚠ reports (report)",
            "base without adapter",
        ]


def test_a_question_by_keyboard_alone_is_answered_word_by_word(browser: Browser) -> None:
    backend = StubBackend(delay_s=0.02)
    with opened(browser, backend) as page:
        give_key(page)
        expect(page.locator("#files")).to_be_focused()
        choose(page, FILE)
        page.evaluate(SEEN)
        tab_to(page, "open-more")
        page.keyboard.press("Enter")
        tab_to(page, "max-tokens")
        page.keyboard.type("9")
        for _ in range(5):
            page.keyboard.press("Shift+Tab")
        expect(page.locator("#question")).to_be_focused()
        page.keyboard.type(QUESTION)
        page.keyboard.press("Shift+Enter")
        page.keyboard.press("Enter")
        card = page.locator("#answers .card")
        expect(card.locator(".text")).to_have_text(ANSWER)
        expect(card).to_have_attribute("aria-busy", "false")
        expect(card.locator(".facts")).to_contain_text(f"embedded:champion · adapter {DIGEST[:12]} · 21 tokens · ")
        expect(page.locator("#status")).to_have_text("Answered.")
        seen = page.evaluate("window.seen")
        assert len(set(seen)) > 5
        assert all(ANSWER.startswith(part) for part in seen)
        expect(page.locator("#answers")).to_have_attribute("aria-live", "polite")
    (asked,) = backend.asked
    assert (asked.question, asked.images, asked.sampling.max_tokens) == (QUESTION, (png(),), 9)


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_dropped_or_pasted_anywhere_is_taken(browser: Browser, kind: str) -> None:
    with opened(browser) as page:
        hand_over(page, kind, "header")
        expect(page.locator("#key-trouble")).to_have_text("The key first, then the image.")
        give_key(page)
        expect(page.locator("#asking")).to_be_visible()
        if kind == "drop":
            hand_over(page, "dragover", "body")
            expect(page.locator("#drop-hint")).to_be_visible()
        hand_over(page, kind, "#question" if kind == "paste" else "header")
        expect(page.locator("#images .name")).to_have_text("handed.png")
        expect(page.locator("#images img")).to_be_visible()
        expect(page.locator("#drop-hint")).to_be_hidden()
        assert sizes(page) == [8, 8]
        page.locator("#examples button").first.click()
        page.keyboard.press("Enter")
        expect(page.locator("#answers .text")).to_have_text("fracture? a there Is (1)")


def test_two_adapters_side_by_side(browser: Browser) -> None:
    with opened(browser) as page:
        prepared(page)
        page.locator("#other").select_option(label="⚠ reports (report)")
        expect(page.locator("#warnings")).to_contain_text("bundle 1234 has rank 99")
        ask(page, QUESTION)
        cards = page.locator("#answers .card")
        expect(cards.locator(".text")).to_have_text([ANSWER, ANSWER])
        expect(cards.nth(0).locator(".facts")).to_contain_text(DIGEST[:12])
        expect(cards.nth(1).locator(".facts")).to_contain_text(REPORTS[:12])
        left, right = (cards.nth(number).bounding_box() for number in range(2))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        page.set_viewport_size(PHONE)
        above, below = (cards.nth(number).bounding_box() for number in range(2))
        assert above["y"] + above["height"] <= below["y"]


def test_a_report_needs_no_question_and_an_answer_to_a_question_does(browser: Browser) -> None:
    with opened(browser) as page:
        give_key(page)
        ask(page, "")
        expect(page.locator("#ask-trouble")).to_have_text("Add an image first.")
        choose(page, FILE)
        ask(page, "")
        expect(page.locator("#ask-trouble")).to_have_text("Write a question first.")
        page.locator("#model").select_option(label="⚠ reports (report)")
        expect(page.locator("#question-note")).to_contain_text("Not needed")
        ask(page, "")
        expect(page.locator("#ask-trouble")).to_be_empty()
        expect(page.locator("#answers .text")).to_have_text("(1)")
        page.locator("#model").select_option(label="base without adapter")
        expect(page.locator("#question-note")).not_to_contain_text("Not needed")
        ask(page, "Why?")
        expect(page.locator("#answers .text")).to_have_text(["Why? (1)", "(1)"])
        expect(page.locator("#answers .facts").first).to_contain_text("embedded · no adapter · ")


def test_a_dicom_file_is_shown_and_asked_about(browser: Browser) -> None:
    backend = StubBackend()
    pixels = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20)
    with opened(browser, backend) as page:
        give_key(page)
        choose(page, {"name": "film", "mimeType": "", "buffer": dicom(pixels, PatientName="Jane")})
        expect(page.locator("#images img")).to_be_visible()
        assert sizes(page) == [20, 12]
        ask(page, "Which organ?")
        expect(page.locator("#answers .text")).to_have_text("organ? Which (1)")
    assert backend.asked[0].images[0].startswith(b"\x89PNG")


def test_four_images_at_most_each_removable(browser: Browser) -> None:
    with opened(browser) as page:
        give_key(page)
        files = [{**FILE, "name": f"{number}.png", "buffer": png((number, 4))} for number in range(1, 6)]
        page.locator("#files").set_input_files(files)
        expect(page.locator("#image-trouble")).to_have_text("4 images at most; left out: 5.png")
        expect(page.locator("#images img")).to_have_count(4)
        page.get_by_role("button", name="Remove image 2, 2.png").click()
        assert page.locator("#images .name").all_inner_texts() == ["1.png", "3.png", "4.png"]
        expect(page.locator("#files")).to_be_focused()
        ask(page, "All?")
        expect(page.locator("#answers .text")).to_have_text("All? (3)")


def test_what_the_endpoint_refuses_is_said_and_nothing_is_lost(browser: Browser) -> None:
    backend = StubBackend(ApiError(503, "the replica went away"), delay_s=0.02, fails_after=3)
    with opened(browser, backend) as page:
        prepared(page)
        page.locator("#files").set_input_files([{**FILE, "name": "notes.txt", "buffer": b"no picture"}])
        expect(page.locator("#image-trouble")).to_have_text(
            "notes.txt: the body is neither a JPEG, a PNG nor a DICOM file"
        )
        ask(page, QUESTION)
        card = page.locator("#answers .card").first
        expect(card.locator(".trouble")).to_have_text("the replica went away")
        expect(card.locator(".text")).to_have_text("word19 word18 word17")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<html>bad gateway"))
        page.locator("#send").click()
        expect(card.locator(".trouble")).to_have_text("The endpoint answered 502.")
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json={}))
        page.locator("#send").click()
        expect(page.locator("#key-trouble")).to_have_text("This key is not valid.")
        page.unroute("**/v1/chat/completions")
        give_key(page)
        backend.failure = None
        expect(page.locator("#images img")).to_have_count(1)
        expect(page.locator("#question")).to_have_value(QUESTION)
        page.locator("#send").click()
        expect(card.locator(".text")).to_have_text(ANSWER)
        expect(page.locator("#answers .text").last).to_have_text("word19 word18 word17")


def test_an_endpoint_that_is_gone_is_said_and_nothing_is_lost(browser: Browser) -> None:
    with opened(browser) as page:
        prepared(page)
        page.route("**/v1/*/*", lambda route: route.abort())
        ask(page, QUESTION)
        expect(page.locator("#answers .trouble")).to_contain_text("The endpoint did not answer.")
        expect(page.locator("#images img")).to_have_count(1)
        page.unroute("**/v1/*/*")
        body = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
        page.route("**/v1/*/*", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        page.locator("#send").click()
        expect(page.locator("#answers .text").first).to_have_text("half")
        expect(page.locator("#answers .trouble").first).to_have_text("The answer was cut off.")


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_ends_the_answer_and_keeps_what_came(browser: Browser, by: str) -> None:
    backend = StubBackend(delay_s=0.2)
    with opened(browser, backend) as page:
        prepared(page)
        ask(page, QUESTION)
        expect(page.locator("#answers .text")).to_contain_text("word18")
        page.keyboard.press("Escape") if by == "Escape" else page.locator("#stop").click()
        expect(page.locator("#answers .trouble")).to_have_text("Stopped.")
        expect(page.locator("#answers .text")).to_contain_text("word19 word18")
        expect(page.locator("#stop")).to_be_disabled()
        expect(page.locator("#question")).to_be_focused()
        end = time.monotonic() + TIMEOUT_S
        while not backend.closed:
            assert time.monotonic() < end
            page.wait_for_timeout(20)
        assert page.locator("#answers .text").inner_text() != ANSWER


def test_to_forget_the_key_is_to_forget_everything(browser: Browser) -> None:
    with opened(browser) as page:
        prepared(page)
        ask(page, QUESTION)
        expect(page.locator("#answers .text")).to_have_text(ANSWER)
        page.locator("#forget").click()
        expect(page.locator("#asking")).to_be_hidden()
        expect(page.locator("#images img, #answers .card")).to_have_count(0)
        give_key(page)
        expect(page.locator("#asking")).to_be_visible()
        expect(page.locator("#question")).to_have_value("")


def test_markup_in_an_answer_is_text(browser: Browser) -> None:
    markup = "<img/src=x/onerror=alert(1)>"
    with opened(browser) as page:
        prepared(page)
        ask(page, markup)
        expect(page.locator("#answers .text")).to_have_text(f"{markup} (1)")
        expect(page.locator("#answers .text *")).to_have_count(0)


def test_events_are_read_wherever_they_are_cut(browser: Browser) -> None:
    text = (
        ': hello\r\ndata: {"ü": "€"}\r\n\r\nevent: x\r\ndata:one\r\ndata: two\n\n\n\rdata: [DONE]\r\rdata: never ended'
    )
    with opened(browser) as page:
        for size in (1, 2, 3, 7, len(text) * 2):
            assert page.evaluate(EVENTS, [text, size]) == ['{"ü": "€"}', "one\ntwo", "[DONE]"]


@pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
def test_it_fits_the_screen_and_everything_has_a_name_and_shows_its_focus(
    browser: Browser, screen: dict[str, int]
) -> None:
    width = "document.documentElement.scrollWidth"
    with opened(browser, screen=screen) as page:
        assert page.evaluate(width) <= screen["width"]
        give_key(page)
        choose(page, {**FILE, "name": "x" * 200 + ".png"}, FILE)
        page.locator("#other").select_option(index=2)
        page.locator("summary").click()
        ask(page, "x" * 200)
        expect(page.locator("#status")).to_have_text("Answered.")
        assert page.evaluate(width) <= screen["width"]
        unnamed = (
            "[...document.querySelectorAll('button, input, select, textarea, img')]"
            ".filter(at => !(at.tagName === 'BUTTON' && at.textContent.trim() || at.labels?.length || at.alt))"
            ".map(at => at.outerHTML)"
        )
        assert page.evaluate(unnamed) == []
        page.locator("#forget").focus()
        for _ in range(14):
            page.keyboard.press("Tab")
            shown = (
                "(at => getComputedStyle(at.id === 'files' ? at.labels[0] : at).outlineStyle)(document.activeElement)"
            )
            if page.evaluate("document.activeElement !== document.body"):
                assert page.evaluate(shown) == "solid", page.evaluate("document.activeElement.outerHTML")
