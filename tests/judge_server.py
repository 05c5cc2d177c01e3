"""A judge on loopback that speaks the OpenAI protocol over real HTTP, and misbehaves where a test tells it to.

It finds the item in the user message as the prompt says it stands there, and scores like the most naive of judges: the
highest score where the candidate is one of the references, else 0. `faults` names, by an item's question, how its first
tries go wrong; `verdict` replaces the naive judge.
"""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "mock-judge-2026-01-01"
FINGERPRINT = "fp_mock"
PROMPT_TOKENS, COMPLETION_TOKENS = 400, 10
ITEM = re.compile(r"^<item ([0-9a-f]{16})>\n(.*)\n</item \1>$", re.MULTILINE)

Item = dict[str, Any]


@dataclass
class Request:
    """What came in."""

    path: str
    body: Any
    at_s: float
    headers: dict[str, str]

    @property
    def system(self) -> str:
        return next(str(message["content"]) for message in self.body["messages"] if message["role"] == "system")

    @property
    def user(self) -> str:
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else next(part["text"] for part in content if "text" in part)

    @property
    def item(self) -> Item:
        (found,) = ITEM.findall(self.user)
        return json.loads(found[1])


def naive(item: Item, best: int) -> Any:
    """A whole score for the very words of a reference."""
    return best if item["candidate"] in item["references"] else 0


