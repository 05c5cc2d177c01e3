"""What an endpoint answered, and the verdict in it: a whole number of the scale, or the reason why there is none."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KEY = "score"


@dataclass(frozen=True)
class Reply:
    """A chat completion, as far as a verdict needs it. It was paid for, whatever it says."""

    text: str | None
    finish_reason: str | None
    refused: bool
    model: str | None
    """Who answered, in the endpoint's words."""
    fingerprint: str | None
    prompt_tokens: int | None
    """None where the endpoint does not say."""
    completion_tokens: int | None

    @property
    def identity(self) -> str | None:
        """Model and fingerprint."""
        return " ".join(filter(None, (self.model, self.fingerprint))) or None


def read_reply(body: Any) -> Reply | None:
    """The completion in a JSON body; None where it is none, such as one whose `choices` are null."""
    choice = _first(body.get("choices")) if isinstance(body, dict) else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return None
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=_text(message.get("content")),
        finish_reason=_text(choice.get("finish_reason")),
        refused=bool(message.get("refusal")),
        model=_text(body.get("model")),
        fingerprint=_text(body.get("system_fingerprint")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def read_verdict(reply: Reply, best: int) -> tuple[int | None, str | None]:
    """(score, None), or (None, reason): refusal, content_filter, empty, cut_short, unparsable, out_of_scale.

    Strict: one JSON object with the key `score` alone and a whole number in it; prose around it is passed over, but a
    second object, or a brace that begins none, makes the whole unparsable. A score is never guessed from prose.
    """
    if reply.refused:
        return None, "refusal"
    if reply.finish_reason == "content_filter":
        return None, "content_filter"
    if not reply.text or not reply.text.strip():
        return None, "cut_short" if reply.finish_reason == "length" else "empty"
    score = _only_score(reply.text)
    if score is None:
        return None, "cut_short" if reply.finish_reason == "length" else "unparsable"
    return (score, None) if 0 <= score <= best else (None, "out_of_scale")


def _only_score(text: str) -> int | None:
    try:
        objects = list(_objects(text))
    except (ValueError, RecursionError):
        return None
    if len(objects) != 1 or set(objects[0]) != {KEY}:
        return None
    score = objects[0][KEY]
    return score if isinstance(score, int) and not isinstance(score, bool) else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text. Raises ValueError at a brace that begins none."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    at = text.find("{")
    while at >= 0:
        value, end = decoder.raw_decode(text, at)
        yield value
        at = text.find("{", end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
