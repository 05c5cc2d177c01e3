"""`pefomed-ray serve` and what is done with it from other terminals; SIGTERM while it is asked."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._load import HUNG, NO_ANSWER, Sent, open_loop
from tests.served_here import free_port, messages
from tests.tiny_served import make_base, make_bundle, png

pytestmark = pytest.mark.long

TIMEOUT_S = 120
DRAIN_S = 10.0
Run = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Running:
    """A `pefomed-ray serve` of this test's own, and a folder with bundles `one` and `two`."""

    folder: Path
    process: "subprocess.Popen[str]"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def run(self, *words: str) -> Run:
        return run(self.folder, *words)

    def result(self, *words: str) -> dict[str, Any]:
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def run(folder: Path, *words: str) -> Run:
    command = [sys.executable, "-m", "pefomed_ray", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture
def running() -> Iterator[Running]:
    folder = Path(tempfile.mkdtemp(prefix="pfc-", dir="/tmp"))
    make_base(folder / "base")
    for number, name in enumerate(("one", "two")):
        make_bundle(folder / name, folder / "base", seed=number + 1, rank=4, alpha=8)
    assert run(folder, "promote", "one", "--alias", "champion").returncode == 0
    port = free_port()
    words = ["serve", "--alias", "champion", "--port", str(port), f"drain_timeout_s={DRAIN_S}", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pefomed_ray", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert started["model"] == "base:champion"
        yield Running(folder, process, port)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(TIMEOUT_S)
        shutil.rmtree(folder, ignore_errors=True)


def test_asked_promoted_rolled_back_and_taken_down(running: Running) -> None:
    (running.folder / "scan.png").write_bytes(png(3))
    query = ("query", "scan.png", "Is it normal?", "--url", running.url)
    first = running.result(*query)
    aloud = running.run(*query, "--stream", "--json")
    assert json.loads(aloud.stdout)["answer"] == first["answer"]
    assert first["answer"] in aloud.stderr
    _ask_about_dicom(running)

    promoted = running.result("promote", "two", "--alias", "champion", "--endpoint", running.url)
    assert promoted["proof"]["probed"] == 3
    second = running.result(*query)
    assert second["digest"] == promoted["digest"] != first["digest"]
    assert second["answer"] != first["answer"]
    back = running.result("rollback", "--alias", "champion", "--endpoint", running.url)
    assert running.result(*query) == first
    assert back["proof"]["digest"] == first["digest"]
    moves = running.result("history", "--alias", "champion")["moves"]
    assert [move["action"] for move in moves] == ["promote", "promote", "rollback"]
    assert [move["proof"] is None for move in moves] == [True, False, False]

    key = running.result("keys", "add", "ward-7")["key"]
    assert set(running.result("keys", "list")) == {"first", "ward-7"}
    assert key not in (running.folder / "runs/registry/server.keys").read_text()
    assert running.run("keys", "revoke", "nobody").returncode == 2
    assert running.run("query", "scan.png", "?", "--url", running.url, "--model", "none").returncode == 2
    assert running.run("query", "none.png", "?", "--url", running.url).returncode == 2
    _take_down_under_load(running, second["digest"])


def _ask_about_dicom(running: Running) -> None:
    pytest.importorskip("pydicom")
    from tests.dicom_files import dicom

    scan = dicom(np.arange(4096, dtype=np.uint16).reshape(64, 64), PatientName="Roe^Jane")
    (running.folder / "scan.dcm").write_bytes(scan)
    assert running.result("query", "scan.dcm", "Is it normal?", "--url", running.url)["answer"]
    burned = dicom(np.arange(4096, dtype=np.uint16).reshape(64, 64), BurnedInAnnotation="YES")
    (running.folder / "burned.dcm").write_bytes(burned)
    refused = running.run("query", "burned.dcm", "Is it normal?", "--url", running.url)
    assert (refused.returncode, "pixels show the patient's data" in refused.stderr) == (3, True)


def _take_down_under_load(running: Running, digest: str) -> None:
    """SIGTERM: what is under way is answered, what comes then is refused with 503, and the process ends in time."""
    told: list[float] = []

    def stop() -> None:
        told.append(time.perf_counter())
        os.kill(running.process.pid, signal.SIGTERM)

    key = (running.folder / "runs/registry/client.key").read_text().strip()
    started = time.perf_counter()
    threading.Timer(3.0, stop).start()
    sent = asyncio.run(open_loop(f"{running.url}/chat/completions", key, _long_question, 30, 5.0, timeout_s=30))
    assert running.process.wait(DRAIN_S + 30) == 0
    stopped_at = told[0] - started
    statuses = [one.status for one in sent]
    assert set(statuses) <= {200, 503, 429, NO_ANSWER}
    assert HUNG not in statuses
    before = [one for one in sent if one.due_s < stopped_at - 0.1]
    assert len(before) > 10
    assert {one.status for one in before} <= {200, 429}
    under_way = [one for one in sent if one.due_s < stopped_at < one.due_s + one.seconds and one.status == 200]
    assert under_way  # there was something to wait for
    assert 503 in statuses
    _refused_from_some_time_on(sent)


def _refused_from_some_time_on(sent: list[Sent]) -> None:
    """503 while others are answered, then nobody is there: a connection that broke lies behind all answers."""
    broken = [one.due_s for one in sent if one.status == NO_ANSWER]
    answered = [one.due_s for one in sent if one.status == 200]
    assert not broken or min(broken) > max(answered)


def _long_question(number: int) -> dict[str, Any]:
    return {"model": "champion", "messages": messages(png(number % 100), "Is it normal?"), "max_tokens": 150}
