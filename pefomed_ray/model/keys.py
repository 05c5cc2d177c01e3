"""What became of each key of a file that is converted: used, ignored for a stated reason, or an error."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pefomed_ray.errors import DataError


class KeyAccount:
    """The keys of one file, each accounted for once."""

    def __init__(self, file: str, keys: Iterable[str]) -> None:
        self.file = file
        self._open = dict.fromkeys(keys)
        self.used: list[str] = []
        self.ignored: dict[str, str] = {}
        """Key -> the reason."""

    def use(self, key: str) -> str:
        """Note that `key` is used and return it. Raises DataError where the file does not have it."""
        if key not in self._open:
            raise DataError(f"{self.file!r} has no key {key!r}, which this model needs; is it the right file?")
        del self._open[key]
        self.used.append(key)
        return key

    def ignore(self, key: str, reason: str) -> None:
        """Note that `key` is left out, and why."""
        del self._open[key]
        self.ignored[key] = reason

    def close(self) -> None:
        """Raise DataError, naming it, where a key was neither used nor ignored."""
        for key in self._open:
            more = f" (and {len(self._open) - 1} more)" if len(self._open) > 1 else ""
            raise DataError(
                f"{self.file!r} has a key {key!r}{more} that has no place in this model; is it the right file?"
            )

    def to_json(self) -> dict[str, Any]:
        """Counts: keys used, and ignored by reason."""
        return {"file": self.file, "used": len(self.used), "ignored": dict(Counter(self.ignored.values()))}
