"""Whatever gives an answer a score, as columns over the same items: automatic metrics, judges, raters, people."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.answers import ASKED_FILE
from pefomed_ray.evaluation.judgements import read_judgements
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.evaluation.ratings import Rating, read_ratings
from pefomed_ray.evaluation.verdicts import JUDGEMENTS_FILE, METRICS_FILE
from pefomed_ray.metrics.agreement import CIDER, GRADE, SHARE, VERDICT, Scale

Kind = Literal["automatic", "judge", "rater", "people"]

TIED = "tied"
"""Reason code of an item that as many call right as wrong."""
NO_PREDICTION = "no_prediction"
OTHER_ITEMS = "not_about_it"
"""Reason code of an item that a metric is not about: recall is of open answers."""
SKIPPED = "skipped"
NOT_SEEN = "not_seen"
"""Reason code of an item that a judge or a rater was not asked about."""
PEOPLE = "people"
LABELS = {
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "token_recall": "Token recall",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "rougeL": "ROUGE-L",
    "rougeL_coco": "ROUGE-L (coco)",
    "cider": "CIDEr",
}


@dataclass(frozen=True)
class Measure:
    """A column: one score an item, in the order of the predictions."""

    name: str
    """Unique: a metric's own, or `judge:NAME`, `rater:NAME`, `people`."""
    kind: Kind
    scale: Scale
    scores: tuple[float | None, ...]
    unscored: Mapping[str, int]
    """Reason code -> items."""
    repeats: np.ndarray | None = None
    """Of a judge asked several times: repeats x items, NaN where unscored."""
    flags: tuple[str, ...] = ()
    """What speaks against trusting a judge, by its own checks."""

    @property
    def label(self) -> str:
        """What a reader calls it."""
        if self.kind in ("judge", "rater"):
            return f"{self.kind.capitalize()} {self.name.partition(':')[2]}"
        return "People" if self.kind == "people" else LABELS.get(self.name, self.name)

    @property
    def scored(self) -> list[float]:
        """The scores there are."""
        return [score for score in self.scores if score is not None]


def scale_of(task: Task) -> Scale:
    """On which judges and people say what they think."""
    return VERDICT if task == "vqa" else GRADE


def automatic_measures(
    scores: Mapping[str, Sequence[float | None]], rows: Sequence[Prediction], chosen: Sequence[str] | None = None
) -> list[Measure]:
    """Columns of `score.item_scores`: all that score an item, or those chosen by name.

    Raises ConfigError for a name that is none of them.
    """
    # Exact match of open questions only is exact match, on fewer items: the answer types are told apart elsewhere.
    found = {
        name: column
        for name, column in scores.items()
        if not name.startswith("exact_match_") and any(score is not None for score in column)
    }
    for name in chosen or ():
        if name not in found:
            raise ConfigError(f"--metric {name!r} is not a metric of these items; there are: {', '.join(found)}")
    absent = sum(row.prediction is None for row in rows)
    return [
        Measure(
            name,
            "automatic",
            VERDICT if name == "exact_match" else CIDER if name == "cider" else SHARE,
            tuple(column),
            _counts({NO_PREDICTION: absent, OTHER_ITEMS: sum(score is None for score in column) - absent}),
        )
        for name, column in found.items()
        if chosen is None or name in chosen
    ]


def judge_measure(path: Path, rows: Sequence[Prediction], task: Task, predictions_sha256: str | None = None) -> Measure:
    """A judge's file, or the folder that `judge` wrote. Repeats count by majority for a question, by mean for a report.

    Raises ConfigError where there is no file or it is about another task; DataError where it is no file of judgements,
    a verdict on a question is neither 0 nor 1, no item of it is among the rows, or the file of predictions that the
    folder says were judged has another sha256 than this: other answers to the same questions have the same ids.
    """
    file = path / JUDGEMENTS_FILE if path.is_dir() else path
    flags = _checks_beside(file, predictions_sha256)
    judgements = read_judgements(file)
    others = sorted({judgement.task for judgement in judgements} - {task})
    if others:
        raise ConfigError(f"--judge {str(file)!r} is about task {', '.join(others)}, not {task}")
    names = sorted({judgement.judge for judgement in judgements})
    if len(names) > 1:
        raise DataError(
            f"judgements {str(file)!r} are of several judges, {', '.join(names)}; give each a file of its own"
        )
    at = {row.id: place for place, row in enumerate(rows)}
    known = [judgement for judgement in judgements if judgement.id in at]
    if not known:
        raise DataError(f"judgements {str(file)!r} share no id with the predictions")
    if task == "vqa" and any(judgement.score not in (None, 0, 1) for judgement in known):
        raise DataError(f"judgements {str(file)!r}: a verdict on a question is 0 or 1, and one of these is neither")
    repeats = {number: place for place, number in enumerate(sorted({judgement.repeat for judgement in known}))}
    matrix_KN = np.full((len(repeats), len(rows)), np.nan)
    reasons: dict[str, list[str]] = defaultdict(list)
    for judgement in known:
        if judgement.score is None:
            reasons[judgement.id].append(judgement.unscored or "")
        else:
            matrix_KN[repeats[judgement.repeat], at[judgement.id]] = judgement.score
    seen = {judgement.id for judgement in known}
    scores, unscored = [], Counter[str]()
    for place, row in enumerate(rows):
        given = matrix_KN[:, place][np.isfinite(matrix_KN[:, place])].tolist()
        score = _together(given, task)
        scores.append(score)
        if score is None:
            unscored[TIED if given else reasons[row.id][0] if row.id in seen else NOT_SEEN] += 1
    name = f"judge:{names[0]}"
    repeated = matrix_KN if len(repeats) > 1 else None
    return Measure(name, "judge", scale_of(task), tuple(scores), unscored, repeated, flags)


