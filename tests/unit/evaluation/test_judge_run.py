"""The judge against a server that misbehaves in every way it can, with numbers (J1, J2, J3)."""

import asyncio
import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError, PefomedError
from pefomed_ray.evaluation.judge import ask
from pefomed_ray.evaluation.judge.ask import Asker
from pefomed_ray.evaluation.judge.budget import Budget
from pefomed_ray.evaluation.judge.endpoint import open_client
from pefomed_ray.evaluation.judge.prompts import Asked, prompt_for
from pefomed_ray.evaluation.judge.run import JudgeResult, judge_rows
from pefomed_ray.evaluation.predictions import Prediction
from tests.judge_server import FAULTS, FINGERPRINT, MODEL, Item, Judge, serving

RETRIES = 1
TIMEOUT_S = 1.5
PASSING = {
    "rate_limit": "http_429",
    "rate_limit_for_ever": "http_429",
    "error_500": "http_500",
    "error_503": "http_503",
    "error_408": "http_408",
    "reset": "connection",
    "cut": "connection",
    "stall": "timeout",
    "drip": "timeout",
    "html": "not_json",
    "truncated": "not_json",
    "not_utf8": "not_json",
    "deep": "not_json",
    "null": "no_completion",
    "list": "no_completion",
    "null_choices": "no_completion",
    "no_choices": "no_completion",
    "null_message": "no_completion",
}
"""Fault -> the reason when it does not pass; tried again until then."""
LASTING = {
    "error_400": "http_400",
    "error_413": "http_413",
    "filtered_400": "content_filter",
    "refusal": "refusal",
    "filtered": "content_filter",
    "empty": "empty",
    "cut_short": "cut_short",
    "eleven_of_ten": "unparsable",
    "eleven": "out_of_scale",
    "minus_one": "out_of_scale",
    "nan": "unparsable",
    "half": "unparsable",
    "true": "unparsable",
    "text": "unparsable",
    "other_key": "unparsable",
    "more_keys": "unparsable",
    "two_objects": "unparsable",
    "twice_in_one": "unparsable",
    "nested": "unparsable",
    "bare": "unparsable",
}
"""Fault -> the reason; asked once."""
FATAL = {"error_401", "error_404", "redirect", "quota", "spend_limit"}
ELSEWHERE = {"prose", "late"}


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(ask, "LONGEST_WAIT_S", 0.2)


def rows(questions: list[str], answer: str = "yes", **more: Any) -> list[Prediction]:
    return [Prediction(f"id-{i}", question, answer, answer, **more) for i, question in enumerate(questions)]


def run(judge: Judge, found: list[Prediction], folder: Path, task: Task = "vqa", **settings: Any) -> JudgeResult:
    config = JudgeConfig.model_validate(
        {"model": "m", "base_url": judge.url, "max_retries": RETRIES, "canaries": 0, "licence": "open", **settings}
    )
    return judge_rows(found, task, config, licence=None, cache=folder / "cache.sqlite")


def test_every_fault_has_its_place() -> None:
    assert PASSING.keys() | LASTING.keys() | FATAL | ELSEWHERE == FAULTS.keys()


def test_faults_that_last_leave_items_unscored_with_the_reason(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "GIVE_UP_AFTER", 1000)
    expected = {**PASSING, **LASTING, "fine": None}
    judge.faults = {name: [name] * 99 for name in expected if name != "fine"}
    result = run(judge, rows(list(expected)), tmp_path, timeout_s=TIMEOUT_S, concurrency=32)
    reasons = {name: one.unscored for name, one in zip(expected, result.judgements, strict=True)}
    assert reasons == expected
    metric = result.metrics["judge_accuracy"]
    assert (metric["n"], metric["unscored"]) == (1, len(expected) - 1)
    assert metric["n"] + metric["unscored"] == len(expected) == len(result.judgements)
    assert all((one.score is None) == (one.unscored is not None) for one in result.judgements)
    tries = {name: judge.asked(name) for name in expected}
    assert result.usage["calls"] == sum(tries.values())
    assert tries.pop("error_400") <= 1 + len(ask.DISPENSABLE)  # as the first of all, it is asked with less and less
    assert tries == {name: 1 + RETRIES if name in PASSING else 1 for name in tries}
    assert result.flagged


