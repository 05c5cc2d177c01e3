"""Questions as one job of the Batch API: half the price, within a day, and never sent twice.

Which job answers which questions is kept with the replies. A job that a crash left without that note is found again by
the digest in its metadata, before another is started.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import openai
from openai.types import Batch

from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.errors import PefomedError
from pefomed_ray.evaluation.judge.ask import Asker, Unanswered, error_code
from pefomed_ray.evaluation.judge.budget import cost_usd, prompt_tokens
from pefomed_ray.evaluation.judge.cache import ReplyCache
from pefomed_ray.evaluation.judge.prompts import Asked
from pefomed_ray.evaluation.judge.reply import Reply, read_reply

POLL_S = 30.0
ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
DIGEST_NAME = "pefomed_ray_questions"
"""In the job's metadata."""
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


async def job_of(asker: Asker, questions: Mapping[str, Asked], replies: ReplyCache) -> str | None:
    """The id of the job that was started for exactly these questions before, if there is one.

    Raises PefomedError where the endpoint cannot be asked.
    """
    digest = digest_of(sorted(questions))
    async with _explained(asker):
        return replies.batch_of(digest) or await _started(_patient(asker), digest, replies)


async def ask_batch(
    asker: Asker, questions: Mapping[str, Asked], replies: ReplyCache, job: str | None
) -> AsyncIterator[tuple[str, Reply | Unanswered]]:
    """An outcome for each question (key -> what is asked). Replies are in the cache when they are yielded.

    `job` is the one that `job_of` found for them; None starts one.

    What does not fit into the budget is not sent. A question whose result is missing, comes twice with different
    contents, or is no completion, is unanswered; results of other questions are passed over.
    Raises PefomedError where the job fails as a whole, or has not ended after `batch_wait_s`; the same call goes on.
    """
    digest = digest_of(sorted(questions))
    fitting = dict(questions) if job else _fitting(asker, questions)
    for key in questions.keys() - fitting.keys():
        yield key, Unanswered("budget")
    if not fitting:
        return
    async with _explained(asker):
        batch_id = job or await _start(asker, digest, fitting)
        replies.put_batch(digest, batch_id)
        batch = await _ended(_patient(asker), batch_id, asker.config.batch_wait_s)
        results = [line async for line in _results(_patient(asker), batch)]
    outcomes = _outcomes(results, fitting)
    for key, outcome in outcomes.items():
        if isinstance(outcome, Reply):
            asker.budget.add(outcome, prompt_tokens(asker.prompt, fitting[key]))
            replies.put(key, outcome)
    replies.end_batch(digest, batch_id)
    for key, outcome in outcomes.items():
        yield key, outcome
    if batch.status == "failed":
        codes = sorted({error_code(dict(found)) or "unknown" for found in (batch.errors and batch.errors.data) or []})
        raise PefomedError(
            f"{asker.config.base_url} refused the batch job {batch.id}: {', '.join(codes)}; batch=false asks one by one"
        )


@asynccontextmanager
async def _explained(asker: Asker) -> AsyncIterator[None]:
    """What the endpoint does wrong, as a PefomedError."""
    try:
        yield
    except (openai.OpenAIError, ValueError) as error:
        status = getattr(error, "status_code", None)
        raise PefomedError(
            f"{asker.config.base_url}: the batch job could not be had ({status or type(error).__name__}); the same "
            "command goes on with it, batch=false asks one by one"
        ) from None


def _patient(asker: Asker) -> openai.AsyncOpenAI:
    """A client that retries: what is only looked at may be looked at again."""
    return asker.client.with_options(max_retries=asker.config.max_retries)


def _fitting(asker: Asker, questions: Mapping[str, Asked]) -> dict[str, Asked]:
    """As many of the questions as the budget has room for, should each cost as much as it can."""
    config, left, calls = asker.config, asker.budget.left_usd, asker.budget.calls
    fitting: dict[str, Asked] = {}
    for key, asked in questions.items():
        left -= cost_usd(config, prompt_tokens(asker.prompt, asked), config.max_tokens) or 0.0
        if left < 0 or (config.max_calls is not None and calls + len(fitting) >= config.max_calls):
            break
        fitting[key] = asked
    return fitting


async def _started(client: openai.AsyncOpenAI, digest: str, replies: ReplyCache) -> str | None:
    """The id of a job for these questions whose results may still be had, among the newest hundred."""
    try:
        page = await client.batches.list(limit=100)
    except openai.APIStatusError:
        return None  # an endpoint that lists no jobs
    for batch in getattr(page, "data", None) or []:
        is_ours = (batch.metadata or {}).get(DIGEST_NAME) == digest
        if is_ours and batch.status not in ("failed", "expired", "cancelled") and not replies.was_read(batch.id):
            return batch.id
    return None


async def _start(asker: Asker, digest: str, questions: Mapping[str, Asked]) -> str:
    lines = [
        {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": asker.request(asked, asker.parameters)}
        for key, asked in questions.items()
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = await _patient(asker).files.create(file=("judge.jsonl", data), purpose="batch")
    # Not retried: a second job would be paid for, too. Should the reply be lost, the next run finds it in the list.
    batch = await asker.client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={DIGEST_NAME: digest}
    )
    for _ in questions:
        asker.budget.begin_call()
    return _checked(batch).id


async def _ended(client: openai.AsyncOpenAI, batch_id: str, wait_s: float) -> Batch:
    try:
        async with asyncio.timeout(wait_s):
            while (batch := _checked(await client.batches.retrieve(batch_id))).status not in ENDED:
                await asyncio.sleep(POLL_S)
            return batch
    except TimeoutError:
        raise PefomedError(
            f"the batch job {batch_id} has not ended after {wait_s:g} s; the same command goes on waiting for it"
        ) from None


def _checked(found: Any) -> Batch:
    """A job. Raises ValueError for another body, which the client hands out as it is."""
    if not isinstance(found, Batch) or not isinstance(found.id, str):
        raise ValueError("not a batch job")
    return found


async def _results(client: openai.AsyncOpenAI, batch: Batch) -> AsyncIterator[Any]:
    """The lines of output and error file, in any order; None for one that is no JSON."""
    for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
        content = (await client.files.content(file_id)).content
        for line in filter(bytes.strip, content.splitlines()):
            yield _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _outcomes(results: list[Any], questions: Mapping[str, Asked]) -> dict[str, Reply | Unanswered]:
    found: dict[str, Reply | Unanswered] = {}
    for key, outcome in _known(results, questions):
        found[key] = outcome if found.get(key, outcome) == outcome else Unanswered("batch_twice")
    return {key: found.get(key, Unanswered("batch_missing")) for key in questions}


def _known(results: list[Any], questions: Mapping[str, Asked]) -> Iterator[tuple[str, Reply | Unanswered]]:
    for result in results:
        key = result.get("custom_id") if isinstance(result, dict) else None
        if isinstance(key, str) and key in questions:
            yield key, _outcome(result)


def _outcome(result: dict[str, Any]) -> Reply | Unanswered:
    response = result.get("response")
    if not isinstance(response, dict):
        return Unanswered(error_code(result.get("error")) or "batch_error")
    status = response.get("status_code")
    if status != 200:
        return Unanswered(f"http_{status}" if isinstance(status, int) else "batch_error")
    return read_reply(response.get("body")) or Unanswered("no_completion")