def _checks_beside(file: Path, predictions_sha256: str | None) -> tuple[str, ...]:
    """The flags of the run of `judge` that wrote this file, where it still lies in that run's folder."""
    folder = file.parent
    if not (folder / ASKED_FILE).is_file() or not (folder / METRICS_FILE).is_file():
        return ()
    try:
        judged = read_json(folder / ASKED_FILE)["predictions"]
        flags = tuple(str(flag) for flag in read_json(folder / METRICS_FILE)["flags"])
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(f"{str(folder)!r} does not hold what `pefomed-ray judge` writes") from None
    if predictions_sha256 is not None and judged != predictions_sha256:
        raise DataError(f"judgements {str(file)!r} are about another file of predictions; judge these")
    return flags


def rater_measures(
    paths: Iterable[Path], rows: Sequence[Prediction], task: Task, model: str | None = None
) -> list[Measure]:
    """A column for every rater of some CSV files, in the order of their names.

    `model` chooses the ratings of one model's answers where the files hold several. Raises ConfigError where a file is
    missing, holds several models' and none was chosen, or none of that name; DataError where a file is none of ratings,
    shares no id with the rows, has a score beyond the task's scale, or contradicts another one.
    """
    best, ids = scale_of(task).best, {row.id for row in rows}
    by_rater: dict[str, dict[str, Rating]] = defaultdict(dict)
    for path in paths:
        ratings = _of_model(read_ratings(path), model, path)
        if ids.isdisjoint(rating.id for rating in ratings):
            raise DataError(f"ratings {str(path)!r} share no id with the predictions")
        for rating in ratings:
            if rating.score is not None and rating.score > best:
                raise DataError(
                    f"ratings {str(path)!r}: rater {rating.rater!r} gives {rating.id!r} a {rating.score}, but the best "
                    f"score of task {task} is {best:.0f}"
                )
            before = by_rater[rating.rater].setdefault(rating.id, rating)
            if before.score != rating.score:
                raise DataError(
                    f"ratings {str(path)!r}: another file gives another score of the same rater, {rating.rater!r}, "
                    f"and answer, {rating.id!r}; which holds?"
                )
    measures = []
    for rater, said in sorted(by_rater.items()):
        given = [said.get(row.id) for row in rows]
        missing = [rating for rating in given if rating is None or rating.score is None]
        skipped = sum(rating is not None and rating.skipped for rating in missing)
        unscored = _counts({SKIPPED: skipped, NOT_SEEN: len(missing) - skipped})
        scores = tuple(None if rating is None or rating.score is None else float(rating.score) for rating in given)
        measures.append(Measure(f"rater:{rater}", "rater", scale_of(task), scores, unscored))
    return measures


def people(raters: Sequence[Measure], task: Task) -> Measure:
    """All raters as one: their majority on a question, ties left out; the mean of their grades of a report."""
    scores, unscored = [], Counter[str]()
    for given in zip(*(rater.scores for rater in raters), strict=True):
        there = [score for score in given if score is not None]
        score = _together(there, task)
        scores.append(score)
        if score is None:
            unscored[TIED if there else NOT_SEEN] += 1
    return Measure(PEOPLE, "people", scale_of(task), tuple(scores), unscored)


def check_names(measures: Sequence[Measure]) -> None:
    """Raise ConfigError where two measures have one name, which would hide one of them."""
    for name, count in Counter(measure.name for measure in measures).items():
        if count > 1:
            raise ConfigError(f"{name!r} is given {count} times; leave one out, or give its rows another `judge`")


def _together(scores: Sequence[float], task: Task) -> float | None:
    """Several scores of one item as one; None without any, and where a vote is tied."""
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    if task != "vqa":
        return mean
    return None if mean == 0.5 else float(mean > 0.5)


def _of_model(ratings: Sequence[Rating], model: str | None, path: Path) -> list[Rating]:
    models = sorted({rating.model for rating in ratings})
    if model is None and len(models) > 1:
        raise ConfigError(
            f"ratings {str(path)!r} are of answers of several models; say by --model whose the predictions are: "
            + ", ".join(map(repr, models))
        )
    if model is None or models == [""]:
        return list(ratings)
    if model not in models:
        raise ConfigError(
            f"ratings {str(path)!r} hold none of --model {model!r}, but of {', '.join(map(repr, models))}"
        )
    return [rating for rating in ratings if rating.model == model]


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}
