"""The client against a small local server that answers what it is told to."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.serving.client import Client, Reply, read_picture

KEY = "k" * 43
COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "embedded:champion",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    "system_fingerprint": "d" * 64,
}


@dataclass
class Server:
    """What to answer, and what came."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(body=json.dumps(COMPLETION).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            state.requests.append({"path": self.path, **json.loads(self.rfile.read(length))})
            state.keys.append(self.headers["Authorization"])
            self.send_response(state.status)
            self.send_header("Content-Type", state.content_type)
            self.send_header("Content-Length", str(len(state.body)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http_server.server_port}/v1"
    yield state
    http_server.shutdown()
    http_server.server_close()
    thread.join(timeout=5)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("L", (4, 4)).save(tmp_path / "scan.png")
    return tmp_path / "scan.png"


def ask(url: str, picture: Path, timeout_s: float = 10.0) -> Reply:
    with Client(url, KEY, timeout_s) as client:
        return client.ask("champion", [read_picture(picture)], "Normal?")


def test_ask(server: Server, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # would refuse: the picture stays on this machine
    reply = ask(server.url, picture)
    assert (reply.text, reply.digest, reply.model) == ("yes", "d" * 64, "embedded:champion")
    assert reply.usage == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert server.keys == [f"Bearer {KEY}"]
    request = server.requests[0]
    assert (request["path"], request["model"]) == ("/v1/chat/completions", "champion")
    image, text = request["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert text == {"type": "text", "text": "Normal?"}


@pytest.mark.parametrize(
    ("status", "expected", "calls"),
    [
        (400, DataError, 1),
        (401, ConfigError, 1),
        (404, ConfigError, 1),
        (413, DataError, 1),
        (415, DataError, 1),
        (429, PefomedError, 3),
        (500, PefomedError, 3),
    ],
)
def test_refusals_carry_the_endpoint_s_words(
    server: Server, picture: Path, status: int, expected: type[Exception], calls: int
) -> None:
    server.status = status
    server.body = json.dumps({"error": {"message": "the reason", "type": "x", "param": None, "code": None}}).encode()
    with pytest.raises(expected, match=f"{status}: the reason") as caught:
        ask(server.url, picture)
    assert type(caught.value) is expected
    assert len(server.requests) == calls


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<html>", "text/html"),
        (b'{"id": "x', "application/json"),
        (b'{"id": "x", "choices": null}', "application/json"),
        (b'{"error": "x"}', "application/json"),
    ],
)
def test_answers_that_are_no_completion(server: Server, picture: Path, body: bytes, content_type: str) -> None:
    server.body, server.content_type = body, content_type
    with pytest.raises(PefomedError, match=r"OpenAI-compatible|not as an endpoint"):
        ask(server.url, picture)


def test_nobody_there(picture: Path) -> None:
    with pytest.raises(PefomedError, match=r"127\.0\.0\.1:9/v1.*pefomed-ray serve") as caught:
        ask("http://127.0.0.1:9/v1", picture, 2.0)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"%PDF", "PDF"), (b"II*\0....", "TIFF"), (b"GIF89a", "GIF"), (b"hello", "unknown")],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_picture(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_picture(tmp_path / "no.png")


def test_dicom_is_sent_as_it_is(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM...")
    assert ask(server.url, path).text == "yes"
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:application/dicom;base64,")) == path.read_bytes()


def test_aloud_says_each_piece_and_returns_the_whole(server: Server, picture: Path) -> None:
    def chunk(**fields: Any) -> str:
        common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "embedded:champion"}
        return f"data: {json.dumps(common | {'system_fingerprint': 'd' * 64, 'choices': []} | fields)}\n\n"

    def said(text: str) -> str:
        return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])

    events = [said("ye"), said("s"), chunk(usage=COMPLETION["usage"])]
    server.content_type = "text/event-stream"
    server.body = "".join([*events, "data: [DONE]\n\n"]).encode()
    pieces: list[str] = []
    with Client(server.url, KEY, 10.0) as client:
        reply = client.ask_aloud("champion", [picture.read_bytes()], "Normal?", pieces.append)
    assert (reply.text, reply.digest, reply.usage) == ("yes", "d" * 64, COMPLETION["usage"])
    assert [piece for piece in pieces if piece] == ["ye", "s"]
    server.body = (said("ye") + 'data: {"error": {"message": "the replica was lost"}}\n\n').encode()
    with Client(server.url, KEY, 10.0) as client, pytest.raises(PefomedError, match="the replica was lost"):
        client.ask_aloud("champion", [picture.read_bytes()], "Normal?", pieces.append)


def test_telling_another_kind_of_endpoint_says_so(server: Server) -> None:
    with Client(server.url, KEY, 10.0) as client, pytest.raises(PefomedError, match="pefomed-ray serve"):
        client.refresh()
