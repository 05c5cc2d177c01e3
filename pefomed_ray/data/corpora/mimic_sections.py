"""Sections of a MIMIC-CXR report, and the one that is worth generating.

Follows what MIT-LCP's `section_parser.py` and `create_section_files.py` (github.com/MIT-LCP/mimic-cxr, folder txt) do:
a header is a line that begins with a space, capitals and a colon; names are brought into one form; impression is
preferred to findings, findings to the last paragraph, that to the comparison. Their spelling table is replaced by a
comparison of spellings, and their list of 54 studies that need hand-made rules is not applied.
"""

import re
from difflib import get_close_matches
from functools import lru_cache

HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
"""What follows the colon may be a line end. The next line, "AP CHEST: clear" say, is then text and no header."""
BLANK_LINE = "\n \n"
PREFERENCE = ("impression", "findings", "last_paragraph", "comparison")

CONTAINED = ("impression", "findings", "history", "comparison", "addendum")
"""A header that contains one of these, the first that does, has that name: "findings and impression"."""
OTHER_NAMES = {"conclusion": "impression", "finding": "findings", "reference exam": "comparison"}
LIKE_ENOUGH = 0.87
""""finidngs" is 0.875 like "findings", "compression" 0.857 like "impression"."""
VIEWS = re.compile(
    r"chest|portable|ribs|bone window|frontal and|frontal upright|frontal semi-upright|two views"
    r"|(frontal|pa|ap|one|lateral) view|(pa|ap) and lat|lateral and (pa|ap)"
)
"""A header that names the views, "chest, two views", stands over findings."""


def sections_of(report: str) -> list[tuple[str, str]]:
    """Name and text of each section, in order; `preamble` comes before the first header.

    A report without headers is one section, `full report`. Impressions and findings without text are left out. Where
    neither is left, what follows the first paragraph of the last section is `last_paragraph`.
    """
    sections = [(name, text) for name, text in _headed(report) if text.strip() or name not in PREFERENCE[:2]]
    if not {"impression", "findings"} & {name for name, _ in sections}:
        name, text = sections[-1]
        first, blank, rest = text.partition(BLANK_LINE)
        if blank:
            sections[-1:] = [(name, first), ("last_paragraph", rest)]
    return [(name, text.strip()) for name, text in sections]


def preferred_section(report: str) -> tuple[str, str]:
    """Name and text of the section that PREFERENCE puts first, of several the last with any text; ("", "") for none."""
    texts = {name: text for name, text in sections_of(report) if text}
    return next(((name, texts[name]) for name in PREFERENCE if name in texts), ("", ""))


def _headed(report: str) -> list[tuple[str, str]]:
    headers = list(HEADER.finditer(report))
    if not headers:
        return [("full report", report)]
    ends = [*(header.start() for header in headers[1:]), len(report)]
    texts = [(_name(header[1]), report[header.end() : end]) for header, end in zip(headers, ends, strict=True)]
    return [("preamble", report[: headers[0].start()]), *texts]


@lru_cache(maxsize=4096)  # a few dozen headers are nearly all of a million
def _name(header: str) -> str:
    name = header.lower().strip()
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    contained = next((part for part in CONTAINED if part in name), None)
    if contained:
        return contained
    like = get_close_matches(name, CONTAINED, n=1, cutoff=LIKE_ENOUGH)
    if like:
        return like[0]
    return "findings" if VIEWS.search(name) else name
