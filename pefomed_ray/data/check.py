"""`data check`: what `data prepare` would count, and what is odd about the rows beyond that; in this process.

What it returns says where a row stands and what was found there, never what the row says.
"""

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pefomed_ray.artifacts.folders import Folder, open_folder
from pefomed_ray.artifacts.records import SPLITS, Reference
from pefomed_ray.data.check_page import check_page_is_free, write_page
from pefomed_ray.data.dirt import WHY, WHY_QUARANTINED, UsableRow, find_dirt
from pefomed_ray.data.images import FORMATS, split_path
from pefomed_ray.data.intake import (
    Intake,
    Quarantined,
    RecordMaker,
    Tally,
    dirt_verdict,
    image_order,
    images_ahead,
    quarantine,
    take_in,
)
from pefomed_ray.data.options import DataOptions
from pefomed_ray.data.reasons import RowError

EXAMPLES = 6
"""Rows that a finding names."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")

OnProgress = Callable[[int, int], None]
"""Called with the rows looked at and all rows."""


@dataclass
class ImageSums:
    """Of distinct images, as records hold them."""

    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    """Pillow's names: `L` is 8-bit grey, `I;16` 16-bit grey."""
    sizes: set[tuple[int, int]] = field(default_factory=set)
    """Width and height, pixels."""
    seen: set[str] = field(default_factory=set)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count those images of a record that were not seen before."""
        for image, digest in zip(record["images"], record["image_sha256"], strict=True):
            if digest in self.seen:
                continue
            self.seen.add(digest)
            header = Image.open(BytesIO(image["bytes"]), formats=FORMATS)
            self.bytes += len(image["bytes"])
            self.formats[str(header.format)] += 1
            self.modes[header.mode] += 1
            self.sizes.add(header.size)

    def document(self, tally: Tally) -> dict[str, Any]:
        """As `check` returns it; a range is smallest and largest, or None without images."""
        widths, heights = {width for width, _ in self.sizes}, {height for _, height in self.sizes}
        return {
            "distinct": len(self.seen),
            "by_split": {split: len(tally.images.get(split, ())) for split in SPLITS},
            "bytes": self.bytes,
            "formats": dict(sorted(self.formats.items())),
            "modes": dict(sorted(self.modes.items())),
            "width_px": [min(widths), max(widths)] if widths else None,
            "height_px": [min(heights), max(heights)] if heights else None,
        }


@dataclass
class Survey:
    """Every row of a corpus, looked at."""

    tally: Tally = field(default_factory=Tally)
    images: ImageSums = field(default_factory=ImageSums)
    usable: list[tuple[int, UsableRow]] = field(default_factory=list)
    bad: list[tuple[Quarantined, Reference | None]] = field(default_factory=list)
    """With the row itself, where its reader could make one and its id was new."""

    def sort(self) -> None:
        """Into the publisher's order."""
        self.usable.sort(key=lambda row: row[0])
        self.bad.sort(key=lambda row: row[0].position)


@dataclass(frozen=True)
class Finding:
    """The rows that have one thing in common."""

    code: str
    why: str
    quarantined: bool
    rows: Sequence[tuple[Quarantined | Reference, Reference | None]]
    """What may be said about each row, and the row itself where there is one."""

    def document(self) -> dict[str, Any]:
        """As `check` returns it."""
        by_split = Counter(row.split for row, _ in self.rows)
        return {
            "count": len(self.rows),
            "by_split": {split: by_split[split] for split in SPLITS},
            "quarantined": self.quarantined,
            "why": self.why,
            "examples": [{"id": row.id, "split": row.split, "line": row.line} for row, _ in self.rows[:EXAMPLES]],
        }


