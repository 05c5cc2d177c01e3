"""Predictions -> metric name -> value, n, unscored rows and 95 % interval.

`score_rows` is quick and starts nothing; `score_rows_fully` adds what the captioning literature reports, and so may
start Java. docs/metrics.md has every metric.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.records import TASKS, Task
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.metrics.caption import NotComputed, caption_metrics
from pefomed_ray.metrics.intervals import Metric, Summed, mean_of, with_interval
from pefomed_ray.metrics.radiology import check_radiology, highest, radiology_metrics
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import Normalizer, exact_match, normalizer_named, token_f1, token_recall

PRIMARY_METRIC: dict[Task, str] = {"vqa": "exact_match", "caption": "rougeL", "report": "rougeL"}
"""The one that a task's report shows first and its gate looks at."""

Scores = dict[str, dict[str, Any]]
"""Metric name -> Metric.to_json(), with `not_computed` and the reason where there is no number, and `tokenizer` where
one made the tokens."""


@dataclass(frozen=True)
class Scored:
    """A metric over rows, before intervals."""

    found: Summed | NotComputed
    rows: tuple[int, ...]
    """Which rows have a score."""
    of: int
    """How many rows the metric is about: of open answers, say."""
    tokenizer: str | None = None

    def to_json(self, clusters: Sequence[str]) -> dict[str, Any]:
        """As `Scores` has it; `clusters` of all rows."""
        if isinstance(self.found, NotComputed):
            shown = Metric(None, 0, self.of, None).to_json()
            # Nothing to compute is not a failure to compute.
            return shown | ({"not_computed": self.found.reason} if self.rows else {})
        metric = with_interval(self.found, [clusters[row] for row in self.rows], self.of - len(self.rows))
        return metric.to_json() | ({"tokenizer": self.tokenizer} if self.tokenizer else {})

    def by_row(self, count: int) -> list[float | None]:
        """One number for each of `count` rows, None where unscored."""
        values: list[float | None] = [None] * count
        if isinstance(self.found, Summed):
            for row, value in zip(self.rows, self.found.items, strict=True):
                values[row] = value
        return values


