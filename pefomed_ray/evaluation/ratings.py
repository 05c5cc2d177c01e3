"""Human ratings as CSV: one row what a person says about one answer, made by `rate` or anywhere else."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from pefomed_ray.errors import ConfigError, DataError

COLUMNS = ("rater", "id", "score", "skipped", "comment", "rated_at")
MODEL_COLUMN = "model"
"""Last, and only where answers of several models were rated."""
HIGHEST_SCORE = 4
"""Of a report or a caption; of a visual question 1."""

_FLAGS = {"true": True, "1": True, "false": False, "0": False, "": False}


@dataclass(frozen=True)
class Rating:
    """What one rater says about one answer."""

    rater: str
    id: str
    """Of the row of the predictions."""
    score: int | None
    """0/1 for a visual question, 0-4 for a report or a caption; None where skipped, or only commented on so far."""
    skipped: bool
    comment: str
    rated_at: str
    """ISO 8601; empty where it is not known."""
    model: str = ""
    """Whose answer it was; empty where there is only one."""


def write_ratings(path: Path, ratings: Iterable[Rating]) -> None:
    """Write ratings as CSV (RFC 4180, UTF-8), with the column `model` where any has one."""
    rows = list(ratings)
    columns = [*COLUMNS, MODEL_COLUMN] if any(row.model for row in rows) else list(COLUMNS)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row) | {"skipped": "true" if row.skipped else "false"})


def read_ratings(path: Path) -> list[Rating]:
    """The rows of a CSV file with the columns of COLUMNS, and `model` where there is one; others are ignored.

    Raises ConfigError where there is no such file; DataError naming file and line, never a comment, for a column that
    is missing, a score that is none of 0-4, a row both scored and skipped, a date that is none, and a rater who rates
    an answer twice; and for a file without rows.
    """
    if not path.is_file():
        raise ConfigError(f"ratings {str(path)!r} does not exist or is not a file")
    ratings: list[Rating] = []
    seen: dict[tuple[str, str, str], int] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a file with a byte order mark
        reader = csv.DictReader(file)
        try:
            _check_columns(reader.fieldnames or [])
            for row in reader:
                rating = _rating(row)
                key = (rating.rater, rating.id, rating.model)
                if key in seen:
                    raise DataError(f"the same rater rates the same answer as in line {seen[key]}")
                seen[key] = reader.line_num
                ratings.append(rating)
        except (csv.Error, UnicodeDecodeError):
            raise DataError(f"ratings {str(path)!r}, line {reader.line_num}: not CSV in UTF-8") from None
        except DataError as error:
            raise DataError(f"ratings {str(path)!r}, line {reader.line_num}: {error}") from None
    if not ratings:
        raise DataError(f"ratings {str(path)!r} holds no rows")
    return ratings


def _check_columns(names: Iterable[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataError(f"no column {', '.join(missing)}; there must be {','.join(COLUMNS)}, separated by commas")


def _rating(row: dict[str, str | None]) -> Rating:
    values = {name: row.get(name) or "" for name in (*COLUMNS, MODEL_COLUMN)}
    if not values["rater"].strip() or not values["id"]:
        raise DataError("no rater or no id")
    skipped = _FLAGS.get(values["skipped"].strip().lower())
    if skipped is None:
        raise DataError("skipped is neither true nor false")
    score = _score(values["score"].strip())
    if skipped and score is not None:
        raise DataError("both skipped and with a score")
    return Rating(
        rater=values["rater"].strip(),
        id=values["id"],
        score=score,
        skipped=skipped,
        comment=values["comment"],
        rated_at=_date(values["rated_at"].strip()),
        model=values["model"],
    )


def _score(text: str) -> int | None:
    """A whole number 0-4, written `3` or, as pandas does beside empty cells, `3.0`."""
    if not text:
        return None
    if text.removesuffix(".0") not in map(str, range(HIGHEST_SCORE + 1)):
        raise DataError(f"score is none of 0-{HIGHEST_SCORE} and empty")
    return int(text.removesuffix(".0"))


def _date(text: str) -> str:
    if text:
        try:
            datetime.fromisoformat(text)
        except ValueError:
            raise DataError("rated_at is not a date such as 2026-01-31T12:00:00+00:00") from None
    return text
