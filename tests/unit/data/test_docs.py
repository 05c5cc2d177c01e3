"""The pages about corpora name what there is."""

import re
from dataclasses import fields
from pathlib import Path

from pefomed_ray.data.corpora import READERS
from pefomed_ray.data.options import DataOptions

DOCS = Path(__file__).parents[3] / "docs"


def test_every_reader_has_its_line_and_says_the_same_of_splits_and_licence() -> None:
    page = (DOCS / "corpora.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("`"): row for row in cells}
    assert set(rows) == set(READERS)
    for name, reader in READERS.items():
        assert rows[name][4] == reader.LICENCE
        assert (rows[name][3] == "none") == (not reader.OFFICIAL_SPLITS)


def test_every_option_that_a_page_shows_exists() -> None:
    names = {field.name for field in fields(DataOptions)}
    shown = set()
    for page in ("corpora.md", "bring-your-own.md"):
        shown |= set(re.findall(r"`(\w+)=[^`]*`", (DOCS / page).read_text(encoding="utf-8")))
    assert shown
    assert shown <= names
