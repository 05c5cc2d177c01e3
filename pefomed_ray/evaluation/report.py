"""`report.html`: one page without a second file, to read on a phone or to attach to a mail."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.data.plan import open_index, read_rows
from pefomed_ray.evaluation.predictions import Prediction
from pefomed_ray.evaluation.score import PRIMARY_METRIC
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import Normalizer, exact_match
from pefomed_ray.rendering.images import decode_image

EXAMPLES = 12
THUMBNAIL_PX = 240
CONTROL_TITLES = {
    "blank_image": ("Model, shown grey pictures", "grey"),
    "noise_image": ("Model, shown noise", "noise"),
    "shuffled_image": ("Model, shown other images", "shuffled"),
    "majority": ("Most frequent training answer", "majority"),
    "question_prior": ("Most frequent answer to the question", "question prior"),
}
"""Title of the bar, and of the column."""


@dataclass(frozen=True)
class Example:
    """A row of the page."""

    id: str
    question: str
    answer: str
    prediction: str | None
    score: float | None
    """Exact match, for captions and reports ROUGE-L; None where unscored."""
    thumbnails: tuple[str, ...]
    """`data:` URLs."""


def choose_examples(
    rows: Sequence[Prediction], shards: Path, split: str, task: Task, normalizer: Normalizer
) -> list[Example]:
    """Twelve rows with their images: half the best and half the worst answered, at random among equals but fixed by id.

    `rows` are the first rows of the split, in row order.
    """
    scores = [_score(row, task, normalizer) for row in rows]
    unscored_is_worst = [-1.0 if score is None else score for score in scores]
    drawn = sorted(range(len(rows)), key=lambda at: sha256_bytes(rows[at].id.encode()))
    worst_first = sorted(drawn, key=lambda at: unscored_is_worst[at])
    half = min(EXAMPLES, len(rows)) // 2
    chosen = [*worst_first[::-1][: min(EXAMPLES, len(rows)) - half], *worst_first[:half]]
    records = read_rows(open_index(shards, split), np.asarray(chosen, dtype=np.int64))
    return [
        Example(
            id=rows[at].id,
            question=rows[at].question,
            answer=rows[at].answer,
            prediction=rows[at].prediction,
            score=scores[at],
            thumbnails=tuple(thumbnail(image["bytes"]) for image in record["images"]),
        )
        for at, record in zip(chosen, records, strict=True)
    ]


def write_report(path: Path, metrics: dict[str, Any], examples: Sequence[Example] | None) -> None:
    """Write the page of a `metrics.json`; `examples` None: the licence of the corpus keeps its rows off the page."""
    path.write_text(render_report(metrics, examples), encoding="utf-8")


def render_report(metrics: dict[str, Any], examples: Sequence[Example] | None) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["score"] = _score_text
    environment.filters["interval"] = _interval_text
    primary = PRIMARY_METRIC[metrics["task"]]
    bars = [("This model", metrics[primary], True)]
    bars += [(title, metrics["controls"][name][primary], False) for name, (title, _) in CONTROL_TITLES.items()]
    names = [name for name, found in metrics.items() if isinstance(found, dict) and "ci95" in found]
    return environment.get_template("report.html.j2").render(
        metrics=metrics,
        primary=primary,
        metric_names=names,
        bars=bars,
        short_titles={name: short for name, (_, short) in CONTROL_TITLES.items()},
        examples=examples,
    )


def thumbnail(data: bytes) -> str:
    """An encoded image as the `data:` URL of a JPEG of at most 240 px a side. Raises DataError where it is no image."""
    image = decode_image(data)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _score(row: Prediction, task: Task, normalizer: Normalizer) -> float | None:
    if row.prediction is None:
        return None
    if task == "vqa":
        return exact_match(row.prediction, row.answer, normalizer)
    return rouge_l(row.prediction, row.answer)


def _score_text(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval_text(interval: list[float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
