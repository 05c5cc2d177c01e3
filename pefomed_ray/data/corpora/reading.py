"""What corpus readers share: the interface, and reading files whose rows may be dirty."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pefomed_ray.artifacts.folders import Folder
from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.artifacts.storage import digest_of, sha256_bytes
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import Reason, RowError
from pefomed_ray.errors import DataError

TEXT_READERS = 8
TEXTS_AT_ONCE = 1024
HEAD_BYTES = 1 << 16
CHAT_KEY = re.compile(rb'"(conversations|messages|query)"\s*:')
ANSWER_TYPES = ("OPEN", "CLOSED", "open", "closed")
"""Spellings that are nothing to speak of."""


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
    """One corpus layout: what each module named in READERS is."""

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
    def OFFICIAL_SPLITS(self) -> bool:  # noqa: N802
        """Whether the publisher says which rows are for testing. Where not, all rows come as `train`, and test and
        validation are taken from them by group; a validation split that alone is missing is taken from `train`."""

    @property
    def OPTIONS(self) -> frozenset[str]:  # noqa: N802
        """Names of the DataOptions that mean something to this corpus alone."""

    def detect(self, root: Folder) -> bool:
        """Whether `root` has this layout; looks at names only, or at the schema of one file."""

    def read(self, root: Folder, options: DataOptions) -> Iterator[Row]:
        """Every row in the publisher's order. Raises DataError where a whole file cannot be read."""


def decode(data: bytes) -> str:
    """UTF-8 text; any other byte becomes a lone surrogate, so that its row alone is quarantined (text_encoding)."""
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


@contextmanager
def open_file(root: Folder, name: str) -> Iterator[BinaryIO | gzip.GzipFile]:
    """A file of the corpus to read from; one named `.gz` is unpacked on the way. Raises DataError, also in between."""
    try:
        with root.open(name) as file:
            yield gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    except FileNotFoundError:
        raise DataError(f"{root.url_of(name)!r} does not exist; the corpus is not complete, fetch it again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{root.url_of(name)!r} cannot be read ({type(error).__name__}); fetch it again") from None


def read_file(root: Folder, name: str) -> bytes:
    """The content of a whole file of the corpus; one named `.gz` is unpacked. Raises DataError."""
    with open_file(root, name) as file:
        return file.read()


def load_json(root: Folder, name: str) -> Any:
    """The parsed file. Raises DataError naming the file and the position, never the content."""
    try:
        return json.loads(decode(read_file(root, name)))
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
    except RecursionError:
        where = "nested too deeply"
    raise DataError(f"{name!r} cannot be read as JSON ({where}); fetch it again")


def looks_like_chats(root: Folder, name: str) -> bool:
    """Whether the file is a JSON list whose first rows are questions and answers as chat models are taught with.

    Told from its first 64 KiB: a name such as `train.json` says nothing.
    """
    if not root.is_file(name):
        return False
    with root.open(name) as file:
        head = file.read(HEAD_BYTES)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") and CHAT_KEY.search(head) is not None


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


def lines_of(root: Folder, name: str, split: str) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each with its place: `("train.jsonl:1", b"...")`, one in memory at a time.

    Raises DataError where there are none, for the reason given at `numbered`.
    """
    seen = False
    with open_file(root, name) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                seen = True
                yield f"{name}:{number}", line.rstrip(b"\n")
    if not seen:
        raise DataError(f"split {split!r} is empty: {name!r} holds no rows; fetch it again, or remove it if meant so")


def table_of(
    root: Folder, name: str, columns: Sequence[str], delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with a header, each with its place: `("reports.csv:2", {"uid": "1", ...})`.

    The place is the line on which a row ends: quoted fields may hold line ends. A row with fewer fields than the header
    lacks keys, one with more has the key None (see `rows_of`). Raises DataError where one of `columns` is not in the
    header, or there are no rows.
    """
    with open_file(root, name) as file:
        # Not str.splitlines: to it U+2028 and others, which captions hold, end a line.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, delimiter=delimiter)
        try:
            reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
            missing = sorted(set(columns) - set(reader.fieldnames))
            if missing:
                seen = ", ".join(map(repr, reader.fieldnames)) or "nothing"
                raise DataError(f"{name!r} has no column {', '.join(missing)}; its header has {seen}")
            empty = True
            for row in reader:
                empty = False
                yield f"{name}:{reader.line_num}", {key: value for key, value in row.items() if value is not None}
        except csv.Error as error:
            where = f"{error} at line {reader.line_num}"
            raise DataError(f"{name!r} cannot be read as CSV ({where}); fetch it again") from None
    if empty:
        raise DataError(f"{name!r} holds no rows; fetch it again, or remove it if meant so")


