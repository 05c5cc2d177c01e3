"""`evaluate` as a person runs it: killed with SIGKILL while an endpoint answers, and started again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.manifests import ShardFile, ShardManifest, save_document
from pefomed_ray.artifacts.records import RECORD_SCHEMA
from pefomed_ray.artifacts.storage import sha256_file

ROWS = 40
COMMAND = [sys.executable, "-m", "pefomed_ray", "evaluate"]


class Endpoint(ThreadingHTTPServer):
    """Answers `lung`, one question in a twentieth of a second, and counts what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.one_at_a_time = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.one_at_a_time:
            self.server.asked[body["messages"][1]["content"][0]["text"]] += 1
            time.sleep(0.05)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "lung"}}
        found = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "shards"
    (folder / "test").mkdir(parents=True)
    image = {"bytes": b"\x89PNG never decoded", "path": "i.png"}
    rows = [
        dict.fromkeys(RECORD_SCHEMA.names)
        | {"id": f"q{number}", "source": "s", "split": "test", "task": "vqa", "images": [image], "meta": "{}"}
        | {"image_sha256": [f"{number}"], "question": f"Is it {number}?", "answer": "lung", "group": f"{number}"}
        for number in range(ROWS)
    ]
    path = folder / "test" / "part-0.parquet"
    pq.write_table(pa.Table.from_pylist(rows, RECORD_SCHEMA), path)
    file = ShardFile(path="test/part-0.parquet", split="test", rows=ROWS, bytes=1, sha256=sha256_file(path))
    manifest = ShardManifest(
        source="s",
        licence="restricted",
        rows={"test": ROWS},
        tasks={"vqa": ROWS},
        answer_types={},
        bytes={},
        quarantined={},
        image_overlap={},
        files=(file,),
        made_by={},
    )
    save_document(manifest, folder / "manifest.json")
    return folder


@pytest.mark.long
def test_killed_and_resumed_nothing_is_asked_twice(endpoint: Endpoint, shards: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    words = ["--data", str(shards), "--output", "out", "--endpoint", url, "--model", "m", "--local", "--json"]
    words += ["--skip-image-controls", "--concurrency", "1"]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen([*COMMAND, *words], cwd=tmp_path, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while sum(endpoint.asked.values()) < ROWS // 3:
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(timeout=30)
    assert not (tmp_path / "out").exists()
    asked_before = sum(endpoint.asked.values())
    assert asked_before < ROWS

    again = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 2
    assert "--resume goes on" in " ".join(again.stderr.split())
    assert sum(endpoint.asked.values()) == asked_before

    resumed = subprocess.run(
        [*COMMAND, *words, "--resume"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert len(endpoint.asked) == ROWS
    # One question was on its way when the process was killed; it alone may have been asked again.
    assert sum(endpoint.asked.values()) <= ROWS + 1
    result = json.loads(resumed.stdout.splitlines()[-1])
    assert result["values"]["exact_match"] == 1.0
    assert json.loads(Path(result["metrics"]).read_text())["exact_match"]["n"] == ROWS


def test_a_restricted_corpus_is_refused_with_exit_code_5(endpoint: Endpoint, shards: Path, tmp_path: Path) -> None:
    words = ["--data", str(shards), "--output", "out", "--endpoint", "https://127.0.0.1:1/v1", "--model", "m"]
    environment = {**os.environ, "OPENAI_API_KEY": "k"}
    refused = subprocess.run(
        [*COMMAND, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert refused.returncode == 5, refused.stderr
    assert "restricted corpus" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
