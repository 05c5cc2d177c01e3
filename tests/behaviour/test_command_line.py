"""The command as a person runs it: exit codes, the name of what is wrong, and nothing half-written."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.data.phantom import write_slake

ROOT = Path(__file__).parents[2]
SLAKE_CPU = str(ROOT / "configs" / "cpu" / "slake.yaml")
TIMEOUT_S = 120


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pefomed_ray", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus") / "phantoms"
    write_slake(root, images=20, questions_per_image=4, seed=1)
    return root


def test_help_names_the_verbs_without_loading_torch_or_ray(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['pefomed-ray', '--help']\n"
        "from pefomed_ray.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "loaded = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in (
        "train",
        "search",
        "estimate",
        "evaluate",
        "score",
        "promote",
        "export",
        "convert",
        "serve",
        "query",
        "demo",
        "doctor",
        "data",
    ):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["train", SLAKE_CPU, "lora.rnak=8"], 2, "did you mean 'lora.rank'"),
        (["train", SLAKE_CPU, "optimizer.learning_rate=-1"], 2, "optimizer.learning_rate"),
        (["train", "none.yaml"], 2, "'none.yaml' does not exist"),
        (["train", SLAKE_CPU, "data.shards=nowhere"], 2, "data.shards"),
        (["train", SLAKE_CPU, "base.path=nowhere"], 2, "base.path"),
        (["train", SLAKE_CPU, "base.path=."], 2, "is not a base model: it has no config.json"),
        (["train", SLAKE_CPU, "lora.target_modules=[qkv]"], 2, "qkv matches no linear layer"),
        (["train", SLAKE_CPU, "template=shrot"], 2, "template: 'shrot'"),
        (["search", str(ROOT / "search_spaces" / "phantom.yaml"), "trails=3"], 2, "did you mean 'trials'"),
        (["data", "prepare", "nowhere", "out"], 2, "nowhere"),
        (["data", "prepare", ".", "out"], 3, "layout"),
        (["data", "prepare", "gs://bucket/x", "out"], 2, "neither a local path nor an s3:// URL"),
        (["data", "prepare", "s3://no-such-bucket/x", "out"], 2, "s3://no-such-bucket/x"),
        (["data", "check", "."], 3, "layout"),
        (["evaluate", "nowhere", "--data", "nowhere"], 3, "does not hold an adapter bundle"),
        (["promote", "nowhere", "--alias", "champion"], 3, "does not hold an adapter bundle"),
        (["serve", "--alias", "champion"], 2, "champion"),
        (["query", "none.png", "What?"], 2, "no key"),
        (["score", "none.jsonl"], 2, "none.jsonl"),
        (["fly"], 2, "No such command"),
        (["train"], 2, "Missing argument"),
    ],
)
def test_bad_usage_is_named_fast_and_writes_nothing(words: list[str], code: int, named: str, tmp_path: Path) -> None:
    started = time.monotonic()
    done = run(*words, cwd=tmp_path)
    seconds = time.monotonic() - started
    assert done.returncode == code, done.stderr
    assert named in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == []
    assert seconds < 30  # a hang is a failure; the promise of 5 s is for an idle machine


def test_check_tells_the_dirt_and_fails_on_too_much(corpus: Path, tmp_path: Path) -> None:
    clean = run("data", "check", str(corpus), "--json", cwd=tmp_path)
    assert clean.returncode == 0, clean.stderr
    found = last_line(clean)
    assert found["quarantined"] == {}
    assert sum(found["rows"].values()) == 80
    broken = tmp_path / "broken"
    write_slake(broken, images=20, questions_per_image=4, seed=1)
    (broken / "imgs" / "xmlab1" / "source.jpg").unlink()
    done = run("data", "check", str(broken), "--json", cwd=tmp_path)
    assert done.returncode == 3
    assert last_line(done)["quarantined"] == {"missing_image": 4}
    assert "missing_image" in done.stderr


@pytest.mark.ray
def test_prepare_publishes_a_clean_corpus_and_nothing_of_a_dirty_one(corpus: Path, tmp_path: Path) -> None:
    done = run("data", "prepare", str(corpus), "shards", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = last_line(done)
    assert found["manifest"] == str(tmp_path / "shards" / "manifest.json")
    assert sum(found["rows"].values()) == 80
    again = run("data", "prepare", str(corpus), "shards", "--json", cwd=tmp_path)
    assert (again.returncode, "not empty" in again.stderr) == (2, True)
    rows = json.loads((corpus / "test.json").read_text(encoding="utf-8"))
    rows[0]["img_name"] = ""  # a question without an image
    dirty = tmp_path / "dirty"
    write_slake(dirty, images=20, questions_per_image=4, seed=1)
    (dirty / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    refused = run("data", "prepare", str(dirty), "other", cwd=tmp_path)
    assert refused.returncode == 3, refused.stderr
    assert "test" in refused.stderr
    (dirty / "test.json").write_text("[]", encoding="utf-8")  # an empty split
    empty = run("data", "prepare", str(dirty), "other", cwd=tmp_path)
    assert (empty.returncode, "test" in empty.stderr) == (3, True), empty.stderr
    assert not (tmp_path / "other").exists()
    assert [name for name in files(tmp_path) if "partial" in name] == []


def test_score_reads_predictions_made_anywhere(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "question": "Q", "answer": "Yes", "prediction": "yes.", "answer_type": "closed"},
        {"id": "2", "question": "Q", "answer": "Liver", "prediction": "lung", "answer_type": "open"},
        {"id": "3", "question": "Q", "answer": "Liver", "prediction": None, "answer_type": "open"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    done = run("score", "p.jsonl", "--task", "vqa", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = last_line(done)
    assert (scores["exact_match"]["value"], scores["exact_match"]["n"], scores["exact_match"]["unscored"]) == (
        0.5,
        2,
        1,
    )
    assert scores["exact_match_closed"]["value"] == 1.0
    (tmp_path / "p.jsonl").write_text(text[:-20], encoding="utf-8")
    torn = run("score", "p.jsonl", cwd=tmp_path)
    assert (torn.returncode, "3" in torn.stderr, "Liver" in torn.stderr) == (3, True, False)


def test_doctor_finds_the_embedded_base_whole(tmp_path: Path) -> None:
    done = run("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_line(done)["embedded_base"] == "ok"
