"""Who wins: the best trials answer the whole validation split, and are compared on the same rows.

During a search each epoch is measured on the first `validation.rows` rows, and the best of many such numbers is partly
the luckiest. So the best few trials, and one that ran the paper's defaults, are asked again, on all rows of the split,
as `evaluate` asks. The test split is not opened. Where a judge is asked too (`judged`), its verdicts on these answers
decide, and where they cannot, the metric does.

<output>/choice/<trial id>.jsonl    answers to the validation split
<output>/choice.json                ranking, comparisons, Pareto front, the winner and why
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.manifests import load_bundle_manifest, load_shard_manifest
from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.config import SearchConfig, TrainConfig, load_config
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import PefomedError
from pefomed_ray.evaluation.predict import GenerationSettings, predict
from pefomed_ray.evaluation.predictions import Prediction, write_predictions
from pefomed_ray.metrics.intervals import Difference, Metric, mean_with_interval, paired_difference
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import exact_match
from pefomed_ray.search.judged import Verdicts, ask_judge, licence_of
from pefomed_ray.search.leaderboard import TRIALS_FOLDER, TrialRow, ranked
from pefomed_ray.training.trainer import train

OnProgress = Callable[[int, int], None]

CHOICE_FILE = "choice.json"
SPLIT = "validation"
SCORES: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "rougeL": rouge_l}
"""As each epoch's validation scores a row (prediction, answer)."""
PAPER_RANK, PAPER_ALPHA, PAPER_LEARNING_RATES = 64, 16, (1e-5, 3e-5)
"""LoRA and peak learning rates of arXiv 2401.02797, section 4.1 and the published configuration files."""


@dataclass(frozen=True)
class Rescored:
    """A trial's answers to the whole validation split, scored."""

    row: TrialRow
    scores: list[float]
    """Of each row of the split, in its order."""
    clusters: list[str]
    """What the rows are resampled by."""

    @property
    def metric(self) -> Metric:
        """Their mean and its interval."""
        return mean_with_interval(self.scores, self.clusters)


@dataclass(frozen=True)
class Comparison:
    """The winner against another trial, on the same rows."""

    trial: str
    difference: Difference
    note: str | None = None
    """What the reader must know to weigh it."""


@dataclass(frozen=True)
class Choice:
    """What `choice.json` says."""

    metric: str
    ranking: list[TrialRow]
    """The re-scored trials, best first, of equals the one that trains less."""
    runner_up: Comparison | None
    """None where only one trial could be re-scored."""
    paper: Comparison | None
    """None where no other trial ran the paper's defaults to a result."""
    pareto: list[str]
    """Trials that no other beats in `value` without training more parameters, by parameters."""
    why: str
    """In words."""
    judge: str | None = None
    """Whose verdicts decided, where a judge's did; comparisons are of these then."""

    @property
    def winner(self) -> TrialRow:
        """The best of the ranking."""
        return self.ranking[0]


def choose(
    search: SearchConfig,
    rows: Sequence[TrialRow],
    output: Path,
    *,
    workers: int = 1,
    on_progress: OnProgress = lambda done, total: None,
    on_judging: OnProgress = lambda done, total: None,
) -> Choice:
    """Re-score the best `choice.rescore` trials of ranked `rows`, and the best of those that ran the paper's defaults.

    `workers` processes answer, each as large as the trial was; Ray must have been started. `on_progress(done, total)`
    counts the answers of each in turn, `on_judging` the questions to the judge. Writes what the head of this module
    lists. Raises PefomedError where no trial came to a result, and what `predict` raises.
    """
    survivors = [row for row in rows if row.value is not None][: search.choice.rescore]
    if not survivors:
        raise PefomedError("no trial came to a result, so there is none to choose")
    configs = {row.trial: load_config(TrainConfig, file) for row in rows if (file := _run_file(output, row)).is_file()}
    paper = [row for row in rows if row.trial in configs and ran_papers_defaults(configs[row.trial])]
    contestants = survivors + [row for row in paper[:1] if row.value is not None and row not in survivors]
    (output / "choice").mkdir(exist_ok=True)
    answers: dict[str, list[Prediction]] = {}
    found = []
    for row in contestants:
        answers[row.trial] = _answers(row, configs[row.trial], workers, on_progress)
        write_predictions(output / "choice" / f"{row.trial}.jsonl", answers[row.trial], _origin(row))
        found.append(_scored(row, answers[row.trial], search.metric))
    verdicts = None
    if search.choice.judge is not None:
        first = configs[contestants[0].trial]
        verdicts = _verdicts(answers, first, search.choice.judge, output / "choice", on_judging)
    choice = _choice(search.metric, found, paper, pareto_front(rows), verdicts)
    write_json(output / CHOICE_FILE, _document(choice))
    return choice


