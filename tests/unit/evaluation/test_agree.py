"""`agree` on small files of scores that were made up so that the right answer is known."""

import csv
import html
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.cli.main import app
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.evaluation.agree import FILES, Asked, agree
from pefomed_ray.evaluation.agreement_figure import draw_figure
from pefomed_ray.evaluation.agreement_page import cautions, headline, render_page
from pefomed_ray.evaluation.measures import judge_measure, people, rater_measures
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.metrics import agreement as statistics
from pefomed_ray.metrics import resampled
from pefomed_ray.metrics.text import rouge_l

N = 60
PINGOUIN = statistics._icc


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def predictions(folder: Path, right: Sequence[int], **more: Any) -> Path:
    """Questions 0..n; exact match says `right` of each. Every third question is closed; two questions an image."""
    rows = [
        {
            "id": f"q{number}",
            "question": f"Question {number}?",
            "answer": "left lung",
            "prediction": "left lung" if said else "liver",
            "answer_type": "open" if number % 3 else "closed",
            "group": f"image {number // 2}",
        }
        | more
        for number, said in enumerate(right)
    ]
    return write_rows(folder / "predictions.jsonl", rows)


def judgements(
    path: Path, repeats: Sequence[Sequence[float | None]], judge: str = "model-a", task: str = "vqa"
) -> Path:
    rows = [
        {
            "id": f"q{number}",
            "repeat": repeat,
            "score": score,
            "unscored": "not_json" if score is None else None,
            "judge": judge,
            "task": task,
        }
        for repeat, scores in enumerate(repeats)
        for number, score in enumerate(scores)
    ]
    return write_rows(path, rows)


