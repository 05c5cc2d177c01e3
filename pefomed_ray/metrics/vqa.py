"""Exact match, token F1 and token recall of short answers, under a normaliser that is chosen by name.

A normaliser decides which answers count as equal, so it belongs to the number: name it wherever the number is written.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from pefomed_ray.errors import ConfigError

Normalizer = Callable[[str], str]

_DIGITS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—−", "-"))
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_X_RAY = re.compile(r"\bx[\s-]*ray(s?)\b")
_LIST_COMMA = re.compile(r"[,、]")
_EDGE_MARKS = re.escape(";:!?\"'`“”‘’()[]{}*。")
_WORD_EDGES = re.compile(rf"^(?:[{_EDGE_MARKS}]|\.(?!\d))+|[{_EDGE_MARKS}.]+$")


def strict(answer: str) -> str:
    """Ours and the default: answers are equal when a reader would call them the same words.

    - Unicode NFKC, case folded, all dashes alike, white space collapsed.
    - Punctuation around a word goes; inside a word it stays: `3.5`, `.5`, `t2-weighted`, `-3`, `50%`.
    - `x ray` = `x-ray` = `xray`, as whole words only; `zero`..`ten` = `0`..`10`; `1,000` = `1000`.
    - The order of a comma list does not count, its length does: SLAKE enumerates organs and findings in any order.
    - No article is dropped: `hepatitis A` is not `hepatitis`. `none` is not `0`.
    """
    text = unicodedata.normalize("NFKC", answer).casefold().translate(_DASHES)
    text = _X_RAY.sub(r"xray\1", _THOUSANDS_COMMA.sub("", text))
    items = (" ".join(_bare_words(item)) for item in _LIST_COMMA.split(text))
    return ", ".join(sorted(item for item in items if item))


def _bare_words(text: str) -> list[str]:
    words = (_WORD_EDGES.sub("", word) for word in text.split())
    return [_DIGITS.get(word, word) for word in words if word]


_PUBLISHED_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PUBLISHED_PERIOD = re.compile(r"\.(?!\d)")
_PUBLISHED_PERIODS_REMOVED = 32
"""The published call passes a flag of this value where the number of replacements goes."""
_PUBLISHED_DIGIT_COMMA = re.compile(r"\d,\d")
_PUBLISHED_DIGITS = {**_DIGITS, "none": "0"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction with one apostrophe forgotten -> the contraction; the last pair is a slip of the published table."""


def pefomed(answer: str) -> str:
    """The published PeFoMed normaliser, defects included, to compare with published numbers.

    Among them: `none` = `zero` = `0`; articles go, so `hepatitis A` = `hepatitis`; one `digit,digit` anywhere glues all
    punctuated words together; only the first 32 periods go; `max ray` = `maxray`.
    """
    glue_all = _PUBLISHED_DIGIT_COMMA.search(answer) is not None
    text = answer
    for mark in _PUBLISHED_MARKS:
        glue = glue_all or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if glue else " ")
    text = _PUBLISHED_PERIOD.sub("", text, count=_PUBLISHED_PERIODS_REMOVED)
    words = (_PUBLISHED_DIGITS.get(word, word) for word in text.lower().split())
    kept = (_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(kept).replace("x ray", "xray")


NORMALIZERS: dict[str, Normalizer] = {"strict": strict, "pefomed": pefomed}


def normalizer_named(name: str) -> Normalizer:
    """The normaliser, or ConfigError with the names there are."""
    if name not in NORMALIZERS:
        raise ConfigError(f"normalizer: {name!r} is not known; allowed: {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]


def exact_match(prediction: str, reference: str, normalizer: Normalizer = strict) -> float:
    """1.0 where both are equal once normalised, else 0.0."""
    return float(normalizer(prediction) == normalizer(reference))


def token_f1(prediction: str, reference: str, normalizer: Normalizer = strict) -> float:
    """Harmonic mean of precision and recall of normalised words, in [0, 1], counted with repetition (SQuAD's F1).

    Where one side has no words: 1.0 if the other has none either, else 0.0.
    """
    predicted, expected = _words(prediction, normalizer), _words(reference, normalizer)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def token_recall(prediction: str, reference: str, normalizer: Normalizer = strict) -> float:
    """Share of the reference's words that the prediction has, in [0, 1]: what LLaVA-Med reports of open answers.

    Its arithmetic (github.com/microsoft/LLaVA-Med, `calculate_f1score` of llava/eval/eval_metrics), oddity included: a
    word that both have counts as often as the prediction says it, so that saying it again raises the recall of what is
    missing. Its normaliser is `pefomed` but for `x ray`. 0.0 where either side has no words.
    """
    predicted, expected = Counter(_words(prediction, normalizer)), Counter(_words(reference, normalizer))
    found = sum(count for word, count in predicted.items() if word in expected)
    missing = sum(count for word, count in expected.items() if word not in predicted)
    return found / (found + missing) if found else 0.0


def _words(text: str, normalizer: Normalizer) -> list[str]:
    return normalizer(text).replace(",", " ").split()
