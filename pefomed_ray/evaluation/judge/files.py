"""Judge a file of predictions into a folder, which goes on where it was left.

OUTPUT/asked.json         what is judged, by whom, how: other verdicts never go into the same folder
OUTPUT/cache.sqlite       replies as they come, unless they are kept elsewhere
OUTPUT/judgements.jsonl   a verdict a line
OUTPUT/metrics.json       what they come to; written last
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import check_output_is_free, local_path, read_json, sha256_file, write_json
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.answers import ASKED_FILE, check_same
from pefomed_ray.evaluation.judge.budget import Estimate
from pefomed_ray.evaluation.judge.endpoint import check_may_send, licence_in, open_client
from pefomed_ray.evaluation.judge.prompts import prompt_for
from pefomed_ray.evaluation.judge.run import JudgeResult, OnProgress, estimate_plan, judge_rows, plan_judging
from pefomed_ray.evaluation.judgements import write_judgements
from pefomed_ray.evaluation.predictions import read_predictions
from pefomed_ray.evaluation.verdicts import JUDGEMENTS_FILE, METRICS_FILE

CACHE_FILE = "cache.sqlite"
LOCK_FILE = ".lock"
WHAT_VERDICTS_DEPEND_ON = {
    "model",
    "base_url",
    "repeats",
    "temperature",
    "seed",
    "max_tokens",
    "sample",
    "canaries",
    "blank_image",
}
"""Of the config; the rest may be another when the same command goes on."""


@dataclass(frozen=True)
class Judged:
    """What was written."""

    judgements: Path
    metrics: Path
    result: JudgeResult
    estimate: Estimate


def judge_file(
    source: Path,
    task: Task,
    config: JudgeConfig,
    output: Path,
    accept: Callable[[Estimate], None],
    on_progress: OnProgress,
) -> Judged:
    """Judge a JSONL file of predictions into `output`; `accept` sees what it may cost and raises where it is too much.

    Raises ConfigError for a folder that holds something else or is being written, what `read_predictions` raises, and
    what `judge_rows` raises.
    """
    rows = read_predictions(source)
    licence = licence_in(source)
    check_may_send(config, licence)
    open_client(config)  # a wrong address or a missing key is found before anything is written
    asked = {
        "task": task,
        "predictions": sha256_file(source),
        "prompt": prompt_for(task).digest,
        **config.model_dump(include=WHAT_VERDICTS_DEPEND_ON),
    }
    cache = local_path(config.cache) if config.cache else output / CACHE_FILE
    estimate = estimate_plan(plan_judging(rows, task, config), config, cache)
    accept(estimate)
    with _writing(output, asked):
        result = judge_rows(rows, task, config, licence=licence, cache=cache, on_progress=on_progress)
        write_judgements(output / JUDGEMENTS_FILE, result.judgements)
        about = {"predictions": str(source), "licence": licence or config.licence, "estimate": asdict(estimate)}
        write_json(output / METRICS_FILE, result.to_json() | about)
    return Judged(output / JUDGEMENTS_FILE, output / METRICS_FILE, result, estimate)


@contextmanager
def _writing(output: Path, asked: dict[str, Any]) -> Iterator[None]:
    """The folder, made where it is not there, for this process alone.

    Raises ConfigError where another process is writing there, or the folder holds other verdicts or other files.
    """
    if not (output / ASKED_FILE).is_file():
        check_output_is_free(output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / ASKED_FILE, asked)
    lock = FileLock(output / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"output {str(output)!r}: another judge is writing there; wait for it, or end it") from None
    try:
        check_same(asked, read_json(output / ASKED_FILE), output)
        yield
    finally:
        lock.release()
