"""`pefomed-ray data check` as a person and as a program see it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pefomed_ray.cli.main import app
from pefomed_ray.data.phantom.corpus import write_slake


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_slake(tmp_path / "c", images=10, questions_per_image=4, seed=1, size_px=48)
    return tmp_path / "c"


def edit(corpus: Path, **changes: str) -> None:
    rows = json.loads((corpus / "train.json").read_text(encoding="utf-8"))
    rows[0] |= changes
    (corpus / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["data", "check", *map(str, words)])


def test_for_a_person_it_says_what_is_odd_and_where(corpus: Path) -> None:
    edit(corpus, answer=" Lung")
    done = run(corpus)
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "left out: nothing usable, but odd: edge_spaces: 1 row (train 1), first 0 at train.json[0]. Spaces" in said
    assert "checking: 40/40 rows" in said
    assert "Lung" not in done.output
    keys = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert {"rows", "licence", "layout", "images", "problem"} < set(keys)
    assert not {"bad_rows", "findings", "rows_by", "page"} & set(keys)


def test_of_a_clean_corpus_it_says_so(corpus: Path) -> None:
    assert "left out: nothing usable, but odd: nothing" in " ".join(run(corpus).stderr.split())


def test_for_a_program_it_ends_in_one_json_object(corpus: Path) -> None:
    edit(corpus, answer=" Lung")
    done = run(corpus, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["findings"]["edge_spaces"]["count"] == 1
    assert (found["bad_rows"], found["problem"]) == ([], None)
    assert "Lung" not in done.stdout


def test_too_much_dirt_ends_in_exit_code_3_with_the_page_written(corpus: Path, tmp_path: Path) -> None:
    edit(corpus, answer="")
    done = run(corpus, "--html", tmp_path / "page.html", "--json")
    assert done.exit_code == 3
    assert "max_bad_fraction" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["page"] == str(tmp_path / "page.html")
    assert "empty_answer" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_that_is_there_already_is_a_usage_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").touch()
    done = run(corpus, "--html", tmp_path / "page.html")
    assert done.exit_code == 2
    assert "already exists" in done.stderr
    assert "checking" not in done.stderr
