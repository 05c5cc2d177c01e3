"""`report.html`: one page without a second file, to read on a phone or to attach to a mail."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.data.plan import open_index, read_rows
from pefomed_ray.evaluation.flags import CONTROL_WORDS, flags
from pefomed_ray.evaluation.headline import headline
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.evaluation.score import PRIMARY_METRIC
from pefomed_ray.evaluation.shown import interval_text, score_text
from pefomed_ray.evaluation.verdicts import Verdicts
from pefomed_ray.rendering.images import decode_image

EXAMPLES_A_GROUP = 6
THUMBNAIL_PX = 240
DISPUTED = 0.5
"""Words and judge are this far apart at least, both as shares of their best score."""
CONTROL_TITLES = {
    "blank_image": ("Model, shown grey pictures", "grey"),
    "noise_image": ("Model, shown noise", "noise"),
    "shuffled_image": ("Model, shown other patients' pictures", "shuffled"),
    "majority": ("Most frequent training answer", "majority"),
    "question_prior": ("Most frequent answer to the question", "question prior"),
    "constant_text": ("The same training text for all", "constant text"),
}
"""Title of the bar, and of the column."""
METRIC_WORDS = {
    "exact_match": "the answer is the reference, word for word",
    "exact_match_open": "the same, of open questions",
    "exact_match_closed": "the same, of closed questions",
    "token_f1": "words shared with the reference, of all words of both",
    "token_recall": "words of the reference that are in the answer, of open questions",
    "bleu1": "single words shared",
    "bleu2": "runs of up to two words shared",
    "bleu3": "runs of up to three words shared",
    "bleu4": "runs of up to four words shared",
    "meteor": "words shared, synonyms and stems included",
    "rougeL": "words shared in the same order",
    "rougeL_coco": "the same, as captions are scored",
    "cider": "rare words shared count more; 0 to 10",
    "judge_accuracy": "answers that a language model calls right",
    "judge_accuracy_open": "the same, of open questions",
    "judge_accuracy_closed": "the same, of closed questions",
    "judge_was": "score by a language model, 0 to 4",
}


@dataclass(frozen=True)
class Example:
    """A row of the page. Of a restricted corpus only the id and the scores."""

    id: str
    score: float | None
    """Exact match, for captions and reports ROUGE-L; None where unscored."""
    judged: float | None
    """The judge's mean score as a share of the best one; None where there is none."""
    question: str = ""
    answer: str = ""
    prediction: str | None = None
    thumbnails: tuple[str, ...] = ()
    """`data:` URLs."""


@dataclass(frozen=True)
class Examples:
    """Groups of rows with their titles."""

    groups: dict[str, list[Example]]
    embedded: bool
    """Whether texts and pictures are on the page: the licence decides."""


def choose_examples(
    rows: Sequence[Prediction],
    scores: Sequence[float | None],
    verdicts: Verdicts | None,
    shards: Path,
    split: str,
    licence: Literal["open", "restricted"],
) -> Examples:
    """The best, the worst and the most disputed rows, six each, at random among equals but fixed by id.

    `rows` are the first rows of the split, in row order. Disputed are those about which words and judge are furthest
    apart; none without a judge.
    """
    judged = [verdicts.scores.get(row.id) if verdicts else None for row in rows]
    unscored_is_worst = [-1.0 if score is None else score for score in scores]
    drawn = sorted(range(len(rows)), key=lambda at: sha256_bytes(rows[at].id.encode()))
    worst_first = sorted(drawn, key=lambda at: unscored_is_worst[at])
    count = min(EXAMPLES_A_GROUP, len(rows) // 2)
    apart = [
        (abs(score - verdict), at)
        for at in drawn
        if (score := scores[at]) is not None and (verdict := judged[at]) is not None
    ]
    disputed = [at for gap, at in sorted(apart, key=lambda pair: -pair[0]) if gap >= DISPUTED][:EXAMPLES_A_GROUP]
    chosen = {"best": worst_first[::-1][: max(count, 1)], "worst": worst_first[:count], "disputed": disputed}
    index = open_index(shards, split)

    def example(at: int) -> Example:
        row = rows[at]
        if licence == "restricted":
            return Example(row.id, scores[at], judged[at])
        (record,) = read_rows(index, np.asarray([at]))
        pictures = tuple(thumbnail(image["bytes"]) for image in record["images"])
        return Example(row.id, scores[at], judged[at], row.question, row.answer, row.prediction, pictures)

    groups = {name: [example(at) for at in places] for name, places in chosen.items() if places}
    return Examples(groups, embedded=licence == "open")


def render_report(metrics: dict[str, Any], examples: Examples) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = score_text
    environment.filters["interval"] = interval_text
    environment.filters["count"] = lambda number: f"{number:,}"
    primary = PRIMARY_METRIC[metrics["task"]]
    controls = {name: metrics["controls"][name] for name in CONTROL_WORDS if name in metrics["against_controls"]}
    bars = [("This model", metrics[primary], True)]
    bars += [(CONTROL_TITLES[name][0], scores[primary], False) for name, scores in controls.items()]
    return environment.get_template("report.html.j2").render(
        metrics=metrics,
        headline=headline(metrics),
        flags=flags(metrics),
        primary=primary,
        metric_names=[name for name, found in metrics.items() if isinstance(found, dict) and "ci95" in found],
        metric_words=METRIC_WORDS,
        bars=bars,
        kinds=_kinds(metrics),
        controls=controls,
        short_titles={name: CONTROL_TITLES[name][1] for name in controls},
        examples=examples,
    )


def thumbnail(data: bytes) -> str:
    """An encoded image as the `data:` URL of a JPEG of at most 240 px a side. Raises DataError where it is no image."""
    image = decode_image(data)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _kinds(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Exact match of the kinds of question there are: closed, open, then by question type."""
    if metrics["task"] != "vqa":
        return []
    kinds = [
        ("Closed questions (yes/no, either/or)", metrics["exact_match_closed"]),
        ("Open questions", metrics["exact_match_open"]),
        *((f"About: {kind}", scores["exact_match"]) for kind, scores in metrics["by_question_type"].items()),
    ]
    return [(title, scores) for title, scores in kinds if scores["n"] + scores["unscored"] > 0]
