"""Is a report normal? A keyword rule, and nothing more: a HEURISTIC that shows a model which calls everybody healthy.

Text is cut into sentences. A sentence that names a finding (FINDINGS) and holds no word of negation (NEGATIONS) is
abnormal. A report is normal where no sentence is abnormal and at least one says so: it holds a word of NORMAL, or names
a finding that it denies. A report that does neither counts as not normal. Hedges, comparisons with earlier studies and
languages other than English are beyond it: compare its share in the reports of a model with that in the references,
and read neither as a diagnosis.
"""

import re
from collections.abc import Sequence
from typing import Any

FINDINGS = (
    "abscess",
    "aneurysm",
    "atelecta",
    "bronchiectasis",
    "calcifi",
    "cardiomegaly",
    "cavit",
    "collapse",
    "congestion",
    "consolidation",
    "cyst",
    "degenerative",
    "dilat",
    "disease",
    "dislocat",
    "edema",
    "effusion",
    "emphysema",
    "enlarge",
    "fibrosis",
    "fractur",
    "granuloma",
    "haemorrhage",
    "hematoma",
    "hemorrhage",
    "hernia",
    "hyperinflat",
    "infarct",
    "infiltrat",
    "interstitial markings",
    "lesion",
    "lymphadenopathy",
    "mass",
    "metasta",
    "nodul",
    "obstruct",
    "oedema",
    "opacit",
    "pneumonia",
    "pneumothora",
    "prominen",
    "scarring",
    "scoliosis",
    "spondylosis",
    "stenosis",
    "thickening",
    "tortuous",
    "tumor",
    "tumour",
)
NEGATIONS = ("no", "not", "without", "free of", "negative for", "absence of", "neither", "nor", "resolved", "cleared")
NORMAL = ("normal", "unremarkable", "clear", "intact", "within limits", "within normal limits", "stable")

_SENTENCE = re.compile(r"[.;\n]+(?:\s|$)")
_FINDING = re.compile(rf"\b(?:{'|'.join(FINDINGS)})")
_NEGATION = re.compile(rf"\b(?:{'|'.join(NEGATIONS)})\b")
_NORMAL = re.compile(rf"\b(?:{'|'.join(NORMAL)})\b")


def looks_normal(report: str) -> bool:
    """Whether the rule at the head of this module calls a report normal."""
    says_so = False
    for sentence in _SENTENCE.split(report.casefold()):
        finding, denied = _FINDING.search(sentence), _NEGATION.search(sentence)
        if finding and not denied:
            return False
        says_so |= bool(finding or _NORMAL.search(sentence))
    return says_so


def normal_share(reports: Sequence[str | None]) -> dict[str, Any]:
    """`{"value": share that looks normal, "n": reports}`; rows without one are left out."""
    found = [looks_normal(report) for report in reports if report is not None]
    return {"value": sum(found) / len(found) if found else None, "n": len(found)}