def ran_papers_defaults(config: TrainConfig) -> bool:
    """Whether the paper's rank, alpha and one of its learning rates are what this trial trained with."""
    learning_rate = config.optimizer.learning_rate
    return (config.lora.rank, config.lora.alpha) == (PAPER_RANK, PAPER_ALPHA) and learning_rate in PAPER_LEARNING_RATES


def pareto_front(rows: Sequence[TrialRow]) -> list[str]:
    """Trials that no other equals or beats in `value` with fewer parameters to train, nor beats with as many."""
    front: list[TrialRow] = []
    scored = [row for row in rows if row.value is not None]
    for row in sorted(scored, key=lambda row: (row.trainable_parameters, -(row.value or 0.0), row.trial)):
        if not front or (row.value or 0.0) > (front[-1].value or 0.0):
            front.append(row)
    return [row.trial for row in front]


def in_order(rows: Sequence[TrialRow], choice: Choice) -> list[TrialRow]:
    """The leaderboard's rows: re-scored trials in the order of the ranking, then the others by what they had."""
    first = {row.trial for row in choice.ranking}
    return choice.ranking + ranked(row for row in rows if row.trial not in first)


def winning_bundle(search: SearchConfig, choice: Choice, best: TrainConfig, output: Path) -> Path:
    """The winner's own bundle, or that of its config `best`, trained into `<output>/best`, as `choice.retrain` says.

    A training that was interrupted goes on. Raises what `training.trainer.train` raises.
    """
    if not search.choice.retrain:
        return Path(str(choice.winner.bundle))
    folder = output / "best"
    if (folder / "bundle").is_dir():
        return folder / "bundle"
    return train(best.model_copy(update={"output_dir": str(folder)}), resume=folder.exists()).bundle


def _run_file(output: Path, row: TrialRow) -> Path:
    """What the trial trained with; not there where it failed before it began."""
    return output / TRIALS_FOLDER / row.trial / "run.yaml"


def _answers(row: TrialRow, config: TrainConfig, workers: int, on_progress: OnProgress) -> list[Prediction]:
    """Of a mixture: to each part's validation rows, one part after the other; ids and groups then name the part."""
    settings = GenerationSettings(
        workers=workers,
        use_gpu=config.resources.use_gpu,
        cpus_per_worker=config.resources.cpus_per_worker,
        batch_size=config.validation.batch_size,
        feature_cache=config.data.feature_cache,
    )
    parts = [part.shards for part in config.data.shards if load_shard_manifest(part.shards).rows.get(SPLIT)]
    bundle = Path(str(row.bundle))
    answers: list[Prediction] = []
    for number, shards in enumerate(parts):
        found = predict(bundle, shards, SPLIT, settings, variants=["image"], on_progress=on_progress)["image"]
        answers += found if len(parts) == 1 else [_of_part(answer, number) for answer in found]
    return answers


def _of_part(answer: Prediction, part: int) -> Prediction:
    """Two corpora may use the same ids and groups."""
    group = None if answer.group is None else f"{part}/{answer.group}"
    return replace(answer, id=f"{part}/{answer.id}", group=group)


def _origin(row: TrialRow) -> dict[str, Any]:
    return {"bundle": load_bundle_manifest(Path(str(row.bundle))).digest, "split": SPLIT, "given": "image"}


def _scored(row: TrialRow, answers: Sequence[Prediction], metric: str) -> Rescored:
    score = SCORES[metric]
    scores = [score(answer.prediction or "", answer.answer) for answer in answers]
    clusters = [f"row {answer.id}" if answer.group is None else f"group {answer.group}" for answer in answers]
    return Rescored(row, scores, clusters)


def _verdicts(
    answers: Mapping[str, Sequence[Prediction]],
    config: TrainConfig,
    judge: JudgeConfig,
    folder: Path,
    on_judging: OnProgress,
) -> Verdicts | PefomedError:
    """Or why there are none: hours of a search are not lost with its judge."""
    try:
        return ask_judge(answers, config.task, judge, licence_of(config), folder, on_judging)
    except PefomedError as error:
        return error