def ratings(path: Path, raters: dict[str, Sequence[int | None]], model: str = "") -> Path:
    lines = ["rater,id,score,skipped,comment,rated_at,model"]
    for rater, scores in raters.items():
        for number, score in enumerate(scores):
            lines.append(f"{rater},q{number},{'' if score is None else score},{str(score is None).lower()},,,{model}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def flipped(truth: Sequence[int], places: Sequence[int]) -> list[int]:
    return [1 - value if place in places else value for place, value in enumerate(truth)]


TRUTH = [int(number % 5 < 3) for number in range(N)]


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    """With our own ICC in place of pingouin's, which takes a tenth of a second each and is tested where it is."""

    def icc(scores: np.ndarray) -> dict[str, float]:
        once = np.ones((1, len(scores)))
        return {
            name: float(resampled.icc(scores, absolute=name == "icc_2_1")(once)[0]) for name in ("icc_2_1", "icc_3_1")
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pefomed_ray.metrics.agreement._icc", icc)
        yield


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second."""
    monkeypatch.setattr("pefomed_ray.evaluation.agree.draw_figure", lambda *_, **__: b"<svg/>")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Three raters nearly at one, a judge a little less, exact match that misses a third of the right answers."""
    folder = tmp_path_factory.mktemp("asked")
    raters = {"Ada": flipped(TRUTH, [0, 7]), "Ben": flipped(TRUTH, [3, 21]), "Cem": flipped(TRUTH, [11])}
    judged = flipped(TRUTH, [2, 5, 8, 12])
    return Asked(
        predictions=predictions(folder, [value if place % 3 else 0 for place, value in enumerate(TRUTH)]),
        task="vqa",
        judges=(judgements(folder / "a.jsonl", [judged, flipped(judged, [4, 9]), judged]),),
        ratings=(ratings(folder / "ratings.csv", raters),),
        metrics=("exact_match", "token_f1"),
    )


Found = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def found(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What is answered of `asked`, and where it lies."""
    output = tmp_path_factory.mktemp("found") / "out"
    return agree(asked, output), output


def compared(result: dict[str, Any], kind: str = "all") -> dict[str, dict[str, Any]]:
    return {row["measure"]: row for row in result["answer_types"][kind]["compared"]}


def test_who_agrees_with_people(found: Found) -> None:
    result, output = found
    assert result["reference"]["name"] == "people"
    rows = compared(result)
    assert list(rows) == ["exact_match", "token_f1", "judge:model-a", "rater:Ada", "rater:Ben", "rater:Cem"]
    judge = rows["judge:model-a"]
    assert (judge["n"], judge["clusters"], judge["best"]) == (N, N // 2, True)
    assert judge["statistics"]["same"]["value"] == pytest.approx(1 - 4 / N)
    assert rows["exact_match"]["behind_best"]["value"] > 0
    assert rows["exact_match"]["statistics"]["kappa"]["value"] < judge["statistics"]["kappa"]["value"]
    assert sum(compared(result, kind)["exact_match"]["n"] for kind in ("open", "closed")) == N
    # On disk is what was answered, and no NaN.
    assert json.loads((output / FILES["agreement"]).read_text()) == result
    assert "NaN" not in (output / FILES["agreement"]).read_text()


def test_a_rater_is_held_against_the_others_not_against_themselves(found: Found) -> None:
    result, _ = found
    ada = compared(result)["rater:Ada"]
    assert ada["against"] == "the other raters"
    # Ben and Cem differ on three items, which leaves ties; of the others Ada is wrong on two.
    assert ada["n"] == N - 3
    assert ada["statistics"]["same"]["value"] == pytest.approx(1 - 2 / (N - 3))
    pairs = {(pair["measure"], pair["with"]) for pair in result["answer_types"]["all"]["pairs"]}
    assert ("rater:Ada", "rater:Ben") in pairs
    assert ("rater:Ada", "people") not in pairs


def test_repeats_count_by_majority_and_show_stability(asked: Asked, found: Found) -> None:
    rows = read_predictions(asked.predictions)
    judge = judge_measure(asked.judges[0], rows, "vqa")
    assert judge.scores == tuple(float(score) for score in flipped(TRUTH, [2, 5, 8, 12]))
    result, _ = found
    repeats = result["answer_types"]["all"]["judge_repeats"]["judge:model-a"]
    assert repeats["repeats"] == 3
    assert repeats["statistics"]["same"]["value"] == pytest.approx(1 - 2 / N)
    assert 0.9 < repeats["statistics"]["alpha"]["value"] < 1
    raters = result["answer_types"]["all"]["among_raters"]
    assert raters["complete"] == N
    assert raters["statistics"]["same"]["value"] == pytest.approx(1 - 5 / N)


def test_a_tied_vote_has_no_score(tmp_path: Path) -> None:
    rows = read_predictions(predictions(tmp_path, [1, 1, 1]))
    judge = judge_measure(judgements(tmp_path / "a.jsonl", [[1, 1, None], [0, 1, None]]), rows, "vqa")
    assert judge.scores == (None, 1.0, None)
    assert judge.unscored == {"tied": 1, "not_json": 1}
    two = rater_measures([ratings(tmp_path / "r.csv", {"Ada": [1, 1, None], "Ben": [0, 1, 0]})], rows, "vqa")
    assert people(two, "vqa").scores == (None, 1.0, 0.0)
    assert two[0].unscored == {"skipped": 1}


def test_grades_of_reports_are_averaged(tmp_path: Path) -> None:
    rows = [Prediction(f"q{number}", "", "heart normal", "heart normal") for number in range(2)]
    judge = judge_measure(judgements(tmp_path / "a.jsonl", [[4, 1], [3, 1]], task="report"), rows, "report")
    assert judge.scores == (3.5, 1.0)
    two = rater_measures([ratings(tmp_path / "r.csv", {"Ada": [4, 0], "Ben": [1, 0]})], rows, "report")
    assert people(two, "report").scores == (2.5, 0.0)


@pytest.mark.usefixtures("no_figure")
def test_reports_compare_grades_with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def words_only(rows: Sequence[Prediction], *_: object) -> dict[str, list[float]]:
        return {"rougeL": [rouge_l(row.prediction or "", row.answer) for row in rows]}

    monkeypatch.setattr("pefomed_ray.evaluation.agree.item_scores", words_only)  # the others start Java
    rng = np.random.default_rng(2)
    words = [f"word{number}" for number in range(14)]
    grades = rng.integers(0, 5, 40)
    rows = []
    for number, grade in enumerate(grades):
        kept = words[: 3 * grade + 1]
        text = " ".join(kept + ["xyz"] * (len(words) - len(kept)))
        rows.append({"id": f"q{number}", "answer": " ".join(words), "prediction": text})
    result = agree(
        Asked(
            predictions=write_rows(tmp_path / "p.jsonl", rows),
            task="report",
            ratings=(ratings(tmp_path / "r.csv", {"Ada": grades.tolist(), "Ben": np.clip(grades + 1, 0, 4).tolist()}),),
            metrics=("rougeL",),
        ),
        tmp_path / "out",
    )
    row = compared(result)["rougeL"]
    assert row["statistics"]["ordered"]["value"] > 0.95
    assert row["statistics"]["kappa_quadratic"]["value"] is None
    assert "scales differ" in row["statistics"]["kappa_quadratic"]["reason"]
    raters = result["answer_types"]["all"]["among_raters"]["statistics"]
    assert raters["icc_3_1"]["value"] > raters["icc_2_1"]["value"]  # Ben is milder by one, in the same order
    assert list(result["answer_types"]) == ["all"]


@pytest.mark.usefixtures("no_figure")
def test_without_people_the_judge_is_the_reference_and_the_page_says_so(asked: Asked, tmp_path: Path) -> None:
    other = judgements(tmp_path / "b.jsonl", [flipped(TRUTH, [30])], judge="model-b")
    result = agree(
        Asked(asked.predictions, "vqa", judges=(*asked.judges, other), metrics=("exact_match",)), tmp_path / "out"
    )
    assert result["reference"]["name"] == "judge:model-a"
    assert "judge:model-b" in compared(result)
    assert "No person rated these answers" in cautions(result)[0]
    assert "No person rated these answers" in (tmp_path / "out" / FILES["page"]).read_text()
    assert headline(result)[0] == "Judge model-b agrees best with Judge model-a."


@pytest.mark.usefixtures("no_figure")
def test_missing_items_are_counted_by_pair(asked: Asked, tmp_path: Path) -> None:
    half = ratings(tmp_path / "half.csv", {"Dan": [*TRUTH[:20], None]})
    some = Asked(asked.predictions, "vqa", judges=asked.judges, ratings=(half,), metrics=("exact_match",))
    result = agree(some, tmp_path / "out")
    assert result["reference"] == {"name": "rater:Dan", "kind": "rater", "label": "Rater Dan"}
    assert compared(result)["judge:model-a"]["n"] == 20
    assert result["measures"]["rater:Dan"]["unscored"] == {"skipped": 1, "not_seen": N - 21}
    assert "Only one person rated" in cautions(result)[0]
    assert "scored only 20 of 60" in cautions(result)[1]


def test_disagreements_are_listed_by_id(found: Found) -> None:
    result, _ = found
    groups = {(group["measure"], group["says"]): group for group in result["disagreements"]}
    # Exact match never says right of a wrong answer here, so that there is no group of those.
    assert set(groups) == {("exact_match", "lower"), ("judge:model-a", "lower"), ("judge:model-a", "higher")}
    missed = groups["exact_match", "lower"]
    assert missed["count"] == sum(TRUTH[::3])
    assert len(missed["items"]) == 6
    for item in missed["items"]:
        assert item["scores"]["exact_match"] == 0
        assert item["scores"]["people"] == 1
    judged = [item["id"] for says in ("lower", "higher") for item in groups["judge:model-a", says]["items"]]
    assert sorted(judged) == ["q12", "q2", "q5", "q8"]


def test_table_has_a_line_a_pair(found: Found) -> None:
    result, output = found
    with open(output / FILES["table"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(own["compared"]) + len(own["pairs"]) for own in result["answer_types"].values())
    line = next(line for line in lines if line["measure"] == "judge:model-a" and line["against"] == "People")
    assert float(line["kappa"]) == compared(result)["judge:model-a"]["statistics"]["kappa"]["value"]
    assert float(line["kappa_low"]) == compared(result)["judge:model-a"]["statistics"]["kappa"]["ci95"][0]


def page_of(asked: Asked, tmp_path: Path) -> str:
    agree(asked, tmp_path / "out")
    return (tmp_path / "out" / FILES["page"]).read_text(encoding="utf-8")


def about_shards(tmp_path: Path, shards: Path) -> Asked:
    """Rows `test-0` .. `test-6` of the shards, on half of which judge and people differ."""
    rows = [
        {"id": f"test-{number}", "question": "What is <b>seen</b>?", "answer": "red", "prediction": "a <i>hue</i>"}
        for number in range(7)
    ]
    ratings(tmp_path / "r.csv", {"Ada": [1, 1, 1, 0, 0, 0, 1], "Ben": [1, 1, 1, 0, 0, 1, 1]})
    judgements(tmp_path / "a.jsonl", [[1, 0, 1, 0, 1, 0, 1]])
    for name in ("r.csv", "a.jsonl"):
        path = tmp_path / name
        path.write_text(re.sub(r"\bq(\d)", r"test-\1", path.read_text()))
    return Asked(
        predictions=write_rows(tmp_path / "p.jsonl", rows),
        task="vqa",
        judges=(tmp_path / "a.jsonl",),
        ratings=(tmp_path / "r.csv",),
        shards=shards,
    )


@pytest.mark.usefixtures("no_figure")
def test_open_data_show_pictures_and_escaped_texts(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    page = page_of(about_shards(tmp_path, make_shards()), tmp_path)
    assert page.count("data:image/jpeg;base64,") > 1
    assert "a &lt;i&gt;hue&lt;/i&gt;" in page
    assert "<i>hue" not in page


@pytest.mark.usefixtures("no_figure")
def test_restricted_data_show_ids_only(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    page = page_of(about_shards(tmp_path, make_shards("restricted")), tmp_path)
    assert "data:image/jpeg" not in page
    assert "hue" not in page
    assert "seen" not in html.unescape(page).split("<h2>Where they disagree</h2>")[1].split("How to read")[0]
    assert "the licence of this data set is restricted" in page
    assert "test-1" in page


def test_unknown_licence_shows_ids_only(found: Found) -> None:
    page = (found[1] / FILES["page"]).read_text(encoding="utf-8")
    assert "left lung" not in page
    assert "it is not known whether the licence" in page


def test_page_stands_alone(found: Found) -> None:
    page = (found[1] / FILES["page"]).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "<script" not in page
    assert page.count("data:image/svg+xml;base64,") == 2


def test_names_that_are_no_markup_and_no_formula(found: Found) -> None:
    result = json.loads(json.dumps(found[0]))
    result["measures"]["rater:Ada"]["label"] = "Rater <b>$x$"
    result["measures"]["rater:Ben"]["label"] = "Rater 李明 $1_"
    figure = draw_figure(result, narrow=True)
    assert "李明 $1_" in figure.decode()
    assert "&lt;b&gt;$x$" in figure.decode()
    page = render_page(result, [], None, figure, figure)
    assert "Rater &lt;b&gt;$x$" in page
    assert "<b>" not in page


def test_files_about_other_items_are_bad_data(asked: Asked, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(asked.judges[0].read_text().replace('"q', '"z'))
    with pytest.raises(DataError, match=r"other\.jsonl.*no id"):
        agree(Asked(asked.predictions, "vqa", judges=(other,)), tmp_path / "out")
    foreign = tmp_path / "foreign.csv"
    foreign.write_text(asked.ratings[0].read_text().replace(",q", ",z"))
    with pytest.raises(DataError, match=r"foreign\.csv.*no id"):
        agree(Asked(asked.predictions, "vqa", ratings=(foreign,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_refused(asked: Asked, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(error, match=match):
            agree(Asked(**{"predictions": asked.predictions, "task": "vqa", **more}), tmp_path / "out")

    refused(ConfigError, "nothing to compare")
    report = judgements(tmp_path / "r.jsonl", [TRUTH], task="report")
    refused(ConfigError, "about task report, not vqa", judges=(report,))
    refused(ConfigError, "does not exist", judges=(tmp_path / "none.jsonl",))
    refused(ConfigError, r"'judge:model-a' is given 2 times", judges=(*asked.judges, *asked.judges))
    refused(ConfigError, "'blue' is not a metric", judges=asked.judges, metrics=("blue",))
    four = ratings(tmp_path / "four.csv", {"Ada": [4] * N})
    refused(DataError, "gives 'q0' a 4, but the best", ratings=(four,))
    between = judgements(tmp_path / "b.jsonl", [[0.5] * N])
    refused(DataError, "0 or 1", judges=(between,))
    again = ratings(tmp_path / "again.csv", {"Ada": flipped(TRUTH, [40])})
    refused(DataError, "another file gives another score", ratings=(*asked.ratings, again))


def test_ratings_of_several_models(asked: Asked, tmp_path: Path) -> None:
    rows = read_predictions(asked.predictions)
    both = ratings(tmp_path / "one.csv", {"Ada": TRUTH}, model="ours")
    theirs = ratings(tmp_path / "two.csv", {"Ada": [0] * N}, model="theirs")
    both.write_text(both.read_text() + "".join(theirs.read_text().splitlines(keepends=True)[1:]))
    (ada,) = rater_measures([both], rows, "vqa", "ours")
    assert ada.scores == tuple(map(float, TRUTH))
    with pytest.raises(ConfigError, match="--model"):
        rater_measures([both], rows, "vqa")
    with pytest.raises(ConfigError, match="'other'"):
        rater_measures([both], rows, "vqa", "other")


def judge_folder(folder: Path, predictions_file: Path) -> Path:
    """As `judge` leaves it."""
    folder.mkdir()
    judgements(folder / "judgements.jsonl", [TRUTH])
    (folder / "asked.json").write_text(json.dumps({"predictions": sha256_file(predictions_file)}))
    (folder / "metrics.json").write_text(json.dumps({"flags": ["canary: an empty answer was called right"]}))
    return folder


def test_a_folder_of_judge_brings_its_flags_and_is_about_these_answers(asked: Asked, tmp_path: Path) -> None:
    rows = read_predictions(asked.predictions)
    folder = judge_folder(tmp_path / "judge", asked.predictions)
    judge = judge_measure(folder, rows, "vqa", sha256_file(asked.predictions))
    assert judge.flags == ("canary: an empty answer was called right",)
    with pytest.raises(DataError, match="another file of predictions"):
        judge_measure(folder, rows, "vqa", "0" * 64)


def test_a_flagged_judge_is_said_to_be_so(found: Found) -> None:
    result = json.loads(json.dumps(found[0]))
    assert not any("failed its own checks" in sentence for sentence in cautions(result))
    result["measures"]["judge:model-a"]["flags"] = ["canary: an empty answer was called right"]
    assert "Judge model-a failed its own checks: canary: an empty answer was called right" in cautions(result)


@pytest.mark.usefixtures("no_figure")
def test_judges_that_score_few_items_or_always_say_the_same(
    asked: Asked, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Right on the 30 items that it scored: whether those are the easy ones, nobody knows.
    picky = judgements(tmp_path / "p.jsonl", [[*TRUTH[:30], *[None] * 30]], judge="picky")
    constant = judgements(tmp_path / "c.jsonl", [[1] * N], judge="yes-man")
    judges = (*asked.judges, picky, constant)
    some = Asked(asked.predictions, "vqa", judges, asked.ratings, metrics=("exact_match",))
    result = agree(some, tmp_path / "out")
    rows = compared(result)
    ordered = {name: row["statistics"]["ordered"]["value"] for name, row in rows.items()}
    assert ordered["judge:picky"] > ordered["judge:model-a"]
    assert (rows["judge:picky"]["best"], rows["judge:picky"]["fewer_items"]) == (False, True)
    assert rows["judge:model-a"]["best"]
    assert rows["judge:picky"]["behind_best"]["n"] == 30
    assert any("Judge picky is about 30 of these answers only" in sentence for sentence in cautions(result))
    assert any("Judge picky left 30 answers without a score (not_json 30)" in sentence for sentence in cautions(result))
    statistics = rows["judge:yes-man"]["statistics"]
    assert statistics["kappa"] == {"value": None, "ci95": None, "reason": "one of the two says the same of every item"}
    assert statistics["same"]["value"] is not None
    assert capfd.readouterr() == ("", "")


def test_verb(asked: Asked, found: Found, tmp_path: Path) -> None:
    words = [str(asked.predictions), "--judge", str(asked.judges[0]), "--ratings", str(asked.ratings[0])]
    words += ["--metric", "exact_match", "--metric", "token_f1", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["agree", *words, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["reference"] == "people"
    assert "agrees best with people" in done.stderr
    for key, name in FILES.items():
        assert result[key] == str(tmp_path / "out" / name)
        assert Path(result[key]).read_bytes() == (found[1] / name).read_bytes(), f"{name} is not the same every time"
    again = CliRunner().invoke(app, ["agree", *words])
    assert again.exit_code == 2
    assert "already exists" in again.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "nothing to compare"), (["--judge", "none.jsonl"], "does not exist"), (["--task", "vaq"], "is not one of")],
)
def test_bad_usage(asked: Asked, tmp_path: Path, words: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["agree", str(asked.predictions), "--output", str(tmp_path / "out"), *words])
    assert done.exit_code == 2
    assert says in done.stderr


def test_bad_data(asked: Asked, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(asked.judges[0].read_bytes()[:-20])
    words = ["agree", str(asked.predictions), "--output", str(tmp_path / "out"), "--judge", str(torn)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3
    assert "torn.jsonl" in done.stderr


@pytest.mark.long
def test_a_test_split_in_under_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pefomed_ray.metrics.agreement._icc", PINGOUIN)
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 2, 1061)

    def noisy(share: float) -> list[int]:
        return np.where(rng.random(1061) < share, 1 - truth, truth).tolist()

    asked = Asked(
        predictions=predictions(tmp_path, noisy(0.3)),
        task="vqa",
        judges=(judgements(tmp_path / "a.jsonl", [noisy(0.1) for _ in range(3)]),),
        ratings=(ratings(tmp_path / "r.csv", {"Ada": noisy(0.05), "Ben": noisy(0.05), "Cem": noisy(0.05)}),),
        metrics=("exact_match",),
    )
    begun = time.process_time()
    result = agree(asked, tmp_path / "out")
    assert time.process_time() - begun < 60
    assert len(result["measures"]) == 6