def parquet_rows(root: Folder, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, some columns of them, a few in memory at a time. Raises DataError."""
    try:
        with root.open(name) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=list(columns)):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name!r} cannot be read as Parquet ({type(error).__name__}); fetch it again") from None


def parquet_columns(root: Folder, name: str) -> set[str]:
    """Names of a Parquet file's columns; none where it cannot be read as one."""
    try:
        with root.open(name) as file:
            return set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException):
        return set()


def read_texts(root: Folder, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    """Many small files, in order, several at a time; None for one that is not there."""

    def read(name: str) -> tuple[str, bytes | None]:
        try:
            return name, root.read_bytes(name)
        except FileNotFoundError:
            return name, None

    with ThreadPoolExecutor(TEXT_READERS) as pool:
        for start in range(0, len(names), TEXTS_AT_ONCE):
            yield from pool.map(read, names[start : start + TEXTS_AT_ONCE])


def rows_of(items: Iterable[tuple[str, Any]], split: Split, make: Callable[[Any, str], Reference]) -> Iterator[Row]:
    """`make(item, line)` for each (line, item); an item that it cannot read becomes a BadRow.

    So does a row of a table with more fields than its header: an unquoted comma cuts the text in two.
    """
    for line, item in items:
        row: Row
        try:
            if isinstance(item, dict) and None in item:
                raise RowError("malformed_row")
            row = make(item, line)
            if isinstance(item, dict) and (found := as_written(item.get("answer"), item.get("answer_type"))):
                row = replace(row, as_written=row.as_written | found)
        except RowError as error:
            row = BadRow(split, line, error.reason, _digest(item))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
            row = BadRow(split, line, "malformed_row", _digest(item))
        yield row


def _digest(item: Any) -> str:
    if isinstance(item, dict):  # the key None of a row with too many fields
        item = {str(key): value for key, value in item.items()}
    return sha256_bytes(item) if isinstance(item, bytes) else digest_of(item)


def folder_of(root: Folder, *names: str) -> str:
    """The first of these folders that is there, else the first name: then every image is missing from it."""
    return next((name for name in names if root.is_dir(name)), names[0])


def id_of(path: str) -> str:
    """An id made of an image's path: `CXR692_IM-2258/0.png` becomes `CXR692_IM-2258-0`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.rsplit(".", 1)[0])


def text_of(value: Any) -> str:
    """A publisher's string, or number, as a string; null as "". Raises RowError for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError("malformed_row")


def as_written(answer: Any, answer_type: Any) -> dict[str, str]:
    """`Reference.as_written` of a row that has these for its answer and answer type."""
    found = {}
    if isinstance(answer, int | float):
        found["answer"] = type(answer).__name__
    if isinstance(answer_type, str) and answer_type.strip().upper() in ANSWER_TYPES and answer_type not in ANSWER_TYPES:
        found["answer_type"] = answer_type
    return found


def answer_type_of(value: Any) -> Literal["open", "closed"]:
    """`OPEN`, `CLOSED` and their spellings with other case and spaces. Raises RowError for anything else."""
    name = text_of(value).strip().lower()
    if name == "open":
        return "open"
    if name == "closed":
        return "closed"
    raise RowError("malformed_row")
