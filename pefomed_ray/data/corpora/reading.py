"""What corpus readers share: the interface, and reading files whose rows may be dirty."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.artifacts.storage import digest_of, sha256_bytes
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import Reason, RowError
from pefomed_ray.errors import DataError


@dataclass(frozen=True)
class BadRow:
    """A row that could not even become a Reference; it is quarantined under its place in the file."""

    split: Split
    line: str
    reason: Reason
    sha256: str
    """Of the row as it stands in the file."""


Row = Reference | BadRow


class Reader(Protocol):
    """One corpus layout; each module of this package but this one is a Reader."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """Becomes the `source` of every record."""

    @property
    def LICENCE(self) -> Literal["open", "restricted"]:  # noqa: N802
        """`restricted`: rows go to no service that is not declared local."""

    @property
    def LAYOUT(self) -> str:  # noqa: N802
        """What the folder looks like, in one line, for error messages."""

    @property
    def OPTIONS(self) -> frozenset[str]:  # noqa: N802
        """Names of the DataOptions that mean something to this corpus alone."""

    def detect(self, root: Path) -> bool:
        """Whether `root` has this layout; looks at names only, or at the schema of one file."""

    def read(self, root: Path, options: DataOptions) -> Iterator[Row]:
        """Every row in the publisher's order. Raises DataError where a whole file cannot be read."""


def decode(data: bytes) -> str:
    """UTF-8 text; any other byte becomes a lone surrogate, so that its row alone is quarantined (text_encoding)."""
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def load_json(path: Path) -> Any:
    """The parsed file. Raises DataError naming the file and the position, never the content."""
    try:
        return json.loads(decode(path.read_bytes()))
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
    except RecursionError:
        where = "nested too deeply"
    except OSError as error:
        where = str(error.strerror)
    raise DataError(f"{path.name!r} cannot be read as JSON ({where}); fetch it again")


def numbered(rows: Any, name: str, split: str) -> list[tuple[str, Any]]:
    """The rows of a JSON list, each with its place: `[("train.json[0]", {...}), ...]`.

    Raises DataError where it is not a list, or is empty: a file that promises a split and holds nothing is a fault,
    while a split without a file is simply not there.
    """
    if not isinstance(rows, list):
        raise DataError(f"{name!r} should hold a list of rows for split {split!r}, found {type(rows).__name__}")
    if not rows:
        raise DataError(f"split {split!r} is empty: {name!r} holds no rows; fetch it again, or remove it if meant so")
    return [(f"{name}[{index}]", row) for index, row in enumerate(rows)]


def lines_of(path: Path, root: Path, split: str) -> list[tuple[str, bytes]]:
    """The lines that are not blank, each with its place: `[("train.jsonl:1", b"..."), ...]`.

    Raises DataError where there are none, for the reason given at `numbered`.
    """
    name = path.relative_to(root).as_posix()
    lines = [
        (f"{name}:{number}", line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
    ]
    if not lines:
        raise DataError(f"split {split!r} is empty: {name!r} holds no rows; fetch it again, or remove it if meant so")
    return lines


def rows_of(items: Iterable[tuple[str, Any]], split: Split, make: Callable[[Any, str], Reference]) -> Iterator[Row]:
    """`make(item, line)` for each (line, item); an item that it cannot read becomes a BadRow."""
    for line, item in items:
        row: Row
        try:
            row = make(item, line)
        except RowError as error:
            row = BadRow(split, line, error.reason, _digest(item))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            row = BadRow(split, line, "malformed_row", _digest(item))
        yield row


def _digest(item: Any) -> str:
    return sha256_bytes(item) if isinstance(item, bytes) else digest_of(item)


def text_of(value: Any) -> str:
    """A publisher's string, or number, as a string; null as "". Raises RowError for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError("malformed_row")


def answer_type_of(value: Any) -> Literal["open", "closed"]:
    """`OPEN`, `CLOSED` and their spellings with other case and spaces. Raises RowError for anything else."""
    name = text_of(value).strip().lower()
    if name == "open":
        return "open"
    if name == "closed":
        return "closed"
    raise RowError("malformed_row")