def check(
    root: str | Path,
    options: DataOptions | None = None,
    on_progress: OnProgress | None = None,
    page: Path | None = None,
) -> dict[str, Any]:
    """Read and check every row and image of the corpus in `root`, a folder or an `s3://` URL.

    Returns `source`, `licence`, `rows`, `tasks`, `answer_types`, `quarantined` and `image_overlap` as in ShardManifest;
    `bad_rows`, the quarantine entries in the publisher's order; and `problem`, why `prepare` would refuse the corpus,
    or None. Beside these: `layout`, the reader's name; `rows_by`, usable rows by split, task and answer type;
    `taken_from_train`, the splits that the publisher does not give, with their share of the groups; `images`, sums over
    distinct images and how many image files beside them no row names; `images_in_several_splits`; and `findings`, by
    code: quarantined rows first, then usable ones, each with `count`, `by_split`, `quarantined`, `why` and the place of
    up to six `examples`.

    Where `page` is given, the same is written there as one HTML file; with pictures of the examples where the licence
    class is `open`. Raises ConfigError where that file exists or its folder does not, and what `take_in` raises.
    """
    if page is not None:
        check_page_is_free(page)
    options = options or DataOptions()
    folder = open_folder(root)
    intake = take_in(folder, options)
    survey = _survey(folder, intake, options, on_progress)
    findings = _findings(survey)
    bad = [row for row, _ in survey.bad]
    found = {
        "source": intake.source,
        "layout": intake.reader.NAME,
        "licence": intake.licence,
        "rows": survey.tally.rows_by_split(),
        "rows_by": _rows_by(row.reference for _, row in survey.usable),
        "tasks": dict(sorted(survey.tally.tasks.items())),
        "answer_types": dict(sorted(survey.tally.answer_types.items())),
        "taken_from_train": dict(intake.taken_splits),
        "images": survey.images.document(survey.tally) | {"unreferenced": _unreferenced(folder, intake, survey)},
        "image_overlap": survey.tally.image_overlap(),
        "images_in_several_splits": survey.tally.images_in_several_splits(),
        "quarantined": dict(sorted(Counter(row.reason for row in bad).items())),
        "findings": {finding.code: finding.document() for finding in findings},
        "bad_rows": [row.document(intake.source) for row in bad],
        "problem": dirt_verdict(intake, bad, options.max_bad_fraction),
    }
    if page is not None:
        rows = {finding.code: [row for _, row in finding.rows[:EXAMPLES]] for finding in findings}
        write_page(page, folder, found, rows, options)
    return found


def _survey(folder: Folder, intake: Intake, options: DataOptions, on_progress: OnProgress | None) -> Survey:
    survey = Survey(bad=[(row, None) for row in intake.quarantined])
    lists = image_order(intake.references, options.seed)
    done = 0
    with images_ahead(folder, (row for rows in lists for _, row in rows), options) as image:
        maker = RecordMaker(image, intake.source)
        for rows_of_image in lists:
            for position, reference in rows_of_image:
                try:
                    record = maker.make(reference)
                except RowError as error:
                    survey.bad.append((quarantine(position, reference, error.reason), reference))
                    continue
                survey.tally.add(record)
                survey.images.add(record)
                survey.usable.append((position, UsableRow(reference, tuple(record["image_sha256"]))))
            done += len(rows_of_image)
            if on_progress:
                on_progress(done, len(intake.references))
    survey.sort()
    return survey


def _findings(survey: Survey) -> list[Finding]:
    """Quarantined rows by their reason, most frequent first; then those of usable rows."""
    reasons = Counter(row.reason for row, _ in survey.bad)
    findings = [
        Finding(reason, WHY_QUARANTINED[reason], True, [row for row in survey.bad if row[0].reason == reason])
        for reason, _ in reasons.most_common()
    ]
    for code, rows in find_dirt([row for _, row in survey.usable]).items():
        findings.append(Finding(code, WHY[code], False, [(row.reference, row.reference) for row in rows]))
    return findings


def _rows_by(rows: Iterable[Reference]) -> dict[str, dict[str, dict[str, int]]]:
    """Split, task, answer type (`none` where there is none) and number of rows."""
    counts = Counter((row.split, row.task, row.answer_type or "none") for row in rows)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (split, task, answer_type), count in sorted(counts.items(), key=lambda item: SPLITS.index(item[0][0])):
        found.setdefault(split, {}).setdefault(task, {})[answer_type] = count
    return found


def _unreferenced(folder: Folder, intake: Intake, survey: Survey) -> int:
    """How many image files no row names: of the same suffix as the images of usable rows, below the same top folders.

    SLAKE's masks, PNG files beside its JPEG images, are not counted.
    """
    named = {_file_of(path) for _, row in intake.references for path in row.image_paths}
    used = {_file_of(path) for _, row in survey.usable for path in row.reference.image_paths}
    used = {name for name in used if name.lower().endswith(IMAGE_SUFFIXES)}
    suffixes = {posixpath.splitext(name)[1] for name in used}
    files: list[str] = []
    for top in {name.partition("/")[0] if "/" in name else "" for name in used}:
        files.extend(folder.files(top) if top else folder.names())
    return sum(name not in named and posixpath.splitext(name)[1] in suffixes for name in files)


def _file_of(image_path: str) -> str:
    return posixpath.normpath(split_path(image_path)[0])
