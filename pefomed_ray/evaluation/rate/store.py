"""Ratings in one SQLite file, each written when it is given.

Nothing is overwritten: `changes` holds every rating, skip and comment in the order they came, undone ones marked as
such, and the view `ratings` what holds of them: one row a rater and item. `answers` says whose answer an item is. The
file holds no question, reference, answer or picture. It should lie on a local disk: SQLite's locks do not work on NFS.
"""

import sqlite3
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.records import Task
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.rate.items import Answer
from pefomed_ray.evaluation.rate.scale import scale_of
from pefomed_ray.evaluation.ratings import Rating

SCHEMA_VERSION = 1
WAIT_FOR_LOCK_S = 10.0
MAX_NAME = 60
MAX_COMMENT = 4000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    model TEXT NOT NULL, id TEXT NOT NULL, item TEXT NOT NULL, PRIMARY KEY (model, id)
);
CREATE TABLE IF NOT EXISTS changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, item TEXT NOT NULL, score INTEGER,
    skipped INTEGER NOT NULL, comment TEXT NOT NULL, rated_at TEXT NOT NULL,
    imported INTEGER NOT NULL, undone INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS changes_by_rater ON changes (rater, item);
CREATE VIEW IF NOT EXISTS ratings AS
    SELECT rater, item, score, skipped, comment, rated_at FROM changes
    WHERE number IN (SELECT max(number) FROM changes WHERE NOT undone GROUP BY rater, item)
    AND (score IS NOT NULL OR skipped OR comment <> '');
"""


@dataclass(frozen=True)
class Said:
    """What a rater says about an item: a score, or that it is skipped, or neither yet; and a comment."""

    score: int | None = None
    skipped: bool = False
    comment: str = ""


@dataclass(frozen=True)
class Conflict:
    """A file and the store say different things of one rater's about one answer."""

    rater: str
    id: str
    model: str
    in_store: int | None
    """The score; None where skipped or only commented on."""
    in_file: int | None
    kept: str
    """`store` or `file`: the later one."""


@dataclass(frozen=True)
class Merged:
    """What a file of ratings brought."""

    new: int
    same: int
    conflicts: tuple[Conflict, ...]


