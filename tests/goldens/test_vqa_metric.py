"""The `pefomed` normaliser equals the published one on every pair that was computed with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.metrics.vqa import NORMALIZERS, exact_match

Pair = dict[str, Any]


def pair_sets(folder: Path) -> dict[str, list[Pair]]:
    """File -> its pairs, of every file below that holds some: as a list, or under `pairs` or `rows` of an object."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        pairs = document.get("pairs", document.get("rows")) if isinstance(document, dict) else document
        if isinstance(pairs, list) and pairs and isinstance(pairs[0], dict) and "gt_norm" in pairs[0]:
            found[path.relative_to(folder).as_posix()] = pairs
    return found


@pytest.fixture(scope="module")
def sets(parity_dir: Path) -> dict[str, list[Pair]]:
    found = pair_sets(parity_dir)
    assert found, "the reference folder holds no pairs"
    return found


def mismatches(pairs: list[Pair], name: str) -> list[Pair]:
    normalizer = NORMALIZERS[name]
    # The published code calls str() on both: answers of VQA-RAD are not all strings.
    return [
        pair
        for pair in pairs
        if normalizer(str(pair["gt"])) != pair["gt_norm"]
        or normalizer(str(pair["pred"])) != pair["pred_norm"]
        or bool(exact_match(str(pair["pred"]), str(pair["gt"]), normalizer)) != pair["correct"]
    ]


def test_equal_on_every_pair(sets: dict[str, list[Pair]]) -> None:
    assert {name: mismatches(pairs, "pefomed") for name, pairs in sets.items()} == {name: [] for name in sets}


def test_another_normaliser_is_told_apart(sets: dict[str, list[Pair]]) -> None:
    assert any(mismatches(pairs, "strict") for pairs in sets.values())


def test_accuracy_of_the_real_slake_answers(parity_dir: Path) -> None:
    document = json.loads((parity_dir / "vqa_metric" / "slake_test_en.json").read_text(encoding="utf-8"))
    scores = [exact_match(row["pred"], row["gt"], NORMALIZERS["pefomed"]) for row in document["rows"]]
    assert round(100 * sum(scores) / len(scores), 2) == document["accuracy"]["overall"]
