import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pefomed_ray.cli.main import app

ROWS = [
    {"id": str(n), "answer": "left lung", "prediction": "left lung" if n % 3 else "heart", "answer_type": "open"}
    | {"question_type": "Organ" if n % 2 else "Side"}
    for n in range(12)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def score(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["score", *words])
    return done.exit_code, done.stdout, done.stderr


def test_exact_match_by_question_type(tmp_path: Path) -> None:
    code, out, _ = score(write(tmp_path / "a.jsonl", ROWS), "--task", "vqa", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert found["token_recall"]["value"] == pytest.approx(8 / 12)
    assert {kind: scores["exact_match"]["n"] for kind, scores in found["by_question_type"].items()} == {
        "Organ": 6,
        "Side": 6,
    }


def test_against(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", ROWS)
    second = write(tmp_path / "b.jsonl", [row | {"prediction": "heart"} for row in ROWS[2:]])
    code, out, err = score(first, "--against", second, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (found["common"], found["only_first"], found["only_second"]) == (10, 2, 0)
    assert "10 ids in both, 2 only in" in err
    assert found["differences"]["exact_match"]["value"] == pytest.approx(7 / 10)
    other = write(tmp_path / "c.jsonl", [row | {"id": f"x{row['id']}"} for row in ROWS])
    assert score(first, "--against", other)[0] == 3


def test_bad_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    code, _, err = score(path, "--also", "radgraf")
    assert (code, "did you mean 'radgraph'" in err) == (2, True)
    code, _, err = score(path, "--against", path, "--also", "radgraph")
    assert (code, "--against" in err) == (2, True)
    assert score(path, "--task", "quiz")[0] == 2
