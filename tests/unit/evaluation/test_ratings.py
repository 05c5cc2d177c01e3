"""Ratings as CSV: what is written is read back, what others write is understood, and what is wrong is named."""

from pathlib import Path

import pytest

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.ratings import Rating, read_ratings, write_ratings

HEAD = "rater,id,score,skipped,comment,rated_at\n"
RATINGS = [
    Rating("Anna", "7", 3, False, 'says "left",\nis right', "2026-01-31T12:00:00+00:00"),
    Rating("Anna", "8", None, True, "", "2026-01-31T12:00:05+00:00"),
    Rating("李雷", "7", 0, False, "", ""),
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_ratings(tmp_path / "r.csv", RATINGS)
    assert (tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()[0] + "\n" == HEAD
    assert read_ratings(tmp_path / "r.csv") == RATINGS


def test_the_model_is_a_last_column_where_there_is_one(tmp_path: Path) -> None:
    rows = [Rating("Anna", "7", 1, False, "", "", model) for model in ("a", "b")]
    write_ratings(tmp_path / "r.csv", rows)
    assert (tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()[0] + "\n" == HEAD.replace("\n", ",model\n")
    assert read_ratings(tmp_path / "r.csv") == rows


def test_a_file_of_a_spreadsheet_or_of_pandas_is_understood(tmp_path: Path) -> None:
    text = "id,rater,skipped,score,rated_at,comment,mood\n7,Anna,FALSE,3.0,2026-01-31,,good\n8,Anna,True,,,,\n"
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = read_ratings(tmp_path / "r.csv")
    assert [(row.id, row.score, row.skipped) for row in found] == [("7", 3, False), ("8", None, True)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rater;id;score\nA;1;2\n", "line 1: no column rater, id, score, skipped, comment, rated_at"),
        (HEAD, "holds no rows"),
        (HEAD + "A,1,5,false,SECRET,\n", "line 2: score is none of 0-4"),
        (HEAD + "A,1,yes,false,SECRET,\n", "line 2: score is none of 0-4"),
        (HEAD + "A,1,2,true,SECRET,\n", "line 2: both skipped and with a score"),
        (HEAD + "A,1,2,perhaps,SECRET,\n", "line 2: skipped is neither true nor false"),
        (HEAD + ",1,2,false,SECRET,\n", "line 2: no rater or no id"),
        (HEAD + "A,1,2,false,SECRET,yesterday\n", "line 2: rated_at is not a date"),
        (HEAD + "A,1,2,false,,\nA,1,3,false,SECRET,\n", "line 3: the same rater rates the same answer as in line 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_without_its_text(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "r.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_ratings(tmp_path / "r.csv")
    assert named in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_what_is_not_a_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(HEAD.encode() + b"A,1,2,false,\xff\xfe,\n")
    with pytest.raises(DataError, match="not CSV in UTF-8"):
        read_ratings(tmp_path / "r.csv")
    with pytest.raises(ConfigError, match="does not exist"):
        read_ratings(tmp_path / "none.csv")
