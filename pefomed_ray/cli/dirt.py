"""What `data check` found, for a person: tables and lines on stderr; stdout stays the result's."""

from collections.abc import Mapping
from typing import Any

from pefomed_ray.cli.console import say, table

IN_FULL_ONLY_AS_JSON = ("rows_by", "findings", "bad_rows")
"""What is shown here in words, or is too long for `key: value` lines."""


def show_dirt(found: Mapping[str, Any]) -> None:
    """Usable rows as a table, then a line for each finding: how many, where, why it matters and the first of them."""
    table(
        f"usable rows of {found['source']}",
        ("split", "task", "answer type", "rows"),
        [
            (split, task, answer_type, rows)
            for split, tasks in found["rows_by"].items()
            for task, types in tasks.items()
            for answer_type, rows in types.items()
        ],
    )
    for title, quarantined in (("left out", True), ("usable, but odd", False)):
        findings = [
            (code, finding) for code, finding in found["findings"].items() if finding["quarantined"] == quarantined
        ]
        say(f"{title}:" if findings else f"{title}: nothing")
        for code, finding in findings:
            say(_line(code, finding))


def _line(code: str, finding: Mapping[str, Any]) -> str:
    by_split = ", ".join(f"{split} {count}" for split, count in finding["by_split"].items() if count)
    first = finding["examples"][0]
    rows = "1 row" if finding["count"] == 1 else f"{finding['count']} rows"
    return f"  {code}: {rows} ({by_split}), first {first['id']} at {first['line']}. {finding['why']}"
