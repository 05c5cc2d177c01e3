"""Answers of a vision model behind an OpenAI-compatible endpoint: our own, vLLM's, or one that is paid for.

It is asked the same questions about the same pictures, byte for byte as the shards hold them, and its answers go to the
same scorer. What it is to do stands in the system message, in the words of the `chat` template; the user's message is
the question and its pictures. (Our own endpoint has its adapter's words and passes over the system message.)

A refusal, or a request it cannot take, is an unscored row with a reason, never a wrong answer. What fails for other
reasons (busy, slow, not JSON) is asked again by the client, and once more at the end.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import openai

from pefomed_ray.artifacts.records import Task
from pefomed_ray.errors import ConfigError, PefomedError
from pefomed_ray.evaluation.answers import Answered, Question
from pefomed_ray.evaluation.endpoint import Endpoint
from pefomed_ray.rendering.templates import template_named

MAX_RETRIES = 4
"""Of the client, with its own growing pauses, or the endpoint's Retry-After."""
GIVE_UP_AFTER = 10
"""So many rows in a row without an answer: the endpoint is gone or cannot do this at all, and more may cost money."""
NO_MORE_MONEY = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
)
OTHER_NAMES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "max_tokens": lambda value: {"max_completion_tokens": value},
    "temperature": lambda value: {},
}
"""Parameters that some models refuse -> what they take instead. Without a temperature a model samples as it likes."""

Show = Callable[[Question], tuple[str, tuple[bytes, ...]]]
"""A question's text and its encoded pictures."""


def instruction(task: Task) -> str:
    """What the endpoint is told to do: the words of the `chat` template, without a question."""
    return template_named("chat").words(task, "")


def ask_endpoint(
    endpoint: Endpoint,
    questions: Sequence[Question],
    show: Show,
    task: Task,
    max_tokens: int,
) -> Iterator[Answered]:
    """An answer to each question, as they come, at most `max_tokens` long.

    Raises ConfigError for a refused key or an unknown model, PefomedError where nothing more can be had of the
    endpoint: the quota is used up, or ten rows in a row had no answer. What was answered until then has been yielded.
    """
    http_client = openai.DefaultHttpxClient(trust_env=not endpoint.local, follow_redirects=False)
    with openai.OpenAI(
        base_url=endpoint.url,
        api_key=endpoint.key,
        timeout=endpoint.timeout_s,
        max_retries=MAX_RETRIES,
        http_client=http_client,
    ) as client:
        asker = _Asker(client, endpoint, show, task, max_tokens)
        failed: list[Question] = []
        for question, answer in _concurrently(asker.ask, questions, endpoint.concurrency):
            if answer.unscored in asker.passing:
                failed.append(question)
            else:
                yield answer
        if failed and not asker.has_answered:
            raise asker.gives_up()
        asker.patient = True
        yield from (answer for _, answer in _concurrently(asker.ask, failed, endpoint.concurrency))