class Store:
    """A file of ratings of one task. Any number of threads and processes may use it at once."""

    def __init__(self, path: Path, task: Task) -> None:
        """Open the file, or make it. Raises ConfigError where it cannot be, is no such file, or is of another task."""
        self.path = path
        self.task = task
        if not path.parent.is_dir():
            raise ConfigError(f"store {str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
        try:
            with self._open() as connection:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
                if version != SCHEMA_VERSION and (version or tables):
                    raise ConfigError(f"store {str(path)!r} is a database, but not of ratings; name another file")
                connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
                connection.execute("INSERT OR IGNORE INTO settings VALUES ('task', ?)", [task])
                (found,) = connection.execute("SELECT value FROM settings WHERE key = 'task'").fetchone()
        except sqlite3.Error as error:
            raise ConfigError(f"store {str(path)!r} cannot be used ({error}); name another file") from None
        if found != task:
            raise ConfigError(f"store {str(path)!r} holds ratings of task {found!r}, not {task!r}; name another file")

    def add_answers(self, answers: Iterable[Answer]) -> None:
        """Note whose answers the items are. Raises ConfigError where a model is known by other answers already."""
        with self._writing() as connection:
            for answer in answers:
                row = [answer.model, answer.id]
                connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", [*row, answer.item])
                found = connection.execute("SELECT item FROM answers WHERE model = ? AND id = ?", row).fetchone()
                if found["item"] != answer.item:
                    raise ConfigError(
                        f"store {str(self.path)!r} is about another answer of {answer.model!r} to {answer.id!r}, or "
                        "about the answer to another question; name another store for these predictions"
                    )

    def raters(self) -> list[str]:
        """Names of those who rated, in alphabetical order."""
        with self._open() as connection:
            return _raters(connection)

    def name_of(self, name: str) -> str:
        """A rater's name without superfluous spaces, spelt as it is known already.

        Raises DataError where nothing is left, it is longer than 60 characters or holds a control character.
        """
        with self._open() as connection:
            return _name(connection, name)

    def said(self, rater: str) -> dict[str, Said]:
        """Item -> what this rater says about it."""
        with self._open() as connection:
            found = connection.execute("SELECT * FROM ratings WHERE rater = ?", [rater]).fetchall()
        return {row["item"]: _said(row) for row in found}

    def say(self, rater: str, item: str, said: Said) -> None:
        """Write down what a rater says; durable once this returns. What is said already is not written again."""
        with self._writing() as connection:
            if self._now(connection, rater, item)[0] != said:
                _append(connection, rater, item, said, datetime.now(UTC).isoformat(timespec="seconds"), imported=False)

    def undo(self, rater: str, items: Collection[str]) -> str | None:
        """Take back the last thing this rater said on the page about one of these items; answers which item."""
        with self._writing() as connection:
            last_first = connection.execute(
                "SELECT number, item FROM changes WHERE rater = ? AND NOT imported AND NOT undone ORDER BY number DESC",
                [rater],
            )
            found = next((row for row in last_first if row["item"] in items), None)
            if found is None:
                return None
            connection.execute("UPDATE changes SET undone = 1 WHERE number = ?", [found["number"]])
            return str(found["item"])

    def ratings(self) -> list[Rating]:
        """All there are, by rater, row and model; the model is named where the store knows several."""
        query = "SELECT * FROM ratings JOIN answers USING (item) ORDER BY rater, id, model"
        with self._open() as connection:
            several = len(_models(connection)) > 1
            return [
                Rating(
                    rater=row["rater"],
                    id=row["id"],
                    **_said(row).__dict__,
                    rated_at=row["rated_at"],
                    model=row["model"] if several else "",
                )
                for row in connection.execute(query)
            ]

    def counts(self) -> dict[str, dict[str, int]]:
        """Rater -> how many items they `rated` and `skipped`."""
        query = "SELECT rater, count(score) AS rated, sum(skipped) AS skipped FROM ratings GROUP BY rater"
        with self._open() as connection:
            found = connection.execute(query).fetchall()
        return {row["rater"]: {"rated": row["rated"], "skipped": row["skipped"]} for row in found}

    def merge(self, ratings: Sequence[Rating]) -> Merged:
        """Take in ratings made elsewhere, all of them or, where one is wrong, none.

        Where the store says otherwise the later one holds, and the store's where that cannot be told. Raises DataError
        for an answer that the store does not know, a model that is not named, or a score that is not of this task.
        """
        new = same = 0
        conflicts = []
        with self._writing() as connection:
            models = _models(connection)
            for rating in ratings:
                item = self._item(connection, rating, models)
                said = Said(rating.score, rating.skipped, rating.comment)
                rater = _name(connection, rating.rater)
                now, since = self._now(connection, rater, item)
                if now == said:
                    same += 1
                    continue
                if now == Said():
                    new += 1
                else:
                    kept = "file" if _later(rating.rated_at, since) else "store"
                    conflicts.append(Conflict(rater, rating.id, rating.model, now.score, said.score, kept))
                    if kept == "store":
                        continue
                _append(connection, rater, item, said, rating.rated_at, imported=True)
        return Merged(new, same, tuple(conflicts))

    def _item(self, connection: sqlite3.Connection, rating: Rating, models: Sequence[str]) -> str:
        if rating.score is not None and rating.score not in scale_of(self.task):
            raise DataError(f"score {rating.score} of {rating.id!r} is none of task {self.task!r}")
        if not rating.model and len(models) > 1:
            raise DataError(f"the rating of {rating.id!r} does not say of which model, and there are {len(models)}")
        found = connection.execute(
            "SELECT item FROM answers WHERE id = ? AND model = ?", [rating.id, rating.model or models[0]]
        ).fetchone()
        if found is None:
            raise DataError(
                f"nothing is known of an answer by {rating.model or models[0]!r} to {rating.id!r}: are the ratings "
                "about these predictions?"
            )
        return str(found["item"])

    @staticmethod
    def _now(connection: sqlite3.Connection, rater: str, item: str) -> tuple[Said, str]:
        """What a rater says about an item, and since when; `Said()` where nothing."""
        row = connection.execute("SELECT * FROM ratings WHERE rater = ? AND item = ?", [rater, item]).fetchone()
        return (_said(row), row["rated_at"]) if row else (Said(), "")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=WAIT_FOR_LOCK_S, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which nobody else writes; nothing of it stays where the block raises."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


def _append(
    connection: sqlite3.Connection, rater: str, item: str, said: Said, rated_at: str, *, imported: bool
) -> None:
    connection.execute(
        "INSERT INTO changes (rater, item, score, skipped, comment, rated_at, imported) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [rater, item, said.score, said.skipped, said.comment, rated_at, imported],
    )


def _raters(connection: sqlite3.Connection) -> list[str]:
    return [row["rater"] for row in connection.execute("SELECT DISTINCT rater FROM changes ORDER BY rater")]


def _name(connection: sqlite3.Connection, name: str) -> str:
    clean = " ".join(unicodedata.normalize("NFC", name).split())
    if not 0 < len(clean) <= MAX_NAME or not clean.isprintable():
        raise DataError(f"a rater's name has 1 to {MAX_NAME} characters, all of them printable")
    known = {other.casefold(): other for other in _raters(connection)}
    return known.get(clean.casefold(), clean)


def _models(connection: sqlite3.Connection) -> list[str]:
    return [row["model"] for row in connection.execute("SELECT DISTINCT model FROM answers ORDER BY model")]


def _said(row: Any) -> Said:
    return Said(row["score"], bool(row["skipped"]), row["comment"])


def _later(one: str, other: str) -> bool:
    """Whether a date is later than another; an unknown one is not."""
    return bool(one) and (not other or _utc(one) > _utc(other))


def _utc(date: str) -> datetime:
    found = datetime.fromisoformat(date)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found