def test_faults_that_pass_cost_a_try_and_no_score(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {name: [name] for name in PASSING}
    result = run(judge, rows([*PASSING, "fine"]), tmp_path, timeout_s=TIMEOUT_S, concurrency=32)
    assert [one.score for one in result.judgements] == [1] * (len(PASSING) + 1)
    assert {name: judge.asked(name) for name in PASSING} == dict.fromkeys(PASSING, 2)
    assert result.metrics["judge_accuracy"]["value"] == 1.0


def test_prose_around_a_verdict_is_passed_over(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {"*": ["prose"]}
    assert run(judge, rows(["q"]), tmp_path).judgements[0].score == 1


def test_retry_after_is_kept_to_and_bounded(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {"short": ["rate_limit"], "long": ["rate_limit_for_ever"]}
    run(judge, rows(["short"]), tmp_path)
    run(judge, rows(["long"]), tmp_path)
    short, again, long, once_more = [request.at_s for request in judge.chats]
    assert again - short >= 0.1
    assert 0.2 <= once_more - long < 20


@pytest.mark.parametrize(
    ("fault", "kind", "word"),
    [
        ("quota", PefomedError, "insufficient_quota"),
        ("spend_limit", PefomedError, "project_spend_limit_exceeded"),
        ("error_401", ConfigError, "401"),
        ("error_404", ConfigError, "404"),
        ("redirect", ConfigError, "307"),
    ],
)
def test_what_concerns_every_question_ends_at_once(
    judge: Judge, tmp_path: Path, fault: str, kind: type[PefomedError], word: str
) -> None:
    judge.faults = {"q3": [fault]}
    asked = rows([f"q{i}" for i in range(12)])
    with pytest.raises(kind, match=word) as caught:
        run(judge, asked, tmp_path, concurrency=1)
    sent = len(judge.chats)
    order = [request.item["question"] for request in judge.chats]
    assert order[-1] == "q3"  # 0 further calls
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    result = run(judge, asked, tmp_path, concurrency=1)  # resumable: what was answered is not asked again
    assert len(judge.chats) - sent == len(asked) - (sent - 1)
    assert result.metrics["judge_accuracy"]["n"] == len(asked)


def test_what_waits_for_its_next_try_ends_with_the_quota(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "LONGEST_WAIT_S", 60.0)
    judge.faults = {"q0": ["rate_limit_for_ever"] * 9, "q1": ["quota"]}
    found = rows(["first", "q0", "q1", "q2"])
    config = {"concurrency": 2, "seed": 6}
    started = time.monotonic()
    with pytest.raises(PefomedError, match="insufficient_quota"):
        run(judge, found, tmp_path, **config)
    assert time.monotonic() - started < 30
    assert judge.asked("q0") <= 1


def test_a_dead_endpoint_is_given_up(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {"*": ["error_500"] * 1000}
    with pytest.raises(PefomedError, match=r"10 questions in a row.*http_500"):
        run(judge, rows([f"q{i}" for i in range(100)]), tmp_path, concurrency=1, max_retries=1)
    assert len(judge.chats) == 2 * ask.GIVE_UP_AFTER


def test_a_reply_that_comes_too_late_is_asked_for_a_bounded_number_of_times(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {"late": ["late"] * 99}
    asked = rows(["late", *(f"q{i}" for i in range(5))])
    first = run(judge, asked, tmp_path, timeout_s=1.0, price_in_usd=1, price_out_usd=1)
    assert judge.asked("late") == 1 + RETRIES
    assert first.judgements[0].unscored == "timeout"
    assert first.usage["unanswered_cost_usd"] > 0  # it may have been billed
    judge.faults = {}
    before = len(judge.chats)
    assert run(judge, asked, tmp_path).metrics["judge_accuracy"]["n"] == 6
    assert len(judge.chats) == before + 1  # only what is not there
    last = run(judge, asked, tmp_path)
    assert len(judge.chats) == before + 1  # a re-run bills nothing
    assert (last.usage["calls"], last.usage["cached"], last.usage["prompt_tokens"]) == (0, 6, 0)


def test_nothing_unparsable_is_paid_for_twice(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {"odd": ["eleven"]}
    asked = rows(["odd", "q"])
    assert run(judge, asked, tmp_path).judgements[0].unscored == "out_of_scale"
    assert run(judge, asked, tmp_path).judgements[0].unscored == "out_of_scale"
    assert judge.asked("odd") == 1


def test_the_cache_tells_apart_what_makes_a_difference(judge: Judge, tmp_path: Path) -> None:
    base = rows(["q"])
    run(judge, base, tmp_path)
    same = [Prediction("other id", "q", "yes", "yes", group="g")]
    assert run(judge, same, tmp_path).usage["calls"] == 0
    for found, settings in (
        ([Prediction("id-0", "q?", "yes", "yes")], {}),
        ([Prediction("id-0", "q", "no", "yes")], {}),
        ([Prediction("id-0", "q", "yes", "no")], {}),
        ([Prediction("id-0", "q", "yes", "yes", references=("yes", "yep"))], {}),
        (base, {"model": "n"}),
        (base, {"temperature": 0.5}),
        (base, {"seed": 1}),
        (base, {"max_tokens": 99}),
        (base, {"task": "report"}),
    ):
        assert run(judge, found, tmp_path, **settings).usage["calls"] == 1  # type: ignore[arg-type]
    assert run(judge, base, tmp_path, repeats=3).usage["calls"] == 2


def test_the_same_question_of_several_rows_is_asked_once(judge: Judge, tmp_path: Path) -> None:
    result = run(judge, rows(["Is it normal?"] * 30), tmp_path)
    assert (result.usage["calls"], result.metrics["judge_accuracy"]["n"]) == (1, 30)


PRICES = {"price_in_usd": 2.0, "price_out_usd": 20.0}
CALL_USD = (400 * 2 + 10 * 20) / 1e6


def test_spending_ends_at_the_cap(judge: Judge, tmp_path: Path) -> None:
    asked = rows([f"q{i}" for i in range(40)])
    judge.delay_s = 0.02
    capped = run(judge, asked, tmp_path, **PRICES, cap_usd=12 * CALL_USD, concurrency=4)
    spent = len(judge.chats) * CALL_USD
    assert capped.usage["cost_usd"] == pytest.approx(spent)
    assert 12 * CALL_USD <= spent + 1e-9 <= (12 + 4) * CALL_USD
    unscored = [one.unscored for one in capped.judgements if one.unscored]
    assert set(unscored) == {"budget"}
    assert len(unscored) == 40 - len(judge.chats)
    assert any("budget" in flag for flag in capped.flags)
    before = len(judge.chats)
    again = run(judge, asked, tmp_path, **PRICES, cap_usd=12 * CALL_USD, concurrency=4)
    assert (again.usage["calls"], len(judge.chats)) == (0, before)  # the cap counts what the cache holds
    whole = run(judge, asked, tmp_path, **PRICES)
    assert whole.metrics["judge_accuracy"]["n"] == 40
    assert len(judge.chats) == 40


def test_a_number_of_calls_is_never_passed(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {f"q{i}": ["error_500"] for i in range(30)}
    result = run(judge, rows([f"q{i}" for i in range(30)]), tmp_path, max_calls=25, concurrency=8)
    assert len(judge.chats) == 25 == result.usage["calls"]
    scored = result.metrics["judge_accuracy"]
    assert scored["n"] + scored["unscored"] == 30


def test_without_usage_the_dear_estimate_counts(judge: Judge, tmp_path: Path) -> None:
    judge.usage = None
    usage = run(judge, rows(["q"]), tmp_path, **PRICES).usage
    assert usage["completion_tokens"] == 256
    assert usage["prompt_tokens"] > 400


@pytest.mark.parametrize(
    ("unknown", "kept"),
    [
        ((), {"response_format": "json_schema", "store": False, "seed": 42, "temperature": 0.0, "max_tokens": 256}),
        (("json_schema",), {"response_format": "json_object", "store": False, "seed": 42}),
        (("response_format",), {"response_format": None, "store": False, "seed": 42}),
        (("response_format", "store", "seed"), {"response_format": None, "temperature": 0.0, "max_tokens": 256}),
        (("max_tokens", "temperature"), {"response_format": "json_schema", "max_completion_tokens": 256}),
    ],
)
def test_what_an_endpoint_does_not_know_is_left_out_once(
    judge: Judge, tmp_path: Path, unknown: tuple[str, ...], kept: dict[str, Any]
) -> None:
    judge.unknown = unknown
    result = run(judge, rows([f"q{i}" for i in range(8)]), tmp_path)
    assert result.metrics["judge_accuracy"]["n"] == 8
    assert result.about["asked_with"].items() >= kept.items()
    refused = len(judge.chats) - 8
    assert refused <= 5
    accepted = [request.body for request in judge.chats[refused:]]
    assert all(body.keys() == accepted[0].keys() for body in accepted)


def test_an_endpoint_that_does_not_say_what_it_refuses(judge: Judge, tmp_path: Path) -> None:
    judge.unknown, judge.unnamed = ("response_format", "store"), True
    result = run(judge, rows(["q0", "q1"]), tmp_path)
    assert result.metrics["judge_accuracy"]["n"] == 2
    assert result.about["asked_with"] == {"temperature": 0.0, "max_tokens": 256, "seed": 42, "response_format": None}


def test_an_item_that_is_refused_leaves_the_parameters_to_the_others(judge: Judge, tmp_path: Path) -> None:
    judge.faults = {"bad": ["error_400"] * 99}
    result = run(judge, rows(["bad", "q1", "q2"]), tmp_path, concurrency=1, seed=1)
    assert [one.unscored for one in result.judgements] == ["http_400", None, None]
    assert result.about["asked_with"]["response_format"] == "json_schema"


def test_repeats_say_how_far_the_judge_agrees_with_itself(judge: Judge, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def wavering(item: Item, best: int) -> int:
        seen[item["question"]] = seen.get(item["question"], 0) + 1
        return 4 if item["question"] == "sure" else seen[item["question"]]

    judge.verdict = wavering
    result = run(judge, rows(["sure", "wavers"]), tmp_path, "report", repeats=3, concurrency=1)
    assert [(one.id, one.repeat) for one in result.judgements] == [(f"id-{i}", r) for i in range(2) for r in range(3)]
    assert [one.score for one in result.judgements] == [4, 4, 4, 1, 2, 3]
    assert result.metrics["judge_was"]["value"] == pytest.approx((4 + 2) / 2 / 4)
    assert result.about["distribution"] == {"0": 0, "1": 1, "2": 1, "3": 1, "4": 3}
    found = result.about["self_consistency"]
    assert (found["agreeing"]["value"], found["agreeing"]["n"]) == (0.5, 2)
    assert found["row_std"] == pytest.approx((0 + 1) / 2)  # 1, 2, 3 has standard deviation 1
    assert found["run_std"] == pytest.approx(0.125)  # means 5/8, 6/8, 7/8
    assert sorted(request.body["seed"] for request in judge.chats) == [42, 42, 43, 43, 44, 44]


def test_rows_without_a_prediction_are_unscored_and_not_asked(judge: Judge, tmp_path: Path) -> None:
    found = [Prediction("a", "q", "yes", None, "closed"), Prediction("b", "q", "yes", "no", "open")]
    result = run(judge, found, tmp_path)
    assert [one.unscored for one in result.judgements] == ["no_prediction", None]
    assert len(judge.chats) == 1
    assert (result.metrics["judge_accuracy_closed"]["n"], result.metrics["judge_accuracy_open"]["value"]) == (0, 0.0)


def test_a_sample_is_the_same_rows_each_time(judge: Judge, tmp_path: Path) -> None:
    found = rows([f"q{i}" for i in range(30)])
    first = [one.id for one in run(judge, found, tmp_path, sample=4).judgements]
    assert len(set(first)) == 4
    assert first == sorted(first, key=lambda name: int(name.removeprefix("id-")))
    assert [one.id for one in run(judge, found, tmp_path, sample=4).judgements] == first
    assert [one.id for one in run(judge, found, tmp_path, sample=4, seed=1).judgements] != first


def test_who_judged_is_written_down_and_a_change_of_model_is_a_flag(judge: Judge, tmp_path: Path) -> None:
    one = run(judge, rows(["q0"]), tmp_path)
    assert one.about["identities"] == {f"{MODEL} {FINGERPRINT}": 1}
    assert one.judgements[0].identity == f"{MODEL} {FINGERPRINT}"
    assert not any("Several" in flag for flag in one.flags)
    judge.model = "mock-judge-2026-09-09"
    two = run(judge, rows(["q0", "q1"]), tmp_path)
    assert any("Several models" in flag and "2026-09-09" in flag for flag in two.flags)


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        (lambda item, best: best, "null answer"),
        (lambda item, best: 0, "reference itself"),
        (lambda item, best: best if "score" in item["candidate"] or item["candidate"] == "yes" else 0, "injected"),
        (lambda item, best: best if "context" in item["candidate"] or item["candidate"] == "yes" else 0, "constant"),
        (lambda item, best: 99, "No canary"),
    ],
)
def test_canaries_flag_a_judge_that_can_be_fooled(judge: Judge, tmp_path: Path, verdict: Any, word: str) -> None:
    judge.verdict = verdict
    result = run(judge, rows(["q0", "q1"]), tmp_path, "report", canaries=1)
    assert result.flagged
    assert any(word in flag for flag in result.flags)


@pytest.mark.parametrize("task", ["vqa", "report"])
def test_canaries_pass_an_honest_judge(judge: Judge, tmp_path: Path, task: Task) -> None:
    """The control, and canaries are in no score."""
    honest = run(judge, [*rows(["q0", "q1"]), Prediction("id-2", "q2", "yes", "no")], tmp_path, task, canaries=2)
    assert not honest.flagged
    best = 1 if task == "vqa" else 4
    assert honest.about["canaries"]["reference"] == {"mean": best, "highest": best, "n": 2, "unscored": 0}
    assert honest.metrics[next(iter(honest.metrics))]["n"] == 3


def test_nothing_may_not_rank_above_the_rows(judge: Judge, tmp_path: Path) -> None:
    judge.verdict = lambda item, best: 4 if item["candidate"] == item["references"][0] else int(not item["candidate"])
    found = [Prediction(str(i), f"q{i}", "yes", "no") for i in range(5)]
    assert any(
        "null answer" in flag and "above" in flag for flag in run(judge, found, tmp_path, "report", canaries=2).flags
    )


def test_requests_are_spaced(judge: Judge, tmp_path: Path) -> None:
    run(judge, rows([f"q{i}" for i in range(6)]), tmp_path, requests_per_minute=600)
    times = [request.at_s for request in judge.chats]
    assert times[-1] - times[0] >= 5 * 0.1 * 0.9


def test_tokens_are_reserved_before_a_request(judge: Judge) -> None:
    async def two_questions() -> None:
        config = JudgeConfig(model="m", base_url=judge.url, tokens_per_minute=100)
        async with open_client(config) as client:
            asker = Asker(client, prompt_for("vqa"), config, Budget(config))
            asked = [Asked(str(i), 0, f"q{i}", ("yes",), "yes") for i in range(2)]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*map(asker.ask, asked)), 3.0)

    asyncio.run(two_questions())
    assert len(judge.chats) == 1  # the second waits for a minute


def test_no_more_are_on_their_way_than_allowed(judge: Judge, tmp_path: Path) -> None:
    judge.delay_s = 0.05
    run(judge, rows([f"q{i}" for i in range(20)]), tmp_path, concurrency=3)
    assert 1 < judge.most_at_once <= 3


def test_no_text_of_a_patient_is_in_an_error_or_a_log(
    judge: Judge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "Canary-93f1"
    caplog.set_level(logging.INFO)
    judge.faults = {"*": ["error_400"] * 99}
    found = [Prediction(str(i), f"{canary} {i}", canary, canary) for i in range(ask.GIVE_UP_AFTER)]
    with pytest.raises(PefomedError) as caught:
        run(judge, found, tmp_path)
    assert canary in judge.chats[0].user  # the control: it was sent
    assert canary not in str(caught.value)
    assert canary not in caplog.text
    assert caught.value.__cause__ is None


def test_a_proxy_of_the_environment_is_not_for_this_machine(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert run(judge, rows(["q"]), tmp_path).metrics["judge_accuracy"]["n"] == 1