class _Asker:
    """Asks one question at a time, from several threads."""

    def __init__(
        self,
        client: openai.OpenAI,
        endpoint: Endpoint,
        show: Show,
        task: Task,
        max_tokens: int,
    ) -> None:
        self.client, self.endpoint, self.show, self.system = client, endpoint, show, instruction(task)
        self.parameters: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
        self.passing: set[str] = set()
        """Reasons that may be gone at the next try."""
        self.has_answered = False
        self.patient = False
        """Failures no longer end it: others were answered, so it is these questions."""
        self.in_a_row, self.last_reason = 0, ""

    def ask(self, question: Question) -> Answered:
        """Raises what `ask_endpoint` raises."""
        text, images = self.show(question)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        content += [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": content},
        ]
        try:
            completion = self._complete(messages)
        except openai.APIStatusError as error:
            return self._refused(question, error)
        except openai.APITimeoutError:
            return self._failed(question, "timeout")
        except openai.OpenAIError:
            return self._failed(question, "connection")
        except ValueError:
            return self._failed(question, "not_json")
        answer = _read(question, completion)
        if answer.unscored == "no_completion":
            return self._failed(question, "no_completion")
        self.in_a_row, self.has_answered = 0, True
        return answer

    def _complete(self, messages: list[dict[str, Any]]) -> Any:
        while True:
            parameters = dict(self.parameters)
            try:
                return self.client.chat.completions.create(
                    model=self.endpoint.model,
                    messages=messages,  # type: ignore[arg-type]
                    **parameters,
                )
            except openai.BadRequestError as error:
                name = _of(error, "param")
                if name not in OTHER_NAMES or name not in parameters:
                    raise
                self.parameters = {key: value for key, value in parameters.items() if key != name} | OTHER_NAMES[name](
                    parameters[name]
                )

    def _refused(self, question: Question, error: openai.APIStatusError) -> Answered:
        code, status = _of(error, "code") or _of(error, "type"), error.status_code
        if code in NO_MORE_MONEY:
            raise PefomedError(f"{self.endpoint.url} answers no more: {code}; --resume goes on once that is settled")
        if status in (401, 403, 404):
            raise ConfigError(
                f"{self.endpoint.url} answered {status} for model {self.endpoint.model!r}; check the key and the name"
            )
        if code == "content_filter":
            return Answered(question.given, question.row, None, "content_filter")
        if status in (400, 413, 415, 422):
            # Ten questions about one picture that is too large are no reason to stop; a model without eyes is.
            if not self.has_answered:
                self._count(f"status_{status}")
            return Answered(question.given, question.row, None, f"status_{status}")
        return self._failed(question, f"status_{status}")

    def _failed(self, question: Question, reason: str) -> Answered:
        self.passing.add(reason)
        self._count(reason)
        return Answered(question.given, question.row, None, reason)

    def _count(self, reason: str) -> None:
        self.in_a_row, self.last_reason = self.in_a_row + 1, reason
        if self.in_a_row >= GIVE_UP_AFTER and not self.patient:
            raise self.gives_up()

    def gives_up(self) -> PefomedError:
        """What is raised where nothing more is to be had."""
        return PefomedError(
            f"{self.endpoint.url} gave no answer to {self.in_a_row} questions in a row, the last time: "
            f"{self.last_reason}; the answers there are have been kept, --resume goes on"
        )


def data_url(image: bytes) -> str:
    """JPEG or PNG bytes, unchanged, as a data: URL."""
    media_type = "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


def _read(question: Question, completion: Any) -> Answered:
    """What a reply of status 200 says, whatever it is: an HTML page comes as a string, choices may be null."""
    choices = getattr(completion, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        return Answered(question.given, question.row, None, "no_completion")
    message = choices[0].message
    text, reason = message.content, None
    if getattr(message, "refusal", None):
        text, reason = None, "refusal"
    elif choices[0].finish_reason == "content_filter":
        text, reason = None, "content_filter"
    elif not isinstance(text, str):
        text, reason = None, "no_text"
    usage = completion.usage
    return Answered(
        question.given,
        question.row,
        text.strip() if text is not None else None,
        reason,
        by=" ".join(filter(None, (completion.model, completion.system_fingerprint))) or None,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


def _of(error: openai.APIStatusError, name: str) -> str | None:
    body = error.body if isinstance(error.body, dict) else {}
    found = body.get(name)
    return found if isinstance(found, str) else None


def _concurrently(
    ask: Callable[[Question], Answered], questions: Iterable[Question], concurrency: int
) -> Iterator[tuple[Question, Answered]]:
    """Answers as they come, never more than `concurrency` questions on their way.

    After an error nothing new is asked; what is on its way is waited for, since it may be paid for, then it is raised.
    """
    waiting = iter(questions)
    running: dict[Future[Answered], Question] = {}
    stop: Exception | None = None
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            more = islice(waiting, 0 if stop else concurrency - len(running))
            running |= {pool.submit(ask, question): question for question in more}
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                question = running.pop(future)
                try:
                    yield question, future.result()
                except PefomedError as error:
                    stop = stop or error
    if stop:
        raise stop
