"""What judging costs: said beforehand, counted as it is spent, ended where it is to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.evaluation.judge.prompts import Asked, Prompt
from pefomed_ray.evaluation.judge.reply import Reply

BYTES_A_TOKEN = 3
"""Of UTF-8. English texts have about four, other scripts and lists of digits fewer: an estimate on the dear side."""
MILLION = 1e6


@dataclass(frozen=True)
class Estimate:
    """What a run may cost, before it starts."""

    calls: int
    """Without retries."""
    prompt_tokens: int
    """Estimated from the texts' bytes."""
    completion_tokens: int
    """At most."""
    cost_usd: float | None
    """At most, by that; None without prices."""


def prompt_tokens(prompt: Prompt, asked: Asked) -> int:
    """About how many tokens one question has."""
    messages = prompt.messages(asked, blank_image=False)
    return sum(len(message["content"].encode()) for message in messages) // BYTES_A_TOKEN + 1


def estimate(prompt: Prompt, questions: Sequence[Asked], config: JudgeConfig) -> Estimate:
    """What it costs to ask these questions once each."""
    tokens_in = sum(prompt_tokens(prompt, asked) for asked in questions)
    tokens_out = len(questions) * config.max_tokens
    return Estimate(len(questions), tokens_in, tokens_out, cost_usd(config, tokens_in, tokens_out))


def cost_usd(config: JudgeConfig, tokens_in: int, tokens_out: int) -> float | None:
    """By the config's prices; None without any."""
    if config.price_in_usd is None or config.price_out_usd is None:
        return None
    return (tokens_in * config.price_in_usd + tokens_out * config.price_out_usd) / MILLION


class Budget:
    """Counts calls and tokens, and says when no more may be asked.

    A call that brought nothing (a timeout, a lost connection) may have been billed all the same: it counts as dear as
    it can have been, beside what is known.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.calls = 0
        self.cached = 0
        self._known = [0, 0]
        self._cached = [0, 0]
        self._perhaps = [0, 0]

    @property
    def is_spent(self) -> bool:
        """Whether the cap or the number of calls is reached."""
        config = self.config
        if config.max_calls is not None and self.calls >= config.max_calls:
            return True
        return config.cap_usd is not None and self.left_usd <= 0

    @property
    def left_usd(self) -> float:
        """Until the cap; infinite without one."""
        if self.config.cap_usd is None:
            return float("inf")
        counts = (self._known, self._cached, self._perhaps)
        return self.config.cap_usd - sum(cost_usd(self.config, *tokens) or 0.0 for tokens in counts)

    def begin_call(self) -> None:
        """Count a request that is sent."""
        self.calls += 1

    def add(self, reply: Reply, tokens_in: int) -> None:
        """Count a reply; `tokens_in` is the estimate where the endpoint does not say."""
        _add(self._known, reply, tokens_in, self.config.max_tokens)

    def add_cached(self, reply: Reply, tokens_in: int) -> None:
        """Count a reply that was paid for before."""
        self.cached += 1
        _add(self._cached, reply, tokens_in, self.config.max_tokens)

    def add_unanswered(self, tokens_in: int) -> None:
        """Count a request that brought nothing and may be billed."""
        self._perhaps[0] += tokens_in
        self._perhaps[1] += self.config.max_tokens

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`: of this run, of the cache, and what may be billed without an answer."""
        return {
            "calls": self.calls,
            "cached": self.cached,
            "prompt_tokens": self._known[0],
            "completion_tokens": self._known[1],
            "cost_usd": cost_usd(self.config, *self._known),
            "cached_cost_usd": cost_usd(self.config, *self._cached),
            "unanswered_cost_usd": cost_usd(self.config, *self._perhaps),
        }


def _add(counts: list[int], reply: Reply, tokens_in: int, max_tokens: int) -> None:
    counts[0] += tokens_in if reply.prompt_tokens is None else reply.prompt_tokens
    counts[1] += max_tokens if reply.completion_tokens is None else reply.completion_tokens
