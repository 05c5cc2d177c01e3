"""What a person can choose when a corpus is read and prepared."""

import re
from dataclasses import dataclass
from typing import Literal

from pefomed_ray.errors import ConfigError


@dataclass(frozen=True)
class DataOptions:
    """Options of `data check` and `data prepare`. Raises ConfigError for a value out of range."""

    source: str | None = None
    """What the corpus is called in records and reports, [A-Za-z0-9._-]{1,64}; default: the layout's name."""
    language: str | None = None
    """Keep rows of one language only; for corpora that state it (SLAKE: `en` or `zh`)."""
    licence: Literal["open", "restricted"] | None = None
    """Override of the reader's licence class: `restricted` for any corpus, `open` for your own data only."""
    max_bad_fraction: float = 0.01
    """Share of a split's rows that may be quarantined before the whole run is refused."""
    seed: int = 0
    """Of the order in which images are written."""
    shard_bytes: int = 64 << 20
    """Where a shard is cut, in bytes of distinct image files."""

    def __post_init__(self) -> None:
        if self.source is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.source):
            raise ConfigError(f"source is {self.source!r}; it has 1 to 64 of the characters A-Z a-z 0-9 . _ -")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction is {self.max_bad_fraction}; it is a share between 0 and 1")
        if self.licence not in (None, "open", "restricted"):
            raise ConfigError(f"licence is {self.licence!r}; it is 'open' or 'restricted'")
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes is {self.shard_bytes}; it must be positive")