def score_file(path: Path, task: str, normalizer: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Score a JSONL file of predictions made anywhere: Scores, and for VQA `by_question_type`.

    `also` names metrics of `metrics.radiology`. Raises ConfigError for an unknown task, normaliser or metric, before
    the file is read, and what `read_predictions` and `radiology_metrics` raise.
    """
    if task not in TASKS:
        raise ConfigError(f"task: {task!r} is not known; allowed: {', '.join(TASKS)}")
    normalize = normalizer_named(normalizer)
    check_radiology(also)
    rows = read_predictions(path)
    scores: dict[str, Any] = score_rows_fully(rows, task, normalize)
    if also:
        scores |= radiology_scores(rows, also)
    if task == "vqa":
        scores["by_question_type"] = score_by_question_type(rows, normalize)
    return scores


def score_rows(rows: Sequence[Prediction], task: Task, normalizer: Normalizer) -> Scores:
    """The quick metrics of the task over these rows. A metric without rows has value null and n 0."""
    return _to_json(_quick(rows, task, normalizer), rows)


def score_rows_fully(rows: Sequence[Prediction], task: Task, normalizer: Normalizer) -> Scores:
    """Every metric of the task. For captions and reports it may run Java for a minute."""
    return score_systems_fully({"": rows}, task, normalizer)[""]


def score_systems_fully(
    systems: Mapping[str, Sequence[Prediction]], task: Task, normalizer: Normalizer
) -> dict[str, Scores]:
    """`score_rows_fully` of what several systems said of the same rows; Java starts once for all that lack the same."""
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, rows in systems.items():
        alike[_with_prediction(rows)].append(name)
    scores: dict[str, Scores] = {}
    for names in alike.values():
        found = all_metrics([systems[name] for name in names], task, normalizer)
        scores |= {name: _to_json(own, systems[name]) for name, own in zip(names, found, strict=True)}
    return {name: scores[name] for name in systems}


def item_scores(rows: Sequence[Prediction], task: Task, normalizer: Normalizer) -> dict[str, list[float | None]]:
    """Metric name -> one number a row, None where unscored, of all metrics of the task.

    BLEU of one item is not smoothed: without a match of four words its BLEU-4 is as good as 0.
    """
    return {name: own.by_row(len(rows)) for name, own in all_metrics([rows], task, normalizer)[0].items()}


def all_metrics(systems: Sequence[Sequence[Prediction]], task: Task, normalizer: Normalizer) -> list[dict[str, Scored]]:
    """Every metric of the task for each system; all systems are about the same rows and lack the same predictions."""
    quick = [_quick(rows, task, normalizer) for rows in systems]
    if task == "vqa":
        return quick
    scored = _with_prediction(systems[0])
    said = [[rows[row].prediction or "" for row in scored] for rows in systems]
    captions = caption_metrics([systems[0][row].right for row in scored], said)
    return [
        own
        | {
            name: Scored(found, scored, len(systems[0]), captions.tokenizer)
            for name, found in captions.systems[number].items()
        }
        for number, own in enumerate(quick)
    ]


def radiology_scores(rows: Sequence[Prediction], names: Sequence[str]) -> Scores:
    """Metrics of `metrics.radiology` against each row's answer, under the names that RadEval gives them.

    What is no mean of items has no interval. Raises what `radiology_metrics` raises.
    """
    about = _with_prediction(rows)
    if not about:
        return {name: Metric(None, 0, len(rows), None).to_json() for name in names}
    found = radiology_metrics(names, [rows[row].answer for row in about], [rows[row].prediction or "" for row in about])
    clusters = [row.cluster for row in rows]
    scores: Scores = {}
    for name, values in found.items.items():
        pairs = [(row, value) for row, value in zip(about, values, strict=True) if value is not None]
        mean = mean_of([value for _, value in pairs], highest(name)) if pairs else NotComputed("RadEval gave no number")
        scores[name] = Scored(mean, tuple(row for row, _ in pairs) or about, len(rows)).to_json(clusters)
    for name, value in found.corpus.items():
        scores[name] = Metric(value, len(about), len(rows) - len(about), None).to_json()
    return scores


def score_by_question_type(rows: Sequence[Prediction], normalizer: Normalizer) -> dict[str, Scores]:
    """Question type -> exact match, in the order of the types' names; rows without a type are left out."""
    by_type: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        if row.question_type is not None:
            by_type[row.question_type].append(row)
    return {
        kind: _to_json({"exact_match": _mean(members, _matcher(normalizer))}, members)
        for kind, members in sorted(by_type.items())
    }


def unique_output_ratio(rows: Sequence[Prediction], normalizer: Normalizer) -> float | None:
    """Distinct outputs over outputs, in (0, 1]; near 0 a model says the same whatever it is shown. None without any."""
    outputs = [normalizer(row.prediction) for row in rows if row.prediction is not None]
    return len(set(outputs)) / len(outputs) if outputs else None


Score = Callable[[str, str], float]
"""Prediction, reference -> score."""


def _quick(rows: Sequence[Prediction], task: Task, normalizer: Normalizer) -> dict[str, Scored]:
    def f1(prediction: str, answer: str) -> float:
        return token_f1(prediction, answer, normalizer)

    def recall(prediction: str, answer: str) -> float:
        return token_recall(prediction, answer, normalizer)

    if task != "vqa":
        return {"rougeL": _mean(rows, rouge_l), "token_f1": _mean(rows, f1)}
    match = _matcher(normalizer)
    return {
        "exact_match": _mean(rows, match),
        "exact_match_open": _mean(rows, match, lambda row: row.answer_type == "open"),
        "exact_match_closed": _mean(rows, match, lambda row: row.answer_type == "closed"),
        "token_f1": _mean(rows, f1),
        "token_recall": _mean(rows, recall, lambda row: row.answer_type != "closed"),
        "rougeL": _mean(rows, rouge_l),
    }


def _matcher(normalizer: Normalizer) -> Score:
    return lambda prediction, answer: exact_match(prediction, answer, normalizer)


def _mean(rows: Sequence[Prediction], score: Score, about: Callable[[Prediction], bool] = lambda row: True) -> Scored:
    """Over the rows it is about; a row's score is that against the right text it is nearest to."""
    numbers = [number for number, row in enumerate(rows) if about(row)]
    scored = tuple(number for number in numbers if rows[number].prediction is not None)
    values = [max(score(rows[number].prediction or "", text) for text in rows[number].right) for number in scored]
    found = mean_of(values) if values else NotComputed("no row has a prediction")
    return Scored(found, scored, len(numbers))


def _with_prediction(rows: Sequence[Prediction]) -> tuple[int, ...]:
    return tuple(number for number, row in enumerate(rows) if row.prediction is not None)


def _to_json(found: dict[str, Scored], rows: Sequence[Prediction]) -> Scores:
    clusters = [row.cluster for row in rows]
    return {name: scored.to_json(clusters) for name, scored in found.items()}
