"""A vision model behind HTTP: asked what the shards hold, paid for once, and never sent what must stay home."""

import base64
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.errors import ConfigError, PefomedError, RefusedError
from pefomed_ray.evaluation import remote
from pefomed_ray.evaluation.endpoint import Endpoint, open_endpoint
from pefomed_ray.evaluation.evaluate import evaluate
from pefomed_ray.evaluation.predictions import read_predictions
from pefomed_ray.evaluation.preflight import read_texts

MakeShards = Callable[..., Path]
Reply = tuple[int, Any]
"""Status, and body: an object becomes JSON, a string goes as it is."""


class Server:
    """Speaks the OpenAI protocol; `answer` says what, given the request's body and how often it came before."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Reply] = lambda body, before: said("red")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                body = json.loads(raw)
                with outer.lock:
                    key = json.dumps(body["messages"])
                    before = outer.seen[key]
                    outer.seen[key] += 1
                    outer.requests.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                status, answer = outer.answer(body, before)
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.send_header("content-type", "text/html" if data.startswith(b"<") else "application/json")
                self.send_header("retry-after-ms", "1")
                if status == 307:
                    self.send_header("location", "/v1/elsewhere")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def endpoint(self, **changed: Any) -> Endpoint:
        return Endpoint(self.url, "seer-1", "key", **{"local": True, "concurrency": 2} | changed)


def said(text: str | None, *, fingerprint: str = "fp_1", **message: Any) -> Reply:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    found = {"id": "1", "object": "chat.completion", "created": 1, "model": "seer-1-2026", "choices": [choice]}
    return 200, found | {"usage": usage, "system_fingerprint": fingerprint}


def failed(status: int, **error: Any) -> Reply:
    return status, {"error": {"message": "no", **error}}


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def metrics_of(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(answer["metrics"]).read_text())
    return found


def asks(server: Server, shards: Path, output: Path, **changed: Any) -> dict[str, Any]:
    words = {"image_controls": False} | changed
    return metrics_of(evaluate(server.endpoint(), shards, "test", output, **words))


def test_the_same_questions_the_same_pictures_the_same_scorer(
    server: Server, make_shards: MakeShards, tmp_path: Path
) -> None:
    shards = make_shards()
    metrics = asks(server, shards, tmp_path / "out", image_controls=True)
    texts = {(row["question"], row["image_sha256"][0]) for row in read_texts(shards, "test")}
    shown = set()
    for body in server.requests:
        system, user = body["messages"]
        assert system == {
            "role": "system",
            "content": "Answer the question about the image in as few words as possible.",
        }
        question, image = user["content"]
        head, data = image["image_url"]["url"].split(",")
        assert head == "data:image/png;base64"
        shown.add((question["text"], sha256_bytes(base64.b64decode(data))))
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("seer-1", 64, 0)
    assert texts <= shown  # and grey, noise and others' pictures beside them
    assert len(server.requests) == 28
    assert server.headers[0]["authorization"] == "Bearer key"
    assert metrics["exact_match"]["value"] == pytest.approx(2 / 7)
    assert list(metrics["controls"]) == ["blank_image", "noise_image", "shuffled_image", "majority", "question_prior"]
    assert metrics["bundle"] is None
    assert metrics["model"]["name"] == "seer-1"
    assert metrics["answered"] == {
        "by": {"seer-1-2026 fp_1": 28},
        "unscored": {},
        "prompt_tokens": 280,
        "completion_tokens": 56,
    }
    assert "seer-1-2026 fp_1" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "fault",
    [
        failed(500),
        failed(429, code="rate_limit_exceeded"),
        failed(408),
        (200, "<html>busy</html>"),
        (200, '{"id": "1", "choi'),
        (200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": None}),
    ],
)
def test_what_passes_is_asked_again(server: Server, make_shards: MakeShards, tmp_path: Path, fault: Reply) -> None:
    server.answer = lambda body, before: fault if before == 0 else said("red")
    metrics = asks(server, make_shards(), tmp_path / "out")
    assert metrics["exact_match"]["n"] == 7
    assert metrics["answered"]["unscored"] == {}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (said(None, refusal="I cannot"), "refusal"),
        (said(None), "no_text"),
        (failed(400, code="content_filter"), "content_filter"),
        (failed(413), "status_413"),
        ((200, "<html>busy</html>"), "no_completion"),
        ((200, '{"id": "1", "choi'), "not_json"),
        (failed(500), "status_500"),
        ((307, {}), "status_307"),
    ],
)
def test_what_does_not_pass_is_unscored_with_its_reason(
    server: Server, make_shards: MakeShards, tmp_path: Path, fault: Reply, reason: str
) -> None:
    server.answer = lambda body, before: fault if "What is" in json.dumps(body) else said("green")
    metrics = asks(server, make_shards(rows={"train": 4, "test": 4}), tmp_path / "out")
    assert (metrics["exact_match"]["n"], metrics["exact_match"]["unscored"]) == (2, 2)
    assert metrics["answered"]["unscored"] == {"image": {reason: 2}}
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [row.prediction for row in rows] == [None, "green", None, "green"]
    assert f"2 of 4 rows have no answer and are in no score: {reason} 2" in (tmp_path / "out/report.html").read_text()


def test_a_model_that_names_its_parameters_otherwise(server: Server, make_shards: MakeShards, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        for name in ("max_tokens", "temperature"):
            if name in body:
                return failed(400, param=name, code="unsupported_parameter")
        assert body["max_completion_tokens"] == 64
        return said("red")

    server.answer = answer
    assert asks(server, make_shards(), tmp_path / "out")["exact_match"]["n"] == 7
    assert sum("max_completion_tokens" in body and "temperature" not in body for body in server.requests) == 7


def test_an_empty_purse_stops_at_once_and_nothing_is_paid_twice(
    server: Server, make_shards: MakeShards, tmp_path: Path
) -> None:
    paid: Counter[str] = Counter()
    purse = [3]

    def answer(body: dict[str, Any], before: int) -> Reply:
        with server.lock:
            if purse[0] == 0:
                return failed(429, code="insufficient_quota")
            purse[0] -= 1
            paid[json.dumps(body["messages"])] += 1
        return said("red")

    server.answer = answer
    shards = make_shards()
    with pytest.raises(PefomedError, match="insufficient_quota"):
        asks(server, shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    purse[0] = 100
    assert asks(server, shards, tmp_path / "out", resume=True)["rows"] == 7
    # Rows 0 and 4 ask the same about the same picture, so do 1 and 5, and 2 and 6.
    assert sum(paid.values()) == 7


def test_an_endpoint_that_is_gone_is_not_asked_for_ever(
    server: Server, make_shards: MakeShards, tmp_path: Path
) -> None:
    server.answer = lambda body, before: failed(500)
    with pytest.raises(PefomedError, match="10 questions in a row, the last time: status_500"):
        asks(server, make_shards(rows={"train": 4, "test": 60}), tmp_path / "out")
    assert len(server.requests) <= 5 * 12


def test_nobody_there(make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_RETRIES", 0)  # its pauses
    nobody = Endpoint("http://127.0.0.1:9/v1", "m", "k", local=True)
    with pytest.raises(PefomedError, match="in a row, the last time: connection"):
        evaluate(nobody, make_shards(rows={"train": 4, "test": 60}), "test", tmp_path / "out")


@pytest.mark.parametrize(("status", "reason"), [(500, "status_500"), (413, "status_413")])
def test_many_questions_that_cannot_be_answered_do_not_end_it(
    server: Server, make_shards: MakeShards, tmp_path: Path, status: int, reason: str
) -> None:
    """Every second one, more than would be borne in a row: first among others, then all together at the end."""
    server.answer = lambda body, before: failed(status) if "What is" in json.dumps(body) else said("red")
    metrics = asks(server, make_shards(rows={"train": 4, "test": 24}), tmp_path / "out")
    assert metrics["answered"]["unscored"] == {"image": {reason: 12}}


@pytest.mark.parametrize("status", [500, 413])
def test_where_nothing_was_ever_answered_nothing_is_published(
    server: Server, make_shards: MakeShards, tmp_path: Path, status: int
) -> None:
    server.answer = lambda body, before: failed(status)
    with pytest.raises(PefomedError, match=f"in a row, the last time: status_{status}"):
        asks(server, make_shards(rows={"train": 4, "test": 3 if status == 500 else 12}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_is_the_configuration(
    server: Server, make_shards: MakeShards, tmp_path: Path, status: int
) -> None:
    server.answer = lambda body, before: failed(status)
    with pytest.raises(ConfigError, match=f"answered {status} for model 'seer-1'"):
        asks(server, make_shards(), tmp_path / "out")


def test_two_versions_are_named(server: Server, make_shards: MakeShards, tmp_path: Path) -> None:
    server.answer = lambda body, before: said("red", fingerprint="a" if "What is" in json.dumps(body) else "b")
    asks(server, make_shards(), tmp_path / "out")
    assert (
        "Several versions of the model answered: seer-1-2026 a, seer-1-2026 b."
        in (tmp_path / "out" / "report.html").read_text()
    )


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that anything in this process connects to, and sends bytes to."""
    found: list[Any] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        found.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return found


