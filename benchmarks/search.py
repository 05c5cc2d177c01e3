"""A search with packed trials beside the same search with each trial by itself.

Sixteen trials of the smoke space on phantoms, on the embedded base, with a row a step, as the paper's GPUs have one
each: from the call that starts them until the last has ended. Which of them wins and Ray's own start are left out.

`ours` is what `pefomed-ray search` does. `trainer_per_trial` starts a run of its own for each, as Ray's guides have it:
a Tune trial that calls `TorchTrainer.fit`, here through `training.trainer.train`, with a worker and a data worker.
`reused` is as good as it gets without packing: our training loop in Tune's own process, which is kept for the next
trial, with cached features; the cache is made in the measured time, as it is in ours. Both run two trials at once, a
thread each; of Ray's logical CPUs they get as many as that takes.

Rates are an eighth of the space's, which are for rows by sixteen: with a row a step these are chaotic, rounding grows
to whole nats within 150 steps (docs/LOG.md), and no two programs come to the same loss.

All trials are drawn at random, and none is stopped early, so that all arms train the same ones; they see the same rows
in the same order. Their losses must agree, and the same trial must win.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer
from ray import tune

from benchmarks._measure import JsonOption, QuickOption, Round, Sample, a_a, finish, per_arm, ratio, run_rounds
from benchmarks._ray import scratch_with_ray, timed_with_workers
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.config import SearchConfig, TrainConfig, load_config
from pefomed_ray.config.load import set_key
from pefomed_ray.config.schema import LogUniform
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.phantom import write_slake
from pefomed_ray.data.shards import prepare
from pefomed_ray.search.features import with_cached_features
from pefomed_ray.search.leaderboard import TRIALS_FOLDER
from pefomed_ray.search.plain_trial import run_trial
from pefomed_ray.search.space import check_search, preset_values, trial_config
from pefomed_ray.search.study import TrialFunction, Unwatched, run_trials
from pefomed_ray.search.trial import Suggestion
from pefomed_ray.training.journal import EPOCHS_FILE, STEPS_FILE
from pefomed_ray.training.trainer import train

SPACE = Path(__file__).parent.parent / "search_spaces" / "phantom.yaml"
PICTURES = (160, 24, 60)
"""For training, validation and test, each with five questions: as the demo has them."""
RATE = "optimizer.learning_rate"
RATES = (3.0e-4 / 8, 6.0e-3 / 8)
TRIALS = 16
SCALES = (4, 16, 64)
ROUNDS = 1
"""Of half an hour."""
LAST_STEPS = 100
TRAINING = {"batch_size": 1, "micro_batch_size": 1, "epochs": 1, "max_steps": 400}
CORES = 2
CPUS_AT_TWO = {"ours": CORES, "reused": CORES, "trainer_per_trial": CORES + 1}
"""Ray's logical ones. A trial with a trainer of its own reserves half a CPU more, for the process that waits for it."""
CACHED = {"ours", "reused"}
"""Arms that read cached features, which are float16."""
MOST_APART, MOST_APART_BY_FEATURES = 1e-3, 2e-2
"""Nats between two arms, mean of a trial's last hundred steps: where both read cached features, and where one does."""
TARGETS = {"vs_trainer_per_trial": 5.0, "vs_reused_function_trials": 2.3}

Start = Callable[[SearchConfig, TrainConfig], None]


@dataclass(frozen=True)
class Trial:
    """What came of one."""

    loss: float
    """Nats, mean of the last steps."""
    best: float
    """The metric, of the best epoch."""


Trials = list[Trial]


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        make_shards(folder)
        rounds, found = measure(folder, 2 if quick else TRIALS, rounds=1 if quick else ROUNDS)
        scale = {} if quick else {trials: searched("ours", folder, trials)[1] for trials in SCALES}
        report(rounds, found, scale, as_json=json_, quick=quick)
    finally:
        shutil.rmtree(folder)


def make_shards(folder: Path) -> None:
    """Of the demo's corpus."""
    write_slake(folder / "corpus", images=sum(PICTURES), questions_per_image=5, seed=7, splits=PICTURES)
    with scratch_with_ray(CORES):
        prepare(folder / "corpus", folder / "shards", DataOptions(source="phantoms"))


def measure(folder: Path, count: int, rounds: int) -> tuple[list[Round], Trials]:
    """All arms; and the trials, as ours came to them."""
    seen: dict[str, Trials] = {}

    def check(arm: str, trials: Trials) -> None:
        for other, theirs in seen.items():
            most = MOST_APART if (arm in CACHED) == (other in CACHED) else MOST_APART_BY_FEATURES
            check_same(f"{arm} and {other}", trials, theirs, most)
        seen[arm] = trials

    arms = {arm: partial(searched, arm, folder, count) for arm in STARTS}
    return run_rounds(arms, check, rounds), seen["ours"]


