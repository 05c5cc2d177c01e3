"""`agreement.html`: one page without a second file that says which measure to trust, and shows where they differ."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pefomed_ray.artifacts.manifests import load_shard_manifest
from pefomed_ray.data.plan import RowIndex, open_index, read_rows
from pefomed_ray.errors import DataError
from pefomed_ray.evaluation.agreement_figure import KIND_WORDS, TITLES, figure_rows, kappa_name
from pefomed_ray.evaluation.measures import NOT_SEEN, OTHER_ITEMS
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.evaluation.preflight import read_texts

FEW_ITEMS = 50
"""Below this an interval is so wide that few measures can be told apart."""
MANY_UNSCORED = 0.01
STATISTIC_WORDS = {
    "same": "Same verdict",
    "kappa": "Kappa",
    "kappa_linear": "Kappa, linear weights",
    "kappa_quadratic": "Kappa, quadratic weights",
    "alpha": "Krippendorff's alpha",
    "icc_2_1": "ICC(2,1)",
    "icc_3_1": "ICC(3,1)",
    "kendall": "Kendall's tau-b",
    "spearman": "Spearman's rho",
    "pearson": "Pearson's r",
}
"""In the order of the page."""
ANSWER_TYPES = {"open": "Open questions", "closed": "Closed questions (yes/no, either/or)"}


@dataclass(frozen=True)
class Corpus:
    """The shards that the predictions are about."""

    licence: Literal["open", "restricted"]
    index: RowIndex
    places: Mapping[str, int]
    """Row id -> number of the row in the split."""


def open_corpus(shards: Path, split: str, rows: Sequence[Prediction]) -> Corpus:
    """The shards of the predictions, for pictures and licence. Raises DataError where they share no id."""
    places = {row["id"]: place for place, row in enumerate(read_texts(shards, split))}
    if places.keys().isdisjoint(row.id for row in rows):
        raise DataError(
            f"shards {str(shards)!r}, split {split!r}, share no id with the predictions; name another split?"
        )
    return Corpus(load_shard_manifest(shards).licence, open_index(shards, split), places)


def render_page(
    result: Mapping[str, Any], rows: Sequence[Prediction], corpus: Corpus | None, wide: bytes, narrow: bytes
) -> str:
    """The page as HTML; every text in it is escaped. `wide` and `narrow` are the figure's two layouts."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "interval": _interval, "count": lambda number: f"{number:,}"}
    shown = corpus is not None and corpus.licence == "open"
    return environment.get_template("agreement.html.j2").render(
        result=result,
        measures=result["measures"],
        title=TITLES[result["task"]],
        headline=headline(result),
        cautions=cautions(result),
        whom=_whom(result),
        figures={"wide": _data_url(wide), "narrow": _data_url(narrow)},
        alternative=_alternative(result),
        order=[row["measure"] for row in figure_rows(result)],
        kappa=kappa_name(result),
        statistic_words=STATISTIC_WORDS,
        statistics=[name for name in STATISTIC_WORDS if _is_defined(result, name)],
        answer_types={"all": f"All {TITLES[result['task']]}", **ANSWER_TYPES},
        kind_words=KIND_WORDS,
        shown=shown,
        corpus=corpus,
        examples=_examples(result, rows, corpus) if corpus is not None and shown else {},
    )


def headline(result: Mapping[str, Any]) -> list[str]:
    """What was found, in a few sentences for somebody who knows medicine and no statistics."""
    compared, whom = result["answer_types"]["all"]["compared"], _whom(result)
    best = next((row for row in compared if row["best"]), None)
    if best is None:
        return [f"No measure can be held against {whom}: each scored too few items, or says the same of all."]
    found, label = best["statistics"]["ordered"], result["measures"][best["measure"]]["label"]
    s = "" if whom == "people" else "s"
    pair = (
        f"Given one answer that {whom} call{s} right and one that {whom} call{s} wrong, it scores the right one higher"
        if result["task"] == "vqa"
        else f"Given two {TITLES[result['task']]} that {whom} grade{s} differently, it puts the better one higher"
    )
    interval = ""
    if found["ci95"]:
        low, high = (_number(end, 100) for end in found["ci95"])
        interval = f"95 % interval {low} to {high}; "
    behind = [row for row in figure_rows(result) if row["behind_best"] is not None]
    level = [result["measures"][row["measure"]]["label"] for row in behind if not _clearly_behind(row)]
    clear = [result["measures"][row["measure"]]["label"] for row in behind if _clearly_behind(row)]
    sentences = [f"{label} agrees best with {whom}."]
    if level:
        sentences.append(f"These {best['n']:,} items do not show, though, that it is better than: {'; '.join(level)}.")
    if clear:
        sentences.append(f"Clearly behind it: {'; '.join(clear)}.")
    sentences.append(
        f"{pair} in {_number(found['value'], 100)} of 100 cases ({interval}chance is 50, ties count half)."
    )
    raters = [
        row["statistics"]["ordered"]["value"]
        for row in compared
        if result["measures"][row["measure"]]["kind"] == "rater" and row["statistics"]["ordered"]["value"] is not None
    ]
    if raters:
        low, high = (_number(end, 100) for end in (min(raters), max(raters)))
        span = low if low == high else f"{low} to {high}"
        sentences.append(f"A single person, held against the other people, does so in {span} of 100.")
    return sentences


