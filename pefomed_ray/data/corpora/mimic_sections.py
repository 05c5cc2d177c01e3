"""Sections of a MIMIC-CXR report, and the one that is worth generating.

Follows what MIT-LCP's `section_parser.py` and `create_section_files.py` (github.com/MIT-LCP/mimic-cxr, folder txt) do:
a header is a line that begins with a space, capitals and a colon; names are brought into one form; impression is
preferred to findings, findings to the last paragraph, that to the comparison. Their spelling table is replaced by a
comparison of spellings, and their list of 54 studies that need hand-made rules is not applied.
"""

import re
from difflib import get_close_matches

HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
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
    sections = [(name, text.strip()) for name, text in _headed(report)]
    sections = [(name, text) for name, text in sections if text or name not in ("impression", "findings")]
    if sections and not {"impression", "findings"} & {name for name, _ in sections}:
        name, text = sections[-1]
        first, blank, rest = text.partition(BLANK_LINE)
        if blank:
            sections[-1:] = [(name, first.strip()), ("last_paragraph", rest.strip())]
    return sections


def preferred_section(report: str) -> tuple[str, str]:
    """Name and text of the section that PREFERENCE puts first, of several the last with any text; ("", "") for none."""
    texts = {name: text for name, text in sections_of(report) if text}
    return next(((name, texts[name]) for name in PREFERENCE if name in texts), ("", ""))


def _headed(report: str) -> list[tuple[str, str]]:
    header = HEADER.search(report)
    if not header:
        return [("full report", report)]
    sections = [("preamble", report[: header.start()])]
    while header:
        start = header.end()
        # Not on the rest of this line, and not on the next where this one is empty: "IMPRESSION:\n AP CHEST: clear".
        following = HEADER.search(report, max(report.find("\n", start), start))
        sections.append((_name(header[1]), report[start : following.start() if following else None]))
        header = following
    return sections


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