def check_same(arms: str, mine: Trials, theirs: Trials, most: float) -> None:
    """Raise AssertionError where losses or winners are not the same."""
    apart = max(abs(one.loss - other.loss) for one, other in zip(mine, theirs, strict=True))
    if not apart <= most:
        raise AssertionError(f"{arms}: losses are up to {apart:.2g} apart: {mine}, {theirs}")
    if winner(mine) != winner(theirs):
        raise AssertionError(f"{arms}: trials {winner(mine)} and {winner(theirs)} win: {mine}, {theirs}")


def winner(trials: Trials) -> int:
    """Its number."""
    return max(range(len(trials)), key=lambda number: trials[number].best)


def searched(arm: str, folder: Path, count: int) -> tuple[Trials, Sample]:
    """A search of so many trials on a Ray of its own."""
    output = Path(tempfile.mkdtemp(prefix="search-", dir=folder))
    words = ["scheduler=none", f"trials={count}", f"sampler.n_startup_trials={count}", f"output_dir={output}"]
    words += [] if arm == "ours" else [f"max_concurrent={CORES}"]
    search = at_low_rates(load_config(SearchConfig, SPACE, words))
    values = preset_values(search, SPACE)
    set_key(values, "data.shards", str(folder / "shards"))
    values["training"] |= TRAINING
    first = check_search(search, values)
    with scratch_with_ray(CPUS_AT_TWO[arm]):
        _, sample = timed_with_workers(lambda: STARTS[arm](search, first))
    return [trial_of(output / TRIALS_FOLDER / f"{number:04d}") for number in range(count)], sample


def at_low_rates(search: SearchConfig) -> SearchConfig:
    """The same space, with learning rates for a row a step."""
    return search.model_copy(update={"space": search.space | {RATE: LogUniform(loguniform=RATES)}, "points": ()})


def trial_of(folder: Path) -> Trial:
    """What its files say."""
    losses = [json.loads(line)["loss"] for line in (folder / STEPS_FILE).read_text().splitlines()[-LAST_STEPS:]]
    best = max(epoch["exact_match"] for epoch in read_json(folder / EPOCHS_FILE)["epochs"])
    return Trial(sum(losses) / len(losses), best)


def start_ours(search: SearchConfig, first: TrainConfig) -> None:
    """Packed."""
    run(search, first, None)


def start_reused(search: SearchConfig, first: TrainConfig) -> None:
    """In Tune's processes, with cached features."""
    cached = with_cached_features(first, Path(search.output_dir or ""), workers=CORES)
    run(search, cached, run_trial)


def start_trainers(search: SearchConfig, first: TrainConfig) -> None:
    """A `TorchTrainer` for each."""
    run(search, first, train_by_itself)


def train_by_itself(suggestion: Suggestion, values: dict[str, Any], output: str) -> None:
    """A trial that starts a run."""
    folder = Path(output) / suggestion["trial"]
    config = trial_config(values, suggestion["params"], name=folder.name, output_dir=str(folder))
    for row in train(config).epochs:
        tune.report(row)


def run(search: SearchConfig, first: TrainConfig, trial: TrialFunction | None) -> None:
    """Until all trials have ended."""
    run_trials(search, first, Unwatched(), resume=False, trial=trial)


STARTS: dict[str, Start] = {"ours": start_ours, "reused": start_reused, "trainer_per_trial": start_trainers}


def report(rounds: list[Round], found: Trials, scale: dict[int, Sample], *, as_json: bool, quick: bool) -> None:
    """Makespan and CPU time."""
    others = {"vs_trainer_per_trial": "trainer_per_trial", "vs_reused_function_trials": "reused"}
    finish(
        "search",
        {name: ratio(rounds, arm, "wall_s") for name, arm in others.items()}
        | {f"{name}_cpu": ratio(rounds, arm, "cpu_s") for name, arm in others.items()},
        {"wall": a_a(rounds, "wall_s"), "cpu": a_a(rounds, "cpu_s")},
        {
            "targets": TARGETS,
            "trials": len(found),
            "winner": winner(found),
            "arms": per_arm(rounds),
            "packed_by_trials": {str(count): asdict(sample) for count, sample in scale.items()},
        },
        as_json=as_json,
        quick=quick,
    )


if __name__ == "__main__":
    typer.run(main)
