"""The `pefomed` normaliser equals the published one on every pair computed with it, and so do the accuracies."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.metrics.vqa import NORMALIZERS, exact_match

Pair = dict[str, Any]
COMMAND_TIMEOUT_S = 120


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


@pytest.fixture(scope="module")
def accuracies(parity_dir: Path, sets: dict[str, list[Pair]]) -> dict[str, dict[str, Any]]:
    """File -> accuracies in percent, of the files that hold them."""
    documents = {name: json.loads((parity_dir / name).read_text(encoding="utf-8")) for name in sets}
    found = {
        name: document["accuracy"]
        for name, document in documents.items()
        if isinstance(document, dict) and "accuracy" in document
    }
    assert found, "the reference folder holds no accuracies"
    return found


@pytest.fixture(scope="module")
def scored(sets: dict[str, list[Pair]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """File -> what `pefomed-ray score` says of its pairs."""
    folder = tmp_path_factory.mktemp("scored")
    found = {}
    for name, pairs in sets.items():
        rows = [
            {
                "id": str(number),
                "answer": str(pair["gt"]),
                "prediction": str(pair["pred"]),
                "answer_type": pair.get("answer_type"),
                "question_type": pair.get("question_type"),
            }
            for number, pair in enumerate(pairs)
        ]
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = ["score", "p.jsonl", "--task", "vqa", "--normalizer", "pefomed", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "pefomed_ray", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
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


def test_the_command_counts_the_published_verdicts(
    sets: dict[str, list[Pair]], scored: dict[str, dict[str, Any]]
) -> None:
    for name, pairs in sets.items():
        by_type: dict[str, list[bool]] = defaultdict(list)
        for pair in pairs:
            if pair.get("question_type") is not None:
                by_type[pair["question_type"]].append(pair["correct"])
        said = scored[name]
        assert said["exact_match"]["value"] == pytest.approx(share([pair["correct"] for pair in pairs]))
        assert (said["exact_match"]["n"], said["exact_match"]["unscored"]) == (len(pairs), 0)
        kinds = {kind: scores["exact_match"]["value"] for kind, scores in said["by_question_type"].items()}
        assert kinds == pytest.approx({kind: share(verdicts) for kind, verdicts in by_type.items()})


def test_the_command_gives_the_published_accuracies(
    accuracies: dict[str, dict[str, Any]], scored: dict[str, dict[str, Any]]
) -> None:
    for name, published in accuracies.items():
        said = scored[name]
        assert percent(said["exact_match"]) == published["overall"]
        of_answers = {kind: percent(said[f"exact_match_{kind.lower()}"]) for kind in published["perAnswerType"]}
        assert of_answers == published["perAnswerType"]
        of_questions = {kind: percent(found["exact_match"]) for kind, found in said["by_question_type"].items()}
        assert of_questions == published["perQuestionType"]


def share(verdicts: list[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def percent(metric: dict[str, Any]) -> float:
    """Rounded as published."""
    return round(100 * metric["value"], 2)
