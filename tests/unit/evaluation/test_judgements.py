"""Verdicts written and read: what is written is read, and what is no verdict is named by line, never by its text."""

import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.judgements import Judgement, read_judgements, write_judgements

ROWS = [
    Judgement("a", 0, 1.0, None, "m vqa-1", "vqa", "m-2026 fp_1"),
    Judgement("a", 1, None, "timeout", "m vqa-1", "vqa"),
    Judgement("b", 0, 0.0, None, "m vqa-1", "vqa"),
]


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "repeat": 0, "score": 1, "unscored": None, "judge": "m", "task": "vqa", "else": "x"} | changes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_judgements(tmp_path / "j.jsonl", ROWS)
    assert read_judgements(tmp_path / "j.jsonl") == ROWS


@pytest.mark.parametrize(
    "changes",
    [
        {"score": 2},
        {"score": float("nan")},
        {"score": None},
        {"score": 1, "unscored": "timeout"},
        {"score": True},
        {"score": "1"},
        {"task": "dialogue"},
        {"repeat": None},
        {"id": 3},
    ],
)
def test_what_is_no_verdict_is_named_by_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (row(), row(id="b") | changes)))
    with pytest.raises(DataError, match="line 2"):
        read_judgements(path)
    path.write_text("\n".join(json.dumps(line) for line in (row(), row(id="b"))))  # the control
    assert len(read_judgements(path)) == 2


def test_scores_of_reports_go_to_four(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text(json.dumps(row(score=4, task="report")))
    assert read_judgements(tmp_path / "j.jsonl")[0].score == 4


def test_a_repeated_row_an_empty_file_and_none(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with pytest.raises(ConfigError, match="does not exist"):
        read_judgements(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_judgements(path)
    path.write_text("\n".join([json.dumps(row())] * 2))
    with pytest.raises(DataError, match=r"line 2.*line 1"):
        read_judgements(path)
