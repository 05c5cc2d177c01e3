"""Judge predictions: each row's answer, and canaries beside them, each distinct question once, whatever is cached not.

Identical questions (same texts, same repeat) are one question with one reply, however many rows ask it.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from pefomed_ray.artifacts.records import Task
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.evaluation.judge import canaries, results
from pefomed_ray.evaluation.judge.ask import Asker, Unanswered
from pefomed_ray.evaluation.judge.batch import ask_batch, job_of
from pefomed_ray.evaluation.judge.budget import Budget, Estimate, estimate, prompt_tokens
from pefomed_ray.evaluation.judge.cache import ReplyCache, reply_key
from pefomed_ray.evaluation.judge.endpoint import Licence, check_may_send, open_client
from pefomed_ray.evaluation.judge.prompts import Asked, Prompt, prompt_for
from pefomed_ray.evaluation.judge.reply import Reply, read_verdict
from pefomed_ray.evaluation.judgements import Judgement
from pefomed_ray.evaluation.predictions import Prediction

NO_PREDICTION = "no_prediction"
MUCH_UNSCORED = 0.05
"""Share of rows without a verdict from which on the rest may be a choice of the easy ones."""

Outcome = Reply | Unanswered
OnProgress = Callable[[int, int], None]
"""Questions that are done, and all of them."""


@dataclass(frozen=True)
class Plan:
    """What is judged, and what has to be asked for it."""

    task: Task
    prompt: Prompt
    rows: tuple[Prediction, ...]
    """Of the predictions or of their sample, in the file's order."""
    asked: tuple[Asked, ...]
    """Rows with an answer, each as often as there are repeats, in random order, so that a cap leaves out any."""
    canaries: tuple[Asked, ...]
    questions: Mapping[str, Asked]
    """Key -> what is asked under it, canaries first: these show early whether the endpoint answers at all."""
    canary_keys: frozenset[str]


@dataclass(frozen=True)
class JudgeResult:
    """Verdicts, and what they come to."""

    judgements: tuple[Judgement, ...]
    """One a row and repeat, in the rows' order: scored, or with the reason why not."""
    metrics: dict[str, Any]
    """Metric name -> Metric.to_json()."""
    flags: tuple[str, ...]
    """Why these verdicts are not to be trusted; none where nothing is known against them."""
    usage: dict[str, Any]
    """Calls, tokens and cost."""
    about: dict[str, Any]
    """Distribution, self-consistency, canaries, and who judged by which prompt."""

    @property
    def flagged(self) -> bool:
        """Whether there is any flag."""
        return bool(self.flags)

    def to_json(self) -> dict[str, Any]:
        """As `metrics.json` has it."""
        flagged = {"flagged": self.flagged, "flags": list(self.flags)}
        return {**self.metrics, **flagged, **self.about, "usage": self.usage}


def plan_judging(rows: Sequence[Prediction], task: Task, config: JudgeConfig) -> Plan:
    """What judging these rows asks; nothing is asked yet."""
    prompt = prompt_for(task)
    drawn = random.Random(config.seed).sample(range(len(rows)), min(config.sample or len(rows), len(rows)))
    asked = tuple(
        Asked(rows[at].id, repeat, rows[at].question, rows[at].right, answer)
        for repeat in range(config.repeats)
        for at in drawn
        if (answer := rows[at].prediction) is not None
    )
    beside = tuple(canaries.make_canaries(asked, config.canaries, prompt.best, config.seed))
    questions: dict[str, Asked] = {}
    for one in (*beside, *asked):
        questions.setdefault(reply_key(one, prompt, config), one)
    keys = frozenset(reply_key(one, prompt, config) for one in beside)
    return Plan(task, prompt, tuple(rows[at] for at in sorted(drawn)), asked, beside, questions, keys)


def estimate_plan(plan: Plan, config: JudgeConfig, cache: Path) -> Estimate:
    """What the questions may cost that the cache has no reply to."""
    if not cache.is_file():
        return estimate(plan.prompt, list(plan.questions.values()), config)
    replies = ReplyCache(cache)
    try:
        missing = [asked for key, asked in plan.questions.items() if replies.get(key) is None]
    finally:
        replies.close()
    return estimate(plan.prompt, missing, config)


def judge_rows(
    rows: Sequence[Prediction],
    task: Task,
    config: JudgeConfig,
    *,
    licence: Licence | None,
    cache: Path,
    on_progress: OnProgress = lambda done, total: None,
) -> JudgeResult:
    """Ask the judge about these rows; `cache` is the SQLite file that replies are kept in, as they come.

    `licence` is what the data say of themselves; None: nothing, `config.licence` declares it.
    Raises RefusedError where the texts may not go there, ConfigError for an address, a key or a model that is refused,
    PefomedError where nothing more can be had of the endpoint: no money left, ten questions in a row without a reply,
    a batch job that failed or takes too long. What was answered is in the cache; the same call goes on.
    A budget that is spent is no error: the rows that are left are unscored, and the result is flagged.
    """
    check_may_send(config, licence)
    client = open_client(config)
    plan = plan_judging(rows, task, config)
    replies, budget = ReplyCache(cache), Budget(config)
    try:
        asking = _Asking(plan, config, replies, budget, on_progress)
        outcomes = asyncio.run(asking.run(client))
    finally:
        replies.close()
    return _result(plan, config, outcomes, budget, asking.parameters)


