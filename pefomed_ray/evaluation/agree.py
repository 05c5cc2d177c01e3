"""Which measure to trust: automatic metrics, judges and people held against each other on the same answers.

What each is held against, the reference, is what people say: their majority on a question, the mean of their grades of
a report. Each rater is held against the others, never against a majority that holds their own vote: that is how well a
person does. Without ratings the reference is the first judge, which may itself be wrong.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import publishing, sha256_bytes, sha256_file, write_bytes, write_json
from pefomed_ray.errors import ConfigError
from pefomed_ray.evaluation.agreement_figure import draw_figure
from pefomed_ray.evaluation.agreement_page import Corpus, open_corpus, render_page
from pefomed_ray.evaluation.measures import (
    Measure,
    automatic_measures,
    check_names,
    judge_measure,
    people,
    rater_measures,
)
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.evaluation.score import PRIMARY_METRIC, item_scores
from pefomed_ray.metrics.agreement import (
    STATISTICS,
    Agreement,
    agreement,
    difference_in_order,
    group_agreement,
)
from pefomed_ray.metrics.intervals import mean_with_interval
from pefomed_ray.metrics.vqa import normalizer_named

FILES = {"page": "agreement.html", "agreement": "agreement.json", "table": "agreement.csv", "figure": "figure.svg"}
"""What there is in the output, by what it is."""
DISPUTED = 0.5
"""How far apart two measures must be, from 0 to 1, for an item to be listed."""
LISTED = 6
"""Items of each kind of disagreement."""
COMMON = 0.9
"""A measure that scored less than this share of the items that the others did is never called the best: easier items
make a better measure. How far it is behind is found on the items in common."""
OTHERS = "the other raters"


@dataclass(frozen=True)
class Asked:
    """What to hold against what."""

    predictions: Path
    task: Task
    judges: tuple[Path, ...] = ()
    ratings: tuple[Path, ...] = ()
    normalizer: str = "strict"
    metrics: tuple[str, ...] | None = None
    """Automatic ones, by name; None: all that score an item."""
    model: str | None = None
    """Whose answers these are, where a file of ratings holds several models'."""
    shards: Path | None = None
    """Where pictures and licence are; None: neither pictures nor texts are shown."""
    split: str = "test"


def agree(asked: Asked, output: Path) -> dict[str, Any]:
    """Write `agreement.json`, `.csv`, `.html` and `figure.svg` to `output`; answers what agreement.json holds.

    Raises ConfigError where there is nothing to compare, a file is missing or of another task, or `output` is there;
    DataError where a file is damaged or shares no id with the predictions.
    """
    if not asked.judges and not asked.ratings:
        raise ConfigError("nothing to compare with: give --judge or --ratings, or both")
    rows = read_predictions(asked.predictions)
    corpus = open_corpus(asked.shards, asked.split, rows) if asked.shards else None
    measures, reference = _measures(asked, rows)
    items = {"all": list(range(len(rows)))}
    if asked.task == "vqa":
        by_type = {kind: [at for at, row in enumerate(rows) if row.answer_type == kind] for kind in ("open", "closed")}
        items |= {kind: places for kind, places in by_type.items() if places}
    clusters = np.asarray([row.cluster for row in rows])
    result = {
        "schema_version": 1,
        "task": asked.task,
        "normalizer": asked.normalizer,
        "rows": len(rows),
        "reference": {"name": reference.name, "kind": reference.kind, "label": reference.label},
        "raters": [measure.name for measure in measures if measure.kind == "rater"],
        "measures": {measure.name: _measure_to_json(measure, clusters) for measure in measures},
        "answer_types": {
            kind: _one_answer_type(measures, reference, places, clusters, asked.task) for kind, places in items.items()
        },
        "disagreements": _disagreements(measures, reference, rows, asked.task),
        "licence": corpus.licence if corpus else None,
    }
    _publish(output, result, rows, corpus)
    return result


def _measures(asked: Asked, rows: Sequence[Prediction]) -> tuple[list[Measure], Measure]:
    """All measures in the order of tables, and the one that the others are held against."""
    digest = sha256_file(asked.predictions)
    judges = [judge_measure(path, rows, asked.task, digest) for path in asked.judges]
    raters = rater_measures(asked.ratings, rows, asked.task, asked.model)
    scores = item_scores(rows, asked.task, normalizer_named(asked.normalizer))
    measures = [*automatic_measures(scores, rows, asked.metrics), *judges, *raters]
    if len(raters) > 1:
        measures.append(people(raters, asked.task))
    check_names(measures)
    return measures, measures[-1] if raters else judges[0]


