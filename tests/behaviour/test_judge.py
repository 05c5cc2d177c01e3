"""`pefomed-ray judge` from the command line: killed in the middle it goes on without paying twice (J6)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.judge_server import Judge, serving

ROWS = 40
CANARIES = 6
TIMEOUT_S = 120


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serving() as running:
        yield running


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    path = tmp_path / "predictions.jsonl"
    rows = [
        {"id": f"r{i}", "question": f"q{i}", "answer": "yes", "prediction": "yes" if i % 2 else "no"}
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(judge: Judge, predictions: Path, *words: str) -> list[str]:
    output = str(predictions.parent / "judged")
    settings = ["model=mock", f"base_url={judge.url}", "licence=open", "canaries=1", "concurrency=2", *words]
    verb = ["judge", str(predictions), "--task", "vqa", "--output", output, "--json", *settings]
    return [sys.executable, "-m", "pefomed_ray", *verb]


def finished(words: list[str]) -> dict[str, Any]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_killed_run_asks_only_what_is_missing(judge: Judge, predictions: Path) -> None:
    judge.delay_s = 0.2
    words = command(judge, predictions, "--yes")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while len(judge.chats) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2 * judge.delay_s)
    before = len(judge.chats)
    assert 20 <= before < ROWS + CANARIES
    judge.delay_s = 0.0
    found = finished(words)
    again = len(judge.chats) - before
    assert ROWS + CANARIES - before <= again <= ROWS + CANARIES - before + 2  # what was on its way was not answered
    assert found["judge_accuracy"] | {"ci95": None} == {"value": 0.5, "n": ROWS, "unscored": 0, "ci95": None}
    assert found["usage"]["calls"] == again
    assert found["flagged"] is False
    total = len(judge.chats)
    rerun = finished(words)
    assert (rerun["usage"]["calls"], len(judge.chats)) == (0, total)  # a re-run bills nothing
    assert rerun["judge_accuracy"] == found["judge_accuracy"]


def test_what_may_cost_much_is_asked_about_first(judge: Judge, predictions: Path) -> None:
    dear = ["price_in_usd=1000", "price_out_usd=1000"]
    for words in ([], dear):
        done = subprocess.run(
            command(judge, predictions, *words),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 5, done.stderr
        assert "--yes" in done.stderr
        assert judge.requests == []
    found = finished(command(judge, predictions, "price_in_usd=0.1", "price_out_usd=0.4"))
    assert found["usage"]["cost_usd"] > 0
    assert Path(found["judgements"]).is_file()
    assert Path(found["metrics"]).is_file()


def test_no_key_and_a_mistyped_word_exit_2(judge: Judge, predictions: Path) -> None:
    for words, name in ((["timeout=3"], "timeout_s"), (["base_url=https://judge.example.org/v1"], "OPENAI_API_KEY")):
        environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
        done = subprocess.run(
            command(judge, predictions, *words), capture_output=True, text=True, timeout=TIMEOUT_S, env=environment
        )
        assert done.returncode == 2
        assert name in done.stderr
