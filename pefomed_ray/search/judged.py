"""What a language model says of the re-scored trials: of the same rows of each, under one budget.

<output>/choice/judge.sqlite          replies, so that nothing is paid twice
<output>/choice/<trial id>.judge.jsonl    verdicts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.artifacts.records import Task
from pefomed_ray.config import TrainConfig
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import PefomedError
from pefomed_ray.evaluation.judge.endpoint import Licence, check_may_send, open_client
from pefomed_ray.evaluation.judge.run import OnProgress, judge_rows
from pefomed_ray.evaluation.judgements import BEST_SCORE, Judgement, write_judgements
from pefomed_ray.evaluation.predictions import Prediction

CACHE_FILE = "judge.sqlite"


@dataclass(frozen=True)
class Verdicts:
    """Of several trials, on the rows where each of them has one."""

    rows: tuple[int, ...]
    """Their places in the validation split."""
    by_trial: Mapping[str, list[float]]
    """In [0, 1], in the order of `rows`; the mean where a row was judged several times."""
    judge: str


def check_judge(config: JudgeConfig, first: TrainConfig) -> None:
    """Find out before a search starts whether its judge may be asked.

    Raises RefusedError where the licence of the data forbids it, ConfigError for the address or where there is no key.
    """
    check_may_send(config, licence_of(first))
    open_client(config)


def licence_of(config: TrainConfig) -> Licence:
    """Of the data of a run: restricted where a part of them is."""
    licences = {load_shard_manifest(part.shards).licence for part in config.data.shards}
    return "restricted" if "restricted" in licences else "open"


def ask_judge(
    answers: Mapping[str, Sequence[Prediction]],
    task: Task,
    config: JudgeConfig,
    licence: Licence,
    folder: Path,
    on_progress: OnProgress,
) -> Verdicts:
    """Have the answers of each trial judged, with an equal part of the budget each.

    Raises PefomedError where the verdicts cannot decide: the judge is flagged, or no row has one for every trial; and
    what `judge_rows` raises. What was answered is kept.
    """
    part = {
        "cap_usd": config.cap_usd and config.cap_usd / len(answers),
        "max_calls": config.max_calls and max(config.max_calls // len(answers), 1),
    }
    found: dict[str, list[float | None]] = {}
    judge, flags = "", set[str]()
    for trial, rows in answers.items():
        result = judge_rows(
            rows,
            task,
            config.model_copy(update=part),
            licence=licence,
            cache=folder / CACHE_FILE,
            on_progress=on_progress,
        )
        write_judgements(folder / f"{trial}.judge.jsonl", result.judgements)
        judge, flags = result.about["judge"], flags | set(result.flags)
        found[trial] = _by_row(rows, result.judgements, BEST_SCORE[task])
    if flags:
        raise PefomedError(f"the judge's verdicts are not to be trusted: {' '.join(sorted(flags))}")
    common = [at for at, scores in enumerate(zip(*found.values(), strict=True)) if None not in scores]
    if not common:
        raise PefomedError("no row has a verdict for every trial")
    by_trial = {trial: [score for at in common if (score := scores[at]) is not None] for trial, scores in found.items()}
    return Verdicts(tuple(common), by_trial, judge)


def _by_row(rows: Sequence[Prediction], judgements: Sequence[Judgement], best: int) -> list[float | None]:
    scores: dict[str, list[float]] = {}
    for judgement in judgements:
        if judgement.score is not None:
            scores.setdefault(judgement.id, []).append(judgement.score / best)
    return [sum(found) / len(found) if (found := scores.get(row.id)) else None for row in rows]
