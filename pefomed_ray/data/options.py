"""What a person can choose when a corpus is read and prepared."""

import re
from dataclasses import dataclass
from typing import Literal

from pefomed_ray.errors import ConfigError


@dataclass(frozen=True)
class DataOptions:
    """Options of `data check` and `data prepare`. Raises ConfigError for a value out of range."""

    corpus: str | None = None
    """Name of the layout, where a folder looks like several; default: the one that is detected."""
    source: str | None = None
    """What the corpus is called in records and reports, [A-Za-z0-9._-]{1,64}; default: the layout's name."""
    language: str | None = None
    """Keep rows of one language only; for corpora that state it (SLAKE: `en` or `zh`)."""
    licence: Literal["open", "restricted"] | None = None
    """Override of the reader's licence class: `restricted` for any corpus, `open` for your own data only."""
    validation_fraction: float = 0.1
    """Share of the training groups that become the validation split of a corpus without one; 0 leaves it without."""
    test_fraction: float = 0.2
    """Share of the groups that become the test split of a corpus that its publisher did not split at all."""
    max_bad_fraction: float = 0.01
    """Share of a split's rows that may be quarantined before the whole run is refused."""
    max_side_px: int | None = None
    """Images with a longer side are made smaller, keeping their aspect; default: images stay the bytes they are."""
    allow_burned_in: bool = False
    """Keep DICOM images that may show a patient's name in their pixels; default: they are quarantined."""
    seed: int = 0
    """Of the order in which images are written, and of splits that the publisher does not give."""
    shard_bytes: int = 64 << 20
    """Where a shard is cut, in bytes of distinct image files."""

    def __post_init__(self) -> None:
        if self.source is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.source):
            raise ConfigError(f"source is {self.source!r}; it has 1 to 64 of the characters A-Z a-z 0-9 . _ -")
        for name in ("max_bad_fraction", "validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; it is a share between 0 and 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                "to train on; together they stay below 1"
            )
        if self.licence not in (None, "open", "restricted"):
            raise ConfigError(f"licence is {self.licence!r}; it is 'open' or 'restricted'")
        if self.max_side_px is not None and not _is_whole(self.max_side_px, 16):
            raise ConfigError(f"max_side_px is {self.max_side_px!r}; it is a whole number of pixels, at least 16")
        if not isinstance(self.allow_burned_in, bool):
            raise ConfigError(f"allow_burned_in is {self.allow_burned_in!r}; it is true or false")
        if not _is_whole(self.seed, 0):
            raise ConfigError(f"seed is {self.seed!r}; it is a whole number, 0 or more")
        if not _is_whole(self.shard_bytes, 1):
            raise ConfigError(f"shard_bytes is {self.shard_bytes!r}; it is a whole number of bytes, 1 or more")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
