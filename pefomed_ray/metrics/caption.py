"""BLEU, METEOR, ROUGE-L and CIDEr as the captioning literature computes them: by `pycocoevalcap`, over tokens.

Which tokeniser made the tokens belongs to the numbers: `ptb` (COCO's own; needs Java) or `lower_split` (lower case, cut
at white space, punctuation stays on the words), which gives much lower ones. SPICE is not here: it needs downloads.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import precook
from pycocoevalcap.rouge.rouge import Rouge

from pefomed_ray.metrics.intervals import Summed, mean_of
from pefomed_ray.metrics.java import JavaError, Meteor, meteor_of_sums, ptb_tokens

CAPTION_METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rougeL_coco", "cider")
ORDERS = 4
CIDER_HIGHEST = 10.0
_TINY, _SMALL = 1e-15, 1e-9
"""What BleuScorer adds above and below so that nothing is divided by 0."""


@dataclass(frozen=True)
class NotComputed:
    """In place of a number that could not be had: never 0."""

    reason: str


Measured = dict[str, Summed | NotComputed]
"""Name of CAPTION_METRICS -> what came of it."""


@dataclass(frozen=True)
class Captions:
    """What several systems said of the same items."""

    tokenizer: str
    systems: tuple[Measured, ...]


def caption_metrics(references: Sequence[Sequence[str]], systems: Sequence[Sequence[str]]) -> Captions:
    """All of CAPTION_METRICS for each system's predictions, one an item, against the items' references (1 or more).

    All systems are tokenised alike. Without a Java that works the tokeniser is `lower_split` and METEOR is NotComputed.
    """
    if not references:
        return Captions("lower_split", tuple(measured([], [], JavaError("not started")) for _ in systems))
    texts = [text for own in references for text in own] + [text for predictions in systems for text in predictions]
    problem = None
    try:
        name, tokens = "ptb", iter(ptb_tokens(texts))
    except JavaError as error:
        name, tokens, problem = "lower_split", iter(lower_split(texts)), str(error)
    cut = [[next(tokens) for _ in own] for own in references]
    said = [[next(tokens) for _ in predictions] for predictions in systems]
    with ExitStack() as stack:
        meteor: Meteor | JavaError
        try:
            meteor = JavaError(problem) if problem else stack.enter_context(Meteor())
        except JavaError as error:
            meteor = error
        return Captions(name, tuple(measured(cut, predictions, meteor) for predictions in said))


def lower_split(texts: Sequence[str]) -> list[str]:
    """Each text in lower case, its words joined by single blanks."""
    return [" ".join(text.lower().split()) for text in texts]


def measured(references: Sequence[list[str]], predictions: Sequence[str], meteor: Meteor | JavaError) -> Measured:
    """All of CAPTION_METRICS of tokens; with a JavaError in place of METEOR, that is what its entry says."""
    if not predictions:
        return dict.fromkeys(CAPTION_METRICS, NotComputed("no row has a prediction"))
    bleu = _bleu(references, predictions)
    rouge = [Rouge().calc_score([said], own) for own, said in zip(references, predictions, strict=True)]
    return {
        **{f"bleu{order}": found for order, found in enumerate(bleu, start=1)},
        "meteor": _meteor(references, predictions, meteor),
        "rougeL_coco": mean_of(rouge),
        "cider": _cider(references, predictions),
    }


def _bleu(references: Sequence[list[str]], predictions: Sequence[str]) -> list[Summed]:
    """BLEU-1 to BLEU-4 of the corpus: n-grams and lengths are added up over items before they are divided."""
    scorer = BleuScorer(n=ORDERS)
    for own, said in zip(references, predictions, strict=True):
        scorer += (said, own)
    values, items = scorer.compute_score(option="closest", verbose=0)
    sums_NK = np.array([_bleu_summands(found) for found in scorer.ctest], dtype=np.float64)
    return [
        Summed(values[order], tuple(items[order]), sums_NK, partial(_bleu_of_order, order)) for order in range(ORDERS)
    ]


def _bleu_summands(found: dict[str, Any]) -> list[int]:
    """n-grams that match and that there are, by order; words, and those of the reference nearest in length."""
    length = found["testlen"]
    _, nearest = min((abs(other - length), other) for other in found["reflen"])
    return [*found["correct"], *found["guess"], length, nearest]


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4, [..., 10] -> [..., 4], with BleuScorer's arithmetic."""
    precisions = (sums[..., :ORDERS] + _TINY) / (sums[..., ORDERS : 2 * ORDERS] + _SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return np.asarray(means * brevity[..., None])


def _bleu_of_order(order: int, sums: np.ndarray) -> np.ndarray:
    return np.asarray(bleu_of_sums(sums)[..., order])


def _meteor(
    references: Sequence[list[str]], predictions: Sequence[str], meteor: Meteor | JavaError
) -> Summed | NotComputed:
    try:
        if isinstance(meteor, JavaError):
            raise meteor
        value, items, sums_NK = meteor.score(references, predictions)
    except JavaError as error:
        return NotComputed(f"METEOR needs Java: {error}")
    return Summed(value, tuple(items), sums_NK, meteor_of_sums)


def _cider(references: Sequence[list[str]], predictions: Sequence[str]) -> Summed | NotComputed:
    """Consensus with the references, words weighed by how few of these items' references have them (0 to 10)."""
    grams = [{gram for text in own for gram in precook(text)} for own in references]
    if all(own == grams[0] for own in grams):
        # The library's 0 would be of its weights, whatever is predicted.
        return NotComputed("CIDEr weighs words by how few items' references have them; here all have the same words")
    said = {number: [text] for number, text in enumerate(predictions)}
    _, items = Cider().compute_score(dict(enumerate(references)), said)
    return mean_of(items, CIDER_HIGHEST)
