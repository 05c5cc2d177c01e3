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
from pefomed_ray.evaluation.answers import Question
from pefomed_ray.rendering.images import decode_image

MID_GREY = 128
VARIANTS = ("image", "blank_image", "noise_image", "shuffled_image")
"""What the model is shown beside the question; all but the first are controls."""
TEMPLATE_SAMPLE = 500
"""Training texts among which the constant text is looked for where none comes twice."""


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


@dataclass(frozen=True)
class ConstantText:
    """What one would say of every picture without looking."""

    text: str
    how: str
    """Why this one, in words."""


def constant_text(training: Sequence[str]) -> ConstantText | None:
    """The most frequent training text (stripped, case folded); None without any.

    Where all differ, the one that shares most words with the others (mean F1 of the sets of words) among 500 drawn by
    their sha256: looking for the text with the best score of all would take hours.
    """
    texts = [text.strip() for text in training if text.strip()]
    if not texts:
        return None
    counts = Counter(_same(text) for text in texts)
    spelling = {_same(text): text for text in sorted(texts)}
    most = _most_frequent(counts)
    if counts[most] > 1:
        return ConstantText(spelling[most], f"the most frequent of {len(texts)} training texts, {counts[most]} times")
    sample = sorted(texts, key=lambda text: sha256_bytes(text.encode()))[:TEMPLATE_SAMPLE]
    how = f"no training text comes twice; of {len(sample)} drawn, the one that shares most words with the others"
    return ConstantText(sample[_nearest_to_the_rest(sample)], how)


def _nearest_to_the_rest(texts: Sequence[str]) -> int:
    """The text with the highest mean F1 of sets of words; S texts, W distinct words."""
    words = [set(_same(text).split()) for text in texts]
    number = {word: at for at, word in enumerate(sorted(set().union(*words)))}
    has_SW = np.zeros((len(texts), len(number)), dtype=np.float32)
    for at, own in enumerate(words):
        has_SW[at, [number[word] for word in own]] = 1
    sizes_S = has_SW.sum(axis=1)
    f1_SS = 2 * (has_SW @ has_SW.T) / (sizes_S[:, None] + sizes_S[None, :])
    return int(f1_SS.mean(axis=1).argmax())


def questions(image_digests: Sequence[tuple[str, ...]], variants: Sequence[str], seed: int) -> list[Question]:
    """What to ask of rows with these images, variant by variant, in the order in which images lie on disk.

    A row whose images no other can stand in for is not asked under `shuffled_image`.
    """
    itself = list(range(len(image_digests)))
    shuffled = shuffled_rows(image_digests, seed)
    asked = []
    for variant in variants:
        shown = shuffled if variant == "shuffled_image" else itself
        pairs = [(image_row, row) for row, image_row in enumerate(shown) if image_row is not None]
        asked += [Question(variant, row, image_row) for image_row, row in sorted(pairs)]
    return asked


def shown_images(variant: str, encoded: Sequence[bytes], seed: int) -> tuple[bytes, ...]:
    """The images of a question's image row, as this variant shows them. Raises DataError where one is no image."""
    if variant == "blank_image":
        return tuple(blank_image(data) for data in encoded)
    if variant == "noise_image":
        return tuple(noise_image(data, seed) for data in encoded)
    return tuple(encoded)


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
