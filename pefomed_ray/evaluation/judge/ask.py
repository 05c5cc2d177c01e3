"""One question to the endpoint: limits before it, retries after it, and a reply or the reason why there is none.

Retries are here and not in the `openai` client, so that one number bounds them, whatever failed: a status, a
connection, or a body that is no completion (which the client hands out as if all were well). A reply whose verdict
cannot be read is not asked again: the answer was given and paid for, and choosing among answers would bend the score.
"""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai
from aiolimiter import AsyncLimiter
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError, PefomedError
from pefomed_ray.evaluation.judge.budget import Budget, prompt_tokens
from pefomed_ray.evaluation.judge.prompts import Asked, Prompt
from pefomed_ray.evaluation.judge.reply import Reply, read_reply

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
"""Between tries, whatever Retry-After says."""
GIVE_UP_AFTER = 10
"""So many questions in a row without a reply: the endpoint is gone or cannot do this at all."""
NO_MORE_MONEY = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
    }
)
PASSING = frozenset({408, 409, 429})
"""Statuses that may be gone at the next try, beside all of 500 and more."""
REQUEST_REFUSED = frozenset({400, 415, 422, 501})
"""Statuses of a request with a parameter that the endpoint does not know."""
DISPENSABLE = ("response_format", "store", "seed", "temperature", "max_tokens")
"""Parameters that a question may do without, or has another name for."""

_CODE = re.compile(r"[a-z][a-z0-9_]{0,59}")


@dataclass(frozen=True)
class Unanswered:
    """Why there is no reply: budget, timeout, connection, not_json, no_completion, content_filter, http_STATUS."""

    reason: str


