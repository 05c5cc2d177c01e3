"""Lexical overlap of longer texts: captions and reports."""

import re

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
"""A run of letters and digits of any script; a Chinese character is a word of its own."""


class _Words(Tokenizer):
    """The package's own words on ASCII text. Its own splits at every letter beyond a-z, so that Chinese scores 0."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1]: the longest common subsequence of words, lower-cased.

    By the `rouge-score` package without its stemmer: Porter's rules are for everyday English and merge terms that
    differ in a report. 0.0 where either text has no words.
    """
    return float(_SCORER.score(reference, prediction)["rougeL"].fmeasure)