def _measure_to_json(measure: Measure, clusters: np.ndarray) -> dict[str, Any]:
    there = [at for at, score in enumerate(measure.scores) if score is not None]
    shares = [score / measure.scale.best for score in measure.scored]
    found = mean_with_interval(shares, clusters[there].tolist() if there else [])
    interval = None if found.ci95 is None else [end * measure.scale.best for end in found.ci95]
    return {
        "label": measure.label,
        "kind": measure.kind,
        "scale": measure.scale.name,
        "n": found.n,
        "unscored": dict(measure.unscored),
        "mean": None if found.value is None else found.value * measure.scale.best,
        "ci95": interval,
        "flags": list(measure.flags),
    }


def _one_answer_type(
    measures: Sequence[Measure], reference: Measure, places: Sequence[int], clusters: np.ndarray, task: Task
) -> dict[str, Any]:
    raters = [measure for measure in measures if measure.kind == "rater"]
    pairs = {
        (first.name, second.name): _pair(first, second, places, clusters)
        for first, second in combinations(measures, 2)
        if not (first.kind == "rater" and second.kind == "people")  # of whom they are one
    }
    compared = []
    for measure in measures:
        if measure.name == reference.name:
            continue
        against = reference
        if measure.kind == "rater":
            against = people([rater for rater in raters if rater is not measure], task)
        found = None if measure.kind == "rater" else pairs.get((measure.name, against.name))
        found = found or _pair(measure, against, places, clusters)
        label = reference.label if against is reference else OTHERS
        compared.append({"measure": measure.name, "against": label, **found.to_json()})
    _add_distance_from_best(compared, measures, reference, places, clusters)
    columns = {measure.name: measure for measure in measures}
    return {
        "rows": len(places),
        "compared": compared,
        "pairs": [{"measure": first, "with": second, **_as_symmetric(pair)} for (first, second), pair in pairs.items()],
        "among_raters": _among(np.array([_column(rater, places) for rater in raters]), raters[0], places, clusters)
        if len(raters) > 1
        else None,
        "judge_repeats": {
            name: {
                "repeats": len(measure.repeats),
                **_among(measure.repeats[:, places], measure, places, clusters),
            }
            for name, measure in columns.items()
            if measure.repeats is not None
        },
    }


def _pair(measure: Measure, reference: Measure, places: Iterable[int], clusters: np.ndarray) -> Agreement:
    """Intervals are left out between two automatic measures: both are functions of the same words."""
    both = [at for at in places if measure.scores[at] is not None and reference.scores[at] is not None]
    return agreement(
        [measure.scores[at] or 0.0 for at in both],
        [reference.scores[at] or 0.0 for at in both],
        measure.scale,
        reference.scale,
        clusters[both].tolist() if both else [],
        intervals={measure.kind, reference.kind} != {"automatic"},
    )


def _as_symmetric(found: Agreement) -> dict[str, Any]:
    """Without `ordered`, which makes one of the two the reference."""
    pair = found.to_json()
    del pair["statistics"]["ordered"]
    return pair


def _among(scores_KN: np.ndarray, measure: Measure, places: Sequence[int], clusters: np.ndarray) -> dict[str, Any]:
    return group_agreement(scores_KN, measure.scale, clusters[list(places)].tolist()).to_json()


def _column(measure: Measure, places: Iterable[int]) -> list[float]:
    return [np.nan if (score := measure.scores[at]) is None else score for at in places]