@dataclass
class Judge:
    """The server's behaviour, and what it saw."""

    url: str = ""
    verdict: Callable[[Item, int], Any] = naive
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Question -> names of FAULTS, one a try, afterwards all is well; `*` for every question without some of its own"""
    unknown: tuple[str, ...] = ()
    """Parameters that a request is refused for, by name."""
    unnamed: bool = False
    """Refuse them without saying which it was."""
    delay_s: float = 0.0
    at_once: int = 0
    most_at_once: int = 0
    model: str = MODEL
    usage: dict[str, int] | None = field(
        default_factory=lambda: {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
    )
    batch_lines: Callable[[list[dict[str, Any]]], list[Any]] = lambda lines: lines
    """Result lines -> what is put into the output file."""
    batch_statuses: list[str] = field(default_factory=lambda: ["validating", "in_progress", "completed"])
    """What each look at a job finds; the last stays."""
    requests: list[Request] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def chats(self) -> list[Request]:
        return [request for request in self.requests if request.path == "/v1/chat/completions"]

    def asked(self, question: str) -> int:
        """How often a question came in."""
        return sum(request.item.get("question") == question for request in self.chats)

    def next_fault(self, question: str) -> str | None:
        with self.lock:
            left = self.faults.get(question, self.faults.get("*", []))
            return left.pop(0) if left else None

    def completion(self, body: dict[str, Any], content: str | None = None, **message: Any) -> dict[str, Any]:
        """The reply to a well-formed request."""
        if content is None and not message:
            item = Request("", body, 0.0, {}).item
            best = 1 if "{1}" in self.scale(body) else 4
            content = json.dumps({"score": self.verdict(item, best)})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}
        found = {"id": "c", "object": "chat.completion", "created": 0, "model": self.model, "choices": [choice]}
        return {**found, "usage": self.usage, "system_fingerprint": FINGERPRINT}

    @staticmethod
    def scale(body: dict[str, Any]) -> str:
        """`{1}` or `{4}`: the highest score that the instructions name."""
        named = re.findall(r'\{"score": (\d)\}', body["messages"][0]["content"])
        return f"{{{max(map(int, named))}}}"


def _error(status: int, code: str, **headers: str) -> Callable[["Handler", dict[str, Any]], None]:
    def answer(handler: "Handler", body: dict[str, Any]) -> None:
        error = {"error": {"message": "no", "type": code, "code": code, "param": None}}
        handler.send(status, json.dumps(error).encode(), **{name.replace("_", "-"): v for name, v in headers.items()})

    return answer


def _raw(data: bytes, media_type: str = "application/json") -> Callable[["Handler", dict[str, Any]], None]:
    return lambda handler, body: handler.send(200, data, Content_Type=media_type)


def _says(
    content: str | None, finish_reason: str = "stop", **message: Any
) -> Callable[["Handler", dict[str, Any]], None]:
    def answer(handler: "Handler", body: dict[str, Any]) -> None:
        reply = handler.judge.completion(body, content, **(message or {"tool_calls": None}))
        reply["choices"][0]["finish_reason"] = finish_reason
        handler.send(200, json.dumps(reply).encode())

    return answer


def _reset(handler: "Handler", body: dict[str, Any]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    _close(handler)


def _stall(handler: "Handler", body: dict[str, Any]) -> None:
    handler.judge.closing.wait(20)


def _drip(handler: "Handler", body: dict[str, Any]) -> None:
    """A byte now and then: no pause is long, but there is no end."""
    handler.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not handler.judge.closing.wait(0.05):
        handler.connection.sendall(b" ")


def _cut(handler: "Handler", body: dict[str, Any]) -> None:
    handler.connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"id": "c", "choi')
    _close(handler)


def _close(handler: "Handler") -> None:
    handler.close_connection = True
    handler.rfile.close()  # it keeps the socket open otherwise
    handler.connection.close()


def _late(handler: "Handler", body: dict[str, Any]) -> None:
    """The reply is made, and would be billed, but comes after the client has gone."""
    handler.judge.closing.wait(3.0)
    handler.send(200, json.dumps(handler.judge.completion(body)).encode())


FAULTS: dict[str, Callable[["Handler", dict[str, Any]], None]] = {
    "rate_limit": _error(429, "rate_limit_exceeded", Retry_After="0.1"),
    "rate_limit_for_ever": _error(429, "rate_limit_exceeded", Retry_After="86400"),
    "error_500": _error(500, "server_error"),
    "error_503": _error(503, "overloaded"),
    "error_408": _error(408, "request_timeout"),
    "error_400": _error(400, "invalid_value"),
    "error_413": _error(413, "too_large"),
    "error_401": _error(401, "invalid_api_key"),
    "error_404": _error(404, "model_not_found"),
    "filtered_400": _error(400, "content_filter"),
    "quota": _error(429, "insufficient_quota"),
    "spend_limit": _error(429, "project_spend_limit_exceeded"),
    "redirect": lambda handler, body: handler.send(307, b"", Location="http://127.0.0.1:9/v1/chat/completions"),
    "reset": _reset,
    "cut": _cut,
    "stall": _stall,
    "drip": _drip,
    "late": _late,
    "html": _raw(b"<html><body>Sign in</body></html>", "text/html"),
    "truncated": _raw(b'{"id": "c", "choices": [{"mess'),
    "not_utf8": _raw(b'{"id": "\xff\xfe"}'),
    "null": _raw(b"null"),
    "list": _raw(b"[]"),
    "deep": _raw(b"[" * 100_000),
    "null_choices": _raw(b'{"id": "c", "choices": null}'),
    "no_choices": _raw(b'{"id": "c", "choices": []}'),
    "null_message": _raw(b'{"id": "c", "choices": [{"message": null}]}'),
    "refusal": _says(None, refusal="I cannot judge this."),
    "filtered": _says(None, "content_filter", tool_calls=None),
    "empty": _says("  "),
    "cut_short": _says('{"sco', "length"),
    "eleven_of_ten": _says("11/10"),
    "eleven": _says('{"score": 11}'),
    "minus_one": _says('{"score": -1}'),
    "nan": _says('{"score": NaN}'),
    "half": _says('{"score": 0.5}'),
    "true": _says('{"score": true}'),
    "text": _says('{"score": "1"}'),
    "other_key": _says('{"verdict": 1}'),
    "more_keys": _says('{"score": 1, "note": "x"}'),
    "two_objects": _says('{"score": 1} or rather {"score": 0}'),
    "twice_in_one": _says('{"score": 0, "score": 1}'),
    "nested": _says('{"answer": {"score": 1}}'),
    "bare": _says("1"),
    "prose": _says('The candidate says the same.\n```json\n{"score": 1}\n```\nSo it is right.'),
}
"""Name -> what the server does with a try."""


class Handler(BaseHTTPRequestHandler):
    """Chat completions, files and batches."""

    protocol_version = "HTTP/1.1"
    judge: Judge

    def log_message(self, format: str, *args: Any) -> None:
        return

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode())

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(data) if self.headers["Content-Type"] == "application/json" else data
        with self.judge.lock:
            self.judge.requests.append(Request(self.path, body, time.monotonic(), dict(self.headers)))
        if self.path == "/v1/files":
            self._keep_file(data)
        elif self.path == "/v1/batches":
            self._start_batch(body)
        else:
            self._chat(body)

    def do_GET(self) -> None:
        with self.judge.lock:
            self.judge.requests.append(Request(self.path, None, time.monotonic(), dict(self.headers)))
        if self.path.startswith("/v1/files/"):
            self.send(200, self.judge.files[self.path.split("/")[3]], Content_Type="application/octet-stream")
        elif self.path.startswith("/v1/batches/"):
            self._look_at_batch(self.judge.batches[self.path.split("/")[3]])
        else:
            self.send_json({"object": "list", "data": list(self.judge.batches.values()), "has_more": False})

    def _chat(self, body: dict[str, Any]) -> None:
        refused = [name for name in self.judge.unknown if name in body]
        if "json_schema" in self.judge.unknown and body.get("response_format", {}).get("type") == "json_schema":
            refused.append("response_format")
        if refused:
            name = None if self.judge.unnamed else refused[0]
            error = {"message": f"{name or 'something'} is not supported", "param": name, "code": "unsupported"}
            self.send(400, json.dumps({"error": error}).encode())
            return
        faulty = self.judge.faults and Request("", body, 0.0, {}).item.get("question", "")
        fault = self.judge.next_fault(faulty) if faulty else None
        if fault:
            FAULTS[fault](self, body)
            return
        with self.judge.lock:
            self.judge.at_once += 1
            self.judge.most_at_once = max(self.judge.most_at_once, self.judge.at_once)
        self.judge.closing.wait(self.judge.delay_s)
        with self.judge.lock:
            self.judge.at_once -= 1
        self.send_json(self.judge.completion(body))

    def _keep_file(self, data: bytes) -> None:
        file_id = f"file-{len(self.judge.files)}"
        lines = [line for line in data.splitlines() if line.startswith(b'{"custom_id"')]
        self.judge.files[file_id] = b"\n".join(lines)
        self.send_json({"id": file_id, "object": "file", "bytes": len(data), "created_at": 0, "purpose": "batch"})

    def _start_batch(self, body: dict[str, Any]) -> None:
        batch_id = f"batch_{len(self.judge.batches)}"
        self.judge.batches[batch_id] = {
            **body,
            "id": batch_id,
            "object": "batch",
            "created_at": 0,
            "status": "validating",
            "looks": 0,
        }
        self.send_json(self.judge.batches[batch_id])

    def _look_at_batch(self, batch: dict[str, Any]) -> None:
        statuses = self.judge.batch_statuses
        batch["status"] = statuses[min(batch["looks"], len(statuses) - 1)]
        batch["looks"] += 1
        if batch["status"] in ("completed", "expired") and "output_file_id" not in batch:
            asked = [json.loads(line) for line in self.judge.files[batch["input_file_id"]].splitlines()]
            results = [
                {
                    "id": "r",
                    "custom_id": line["custom_id"],
                    "response": {"status_code": 200, "body": self.judge.completion(line["body"])},
                    "error": None,
                }
                for line in asked
            ]
            lines = self.judge.batch_lines(results)
            file_id = f"file-{len(self.judge.files)}"
            self.judge.files[file_id] = "\n".join(
                line if isinstance(line, str) else json.dumps(line) for line in lines
            ).encode()
            batch["output_file_id"] = file_id
        if batch["status"] == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "invalid_json_line", "message": "x", "line": 1}]}
        self.send_json(batch)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that has gone


@contextmanager
def serving() -> Iterator[Judge]:
    """A judge that listens on a free port of loopback."""
    judge = Judge()
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"judge": judge}))
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
