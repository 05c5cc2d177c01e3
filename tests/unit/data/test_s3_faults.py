"""What happens when S3 does not answer as it should: a proxy between us and the server misbehaves on request."""

import json
import random
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs
from PIL import Image

from pefomed_ray.artifacts import folders
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.data.intake import take_in
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.output import unfinished
from pefomed_ray.data.reasons import RowError
from pefomed_ray.data.shard_file import ShardResult, plan_shards, write_shard
from pefomed_ray.errors import ConfigError, PefomedError

Fault = Callable[["Proxy"], bool]
OPTIONS = DataOptions(validation_fraction=0, shard_bytes=4000, licence="open")


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, unless a fault is planned for the object that one names."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    faults: dict[str, list[Fault]]
    """By what the path ends with (the key's last part); each is used once, the last one for ever if it says so."""
    lock = threading.Lock()

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        fault = self._planned()
        if fault is not None and fault(self):
            return
        connection = HTTPConnection(self.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        size = int(reply.getheader("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if getattr(self, "cut", False) else data)
        if getattr(self, "cut", False):
            self.close_connection = True
        connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

    def _planned(self) -> Fault | None:
        last = urlsplit(self.path).path.rsplit("/", 1)[-1]
        with self.lock:
            planned = self.faults.get(f"{self.command} {last}")
            if not planned:
                return None
            return planned[0] if len(planned) == 1 and getattr(planned[0], "for_ever", False) else planned.pop(0)

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


def answer(status: int, code: str, *, for_ever: bool = False) -> Fault:
    def fault(proxy: Proxy) -> bool:
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        proxy.send_response(status)
        proxy.send_header("Content-Type", "application/xml")
        proxy.send_header("Content-Length", str(0 if proxy.command == "HEAD" else len(body)))
        proxy.end_headers()
        if proxy.command != "HEAD":
            proxy.wfile.write(body)
        return True

    fault.for_ever = for_ever  # type: ignore[attr-defined]
    return fault


def reset(proxy: Proxy) -> bool:
    proxy.connection.close()
    proxy.close_connection = True
    return True


def cut_body(proxy: Proxy) -> bool:
    proxy.cut = True  # type: ignore[attr-defined]
    return False


def stall(proxy: Proxy) -> bool:
    threading.Event().wait(3)
    proxy.close_connection = True
    return True


@pytest.fixture
def faults(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Fault]]]:
    """Plan of faults by `METHOD last-part-of-the-key`; S3 is reached through the proxy while the test runs."""
    planned: dict[str, list[Fault]] = {}
    handler = type("Handler", (Proxy,), {"upstream": urlsplit(s3_server).netloc, "faults": planned})
    socketserver.TCPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(folders, "READ_TIMEOUT_S", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield planned
    server.shutdown()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def corpus(s3: str) -> str:
    """Ten rows about five images."""
    folder = open_folder(f"{s3}/corpus")
    for number in range(5):
        buffer = BytesIO()
        Image.frombytes("L", (48, 48), random.Random(number).randbytes(48 * 48)).save(buffer, "JPEG")
        folder.write_bytes(f"i{number}.jpg", buffer.getvalue())
    rows = [{"id": f"q{n}", "query": "?", "response": "Left", "image": f"i{n % 5}.jpg"} for n in range(10)]
    folder.write_bytes("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return folder.url


def make(corpus: str, output: str) -> list[ShardResult]:
    root, target = open_folder(corpus), open_folder(output)
    intake = take_in(root, OPTIONS)
    specs = plan_shards(intake.references, root, OPTIONS.seed, OPTIONS.shard_bytes)
    assert len(specs) > 1
    with unfinished(target, "inputs") as work:
        results = [write_shard(spec.to_json(), root, work.work, "jsonl", OPTIONS) for spec in specs]
        files = {result.file.path: result.file.bytes for result in results if result.file}
        work.publish({"quarantine/train.jsonl": b""}, files, json.dumps(files).encode())
    return results


long = pytest.mark.long
TRANSIENT: dict[str, list[Fault]] = {
    "503 twice": [answer(503, "SlowDown"), answer(503, "SlowDown")],
    "500 once": [answer(500, "InternalError")],
    "reset": [reset],
    "cut body": [cut_body],
    "stall": [stall],
}


@pytest.mark.parametrize(
    "name", ["cut body", *(pytest.param(name, marks=long) for name in TRANSIENT if name != "cut body")]
)
def test_what_passes_leaves_no_trace(name: str, corpus: str, faults: dict[str, list[Fault]], tmp_path: Path) -> None:
    expected = make(corpus, str(tmp_path / "out"))
    for target in ("GET i2.jpg", "GET train.jsonl", "PUT part-00000.parquet", "PUT manifest.json"):
        if not (name == "cut body" and target.startswith("PUT")):
            faults[target] = list(TRANSIENT[name])
    output = f"{corpus}-out"
    assert make(corpus, output) == expected
    assert not any(faults.values()), "every fault was met"
    assert open_folder(output).read_bytes("manifest.json") == (tmp_path / "out/manifest.json").read_bytes()
    assert [name for name in open_folder(output).files() if "unfinished" in name] == []


@pytest.mark.parametrize(
    ("target", "fault", "error", "named"),
    [
        pytest.param(
            "GET i2.jpg", answer(500, "InternalError", for_ever=True), PefomedError, "corpus/i2.jpg", marks=long
        ),
        ("GET i2.jpg", answer(403, "AccessDenied", for_ever=True), ConfigError, "corpus/i2.jpg"),
        pytest.param(
            "PUT part-00000.parquet",
            answer(503, "SlowDown", for_ever=True),
            PefomedError,
            "part-00000.parquet",
            marks=long,
        ),
        ("PUT part-00000.parquet", answer(403, "AccessDenied", for_ever=True), ConfigError, "part-00000.parquet"),
        ("GET train.jsonl", answer(403, "AccessDenied", for_ever=True), ConfigError, "corpus/train.jsonl"),
    ],
)
def test_what_stays_names_the_object_and_publishes_nothing(
    target: str, fault: Fault, error: type[Exception], named: str, corpus: str, faults: dict[str, list[Fault]]
) -> None:
    faults[target] = [fault]
    output = f"{corpus}-out"
    with pytest.raises(error, match=named) as caught:
        make(corpus, output)
    assert "s3://bucket-" in str(caught.value)
    assert "0x" not in str(caught.value)
    assert not open_folder(output).is_file("manifest.json")
    faults.clear()
    assert len(make(corpus, output)) > 1  # goes on where it stood
    assert open_folder(output).is_file("manifest.json")


def test_an_object_that_goes_missing_is_one_bad_row_and_an_outage_is_not(
    corpus: str, faults: dict[str, list[Fault]]
) -> None:
    faults["GET i2.jpg"] = [answer(404, "NoSuchKey", for_ever=True)]
    results = make(corpus, f"{corpus}-out")
    bad = [row for result in results for row in result.quarantined]
    assert sorted((row.id, row.reason) for row in bad) == [("q2", "missing_image"), ("q7", "missing_image")]
    assert issubclass(RowError, Exception)
    assert not issubclass(PefomedError, RowError)


@long
def test_an_upload_in_parts_that_fails_leaves_none(s3: str, faults: dict[str, list[Fault]], tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"\0" * (110 << 20))
    faults["PUT big.parquet"] = [answer(403, "AccessDenied", for_ever=True)]
    with pytest.raises(ConfigError, match=r"big\.parquet"):
        open_folder(s3).put(tmp_path / "big", "big.parquet")
    system = folders.s3()
    assert "Uploads" not in system.call_s3("list_multipart_uploads", Bucket=s3.removeprefix("s3://"))
    faults.clear()
    open_folder(s3).put(tmp_path / "big", "big.parquet")
    assert open_folder(s3).entries(["big.parquet"])[0].size == 110 << 20  # type: ignore[union-attr]