def cautions(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing it."""
    found, reference = [], result["reference"]
    if reference["kind"] == "judge":
        found.append(
            f"No person rated these answers. Everything is held against {reference['label']}, which may itself be "
            "wrong: this shows which measures are alike, not which is right."
        )
    if reference["kind"] == "rater":
        found.append("Only one person rated these answers, so nothing shows how well two people would agree.")
    n = result["measures"][reference["name"]]["n"]
    if n < FEW_ITEMS:
        found.append(f"{reference['label']} scored only {n} of {result['rows']:,} answers: intervals are wide.")
    found += [
        f"{result['measures'][row['measure']]['label']} is about {row['n']:,} of these answers only, so its values in "
        "the figure and the tables are not of the same items as the others'; how far it is behind the best is."
        for row in figure_rows(result)
        if row["fewer_items"]
    ]
    for name, measure in result["measures"].items():
        unscored = {
            reason: count for reason, count in measure["unscored"].items() if reason not in (NOT_SEEN, OTHER_ITEMS)
        }
        if measure["kind"] in ("judge", "automatic") and sum(unscored.values()) > MANY_UNSCORED * result["rows"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in unscored.items())
            found.append(f"{measure['label']} left {sum(unscored.values()):,} answers without a score ({reasons}).")
        found += [f"{measure['label']} failed its own checks: {flag}" for flag in measure["flags"]]
        repeats = result["answer_types"]["all"]["judge_repeats"].get(name)
        alpha = repeats and repeats["statistics"]["alpha"]["value"]
        if alpha is not None and alpha < 0.8:
            found.append(f"{measure['label']} contradicts itself when asked again (alpha {alpha:.2f}).")
    return found


def _examples(result: Mapping[str, Any], rows: Sequence[Prediction], corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Id -> texts and pictures of every item that is listed."""
    from pefomed_ray.evaluation.report import thumbnail  # loads torch, which nothing else here needs

    by_id = {row.id: row for row in rows}
    found = {}
    for row_id in {item["id"] for group in result["disagreements"] for item in group["items"]}:
        row, pictures = by_id[row_id], []
        if row_id in corpus.places:
            (record,) = read_rows(corpus.index, np.asarray([corpus.places[row_id]]))
            pictures = [thumbnail(image["bytes"]) for image in record["images"]]
        found[row_id] = {
            "question": row.question,
            "answer": row.answer,
            "prediction": row.prediction,
            "pictures": pictures,
        }
    return found


def _whom(result: Mapping[str, Any]) -> str:
    reference = result["reference"]
    return "people" if reference["kind"] == "people" else reference["label"].replace("Rater", "rater", 1)


def _clearly_behind(row: Mapping[str, Any]) -> bool:
    interval = row["behind_best"]["ci95"]
    return interval is not None and interval[0] > 0


def _is_defined(result: Mapping[str, Any], name: str) -> bool:
    """Weights change nothing where there are two categories, so that these columns would repeat kappa's."""
    if result["task"] == "vqa" and name in ("kappa_linear", "kappa_quadratic"):
        return False
    return any(
        row["statistics"][name]["value"] is not None
        for found in result["answer_types"].values()
        for row in found["compared"]
    )


def _alternative(result: Mapping[str, Any]) -> str:
    """The figure in words."""
    parts = [
        f"{result['measures'][row['measure']]['label']} {_number(row['statistics']['ordered']['value'], 100)}"
        for row in figure_rows(result)
    ]
    return f"Of 100 pairs of answers, in the same order as {_whom(result)}: " + ", ".join(parts)


def _data_url(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _number(value: float | None, times: float = 1) -> str:
    """Of 100 without decimals, else two of them."""
    if value is None:
        return "–"
    return f"{times * value:.{0 if times == 100 else 2}f}".replace("-", "−")


def _interval(interval: Sequence[float] | None, times: float = 1) -> str:
    return "" if interval is None else " to ".join(_number(end, times) for end in interval)