class _Asking:
    """One run over the questions of a plan."""

    def __init__(
        self, plan: Plan, config: JudgeConfig, replies: ReplyCache, budget: Budget, on_progress: OnProgress
    ) -> None:
        self.plan, self.config, self.replies, self.budget, self.on_progress = plan, config, replies, budget, on_progress
        self.outcomes: dict[str, Outcome] = {}
        self.parameters: dict[str, Any] = {}

    async def run(self, client: openai.AsyncOpenAI) -> Mapping[str, Outcome]:
        """Key -> reply or why there is none. Raises what `judge_rows` raises."""
        async with client:
            asker = Asker(client, self.plan.prompt, self.config, self.budget)
            self._take_from_cache()
            if self.config.batch:
                await self._ask_in_batch(asker)
            else:
                await self._ask_now(asker, self._left())
        if asker.error:
            raise asker.error
        self.parameters = asker.parameters
        return self.outcomes

    def _take_from_cache(self) -> None:
        for key, asked in self.plan.questions.items():
            reply = self.replies.get(key)
            if reply is not None:
                self.budget.add_cached(reply, prompt_tokens(self.plan.prompt, asked))
                self._done(key, reply)

    async def _ask_in_batch(self, asker: Asker) -> None:
        """Canaries at once, since they also show which parameters the endpoint takes; then the rows as one job."""
        rows = {key: asked for key, asked in self._left().items() if key not in self.plan.canary_keys}
        await self._ask_now(asker, {key: asked for key, asked in self._left().items() if key not in rows})
        job = await job_of(asker, rows, self.replies) if rows and asker.error is None else None
        if rows and job is None and not asker.is_accepted:
            first = next(iter(rows))
            await self._ask_now(asker, {first: rows.pop(first)})
        if rows and asker.error is None:
            async for key, outcome in ask_batch(asker, rows, self.replies, job):
                self._done(key, outcome)

    async def _ask_now(self, asker: Asker, questions: Mapping[str, Asked]) -> None:
        waiting = iter(questions.items())

        async def work() -> None:
            for key, asked in waiting:  # shared: each takes the next
                outcome = await asker.ask(asked)
                if isinstance(outcome, Reply):
                    self.replies.put(key, outcome)
                self._done(key, outcome)
                if asker.error:
                    return

        await asyncio.gather(*(work() for _ in range(self.config.concurrency)))

    def _left(self) -> dict[str, Asked]:
        return {key: asked for key, asked in self.plan.questions.items() if key not in self.outcomes}

    def _done(self, key: str, outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        self.on_progress(len(self.outcomes), len(self.plan.questions))


def _result(
    plan: Plan, config: JudgeConfig, outcomes: Mapping[str, Outcome], budget: Budget, parameters: Mapping[str, Any]
) -> JudgeResult:
    prompt, judge = plan.prompt, f"{config.model} {plan.prompt.name}"
    verdicts = {
        key: (*read_verdict(outcome, prompt.best), outcome.identity)
        if isinstance(outcome, Reply)
        else (None, outcome.reason, None)
        for key, outcome in outcomes.items()
    }
    found = {
        (one.id, one.repeat): Judgement(one.id, one.repeat, score, reason, judge, plan.task, identity)
        for one in plan.asked
        for score, reason, identity in [verdicts[reply_key(one, prompt, config)]]
    }
    judgements = tuple(
        found.get((row.id, repeat)) or Judgement(row.id, repeat, None, NO_PREDICTION, judge, plan.task)
        for row in plan.rows
        for repeat in range(config.repeats)
    )
    metrics = results.judge_metrics(plan.rows, judgements, plan.task)
    checks = canaries.summarise([(one, verdicts[reply_key(one, prompt, config)][0]) for one in plan.canaries])
    response_format = parameters["response_format"]["type"] if "response_format" in parameters else None
    about = {
        "task": plan.task,
        "judge": judge,
        "identities": results.identities(judgements),
        "prompt": {"name": prompt.name, "digest": prompt.digest},
        "rows": len(plan.rows),
        "verdicts": len(judgements),
        "unscored": results.unscored(judgements),
        "distribution": results.distribution(judgements, plan.task),
        "self_consistency": results.self_consistency(plan.rows, judgements, plan.task),
        "canaries": checks,
        "asked_with": {**parameters, "response_format": response_format},
    }
    return JudgeResult(
        judgements, metrics, tuple(_flags(metrics, judgements, checks, prompt.best)), budget.to_json(), about
    )


def _flags(
    metrics: Mapping[str, Any], judgements: Sequence[Judgement], checks: Mapping[str, Any], best: int
) -> list[str]:
    overall = next(iter(metrics.values()))
    mean = None if overall["value"] is None else overall["value"] * best
    found = canaries.flags(checks, mean, best)
    missing = {reason: n for reason, n in results.unscored(judgements).items() if reason != NO_PREDICTION}
    if "budget" in missing:
        found.append(f"{missing['budget']} of {len(judgements)} verdicts were not asked for: the budget was spent.")
    elif sum(missing.values()) > MUCH_UNSCORED * len(judgements):
        reasons = ", ".join(f"{reason} {number}" for reason, number in missing.items())
        found.append(f"{sum(missing.values())} of {len(judgements)} verdicts could not be had: {reasons}.")
    models = sorted({identity.split(" ")[0] for identity in results.identities(judgements)})
    if len(models) > 1:
        found.append(f"Several models answered: {', '.join(models)}.")
    return found