class _TryAgainError(Exception):
    """This try failed, the next one may not."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after_s = reason, after_s


class _NoReplyError(Exception):
    """No further try will help this question."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Asker:
    """Asks an endpoint. After an error that concerns every question nothing more is sent; `error` holds it."""

    def __init__(self, client: openai.AsyncOpenAI, prompt: Prompt, config: JudgeConfig, budget: Budget) -> None:
        self.client, self.prompt, self.config, self.budget = client, prompt, config, budget
        self.parameters: dict[str, Any] = {
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "response_format": prompt.response_format,
            "seed": config.seed,
            "store": False,
        }
        """What is asked for beside model and messages; what the endpoint refuses is left out or named otherwise."""
        self.error: PefomedError | None = None
        self._create = client.chat.completions.with_raw_response.create
        self._stopped = asyncio.Event()
        self.is_accepted = False
        self._accepting = asyncio.Lock()
        self._failed_in_a_row = 0
        self._refused_for = ""
        per_minute = config.requests_per_minute
        self._requests = AsyncLimiter(1, 60 / per_minute) if per_minute else None
        self._tokens = AsyncLimiter(config.tokens_per_minute, 60) if config.tokens_per_minute else None

    async def ask(self, asked: Asked) -> Reply | Unanswered:
        """Ask, at most 1 + max_retries times. Until the endpoint has accepted a request, one question at a time."""
        if self.is_accepted:
            return await self._ask(asked, self._try)
        async with self._accepting:
            return await self._ask(asked, self._try if self.is_accepted else self._negotiate)

    async def _ask(self, asked: Asked, attempt: Callable[[Asked], Any]) -> Reply | Unanswered:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=stop_after_attempt(1 + self.config.max_retries),
            wait=_wait_s,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            reply: Reply = await retrying(attempt, asked)
        except (_TryAgainError, _NoReplyError) as error:
            self._count_failure(error.reason)
            return Unanswered(error.reason)
        self._failed_in_a_row = 0
        return reply

    async def _negotiate(self, asked: Asked) -> Reply:
        """The first question: parameters are left out until the endpoint accepts what is left.

        Where none is left to leave out, the question itself was refused, and the next one begins with all again.
        """
        parameters = self.parameters
        while True:
            try:
                reply = await self._send(asked, parameters)
            except openai.APIStatusError as error:
                other = _without_refused(parameters, error) if error.status_code in REQUEST_REFUSED else None
                if other is None:
                    raise self._explain(error) from None
                parameters = other
            else:
                self.parameters, self.is_accepted = parameters, True
                return reply

    async def _try(self, asked: Asked) -> Reply:
        try:
            return await self._send(asked, self.parameters)
        except openai.APIStatusError as error:
            raise self._explain(error) from None

    async def _send(self, asked: Asked, parameters: dict[str, Any]) -> Reply:
        """One request. Raises APIStatusError as it comes, _TryAgainError and _NoReplyError for all else."""
        tokens_in = prompt_tokens(self.prompt, asked)
        if self._requests:
            await self._requests.acquire()
        if self._tokens:
            await self._tokens.acquire(min(tokens_in + self.config.max_tokens, self._tokens.max_rate))
        if self._stopped.is_set():
            raise _NoReplyError("stopped")
        if self.budget.is_spent:
            raise _NoReplyError("budget")
        self.budget.begin_call()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await self._create(**self.request(asked, parameters))
            reply = read_reply(json.loads(response.content))
        except (openai.APITimeoutError, TimeoutError):
            self.budget.add_unanswered(tokens_in)
            raise _TryAgainError("timeout") from None
        except openai.APIStatusError:
            raise
        except openai.OpenAIError:
            self.budget.add_unanswered(tokens_in)
            raise _TryAgainError("connection") from None
        except (ValueError, RecursionError):
            self.budget.add_unanswered(tokens_in)
            raise _TryAgainError("not_json") from None
        if reply is None:
            self.budget.add_unanswered(tokens_in)
            raise _TryAgainError("no_completion")
        self.budget.add(reply, tokens_in)
        return reply

    def request(self, asked: Asked, parameters: dict[str, Any]) -> dict[str, Any]:
        """Body of the request; each repeat has a seed of its own."""
        messages = self.prompt.messages(asked, blank_image=self.config.blank_image)
        seed = {"seed": parameters["seed"] + asked.repeat} if "seed" in parameters else {}
        return {"model": self.config.model, "messages": messages, **parameters, **seed}

    def _explain(self, error: openai.APIStatusError) -> _TryAgainError | _NoReplyError:
        """What a status means for this question, and perhaps for all."""
        status, code = error.status_code, error_code(error.body)
        if code in NO_MORE_MONEY or status == 402:
            return self._stop(
                PefomedError(
                    f"{self.config.base_url} answers no more: {code or 'payment required'}. The verdicts there are "
                    "have been kept; the same command goes on once that is settled"
                )
            )
        if status in (401, 403, 404) or status < 400:
            return self._stop(
                ConfigError(
                    f"{self.config.base_url} answered {status} for model {self.config.model!r}; check base_url, the "
                    "key and the model's name"
                )
            )
        if status in PASSING or status >= 500:
            return _TryAgainError(f"http_{status}", _retry_after_s(error))
        self._refused_for = f" ({', '.join(filter(None, (code, _named(error.body, 'param'))))})"
        return _NoReplyError("content_filter" if code == "content_filter" else f"http_{status}")

    def _stop(self, error: PefomedError) -> _NoReplyError:
        self.error = self.error or error
        self._stopped.set()
        return _NoReplyError("stopped")

    def _count_failure(self, reason: str) -> None:
        if reason in ("budget", "stopped"):
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            self._stop(
                PefomedError(
                    f"{self.config.base_url} gave no reply to {self._failed_in_a_row} questions in a row, the last "
                    f"time: {reason}{self._refused_for}. The verdicts there are have been kept; the same command "
                    "goes on"
                )
            )

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not once nothing more is to be sent."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return


def error_code(body: Any) -> str | None:
    """The code, or the type, of an error object; None where it is none of ours to repeat."""
    return _named(body, "code") or _named(body, "type")


def _named(body: Any, key: str) -> str | None:
    found = body.get(key) if isinstance(body, dict) else None
    return found if isinstance(found, str) and _CODE.fullmatch(found) else None


def _wait_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _TryAgainError) and error.after_s is not None:
        return error.after_s
    return wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)


def _retry_after_s(error: openai.APIStatusError) -> float | None:
    """Seconds from the header, bounded; None where it holds no number of seconds."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else None


def _without_refused(parameters: dict[str, Any], error: openai.APIStatusError) -> dict[str, Any] | None:
    """The parameters without the one that the endpoint refuses; None where nothing is left to leave out.

    It is the one that the error names, else, in the order of how few endpoints know them: structured outputs, then
    `store`, then `seed`.
    """
    if error_code(error.body) == "content_filter":
        return None
    body = error.body if isinstance(error.body, dict) else {}
    named = [name for name in DISPENSABLE if name == body.get("param")]
    named += [name for name in DISPENSABLE if name in str(body.get("message", ""))]
    for name in [*named, "response_format", "store", "seed"]:
        if name in parameters:
            rest = {key: value for key, value in parameters.items() if key != name}
            if name == "max_tokens":  # as OpenAI's newer models call it
                rest["max_completion_tokens"] = parameters[name]
            if name == "response_format" and parameters[name]["type"] == "json_schema":
                rest[name] = {"type": "json_object"}
            return rest
    return None
