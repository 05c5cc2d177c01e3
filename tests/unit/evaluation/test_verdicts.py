"""A judge's folder, as `evaluate --judge` reads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.judgements import Judgement, write_judgements
from pefomed_ray.evaluation.verdicts import read_verdicts

PREDICTIONS = "predictions.jsonl"
WAS = {"value": 2.5, "n": 2, "unscored": 1, "ci95": [1.0, 4.0]}


def judged(folder: Path, task: Task = "report", **changed: Any) -> Path:
    folder.mkdir()
    (folder.parent / PREDICTIONS).write_text("{}")
    (folder / "asked.json").write_text(json.dumps({"predictions": sha256_file(folder.parent / PREDICTIONS)}))
    rows = [("a", 0, 4.0), ("a", 1, 2.0), ("b", 0, 0.0), ("c", 0, None)]
    judgements = [
        Judgement(row_id, repeat, score, "refusal" if score is None else None, "judge-1", task)
        for row_id, repeat, score in rows
    ]
    write_judgements(folder / "judgements.jsonl", judgements)
    (folder / "metrics.json").write_text(json.dumps({"judge_was": WAS, "flags": []} | changed))
    return folder


def test_scores_are_means_over_repeats_as_shares_of_the_best(tmp_path: Path) -> None:
    found = read_verdicts(judged(tmp_path / "judge"), tmp_path / PREDICTIONS, "report")
    assert found.scores == {"a": 0.75, "b": 0.0}
    assert found.metrics == {"judge_was": WAS}
    assert found.to_json() == {"judge": "judge-1", "flagged": False, "flags": []}


def test_flags(tmp_path: Path) -> None:
    found = read_verdicts(judged(tmp_path / "judge", flags=["a canary got 4 of 4"]), tmp_path / PREDICTIONS, "report")
    assert found.to_json() == {"judge": "judge-1", "flagged": True, "flags": ["a canary got 4 of 4"]}


def test_what_is_no_judges_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no judgements"):
        read_verdicts(tmp_path, tmp_path / PREDICTIONS, "report")
    folder = judged(tmp_path / "judge")
    with pytest.raises(DataError, match="about another task"):
        read_verdicts(folder, tmp_path / PREDICTIONS, "caption")
    with pytest.raises(DataError, match="about other predictions"):
        read_verdicts(folder, folder / "metrics.json", "report")
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(DataError, match="does not hold what `pefomed-ray judge` writes"):
        read_verdicts(folder, tmp_path / PREDICTIONS, "report")
