"""Judging as one job of the Batch API: results by id, whatever their order, and never two jobs for one set."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import PefomedError
from pefomed_ray.evaluation.judge import batch
from pefomed_ray.evaluation.judge.cache import ReplyCache
from pefomed_ray.evaluation.judge.run import JudgeResult, judge_rows
from pefomed_ray.evaluation.predictions import Prediction
from tests.judge_server import Judge, serving

ROWS = [Prediction(f"id-{i}", f"q{i}", "yes", "yes" if i < 6 else "no") for i in range(10)]
PRICES = {"price_in_usd": 1.0, "price_out_usd": 10.0}

Lines = list[dict[str, Any]]


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "POLL_S", 0.02)


def run(judge: Judge, folder: Path, **settings: Any) -> JudgeResult:
    config = JudgeConfig.model_validate(
        {"model": "m", "base_url": judge.url, "canaries": 1, "licence": "open", "batch": True, **settings}
    )
    return judge_rows(ROWS, "vqa", config, licence=None, cache=folder / "cache.sqlite")


def test_rows_go_as_one_job_and_canaries_before_it(judge: Judge, tmp_path: Path) -> None:
    judge.batch_lines = lambda lines: lines[::-1]
    result = run(judge, tmp_path, repeats=2, **PRICES)
    assert [one.score for one in result.judgements] == [1.0] * 12 + [0.0] * 8
    assert result.metrics["judge_accuracy"]["value"] == 0.6
    assert len(judge.chats) == 6  # one of each kind
    assert len(judge.batches) == 1
    (job,) = judge.batches.values()
    sent = [json.loads(line) for line in judge.files[job["input_file_id"]].splitlines()]
    direct = {json.dumps(request.body) for request in judge.chats}
    assert not direct & {json.dumps(line["body"]) for line in sent}
    assert {line["body"]["response_format"]["type"] for line in sent} == {"json_schema"}
    assert result.usage["calls"] == 6 + len(sent)
    assert result.usage["prompt_tokens"] == 400 * result.usage["calls"]
    before = len(judge.requests)
    again = run(judge, tmp_path, repeats=2)
    assert (again.usage["calls"], len(judge.requests)) == (0, before)


def test_what_an_endpoint_does_not_know_is_not_in_the_job(judge: Judge, tmp_path: Path) -> None:
    judge.unknown = ("response_format", "store")
    run(judge, tmp_path, canaries=0)
    (job,) = judge.batches.values()
    sent = [json.loads(line)["body"] for line in judge.files[job["input_file_id"]].splitlines()]
    assert len(sent) == len(ROWS) - 1  # the first was asked by itself to find that out
    assert all(body.keys() == {"model", "messages", "temperature", "max_tokens", "seed"} for body in sent)


def _as_other(line: dict[str, Any], custom_id: Any) -> dict[str, Any]:
    return {**line, "custom_id": custom_id}


def _rejudged(line: dict[str, Any]) -> dict[str, Any]:
    other = json.loads(json.dumps(line))
    other["response"]["body"]["choices"][0]["message"]["content"] = '{"score": 0}'
    return other


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda lines: lines[1:], {"batch_missing": 1}),
        (lambda lines: [_as_other(lines[0], "another"), *lines[1:]], {"batch_missing": 1}),
        (lambda lines: [_as_other(lines[0], None), *lines[1:]], {"batch_missing": 1}),
        (lambda lines: [*lines, _as_other(lines[0], "another")], {}),
        (lambda lines: [*lines, lines[0]], {}),
        (lambda lines: [*lines, *map(_rejudged, lines)], {"batch_twice": "those right"}),
        (lambda lines: ["{torn", "null", "[]", *lines], {}),
        (lambda lines: [{**lines[0], "response": {"status_code": 500, "body": None}}, *lines[1:]], {"http_500": 1}),
        (lambda lines: [{**lines[0], "response": None, "error": {"code": "batch_expired"}}, *lines[1:]],
         {"batch_expired": 1}),
        (lambda lines: [{**lines[0], "response": {"status_code": 200, "body": {"choices": None}}}, *lines[1:]],
         {"no_completion": 1}),
    ],
)  # fmt: skip
def test_results_are_matched_by_id_or_left_unscored(
    judge: Judge, tmp_path: Path, change: Callable[[Lines], list[Any]], reasons: dict[str, Any]
) -> None:
    judge.batch_lines = change
    result = run(judge, tmp_path, canaries=0)
    found = result.about["unscored"]
    if reasons == {"batch_twice": "those right"}:
        assert 4 <= found.pop("batch_twice") <= 6  # a right one may have been asked by itself
        reasons = {}
    assert found == reasons
    metric = result.metrics["judge_accuracy"]
    assert metric["n"] + metric["unscored"] == len(ROWS)
    wrong = [one for one in result.judgements if one.score == 1 and int(one.id[3:]) >= 6]
    assert not wrong
    judge.batch_lines = lambda lines: lines
    assert run(judge, tmp_path, canaries=0).metrics["judge_accuracy"]["n"] == len(ROWS)  # only what is missing, again


def test_an_expired_job_keeps_what_it_has(judge: Judge, tmp_path: Path) -> None:
    judge.batch_statuses, judge.batch_lines = ["in_progress", "expired"], lambda lines: lines[:5]
    result = run(judge, tmp_path, canaries=0)
    assert result.metrics["judge_accuracy"]["n"] == 6
    assert result.about["unscored"] == {"batch_missing": 4}


def test_a_job_that_takes_too_long_is_gone_on_with(judge: Judge, tmp_path: Path) -> None:
    judge.batch_statuses = ["in_progress"]
    with pytest.raises(PefomedError, match=r"batch_0 has not ended after 0\.2 s"):
        run(judge, tmp_path, batch_wait_s=0.2)
    judge.batch_statuses = ["completed"]
    assert run(judge, tmp_path).metrics["judge_accuracy"]["n"] == len(ROWS)
    assert len(judge.batches) == 1


def test_a_job_whose_id_was_lost_is_found_again(judge: Judge, tmp_path: Path) -> None:
    judge.batch_statuses = ["in_progress"]
    with pytest.raises(PefomedError):
        run(judge, tmp_path, batch_wait_s=0.2)
    cache = ReplyCache(tmp_path / "cache.sqlite")
    cache._file.execute("DELETE FROM batches")
    cache.close()
    judge.batch_statuses = ["completed"]
    assert run(judge, tmp_path).metrics["judge_accuracy"]["n"] == len(ROWS)
    assert len(judge.batches) == 1


def test_a_failed_job_says_so_and_the_next_run_starts_another(judge: Judge, tmp_path: Path) -> None:
    judge.batch_statuses = ["failed"]
    with pytest.raises(PefomedError, match="invalid_json_line"):
        run(judge, tmp_path)
    judge.batch_statuses = ["completed"]
    assert run(judge, tmp_path).metrics["judge_accuracy"]["n"] == len(ROWS)
    assert len(judge.batches) == 2


def test_a_job_whose_results_were_all_errors_is_not_read_for_ever(judge: Judge, tmp_path: Path) -> None:
    judge.batch_lines = lambda lines: [{**line, "response": {"status_code": 500, "body": None}} for line in lines]
    assert run(judge, tmp_path).about["unscored"] == {"http_500": 9}  # one row has the text of a canary
    judge.batch_lines = lambda lines: lines
    assert run(judge, tmp_path).metrics["judge_accuracy"]["n"] == len(ROWS)
    assert len(judge.batches) == 2


def test_only_what_the_cap_has_room_for_is_sent(judge: Judge, tmp_path: Path) -> None:
    result = run(judge, tmp_path, canaries=0, **PRICES, cap_usd=0.015, max_tokens=256)
    sent = result.usage["calls"]
    assert 2 < sent < len(ROWS)
    assert result.about["unscored"] == {"budget": len(ROWS) - sent}
    assert result.usage["cost_usd"] <= 0.015
