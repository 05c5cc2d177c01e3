"""The routes in process, over a stub that answers: keys, limits, shapes, and nothing of a request in a refusal."""

import asyncio
import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api import ServedModel, make_api
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.keys import hash_key
from pefomed_ray.serving.schemas import Ask, Completion

KEY = "k" * 43
DIGEST = "d" * 64
CANARY = "Jane Roe MRN 0x7f12345"
CONFIG = ServeConfig(max_body_bytes=200_000, max_new_tokens=64, request_timeout_s=0.5)
MODEL = ServedModel("embedded", "champion", DIGEST, "vqa", 1_700_000_000, {"template": "short"})
LEAK = re.compile(r"0x|Traceback|/site-packages|\.py|Jane|MRN")


class Stub:
    """Answers with the question's length; fails as told."""

    def __init__(self, failure: Exception | None = None, delay_s: float = 0.0) -> None:
        self.failure = failure
        self.delay_s = delay_s
        self.asked: list[Ask] = []

    async def ready(self) -> None:
        if self.failure:
            raise self.failure

    async def answer(self, ask: Ask) -> Completion:
        await asyncio.sleep(self.delay_s)
        self.asked.append(ask)
        if self.failure:
            raise self.failure
        return Completion(f"{len(ask.question)} characters", DIGEST, 40, 3, finished=ask.max_tokens != 3)


def client_of(stub: Stub, key: str | None = KEY) -> TestClient:
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    return TestClient(make_api(MODEL, [hash_key(KEY)], CONFIG, stub), headers=headers, raise_server_exceptions=False)


def png_url(size: tuple[int, int] = (8, 8)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(text: str | None = "Is it normal?", *urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": parts + ([{"type": "text", "text": text}] if text is not None else [])}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "champion", "messages": [user("Is it normal?", png_url())], **changes}


def assert_refused(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not LEAK.search(response.text), response.text
    return error


def test_chat_completion() -> None:
    stub = Stub()
    response = client_of(stub).post("/v1/chat/completions", json=body(max_tokens=7, seed=1, user="u", temperature=0))
    assert response.status_code == 200
    reply = response.json()
    assert reply["model"] == "embedded:champion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "13 characters"}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"] == {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}
    assert reply["system_fingerprint"] == response.headers["x-adapter-sha256"] == DIGEST
    assert response.headers["x-notice"] == "Not for diagnosis or any clinical use."
    assert stub.asked[0].max_tokens == 7


def test_cut_answers_say_length_and_the_newer_name_wins() -> None:
    response = client_of(Stub()).post("/v1/chat/completions", json=body(max_tokens=9, max_completion_tokens=3))
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_last_user_text_and_all_user_images_are_asked() -> None:
    stub = Stub()
    first, second = png_url(), png_url((9, 9))
    messages = [
        {"role": "system", "content": "Be brief."},
        user("old", first),
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": [*user("one", second)["content"], {"type": "text", "text": "two"}]},
    ]
    assert client_of(stub).post("/v1/chat/completions", json=body(messages=messages)).status_code == 200
    assert stub.asked[0].question == "one\ntwo"
    assert stub.asked[0].images == tuple(base64.b64decode(url.split(",")[1]) for url in (first, second))


def test_models_with_lineage_and_readiness() -> None:
    client = client_of(Stub())
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["embedded:champion", "embedded"]
    assert models[0]["lineage"]["digest"] == DIGEST
    assert client.get("/readyz").json() == {"status": "ready"}
    assert_refused(client_of(Stub(ApiError(503, "the replica was lost"))).get("/readyz"), 503)


BAD_REQUESTS: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("temperature", body(temperature=0.7), 400, "temperature"),
    ("stream", body(stream=True), 400, "stream"),
    ("n", body(n=10**9), 400, "n"),
    ("many tokens", body(max_tokens=10**9), 400, "max_tokens"),
    ("no tokens", body(max_completion_tokens=0), 400, "max_completion_tokens"),
    ("number as text", body(max_tokens="5"), 400, "max_tokens"),
    ("chat_template", body(chat_template=CANARY), 400, "chat_template"),
    ("tools", body(tools=[]), 400, "tools"),
    ("odd key", body(**{CANARY: 1}), 400, None),
    ("odd nested key", body(messages=[{**user("q", png_url()), CANARY: 1}]), 400, "messages"),
    ("role", body(messages=[{"role": CANARY, "content": "x"}]), 400, "messages"),
    ("part type", body(messages=[{"role": "user", "content": [{"type": CANARY}]}]), 400, "messages"),
    (
        "two in a part",
        body(messages=[{"role": "user", "content": [{"type": "text", "image_url": {"url": CANARY}}]}]),
        400,
        "messages",
    ),
    ("content", body(messages=[{"role": "user", "content": None}]), 400, "messages"),
    ("no messages", body(messages=[]), 400, "messages"),
    ("65 messages", body(messages=[user("x", png_url())] * 65), 400, "messages"),
    ("assistant only", body(messages=[{"role": "assistant", "content": CANARY}]), 400, "messages"),
    ("no text", body(messages=[user(None, png_url())]), 400, "messages"),
    ("blank text", body(messages=[user("  ", png_url())]), 400, "messages"),
    ("long text", body(messages=[user("x" * 4001, png_url())]), 400, "messages"),
    ("no image", body(messages=[user(CANARY)]), 400, "messages"),
    ("17 images", body(messages=[user(CANARY, *[png_url()] * 17)]), 400, "messages"),
    (
        "system image",
        body(messages=[{**user(CANARY, png_url()), "role": "system"}, user("q", png_url())]),
        400,
        "messages",
    ),
    ("bad base64", body(messages=[user(CANARY, "data:image/png;base64,@@@@")]), 400, "messages"),
    ("other model", body(model=CANARY), 404, "model"),
    ("base model", body(model="embedded"), 404, "model"),
    ("model number", body(model=5), 400, "model"),
]


@pytest.mark.parametrize(
    ("changed", "status", "param"), [row[1:] for row in BAD_REQUESTS], ids=[r[0] for r in BAD_REQUESTS]
)
def test_bad_requests(changed: dict[str, Any], status: int, param: str | None) -> None:
    stub = Stub()
    error = assert_refused(client_of(stub).post("/v1/chat/completions", json=changed), status)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert stub.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://example.com/a.png",
        "http://[::ffff:a9fe:a9fe]/",
        "http://2130706433/",
        "file:///etc/passwd",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:text/html;base64,PGI+",
        "data:image/tiff;base64,SUkqAA==",
        "data:application/pdf;base64,JVBERg==",
        "data:image/png,raw",
        "",
    ],
)
def test_only_data_urls_of_jpeg_and_png(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connections(*arguments: object) -> None:
        raise AssertionError("an outbound connection was tried")

    monkeypatch.setattr("socket.socket.connect", no_connections)
    error = assert_refused(client_of(Stub()).post("/v1/chat/completions", json=body(messages=[user(CANARY, url)])), 400)
    assert error["code"] == "unsupported_image_url"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 10_000, b'{"a":' * 10_000, b'{"model":"\\ud800"}'],
    ids=["empty", "torn", "list", "null", "string", "not utf-8", "deep list", "deep object", "surrogate"],
)
def test_bodies_that_are_no_request(raw: bytes) -> None:
    assert_refused(client_of(Stub()).post("/v1/chat/completions", content=raw), 400)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1"])
