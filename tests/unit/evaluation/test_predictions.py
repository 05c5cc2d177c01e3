import json
from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.predictions import Prediction, read_predictions, write_predictions

GOOD = '{"id": "1", "question": "Which?", "answer": "lung", "prediction": "lung", "answer_type": "CLOSED "}\n'


def file_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        Prediction("1", "Was ist das?", "Lungenflügel", "左肺\n\u2028", "open", "Organ", "slake", "image 1"),
        Prediction("2", "Which?", "lung", None),
    ]
    write_predictions(tmp_path / "p.jsonl", rows, {"bundle": "abc"})
    assert read_predictions(tmp_path / "p.jsonl") == rows
    first = json.loads((tmp_path / "p.jsonl").read_bytes().split(b"\n")[0])
    assert first["produced_by"] == {"bundle": "abc"}


def test_several_references(tmp_path: Path) -> None:
    lines = (
        '{"id": "1", "answer": "b", "references": ["a", "b", "a"], "prediction": "a"}\n'
        '{"id": "2", "answer": "c", "references": ["a", "b"], "prediction": "a"}\n'
        '{"id": "3", "references": ["a", "b"], "prediction": "a"}\n'
        '{"id": "4", "answer": "a", "references": null, "prediction": "a"}\n'
    )
    rows = read_predictions(file_of(tmp_path, lines))
    assert [row.right for row in rows] == [("a", "b", "a"), ("c", "a", "b"), ("a", "b"), ("a",)]
    assert rows[2].answer == "a"
    write_predictions(tmp_path / "again.jsonl", rows, {})
    assert read_predictions(tmp_path / "again.jsonl") == rows


def test_answer_type_of_vqa_rad_and_numbers(tmp_path: Path) -> None:
    rows = read_predictions(file_of(tmp_path, GOOD + '{"id": 2, "answer": 4, "prediction": "4"}\n'))
    assert rows[0].answer_type == "closed"
    assert (rows[1].id, rows[1].answer) == ("2", "4")


@pytest.mark.parametrize("prediction", ["", ', "prediction": null', ', "prediction": 4', ', "prediction": ["lung"]'])
def test_no_usable_prediction_is_none(tmp_path: Path, prediction: str) -> None:
    assert read_predictions(file_of(tmp_path, f'{{"id": "1", "answer": "lung"{prediction}}}'))[0].prediction is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "2", "answer": "secret', "not valid JSON"),
        ('["secret"]', "not a JSON object"),
        ('{"answer": "secret"}', "'id' is missing"),
        ('{"id": "2", "question": "secret"}', "'answer' is missing"),
        ('{"id": "2", "answer": {"text": "secret"}}', "'answer' is not text"),
        ('{"id": "2", "answer": "secret", "answer_type": "secret"}', "answer_type"),
        ('{"id": "2", "answer": "secret", "references": "secret"}', "'references' is not a list of texts"),
        ('{"id": "2", "answer": "secret", "references": ["secret", 1]}', "'references' is not a list of texts"),
        ('{"id": "2", "references": []}', "'answer' is missing"),
        ('{"id": "1", "answer": "secret"}', "id is that of line 1"),
    ],
)
def test_a_bad_line_is_named_without_its_text(tmp_path: Path, line: str, reason: str) -> None:
    path = file_of(tmp_path, GOOD + "\n" + line + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        read_predictions(path)
    assert "line 3" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_file_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_predictions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no rows"):
        read_predictions(file_of(tmp_path, "\n"))
