"""Verdicts are read strictly: a whole number of the scale, or a reason; never a guess."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pefomed_ray.evaluation.judge.reply import Reply, read_reply, read_verdict


def reply(text: str | None, finish_reason: str | None = "stop", refused: bool = False) -> Reply:
    return Reply(text, finish_reason, refused, "m", "fp", 1, 1)


@pytest.mark.parametrize(
    ("text", "best", "score"),
    [
        ('{"score": 1}', 1, 1),
        ('{"score":0}', 1, 0),
        (' \n{"score": 4}\n', 4, 4),
        ('```json\n{"score": 3}\n```', 4, 3),
        ('The candidate names the other side. {"score": 0} That is wrong.', 1, 0),
        ('<think>Both say pneumonia.</think>{\n  "score": 1\n}', 1, 1),
    ],
)
def test_scores(text: str, best: int, score: int) -> None:
    assert read_verdict(reply(text), best) == (score, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"score": 11}', "out_of_scale"),
        ('{"score": 2}', "out_of_scale"),
        ('{"score": -1}', "out_of_scale"),
        ("11/10", "unparsable"),
        ("1", "unparsable"),
        ("Score: 1", "unparsable"),
        ('{"score": "1"}', "unparsable"),
        ('{"score": "11/10"}', "unparsable"),
        ('{"score": 1.0}', "unparsable"),
        ('{"score": 0.5}', "unparsable"),
        ('{"score": NaN}', "unparsable"),
        ('{"score": Infinity}', "unparsable"),
        ('{"score": 1e999}', "unparsable"),
        ('{"score": true}', "unparsable"),
        ('{"score": null}', "unparsable"),
        ('{"score": [1]}', "unparsable"),
        ('{"Score": 1}', "unparsable"),
        ('{"score": 1, "why": "x"}', "unparsable"),
        ('{"score": 0, "score": 1}', "unparsable"),
        ('{"score": 1} {"score": 1}', "unparsable"),
        ('{"a": {"score": 1}}', "unparsable"),
        ('{"a": {"score": 1}', "unparsable"),
        ('{so} {"score": 1}', "unparsable"),
        ('{"score": 1', "unparsable"),
        ("{" * 100_000, "unparsable"),
        ('{"a":' * 100_000, "unparsable"),
        ('{"score": ' + "9" * 5000 + "}", "unparsable"),
        ("", "empty"),
        (" \n", "empty"),
    ],
)
def test_what_is_no_verdict_is_unscored(text: str, reason: str) -> None:
    assert read_verdict(reply(text), 1) == (None, reason)


def test_refused_filtered_and_cut_short_replies() -> None:
    assert read_verdict(reply('{"score": 1}', refused=True), 1) == (None, "refusal")
    assert read_verdict(reply('{"score": 1}', "content_filter"), 1) == (None, "content_filter")
    assert read_verdict(reply('{"sco', "length"), 1) == (None, "cut_short")
    assert read_verdict(reply("", "length"), 1) == (None, "cut_short")
    assert read_verdict(reply('{"score": 1}', "length"), 1) == (1, None)
    assert read_verdict(reply(None), 1) == (None, "empty")


@settings(max_examples=25, deadline=None)
@given(st.text() | st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_no_text_scores_outside_the_scale(text: str) -> None:
    score, reason = read_verdict(reply(text), 4)
    assert (score is None) == (reason is not None)
    assert score is None or score in range(5)


@pytest.mark.parametrize(
    "body",
    [None, 5, "<html>", [], {}, {"choices": None}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": 3}]}],
)
def test_what_is_no_completion(body: object) -> None:
    assert read_reply(body) is None


def test_a_completion_with_odd_parts() -> None:
    body = {
        "choices": [{"message": {"content": [1]}, "finish_reason": 3}],
        "model": None,
        "usage": {"prompt_tokens": "x"},
    }
    assert read_reply(body) == Reply(None, None, False, None, None, None, None)
    assert read_reply(body | {"usage": 3}) == Reply(None, None, False, None, None, None, None)
    whole = body | {"model": "m", "system_fingerprint": "fp", "usage": {"prompt_tokens": 5, "completion_tokens": -1}}
    found = read_reply(whole)
    assert found
    assert (found.identity, found.prompt_tokens, found.completion_tokens) == ("m fp", 5, None)
    assert pickle.loads(pickle.dumps(found)) == found