def _on_verdicts(one: Rescored, verdicts: Verdicts) -> Rescored:
    return Rescored(one.row, verdicts.by_trial[one.row.trial], [one.clusters[at] for at in verdicts.rows])


def _choice(
    metric: str,
    found: Sequence[Rescored],
    paper: Sequence[TrialRow],
    front: list[str],
    verdicts: Verdicts | PefomedError | None,
) -> Choice:
    if isinstance(verdicts, Verdicts):
        measure, where = f"a mean verdict by {verdicts.judge} of", f"the {SPLIT} rows judged of every trial"
        choice = _decided([_on_verdicts(one, verdicts) for one in found], metric, measure, where, paper, front)
        metrics = {one.row.trial: one.metric for one in found}
        rows = [replace(row, judged=row.rescored, rescored=metrics[row.trial]) for row in choice.ranking]
        return replace(choice, ranking=rows, judge=verdicts.judge)
    choice = _decided(found, metric, metric, f"all {SPLIT} rows", paper, front)
    if verdicts is None:
        return choice
    return replace(choice, why=f"{choice.why} No judge decided ({verdicts}); --resume asks it again.")


def _decided(
    found: Sequence[Rescored], metric: str, measure: str, where: str, paper: Sequence[TrialRow], front: list[str]
) -> Choice:
    ranking = sorted(found, key=lambda one: (-(one.metric.value or 0.0), one.row.trainable_parameters, one.row.trial))
    best, by_trial = ranking[0], {one.row.trial: one for one in ranking}
    runner_up = _against(best, ranking[1]) if len(ranking) > 1 else None
    papers = next((by_trial[row.trial] for row in paper if row.trial in by_trial), None)
    against_paper = _against(best, papers) if papers and papers is not best else None
    rows = [replace(one.row, rescored=one.metric) for one in ranking]
    why = [
        f"Trial {best.row.trial} has {measure} {_share(best.metric.value)}{_range(best.metric.ci95)} on {where}, "
        f"{best.metric.n}, the best of {_count(len(ranking), 're-scored trial')}.",
        _said("the runner-up", runner_up) if runner_up else "No other trial was re-scored, so there is no runner-up.",
        _said("the paper's defaults", against_paper) if against_paper else _why_not_against_paper(best, paper),
    ]
    return Choice(metric, rows, runner_up, against_paper, front, " ".join(why))


def _against(best: Rescored, other: Rescored) -> Comparison:
    epochs = f"it was stopped after {_count(other.row.epochs, 'epoch')}" if other.row.state == "stopped" else None
    return Comparison(other.row.trial, paired_difference(best.scores, other.scores, best.clusters), epochs)


def _why_not_against_paper(best: Rescored, paper: Sequence[TrialRow]) -> str:
    if best.row in paper:
        return "It ran the paper's defaults itself."
    if paper:
        return f"The paper's defaults came to no result: trial {paper[0].trial} failed ({paper[0].reason})."
    rates = " or ".join(f"{rate:g}" for rate in PAPER_LEARNING_RATES)
    return (
        f"No trial ran the paper's defaults (lora.rank {PAPER_RANK}, lora.alpha {PAPER_ALPHA}, optimizer.learning_rate "
        f"{rates}), so nothing is said against them; name them among the points of the search to have them tried."
    )


def _said(whom: str, comparison: Comparison) -> str:
    found = comparison.difference
    note = f" ({comparison.note})" if comparison.note else ""
    begin = f"Against {whom}, trial {comparison.trial}{note}: {100 * found.value:+.1f} points"
    if found.ci95 is None:
        return f"{begin}; all rows are of one image or patient, so no interval can be given."
    low, high = found.ci95
    verdict = "better beyond chance" if low > 0 else "these rows do not tell the two apart"
    return f"{begin} ({100 * low:+.1f} to {100 * high:+.1f}, p = {found.p:.2g}): {verdict}."


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _document(choice: Choice) -> dict[str, Any]:
    def compared(comparison: Comparison | None) -> dict[str, Any] | None:
        if comparison is None:
            return None
        return {"trial": comparison.trial, **comparison.difference.to_json(), "note": comparison.note}

    return {
        "schema_version": 1,
        "metric": choice.metric,
        "judge": choice.judge,
        "split": SPLIT,
        "ranking": [asdict(row) for row in choice.ranking],
        "comparisons": {"runner_up": compared(choice.runner_up), "paper": compared(choice.paper)},
        "pareto": choice.pareto,
        "winner": choice.winner.trial,
        "why": choice.why,
    }
