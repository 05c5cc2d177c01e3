"""From a reader's rows to checked records: what is usable, what is quarantined and why, and the sums over both."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations
from typing import Any, Literal

from pefomed_ray.artifacts.folders import Folder, LocalFolder
from pefomed_ray.artifacts.records import SPLITS, Reference, Split
from pefomed_ray.artifacts.storage import digest_of, sha256_bytes
from pefomed_ray.data.ahead import Ahead
from pefomed_ray.data.corpora import READERS, open_corpus
from pefomed_ray.data.corpora.reading import BadRow, Reader
from pefomed_ray.data.dicom import dicom_to_png, is_dicom, require_packages
from pefomed_ray.data.images import check_image, read_image, split_path
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import Reason, RowError
from pefomed_ray.data.resize import limit_side
from pefomed_ray.data.splits import missing_splits, take_splits
from pefomed_ray.errors import ConfigError, DataError

S3_THREADS = 8
"""Threads of one task that read and check images ahead of their use."""

MAX_TEXT = 32_768
"""Characters in a question or an answer; the longest report known has a tenth of it."""

ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What UTF-8 text cannot hold (lone surrogates, which stand for undecodable bytes) and what no text needs.
BAD_CHARACTERS = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Quarantined:
    """A row that was left out. Holds nothing that the row says, only where it stands and what is wrong with it."""

    position: int
    """In the publisher's order, over all splits."""
    split: Split
    id: str
    line: str
    reason: Reason
    sha256: str
    """Of the row as it was read (not of its images)."""

    def document(self, source: str) -> dict[str, str]:
        """The line of quarantine/<split>.jsonl."""
        return {
            "id": self.id,
            "source": source,
            "line": self.line,
            "reason_code": self.reason,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Intake:
    """A corpus as its reader gives it, before any image is opened."""

    reader: Reader
    source: str
    """What records and reports call the corpus."""
    licence: Literal["open", "restricted"]
    references: list[tuple[int, Reference]]
    """Position in the publisher's order, and row."""
    quarantined: list[Quarantined]
    rows_in: Counter[Split]
    taken_splits: dict[Split, float]
    """Splits that the publisher does not give, and the share of training groups each was given."""

    @property
    def digest(self) -> str:
        """Of every row as it was read, images by name: part of what the shards were made from."""
        rows = [quarantined.sha256 for quarantined in self.quarantined]
        return digest_of([*(row_digest(reference) for _, reference in self.references), *rows])


@dataclass
class Tally:
    """Sums over usable rows; tallies of parts add up to the tally of the whole."""

    rows: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    answer_types: Counter[str] = field(default_factory=Counter)
    images: dict[str, set[str]] = field(default_factory=dict)
    """sha256 of the distinct images of a split."""

    def add(self, record: dict[str, Any]) -> None:
        """Count one record."""
        self.rows[record["split"]] += 1
        self.tasks[record["task"]] += 1
        self.answer_types[record["answer_type"] or "none"] += 1
        self.images.setdefault(record["split"], set()).update(record["image_sha256"])

    def merge(self, other: "Tally") -> None:
        """Add another tally to this one."""
        self.rows += other.rows
        self.tasks += other.tasks
        self.answer_types += other.answer_types
        for split, images in other.images.items():
            self.images.setdefault(split, set()).update(images)

    def rows_by_split(self) -> dict[str, int]:
        """All three splits, 0 for one that is not there."""
        return {split: self.rows[split] for split in SPLITS}

    def image_overlap(self) -> dict[str, int]:
        """How many images stand in both of two splits: `{"train/validation": 0, ...}`."""
        sets = {split: self.images.get(split, set()) for split in SPLITS}
        return {f"{a}/{b}": len(sets[a] & sets[b]) for a, b in combinations(SPLITS, 2)}

    def images_in_several_splits(self) -> int:
        """How many images stand in more than one split."""
        splits_of = Counter(image for images in self.images.values() for image in images)
        return sum(splits > 1 for splits in splits_of.values())


UsableImage = tuple[bytes, str]
"""An image as a record holds it, and its sha256."""


def usable_image(image_path: str, root: Folder, options: DataOptions) -> UsableImage:
    """Read one image of a corpus, make a PNG of a DICOM file, check it, make it smaller on request. Raises RowError."""
    data = read_image(root, image_path)
    if is_dicom(data):
        data = dicom_to_png(data, frame=split_path(image_path)[1] or 0, allow_burned_in=options.allow_burned_in)
    check_image(data)
    if options.max_side_px:
        data = limit_side(data, options.max_side_px)
    return data, sha256_bytes(data)


@contextmanager
def images_ahead(
    root: Folder, references: Iterable[Reference], options: DataOptions
) -> Iterator[Callable[[str], UsableImage]]:
    """Yield a `usable_image` for the images of rows in a known order: from disk one by one, from S3 some ahead of their
    use, since each takes a round trip."""
    usable = partial(usable_image, root=root, options=options)
    # Rows of one image come one after the other, so that few images need to be kept.
    if isinstance(root, LocalFolder):
        yield lru_cache(maxsize=8)(usable)
        return
    upcoming = (path for reference in references for path in reference.image_paths)
    with Ahead(usable, upcoming, S3_THREADS) as ahead:
        yield lru_cache(maxsize=8)(ahead.get)


class RecordMaker:
    """Turns References of one corpus into records."""

    def __init__(self, image: Callable[[str], UsableImage], source: str) -> None:
        """`image` gives the image at a path, as `usable_image` does."""
        self._image = image
        self._source = source

    def make(self, reference: Reference) -> dict[str, Any]:
        """A dict of RECORD_SCHEMA. Raises RowError with the first thing that is wrong."""
        meta = json.dumps(reference.meta, ensure_ascii=False, sort_keys=True)
        _check_text(reference, meta)
        images = [self._image(path) for path in reference.image_paths]
        return {
            "id": reference.id,
            "source": self._source,
            "split": reference.split,
            "task": reference.task,
            "images": [
                {"bytes": data, "path": path} for (data, _), path in zip(images, reference.image_paths, strict=True)
            ],
            "image_sha256": [digest for _, digest in images],
            "question": reference.question,
            "answer": reference.answer,
            "answer_type": reference.answer_type,
            "question_type": reference.question_type,
            "group": reference.group,
            "meta": meta,
        }


def take_in(root: Folder, options: DataOptions) -> Intake:
    """Read every row of the corpus in `root`, without its images.

    Raises ConfigError for a missing folder or an option that this corpus does not have; DataError for an unknown or
    ambiguous layout, an unreadable file, or a corpus without rows.
    """
    reader = open_corpus(root, options.corpus)
    licence = _check_options(reader, options)
    references: list[tuple[int, Reference]] = []
    quarantined: list[Quarantined] = []
    seen: set[str] = set()
    for position, row in enumerate(reader.read(root, options)):
        if isinstance(row, BadRow):
            quarantined.append(Quarantined(position, row.split, row.line, row.line, row.reason, row.sha256))
        elif row.id in seen:
            quarantined.append(quarantine(position, row, "duplicate_id"))
        else:
            seen.add(row.id)
            references.append((position, row))
    if not references and not quarantined:
        raise DataError(f"the corpus {str(root)!r} is empty: no row was read (reader {reader.NAME}, options {options})")
    if any(split_path(path)[0].endswith(".dcm") for _, row in references for path in row.image_paths):
        require_packages()  # better now than in a task
    shares = missing_splits(references, reader.OFFICIAL_SPLITS, options)
    references = take_splits(references, shares, options.seed)
    rows_in = Counter([row.split for _, row in references] + [row.split for row in quarantined])
    return Intake(reader, options.source or reader.NAME, licence, references, quarantined, rows_in, shares)


def quarantine(position: int, reference: Reference, reason: Reason) -> Quarantined:
    """The row's quarantine entry. An id that is none of ours to print is replaced by the row's place."""
    name = reference.id if ID_PATTERN.fullmatch(reference.id) else reference.line
    return Quarantined(position, reference.split, name, reference.line, reason, row_digest(reference))


def row_digest(reference: Reference) -> str:
    """Identity of a row's own content."""
    return digest_of(vars(reference))


def image_order(references: Iterable[tuple[int, Reference]], seed: int) -> list[list[tuple[int, Reference]]]:
    """Rows in lists of one image each, in an order that depends on the seed and the image's name alone.

    Rows of one image stay together, so that a shard stores its bytes once. Because a list's place does not depend on
    the other rows, removing a bad row moves no good one.
    """
    lists: dict[str, list[tuple[int, Reference]]] = {}
    for position, reference in references:
        lists.setdefault("\n".join(reference.image_paths) or reference.id, []).append((position, reference))
    return [lists[key] for key in sorted(lists, key=lambda key: digest_of([seed, key]))]


def dirt_verdict(intake: Intake, quarantined: list[Quarantined], max_bad_fraction: float) -> str | None:
    """Why the corpus is too dirty to use, naming split, ids and reasons; None where it is not.

    Splits that were taken from `train` are judged together with it: a few bad rows of a small part weigh no more than
    they did in the whole.
    """
    for split in SPLITS:
        if split in intake.taken_splits:
            continue
        together: list[Split] = [split, *(intake.taken_splits if split == "train" else ())]
        bad = [row for row in quarantined if row.split in together]
        total = sum(intake.rows_in[name] for name in together)
        if not bad or (len(bad) < total and len(bad) <= max_bad_fraction * total):
            continue
        first = ", ".join(f"{row.id} ({row.reason})" for row in bad[:5])
        limit = "no usable row is left" if len(bad) == total else f"more than max_bad_fraction={max_bad_fraction:g}"
        return (
            f"split {split!r}: {len(bad)} of {total} rows are not usable, {limit}. First: {first}. "
            "Repair the corpus, or raise max_bad_fraction if that many are expected"
        )
    return None


def _check_options(reader: Reader, options: DataOptions) -> Literal["open", "restricted"]:
    if options.language is not None and "language" not in reader.OPTIONS:
        having = ", ".join(name for name, other in READERS.items() if "language" in other.OPTIONS)
        raise ConfigError(
            f"language is {options.language!r}, but {reader.NAME} has no such option; corpora that do: {having}"
        )
    if options.licence == "open" and reader.LICENCE == "restricted" and "licence" not in reader.OPTIONS:
        raise ConfigError(f"licence cannot be 'open': {reader.NAME} is restricted by its publisher")
    return options.licence or reader.LICENCE


def _check_text(reference: Reference, meta: str) -> None:
    if not ID_PATTERN.fullmatch(reference.id):
        raise RowError("bad_id")
    texts = [reference.question, reference.answer, reference.group, reference.question_type or "", meta]
    if any(BAD_CHARACTERS.search(text) for text in [*texts, *reference.image_paths]):
        raise RowError("text_encoding")
    if any(len(text) > MAX_TEXT for text in texts):
        raise RowError("text_too_long")
    if reference.task == "vqa" and not reference.question.strip():
        raise RowError("empty_question")
    if not reference.answer.strip():
        raise RowError("empty_answer")
    if not reference.image_paths:
        raise RowError("no_image")
