"""The routes in process, over a stub that answers: keys, limits, shapes, and nothing of a request in a refusal."""

import asyncio
import base64
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import PefomedError
from pefomed_ray.serving.api_error import ApiError
from pefomed_ray.serving.guard import Door
from tests.served_stub import (
    DIGEST,
    KEY,
    REPORTS,
    StubBackend,
    StubCatalogue,
    body,
    png,
    png_url,
    stub_api,
    user,
)

CANARY = "Jane Roe MRN 0x7f12345"
LEAK = re.compile(r"0x|Traceback|/site-packages|\.py|Jane|MRN")
CHAT = "/v1/chat/completions"


def client_of(backend: StubBackend | None = None, key: str | None = KEY, **config: Any) -> TestClient:
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    settings = ServeConfig.model_validate(
        {"max_body_bytes": 200_000, "max_new_tokens": 64, "request_timeout_s": 10} | config
    )
    return TestClient(stub_api(backend, settings), headers=headers, raise_server_exceptions=False)


def assert_refused(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not LEAK.search(response.text), response.text
    return error


def events_of(text: str) -> list[dict[str, Any]]:
    """What a stream holds; it must end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_chat_completion() -> None:
    stub = StubBackend()
    response = client_of(stub).post(CHAT, json=body(max_tokens=7, seed=1, user="u", temperature=0))
    assert response.status_code == 200
    reply = response.json()
    assert reply["model"] == "embedded:champion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "normal? it Is (1)", "refusal": None}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"] == {"prompt_tokens": 40, "completion_tokens": 4, "total_tokens": 44}
    assert reply["system_fingerprint"] == response.headers["x-adapter-sha256"] == DIGEST
    assert response.headers["x-notice"] == "Not for diagnosis or any clinical use."
    assert "x-not-used" not in response.headers
    assert stub.asked[0].sampling.max_tokens == 7


def test_a_stream_holds_what_the_whole_answer_is() -> None:
    stub = StubBackend()
    response = client_of(stub).post(CHAT, json=body(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adapter-sha256"] == DIGEST
    *chunks, last, usage = events_of(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "normal? it Is (1)"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {DIGEST}
    assert all(event["usage"] is None for event in events_of(client_of().post(CHAT, json=body(stream=True)).text))
    assert stub.closed == 1


def test_a_stream_that_is_refused_has_its_status_and_one_that_breaks_says_so() -> None:
    full = ApiError(429, "the queue is full", code="overloaded", headers={"Retry-After": "1"})
    assert_refused(client_of(StubBackend(full)).post(CHAT, json=body(stream=True)), 429)
    lost = ApiError(503, "the replica was lost")
    for failure, says in ((lost, "the replica was lost"), (RuntimeError(CANARY), "the endpoint failed")):
        stub = StubBackend(failure, fails_after=2)
        response = client_of(stub).post(CHAT, json=body(stream=True))
        assert response.status_code == 200
        assert "[DONE]" not in response.text
        assert says in json.loads(response.text.split("data: ")[-1])["error"]["message"]
        assert not LEAK.search(response.text)
        assert stub.closed == 1


def test_a_stream_is_cut_off_at_the_time_out() -> None:
    stub = StubBackend(delay_s=0.3)
    response = client_of(stub, request_timeout_s=0.5).post(CHAT, json=body(stream=True))
    assert json.loads(response.text.split("data: ")[-1])["error"]["code"] == "timeout"
    assert stub.closed == 1


def test_cut_answers_say_length_and_the_newer_name_wins() -> None:
    response = client_of().post(CHAT, json=body(max_tokens=9, max_completion_tokens=3))
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_last_user_text_and_all_user_images_are_asked() -> None:
    stub = StubBackend()
    first, second = png_url(), png_url((9, 9))
    messages = [
        {"role": "system", "content": "Be brief."},
        user("old", first),
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": [*user("one", second)["content"], {"type": "text", "text": "two"}]},
    ]
    response = client_of(stub).post(CHAT, json=body(messages=messages))
    assert response.status_code == 200
    assert response.headers["x-not-used"] == "system, user, assistant"
    assert stub.asked[0].question == "one\ntwo"
    assert stub.asked[0].images == tuple(base64.b64decode(url.split(",")[1]) for url in (first, second))


def test_sampling_and_what_other_clients_send_unasked() -> None:
    stub = StubBackend()
    neutral = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "store": False,
        "top_logprobs": None,
    }
    sampling = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "stop": ["a", "b"]}
    assert client_of(stub).post(CHAT, json=body(**neutral, **sampling)).status_code == 200
    assert client_of(stub).post(CHAT, json=body(temperature=1, stop="END")).status_code == 200
    assert client_of(stub).post(CHAT, json=body(seed=3)).status_code == 200
    first, second, third = (ask.sampling for ask in stub.asked)
    assert (first.temperature, first.top_p, first.seed, first.stop) == (0.7, 0.9, 5, ("a", "b"))
    assert second.seed is not None  # drawn once, so that any replica can go on
    assert second.stop == ("END",)
    assert third.temperature == 0.0


def test_models_the_base_and_text_alone() -> None:
    stub = StubBackend()
    client = client_of(stub)
    base = client.post(CHAT, json=body(model="embedded", messages=[user("Is it?")]))
    assert (base.json()["model"], base.json()["system_fingerprint"]) == ("embedded", None)
    assert "x-adapter-sha256" not in base.headers
    assert stub.asked[0].adapter is None
    for name in ("champion", "embedded:champion", f"embedded:{DIGEST}"):
        assert client.post(CHAT, json=body(model=name)).headers["x-adapter-sha256"] == DIGEST


def test_models_with_lineage_and_readiness() -> None:
    client = client_of()
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["embedded:champion", "embedded:reports", "embedded"]
    assert (models[0]["lineage"]["task"], models[0]["lineage"]["template"]) == ("vqa", "short")
    assert [model["not_followed"] for model in models] == [None, "bundle 1234 has rank 99", None]
    assert client.get("/v1/models/embedded:champion").json() == models[0]
    assert client.get("/v1/models/embedded").json() == models[2]
    assert_refused(client.get("/v1/models/other"), 404)
    assert client.get("/readyz").json() == {"status": "ready"}
    assert_refused(client_of(StubBackend(ApiError(503, "the replica was lost"))).get("/readyz"), 503)


def test_a_file_and_curl() -> None:
    stub = StubBackend()
    client = client_of(stub)
    answer = client.post("/v1/vqa", content=png(), headers={"X-Question": "Ist er gr\u00f6\u00dfer?".encode()})
    assert answer.json() == {
        "answer": "gr\u00f6\u00dfer? er Ist (1)",
        "finish_reason": "stop",
        "model": "embedded:champion",
        "digest": DIGEST,
        "usage": {"prompt_tokens": 40, "completion_tokens": 4, "total_tokens": 44},
    }
    assert answer.headers["x-notice"]
    report = client.post("/v1/report", params={"model": "reports", "max_tokens": 9}, content=png())
    assert report.json()["digest"] == REPORTS
    assert [(ask.task, ask.sampling.max_tokens) for ask in stub.asked] == [("vqa", None), ("report", 9)]
    assert_refused(client.post("/v1/vqa", content=png()), 400)
    assert_refused(client.post("/v1/vqa", content=b"GIF89a", headers={"X-Question": "q"}), 415)
    assert_refused(client.post("/v1/vqa", params={"model": "reports"}, content=png(), headers={"X-Question": "q"}), 400)
    assert_refused(client.post("/v1/report", params={"model": "champion"}, content=png()), 400)
    assert_refused(client.post("/v1/report", params={"model": "reports", "max_tokens": 65}, content=png()), 400)
    assert_refused(client.post("/v1/report", params={"max_tokens": CANARY}, content=png()), 422)


def test_dicom_becomes_png_without_the_patient_s_data() -> None:
    pytest.importorskip("pydicom")
    from tests.dicom_files import dicom

    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    scan = dicom(pixels, PatientName="Roe^Jane", PatientID="MRN77")
    stub = StubBackend()
    client = client_of(stub)
    seen = client.post("/v1/image", content=scan)
    assert seen.headers["content-type"] == "image/png"
    assert seen.headers["cache-control"] == "no-store"
    assert b"Jane" not in seen.content
    assert b"MRN77" not in seen.content
    url = "data:application/dicom;base64," + base64.b64encode(scan).decode()
    assert client.post(CHAT, json=body(messages=[user("Is it?", url)])).status_code == 200
    assert client.post("/v1/vqa", content=scan, headers={"X-Question": "Is it?"}).status_code == 200
    assert [ask.images for ask in stub.asked] == [(seen.content,), (seen.content,)]
    burned = dicom(pixels, BurnedInAnnotation="YES")
    assert assert_refused(client.post("/v1/image", content=burned), 415)["code"] == "burned_in_annotation"
    assert_refused(client.post("/v1/image", content=scan[:400]), 415)


def test_metrics_count_what_was_asked() -> None:
    client = client_of()
    client.post(CHAT, json=body())
    client.post(CHAT, json=body(stream=True))
    client.post(CHAT, json=body(n=5))
    client.get(f"/nowhere/{CANARY}")
    text = client.get("/metrics").text
    assert re.search(r'pefomed_requests_total\{ingress="\w+",route="/v1/chat/completions",status="200"\} 2\.0', text)
    assert re.search(r'pefomed_requests_total\{ingress="\w+",route="/v1/chat/completions",status="400"\} 1\.0', text)
    assert re.search(r'pefomed_tokens_total\{ingress="\w+",kind="answer"\} 8\.0', text)
    assert 'pefomed_replica_running{replica="0"} 1.0' in text
    assert "Jane" not in text


def test_refresh_says_what_aliases_stand_for() -> None:
    catalogue = StubCatalogue()
    client = TestClient(stub_api(catalogue=catalogue), headers={"Authorization": f"Bearer {KEY}"})
    said = client.post("/v1/refresh").json()
    assert said == {
        "aliases": {"champion": DIGEST, "reports": REPORTS},
        "not_followed": {"reports": "bundle 1234 has rank 99"},
    }
    assert catalogue.refreshed == 1


def test_a_registry_that_cannot_be_read_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: StubCatalogue) -> None:
        raise PefomedError(f"s3://bucket failed about {CANARY}")

    monkeypatch.setattr(StubCatalogue, "refresh", fails)
    assert_refused(client_of().post("/v1/refresh"), 503)


def test_going_down_lets_nobody_in_but_goes_on_with_who_is() -> None:
    stub = StubBackend(delay_s=0.1)
    app = stub_api(stub)
    door = _door_of(app)
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as client:
        assert client.get("/readyz").status_code == 200
        door.is_closing = True
        response = client.post(CHAT, json=body())
        assert assert_refused(response, 503)["code"] == "closing"
        assert response.headers["retry-after"] == "1"
        assert_refused(client.get("/readyz"), 503)
        assert client.get("/healthz").status_code == 200
    assert stub.asked == []


def _door_of(app: Any) -> Door:
    (counted,) = [m for m in app.user_middleware if "door" in m.kwargs]
    door: Door = counted.kwargs["door"]
    return door


BAD_REQUESTS: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("temperature", body(temperature=2.1), 400, "temperature"),
    ("top_p", body(top_p=0), 400, "top_p"),
    ("stop", body(stop=["a"] * 5), 400, "stop"),
    ("empty stop", body(stop=""), 400, "stop"),
    ("stream", body(stream="yes"), 400, "stream"),
    ("penalty", body(presence_penalty=0.5), 400, "presence_penalty"),
    ("logprobs", body(logprobs=True), 400, "logprobs"),
    ("logit_bias", body(logit_bias={"5": 1.0}), 400, "logit_bias"),
    ("json mode", body(response_format={"type": "json_object"}), 400, "response_format"),
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
    ("17 images", body(messages=[user(CANARY, *[png_url()] * 17)]), 400, "messages"),
    (
        "system image",
        body(messages=[{**user(CANARY, png_url()), "role": "system"}, user("q", png_url())]),
        400,
        "messages",
    ),
    ("bad base64", body(messages=[user(CANARY, "data:image/png;base64,@@@@")]), 400, "messages"),
    ("other model", body(model=CANARY), 404, "model"),
    ("model number", body(model=5), 400, "model"),
]


@pytest.mark.parametrize(
    ("changed", "status", "param"), [row[1:] for row in BAD_REQUESTS], ids=[r[0] for r in BAD_REQUESTS]
)
def test_bad_requests(changed: dict[str, Any], status: int, param: str | None) -> None:
    stub = StubBackend()
    error = assert_refused(client_of(stub).post(CHAT, json=changed), status)
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
        "data:image/fits;base64,U0lNUExF",
        "data:image/jp2;base64,AAAADGpQ",
        "http://localhost:8000/redirect",
        "data:application/pdf;base64,JVBERg==",
        "data:image/png,raw",
        "",
    ],
)
def test_only_data_urls_of_jpeg_and_png(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connections(*arguments: object) -> None:
        raise AssertionError("an outbound connection was tried")

    monkeypatch.setattr("socket.socket.connect", no_connections)
    error = assert_refused(client_of().post(CHAT, json=body(messages=[user(CANARY, url)])), 400)
    assert error["code"] == "unsupported_image_url"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 10_000, b'{"a":' * 10_000, b'{"model":"\\ud800"}'],
    ids=["empty", "torn", "list", "null", "string", "not utf-8", "deep list", "deep object", "surrogate"],
)
def test_bodies_that_are_no_request(raw: bytes) -> None:
    assert_refused(client_of().post(CHAT, content=raw), 400)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1"])
def test_odd_numbers(number: str) -> None:
    raw = json.dumps(body()).replace('"model"', f'"temperature": {number}, "model"', 1)
    assert_refused(client_of().post(CHAT, content=raw), 400)


def test_body_limit_with_and_without_a_length() -> None:
    client = client_of()
    assert_refused(client.post(CHAT, content=b"x" * 200_001), 413)
    chunks = (b"x" * 50_000 for _ in range(5))
    assert_refused(client.post(CHAT, content=chunks), 413)


def routes_of(router: Any) -> Iterator[Route]:
    """Every route, those of included routers too, which FastAPI keeps nested."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes_of(inner)
        else:
            yield route


ALL_ROUTES = [(route.path, method) for route in routes_of(stub_api()) for method in sorted(route.methods or ())]
OPEN = ("/healthz", "/", "/page/{name}")
ROUTES = [(path, method) for path, method in ALL_ROUTES if path not in OPEN]


def test_the_routes_are_the_known_ones() -> None:
    assert {path for path, _ in ROUTES} == {
        "/readyz",
        "/v1/models",
        "/v1/models/{model}",
        CHAT,
        "/v1/vqa",
        "/v1/report",
        "/v1/image",
        "/v1/refresh",
        "/metrics",
        "/openapi.json",
    }


@pytest.mark.parametrize(("path", "method"), ROUTES)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}k"]
)
def test_every_route_wants_the_key(path: str, method: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = client_of(key=None, show_api=True).request(method, path, headers=headers, content=b"{")
    assert_refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_with_the_key_no_route_says_401(path: str, method: str) -> None:
    """The control of the test above."""
    response = client_of(show_api=True).request(method, path, content=b"{")
    assert response.status_code != 401


def test_a_host_header_does_not_talk_around_the_key() -> None:
    headers = {"Host": "a/?x="}
    assert client_of(key=None).get("/v1/models", headers=headers).status_code == 401


def test_health_and_page_are_open_and_nothing_else_is_there() -> None:
    client = client_of(key=None)
    assert client.get("/healthz").json() == {"status": "ok"}
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text):
        assert client.get(name).status_code == 200
    for path in ("/docs", "/redoc", "/openapi.json", "/page/api.py", "/page/..%2Fapi.py"):
        assert_refused(client.get(path), 404)
    assert_refused(client.put("/healthz"), 405)