def test_odd_numbers(number: str) -> None:
    raw = json.dumps(body()).replace('"model"', f'"temperature": {number}, "model"', 1)
    assert_refused(client_of(Stub()).post("/v1/chat/completions", content=raw), 400)


def test_body_limit_with_and_without_a_length() -> None:
    client = client_of(Stub())
    assert_refused(client.post("/v1/chat/completions", content=b"x" * 200_001), 413)
    chunks = (b"x" * 50_000 for _ in range(5))
    assert_refused(client.post("/v1/chat/completions", content=chunks), 413)


def routes_of(router: Any) -> Iterator[Route]:
    """Every route, those of included routers too, which FastAPI keeps nested."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes_of(inner)
        else:
            yield route


ALL_ROUTES = [
    (route.path, method)
    for route in routes_of(make_api(MODEL, [hash_key(KEY)], CONFIG, Stub()))
    for method in sorted(route.methods or ())
]
ROUTES = [(path, method) for path, method in ALL_ROUTES if path != "/healthz"]


def test_the_routes_are_the_known_ones() -> None:
    assert {path for path, _ in ROUTES} == {"/readyz", "/v1/models", "/v1/chat/completions"}


@pytest.mark.parametrize(("path", "method"), ROUTES)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}k"]
)
def test_every_route_wants_the_key(path: str, method: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = client_of(Stub(), key=None).request(method, path, headers=headers, content=b"{")
    assert_refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_host_header_does_not_talk_around_the_key() -> None:
    headers = {"Host": "a/?x="}
    assert client_of(Stub(), key=None).get("/v1/models", headers=headers).status_code == 401


def test_health_is_open_and_nothing_else_is_there() -> None:
    client = client_of(Stub(), key=None)
    assert client.get("/healthz").json() == {"status": "ok"}
    for path in ("/docs", "/redoc", "/openapi.json", "/metrics"):
        assert_refused(client.get(path), 404)
    assert_refused(client.put("/healthz"), 405)


def test_failures_say_nothing_of_their_cause(caplog: pytest.LogCaptureFixture) -> None:
    error = assert_refused(client_of(Stub(RuntimeError(CANARY))).post("/v1/chat/completions", json=body()), 500)
    assert error["type"] == "server_error"
    assert CANARY not in caplog.text
    assert "RuntimeError" in caplog.text


def test_overload_and_timeout() -> None:
    full = ApiError(429, "the queue is full", code="overloaded", headers={"Retry-After": "1"})
    response = client_of(Stub(full)).post("/v1/chat/completions", json=body())
    assert assert_refused(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    assert_refused(client_of(Stub(delay_s=5.0)).post("/v1/chat/completions", json=body()), 504)


def test_fastapi_own_validation_errors_do_not_repeat_the_input() -> None:
    app = make_api(MODEL, [hash_key(KEY)], CONFIG, Stub())

    @app.get("/typed")
    async def typed(number: int) -> int:
        return number

    assert_refused(TestClient(app).get("/typed", params={"number": CANARY}), 422)
