"""What a score has to beat: answers that ignore the image, and images that cannot help.

A model that does no better than these has not looked, however high its number.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.rendering.images import decode_image

MID_GREY = 128


@dataclass(frozen=True)
class TextPriors:
    """Baselines that saw the training answers and no image."""

    by_answer_type: dict[str | None, str]
    """Answer type -> its most frequent training answer; None -> that of all rows."""
    by_question: dict[str, str]
    """Question, stripped and case folded -> its most frequent training answer."""

    def majority(self, answer_type: str | None) -> str:
        """The most frequent training answer among rows of this answer type (a question mostly shows its own type)."""
        return self.by_answer_type.get(answer_type, self.by_answer_type[None])

    def question_prior(self, question: str, answer_type: str | None) -> str:
        """The most frequent training answer to the identical question, else the majority."""
        return self.by_question.get(_same(question), self.majority(answer_type))


def text_priors(training: Iterable[tuple[str, str, str | None]]) -> TextPriors | None:
    """Count (question, answer, answer type) of the training rows; None without any.

    Answers that are the same stripped and case folded are counted together. Ties, of answers and of their spellings,
    go to the last in alphabetical order, so that the order of the rows does not matter.
    """
    spelling: dict[str, str] = {}
    by_type: dict[str | None, Counter[str]] = defaultdict(Counter)
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, answer_type in training:
        key = _same(answer)
        spelling[key] = max(spelling.get(key, ""), answer.strip())
        by_question[_same(question)][key] += 1
        for kind in {answer_type, None}:
            by_type[kind][key] += 1
    if not by_type:
        return None
    return TextPriors(
        by_answer_type={kind: spelling[_most_frequent(counts)] for kind, counts in by_type.items()},
        by_question={question: spelling[_most_frequent(counts)] for question, counts in by_question.items()},
    )


def blank_image(data: bytes) -> bytes:
    """A mid-grey PNG of the image's size in pixels. Raises DataError where `data` is no image."""
    return _png(Image.new("RGB", decode_image(data).size, (MID_GREY, MID_GREY, MID_GREY)))


def noise_image(data: bytes, seed: int) -> bytes:
    """A PNG of the image's size whose every value is uniformly random, fixed by `seed` and the image itself.

    Raises DataError where `data` is no image.
    """
    width, height = decode_image(data).size
    generator = np.random.default_rng([seed, int(sha256_bytes(data)[:16], 16)])
    return _png(Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)))


def shuffled_rows(image_digests: Sequence[tuple[str, ...]], seed: int) -> list[int | None]:
    """For every row, given the sha256 of its images, the row whose images it gets instead.

    All rows of one image (or study) get those of the same other one, none gets an image of its own; fixed by `seed`.
    None where every other row shows one of its images too.
    """
    first_row: dict[tuple[str, ...], int] = {}
    for row, digests in enumerate(image_digests):
        first_row.setdefault(digests, row)
    order = list(first_row)
    np.random.default_rng(seed).shuffle(order)
    donor: dict[tuple[str, ...], int | None] = {}
    for at, digests in enumerate(order):
        others = order[at + 1 :] + order[:at]
        donor[digests] = next((first_row[other] for other in others if not set(other) & set(digests)), None)
    return [donor[digests] for digests in image_digests]


def _same(text: str) -> str:
    return text.strip().casefold()


def _most_frequent(counts: Counter[str]) -> str:
    return max(counts, key=lambda answer: (counts[answer], answer))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)  # read once, by the model: speed over size
    return file.getvalue()