def test_failures_say_nothing_of_their_cause(caplog: pytest.LogCaptureFixture) -> None:
    error = assert_refused(client_of(StubBackend(RuntimeError(CANARY))).post(CHAT, json=body()), 500)
    assert error["type"] == "server_error"
    assert CANARY not in caplog.text
    assert "RuntimeError" in caplog.text


def test_overload_and_timeout() -> None:
    full = ApiError(429, "the queue is full", code="overloaded", headers={"Retry-After": "1"})
    response = client_of(StubBackend(full)).post(CHAT, json=body())
    assert assert_refused(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    assert_refused(client_of(StubBackend(delay_s=5.0), request_timeout_s=0.5).post(CHAT, json=body()), 504)


def test_fastapi_own_validation_errors_do_not_repeat_the_input() -> None:
    app = stub_api()

    @app.get("/typed")
    async def typed(number: int) -> int:
        return number

    assert_refused(TestClient(app).get("/typed", params={"number": CANARY}), 422)


async def _slow_body(stop: asyncio.Event) -> AsyncIterator[bytes]:
    yield b'{"model":'
    await stop.wait()


def test_a_body_that_does_not_come_is_cut_off() -> None:
    import httpx

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(stub_api())
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers) as client:
            return await client.post(CHAT, content=_slow_body(asyncio.Event()))

    async def bounded() -> httpx.Response:
        return await asyncio.wait_for(send(), 10)

    # httpx's transport feeds the application from the iterator, and never ends it: the application must.
    assert_refused(asyncio.run(bounded()), 408)


