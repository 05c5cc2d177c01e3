"""What of a test split stands in the training split already: texts here, images in the shards' manifest.

Texts are compared whole, in lower case and with single spaces: `verbatim`, no more. Near repeats are not found.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pefomed_ray.artifacts.records import Task
from pefomed_ray.evaluation.predictions import Prediction

Text = tuple[str, str]
"""Question and answer; for captions and reports no question."""


def text_overlap(rows: Sequence[Prediction], training: Iterable[tuple[str, str]], task: Task) -> dict[str, Any]:
    """`{"references": {"value", "n"}, "predictions": {"value", "n"}}`: shares that stand verbatim in `training`.

    `training` are (question, answer) pairs. For `vqa` it is the pair that must be there, else the text alone.
    """
    seen = {_text(question, answer, task) for question, answer in training}
    references = [_text(row.question, row.answer, task) for row in rows]
    predictions = [_text(row.question, row.prediction, task) for row in rows if row.prediction is not None]
    return {"references": _share(references, seen), "predictions": _share(predictions, seen)}


def image_overlap_share(own: Sequence[Sequence[str]], training: Iterable[Sequence[str]]) -> dict[str, Any]:
    """`{"value": share, "n": images}` of the distinct images of `own` rows that are in `training` too, by sha256."""
    seen = {digest for digests in training for digest in digests}
    images = {digest for digests in own for digest in digests}
    return {"value": len(images & seen) / len(images) if images and seen else None, "n": len(images)}


def _share(texts: Sequence[Text], seen: set[Text]) -> dict[str, Any]:
    value = sum(text in seen for text in texts) / len(texts) if texts and seen else None
    return {"value": value, "n": len(texts)}


def _text(question: str, answer: str, task: Task) -> Text:
    return _folded(question) if task == "vqa" else "", _folded(answer)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
