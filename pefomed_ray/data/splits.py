"""Splits that the publisher does not give: taken out of `train` by group, so that no patient stands on both sides.

Which side a group falls on depends on the seed and the group's name alone: other rows, bad ones say, move none.
"""

from collections.abc import Sequence
from dataclasses import replace

from pefomed_ray.artifacts.records import Reference, Split
from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.data.options import DataOptions

Numbered = list[tuple[int, Reference]]

FIRST_64_BITS = 16
"""Hex digits of a digest that are read as a number."""


def missing_splits(rows: Numbered, official: bool, options: DataOptions) -> dict[Split, float]:
    """Which splits have to be taken from `train`, each with its share of the groups."""
    there = {row.split for _, row in rows}
    wanted: dict[Split, float] = {"validation": options.validation_fraction}
    if not official:
        wanted["test"] = options.test_fraction
    return {split: share for split, share in wanted.items() if share and split not in there and "train" in there}


def take_splits(rows: Numbered, shares: dict[Split, float], seed: int) -> Numbered:
    """The rows, with groups of `train` moved to the splits in `shares`.

    A split for which chance left no group gets the one that came nearest, as long as `train` keeps one.
    """
    groups = sorted({row.group for _, row in rows if row.split == "train"})
    moved = _draw(groups, shares, seed)
    return [
        (at, replace(row, split=moved[row.group]) if row.split == "train" and row.group in moved else row)
        for at, row in rows
    ]


def _draw(groups: Sequence[str], shares: dict[Split, float], seed: int) -> dict[str, Split]:
    moved: dict[str, Split] = {}
    gone = 0.0
    for split, share in shares.items():
        left = [group for group in groups if group not in moved]
        # Of the groups that are left, a larger share makes up for those that are gone.
        drawn = [group for group in left if _number(seed, split, group) < share / (1 - gone)]
        gone += share
        if not drawn and len(left) > 1:
            drawn = [min(left, key=lambda group: _number(seed, split, group))]
        moved |= dict.fromkeys(drawn if len(drawn) < len(left) else drawn[1:], split)
    return moved


def _number(seed: int, split: str, group: str) -> float:
    """Evenly in [0, 1)."""
    return int(digest_of([seed, split, group])[:FIRST_64_BITS], 16) / 16.0**FIRST_64_BITS
