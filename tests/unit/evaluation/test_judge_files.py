"""What is judged where: restricted texts stay home (J5), keys stay secret, and a folder holds one judge's verdicts."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config.load import build_config, parse_words
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError, RefusedError
from pefomed_ray.evaluation.judge.endpoint import licence_in, open_client
from pefomed_ray.evaluation.judge.files import Judged, judge_file
from pefomed_ray.evaluation.judge.run import judge_rows
from pefomed_ray.evaluation.judgements import read_judgements
from pefomed_ray.evaluation.predictions import read_predictions
from pefomed_ray.evaluation.verdicts import read_verdicts
from tests.judge_server import Judge, serving


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serving() as running:
        yield running


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that sockets connect to, names that are looked up, from now on."""
    seen: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: Any) -> None:
        seen.append(address)
        return connect(self, address)

    def guarded_look_up(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    return seen


def write_rows(path: Path, *licences: str | None) -> Path:
    """A row for each licence that its `produced_by` names."""
    made = [{"licence": licence} if licence else {} for licence in licences]
    rows = [
        {"id": f"r{i}", "question": f"q{i}", "answer": "yes", "prediction": "yes", "produced_by": by}
        for i, by in enumerate(made)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(judge: Judge, source: Path, output: Path, **settings: Any) -> Judged:
    config = JudgeConfig.model_validate({"model": "m", "base_url": judge.url, "canaries": 1, **settings})
    return judge_file(source, "vqa", config, output, lambda cost: None, lambda done, total: None)


@pytest.mark.parametrize(
    ("licences", "declared", "word"),
    [
        (("restricted",), None, "restricted corpus"),
        (("open", "restricted"), None, "restricted corpus"),
        (("restricted",), "open", "restricted corpus"),  # a word does not open what the data say is restricted
        ((None,), None, "nobody says"),
        (("open", None), None, "nobody says"),
        ((None,), "restricted", "restricted corpus"),
    ],
)
def test_what_is_not_declared_open_sends_nothing(
    judge: Judge, tmp_path: Path, connections: list[Any], licences: tuple[str | None, ...], declared: Any, word: str
) -> None:
    source = write_rows(tmp_path / "p.jsonl", *licences)
    with pytest.raises(RefusedError, match=word) as caught:
        run(judge, source, tmp_path / "out", licence=declared)
    assert "local=true" in str(caught.value)
    assert caught.value.exit_code == 5
    rows, config = read_predictions(source), JudgeConfig(model="m", base_url=judge.url, licence=declared)
    with pytest.raises(RefusedError):  # nor by the library's own door
        judge_rows(rows, "vqa", config, licence=licence_in(source), cache=tmp_path / "c")
    assert (connections, judge.requests) == ([], [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("licences", "settings"),
    [
        (("open",), {}),
        ((None,), {"licence": "open"}),
        (("restricted",), {"local": True}),
        ((None,), {"local": True}),
    ],
)
def test_what_may_be_sent_is_sent(
    judge: Judge, tmp_path: Path, connections: list[Any], licences: tuple[str | None, ...], settings: dict[str, Any]
) -> None:
    """The control of the guard: it sees a connection."""
    result = run(judge, write_rows(tmp_path / "p.jsonl", *licences), tmp_path / "out", **settings).result
    assert result.metrics["judge_accuracy"]["n"] == 1
    assert connections
    assert judge.chats


def test_a_folder_goes_on_with_the_same_question_only(judge: Judge, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "p.jsonl", "open", "open")
    first = run(judge, source, tmp_path / "out")
    assert [one.score for one in read_judgements(first.judgements)] == [1, 1]
    metrics = json.loads(first.metrics.read_text())
    assert metrics["judge_accuracy"]["value"] == 1
    assert metrics["flagged"] is False
    assert metrics["usage"]["calls"] == len(judge.chats) == first.estimate.calls
    again = run(judge, source, tmp_path / "out", concurrency=1, max_retries=0)
    assert (again.estimate.calls, again.result.usage["calls"]) == (0, 0)
    for other in ({"model": "n"}, {"repeats": 2}, {"temperature": 1.0}, {"sample": 1}):
        with pytest.raises(ConfigError, match=next(iter(other))):
            run(judge, source, tmp_path / "out", **other)
    write_rows(source, "open")
    with pytest.raises(ConfigError, match="predictions"):
        run(judge, source, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        run(judge, source, tmp_path / "full")


def test_the_report_reads_what_was_written(judge: Judge, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "p.jsonl", "open", "open")
    run(judge, source, tmp_path / "out")
    verdicts = read_verdicts(tmp_path / "out", source, "vqa")
    assert (verdicts.judge, verdicts.flags, dict(verdicts.scores)) == ("m vqa-1", (), {"r0": 1.0, "r1": 1.0})


def test_a_cache_may_be_shared(judge: Judge, tmp_path: Path) -> None:
    source, cache = write_rows(tmp_path / "p.jsonl", "open"), str(tmp_path / "shared.sqlite")
    run(judge, source, tmp_path / "one", cache=cache)
    assert run(judge, source, tmp_path / "two", cache=cache).result.usage["calls"] == 0
    (tmp_path / "bad.sqlite").write_text("no database, but some text that is long enough to be looked at as one")
    with pytest.raises(ConfigError, match="cache"):
        run(judge, source, tmp_path / "three", cache=str(tmp_path / "bad.sqlite"))


def test_no_text_is_in_the_cache(judge: Judge, tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text(json.dumps({"id": "r", "question": "Canary-1", "answer": "Canary-2", "prediction": "Canary-3"}))
    run(judge, source, tmp_path / "out", licence="open")
    assert "Canary-1" in judge.chats[0].user  # the control
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"cache.sqlite", "metrics.json", "judgements.jsonl", "asked.json"}
    assert not any(b"Canary" in path.read_bytes() for path in files)


def sent_key(judge: Judge) -> str:
    return judge.chats[0].headers["authorization"]


def test_the_key_comes_from_the_environment_or_a_file(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "p.jsonl", "open")
    monkeypatch.setenv("MY_KEY", "sk-of-env")
    run(judge, source, tmp_path / "one", key_env="MY_KEY")
    assert sent_key(judge) == "Bearer sk-of-env"
    judge.requests.clear()
    (tmp_path / "client.key").write_text("sk-of-file\n")
    run(judge, source, tmp_path / "two", key_file=str(tmp_path / "client.key"))
    assert sent_key(judge) == "Bearer sk-of-file"
    kept = [path.read_bytes() for path in tmp_path.glob("*/*") if path.is_file()]
    assert not any(b"sk-of" in data for data in kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=m", "base_url=ftp://x/v1"], "is not an http"),
        (["model=m", "base_url=http://judge.example.org/v1"], "without encryption"),
        (["model=m", "base_url=https://user:hunter2@judge.example.org/v1"], "holds a user name"),
        (["model=m", "base_url=https://judge.example.org/v1?key=hunter2"], "holds a user name"),
        (["model=m", "base_url=https://judge.example.org/v1"], "OPENAI_API_KEY holds no key"),
        (["model=m", "key_file=/nowhere/client.key"], "does not exist"),
        (["model=m", "api_key=hunter2"], "unknown key 'api_key'"),
        (["base_url=https://x/v1"], "'model' is missing"),
        (["model=m", "cap_usd=5"], "cap_usd needs price_in_usd"),
        (["model=m", "price_in_usd=5"], "give both"),
        (["model=m", "repeats=0"], "repeats"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, connections: list[Any], words: list[str], message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=message) as caught:
        open_client(build_config(JudgeConfig, parse_words(words), "judge"))
    assert "hunter2" not in str(caught.value)
    assert connections == []