def test_a_restricted_corpus_sends_nothing_to_an_endpoint_that_is_not_declared_local(
    server: Server, make_shards: MakeShards, tmp_path: Path, connections: list[Any]
) -> None:
    shards = make_shards("restricted")
    with pytest.raises(RefusedError, match="restricted corpus") as refused:
        evaluate(server.endpoint(local=False), shards, "test", tmp_path / "out")
    assert refused.value.exit_code == 5
    assert connections == []
    assert server.requests == []
    assert list(tmp_path.iterdir()) == [shards]
    # The control: the guard sees what is sent once somebody declares it local.
    asks(server, shards, tmp_path / "out")
    assert connections
    assert len(server.requests) == 7


def test_a_local_endpoint_is_asked_without_proxy(
    server: Server, make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert asks(server, make_shards(), tmp_path / "out")["rows"] == 7


@pytest.mark.parametrize(
    ("url", "changed", "message"),
    [
        ("ftp://x/v1", {}, "not an http"),
        ("x:8000/v1", {}, "not an http"),
        ("https://user:secret@x/v1", {}, "user name, password"),
        ("http://x/v1", {}, "without encryption"),
        ("https://x/v1", {"model": None}, "--model"),
        ("https://x/v1", {"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
    ],
)
def test_words_that_name_no_endpoint(
    url: str, changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEER_KEY", "k")
    words: dict[str, Any] = {"model": "m", "key_env": "SEER_KEY", "local": False, "concurrency": 8} | changed
    with pytest.raises(ConfigError, match=message) as refused:
        open_endpoint(url, **words)
    assert "secret" not in str(refused.value)
    good = open_endpoint("https://x/v1", "m", "SEER_KEY", local=False, concurrency=8)
    assert good.key == "k"
    assert "'k'" not in repr(good)
    assert open_endpoint("http://x/v1", "m", "NO_SUCH_KEY", local=True, concurrency=8).local