def test_what_is_logged_is_sizes_and_names_of_keys(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        client_of().post(CHAT, json=body(messages=[user(CANARY, png_url())]))
    assert "key=tests images=1" in caplog.text
    assert "Jane" not in caplog.text


def test_the_openai_client_sync_async_and_streamed() -> None:
    """Over a real socket: what the package makes of our answers, chunks and refusals."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(stub_api(), log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"

    async def talk() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await asyncio.wait_for(asyncio.to_thread(_ask_sync, url), 30)
            await asyncio.wait_for(_ask_async(url), 30)
        finally:
            server.should_exit = True
            await serving

    asyncio.run(talk())


MESSAGES: Any = [user("Is it normal?", png_url())]


def _ask_sync(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        said = client.chat.completions.create(model="champion", messages=MESSAGES)
        assert said.choices[0].message.content == "normal? it Is (1)"
        chunks = client.chat.completions.create(model="champion", messages=MESSAGES, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "normal? it Is (1)"
        assert next(iter(client.models.list())).id == "embedded:champion"
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.chat.completions.create(model="other", messages=MESSAGES)
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def _ask_async(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        said = await client.chat.completions.create(model="champion", messages=MESSAGES)
        assert said.system_fingerprint == DIGEST
        text = ""
        async for chunk in await client.chat.completions.create(model="champion", messages=MESSAGES, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == "normal? it Is (1)"