def _add_distance_from_best(
    compared: Sequence[dict[str, Any]],
    measures: Sequence[Measure],
    reference: Measure,
    places: Iterable[int],
    clusters: np.ndarray,
) -> None:
    """To each metric and judge, how far it is behind the one that orders answers most as the reference does."""
    columns = {measure.name: measure for measure in measures}
    able = [
        row
        for row in compared
        if columns[row["measure"]].kind != "rater" and row["statistics"]["ordered"]["value"] is not None
    ]
    most = max((row["n"] for row in able), default=0)
    whole = [row for row in able if row["n"] >= COMMON * most]
    best = max(whole, key=lambda row: row["statistics"]["ordered"]["value"], default=None)
    for row in compared:
        row["best"] = row is best
        row["fewer_items"] = row in able and row not in whole
        row["behind_best"] = None
        if best is not None and row in able and row is not best:
            three = (columns[best["measure"]], columns[row["measure"]], reference)
            common = [at for at in places if all(column.scores[at] is not None for column in three)]
            leader, follower, ideal = ([column.scores[at] or 0.0 for at in common] for column in three)
            found = difference_in_order(leader, follower, ideal, clusters[common].tolist() if common else [])
            row["behind_best"] = found.to_json() if found else None


def _disagreements(
    measures: Sequence[Measure], reference: Measure, rows: Sequence[Prediction], task: Task
) -> list[dict[str, Any]]:
    """Items on which the task's first metric, or a judge, is far from the reference; ids and numbers only."""
    found = []
    for measure in measures:
        if measure.name != PRIMARY_METRIC[task] and measure.kind != "judge":
            continue
        if measure.name == reference.name:
            continue
        both = [at for at in range(len(rows)) if measure.scores[at] is not None and reference.scores[at] is not None]
        if not both:
            continue
        ours, theirs = (_from_0_to_1(column, both, measure.scale == reference.scale) for column in (measure, reference))
        gaps = {at: theirs[place] - ours[place] for place, at in enumerate(both)}
        drawn = sorted(both, key=lambda at: sha256_bytes(rows[at].id.encode()))
        for says, sign in (("lower", 1), ("higher", -1)):
            far = sorted((at for at in drawn if sign * gaps[at] >= DISPUTED), key=lambda at: -abs(gaps[at]))
            if far:
                found.append(
                    {
                        "measure": measure.name,
                        "reference": reference.name,
                        "says": says,
                        "by_place": measure.scale != reference.scale,
                        "count": len(far),
                        "of": len(both),
                        "items": [
                            {"id": rows[at].id, "scores": {column.name: column.scores[at] for column in measures}}
                            for at in far[:LISTED]
                        ],
                    }
                )
    return found


def _from_0_to_1(measure: Measure, places: Sequence[int], same_scale: bool) -> list[float]:
    """Shares of the best score; where scales differ the place among these items, from the lowest to the highest."""
    values = np.asarray([measure.scores[at] for at in places], dtype=np.float64)
    if same_scale:
        return [float(value) for value in values / measure.scale.best]
    from scipy.stats import rankdata

    return [float(rank) for rank in (rankdata(values) - 0.5) / len(values)]


def _publish(output: Path, result: Mapping[str, Any], rows: Sequence[Prediction], corpus: Corpus | None) -> None:
    with publishing(output) as folder:
        wide, narrow = draw_figure(result, narrow=False), draw_figure(result, narrow=True)
        write_bytes(folder / FILES["figure"], wide)
        write_bytes(folder / FILES["table"], _csv(result).encode())
        write_bytes(folder / FILES["page"], render_page(result, rows, corpus, wide, narrow).encode())
        write_json(folder / FILES["agreement"], result)


def _csv(result: Mapping[str, Any]) -> str:
    """A line a comparison with the reference, then a line a pair: answer type, names, n, means, statistics."""
    file = io.StringIO()
    spread = [f"{name}{end}" for name in STATISTICS for end in ("", "_low", "_high")]
    writer = csv.writer(file)
    writer.writerow(["table", "answer_type", "measure", "against", "n", "clusters", "mean", "mean_against", *spread])
    for kind, found in result["answer_types"].items():
        for row in (*found["compared"], *found["pairs"]):
            table = "compared" if "against" in row else "pairs"
            cells: list[Any] = []
            for name in STATISTICS:
                statistic = row["statistics"].get(name, {"value": None, "ci95": None})
                cells += [statistic["value"], *(statistic["ci95"] or (None, None))]
            against = row.get("against") or row["with"]
            writer.writerow(
                [
                    table,
                    kind,
                    row["measure"],
                    against,
                    row["n"],
                    row["clusters"],
                    row["mean"],
                    row["reference_mean"],
                    *cells,
                ]
            )
    return file.getvalue()
