"""Who wins, from answers made up by hand; `tests/ray/test_choice.py` has a model give them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.manifests import BundleManifest, ShardManifest, load_shard_manifest, save_document
from pefomed_ray.config import SearchConfig, TrainConfig, build_config, load_config, save_config
from pefomed_ray.config.schema import JudgeConfig
from pefomed_ray.errors import ConfigError, PefomedError, RefusedError
from pefomed_ray.evaluation.judgements import read_judgements
from pefomed_ray.evaluation.predictions import Prediction, read_predictions
from pefomed_ray.search import choice as choice_module
from pefomed_ray.search.choice import choose, in_order, pareto_front, winning_bundle
from pefomed_ray.search.judged import check_judge
from pefomed_ray.search.leaderboard import TrialRow
from tests.judge_server import serving

ROWS = 40
TRIALS = ("exact", "wordy")
OTHER = {"lora": {"rank": 8}}  # the defaults of a config are the paper's
PAPER = {"lora": {"rank": 64, "alpha": 16}, "optimizer": {"learning_rate": 3e-5}}

Trial = Callable[..., TrialRow]


def search(**choice: Any) -> SearchConfig:
    space = {"lora.rank": {"choice": [2, 4]}}
    return build_config(SearchConfig, {"name": "s", "preset": "p", "space": space, "choice": choice}, "test")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    manifest = ShardManifest(
        source="x",
        licence="open",
        rows={"train": 9, "validation": ROWS, "test": 9},
        tasks={},
        answer_types={},
        bytes={},
        quarantined={},
        image_overlap={},
        files=(),
        made_by={},
    )
    (tmp_path / "shards").mkdir()
    save_document(manifest, tmp_path / "shards" / "manifest.json")
    return tmp_path / "shards"


@pytest.fixture
def trial(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A function that makes a trial and its row: `right` of 40 questions about ten images it answers rightly, the
    others with `otherwise`."""
    right_of: dict[str, tuple[int, str]] = {}

    def made(
        name: str,
        value: float | None,
        right: int = 0,
        otherwise: str = "no",
        parameters: int = 10,
        parts: int = 1,
        **config: Any,
    ) -> TrialRow:
        folder = tmp_path / "trials" / name
        (folder / "bundle").mkdir(parents=True)
        mixture = [{"shards": str(shards)}] * parts
        values = {"name": name, "task": "vqa", "data": {"shards": mixture}, **(config or OTHER)}
        save_config(build_config(TrainConfig, values, "test"), folder / "run.yaml")
        manifest = BundleManifest(
            base="embedded", base_digest="a", template="short", template_digest="b", image_size=64, files={}
        )
        save_document(manifest, folder / "bundle" / "bundle.json")
        right_of[str(folder / "bundle")] = right, otherwise
        state, reason = ("failed", "DivergedError: step 1") if value is None else ("finished", None)
        bundle = None if value is None else str(folder / "bundle")
        return TrialRow(name, state, value, 4, None, 1, 1, {}, parameters, 1.0, bundle, reason)

    def predict(
        bundle: Path, shards: str, split: str, settings: Any, *, variants: list[str], on_progress: Any
    ) -> dict[str, list[Prediction]]:
        assert (split, variants) == ("validation", ["image"])
        on_progress(ROWS, ROWS)
        right, otherwise = right_of[str(bundle)]
        answers = [
            Prediction(f"q{i}", "?", "yes", "yes" if i < right else otherwise, group=f"image {i // 4}")
            for i in range(ROWS)
        ]
        return {"image": answers}

    monkeypatch.setattr(choice_module, "predict", predict)
    return made


def test_the_whole_split_decides_not_the_first_rows(trial: Trial, tmp_path: Path) -> None:
    rows = [trial("lucky", 0.75, right=10), trial("good", 0.5, right=30), trial("third", 0.25, right=40)]
    done: list[tuple[int, int]] = []
    found = choose(search(rescore=2), rows, tmp_path, on_progress=lambda *at: done.append(at))
    assert [row.trial for row in found.ranking] == ["good", "lucky"]  # the third was not asked again
    assert [row.rescored.value for row in found.ranking if row.rescored] == [0.75, 0.25]
    assert done == [(ROWS, ROWS)] * 2
    assert [row.trial for row in in_order(rows, found)] == ["good", "lucky", "third"]
    assert found.winner.bundle == str(tmp_path / "trials" / "good" / "bundle")
    (answers, _) = (read_predictions(tmp_path / "choice" / f"{name}.jsonl") for name in ("good", "lucky"))
    assert sum(row.prediction == row.answer for row in answers) == 30


def test_the_winner_is_compared_with_the_runner_up_on_the_same_rows(trial: Trial, tmp_path: Path) -> None:
    rows = [trial("a", 0.5, right=36), trial("b", 0.5, right=12), trial("c", 0.5, right=11)]
    found = choose(search(), rows, tmp_path)
    assert found.runner_up is not None
    difference = found.runner_up.difference
    assert (found.runner_up.trial, difference.n) == ("b", ROWS)
    assert difference.value == pytest.approx(24 / ROWS)
    low, high = difference.ci95 or (0, 0)
    assert 0 < low < 24 / ROWS < high
    assert "better beyond chance" in found.why
    document = json.loads((tmp_path / "choice.json").read_text())
    assert document["winner"] == "a"
    assert document["comparisons"]["runner_up"]["ci95"] == [low, high]
    assert document["ranking"][0]["rescored"]["n"] == ROWS
    assert "not tell the two apart" in choose(search(), rows[1:], tmp_path).why


def test_of_equals_the_one_that_trains_less_wins(trial: Trial, tmp_path: Path) -> None:
    rows = [trial("large", 0.5, right=20, parameters=20), trial("small", 0.5, right=20, parameters=10)]
    found = choose(search(), rows, tmp_path)
    assert found.winner.trial == "small"
    assert found.runner_up is not None
    assert found.runner_up.difference.p == 1.0


def test_the_papers_defaults_are_asked_again_however_they_did(trial: Trial, tmp_path: Path) -> None:
    rows = [trial("a", 0.75, right=30), trial("b", 0.5, right=20), trial("paper", 0.25, right=8, **PAPER)]
    found = choose(search(rescore=1), rows, tmp_path)
    assert [row.trial for row in found.ranking] == ["a", "paper"]
    assert found.paper is not None
    assert found.paper.trial == "paper"
    assert found.paper.difference.value == pytest.approx(22 / ROWS)
    assert "Against the paper's defaults, trial paper: +55.0 points" in found.why


def test_where_nobody_ran_the_papers_defaults_nothing_is_made_up(trial: Trial, tmp_path: Path) -> None:
    near = {"lora": {"rank": 64, "alpha": 32}, "optimizer": {"learning_rate": 3e-5}}
    found = choose(search(), [trial("a", 0.75, right=30), trial("near", 0.5, right=20, **near)], tmp_path)
    assert found.paper is None
    assert "No trial ran the paper's defaults" in found.why


def test_the_papers_defaults_may_win_or_fail(trial: Trial, tmp_path: Path) -> None:
    rows = [trial("paper", 0.75, right=30, **PAPER), trial("b", 0.5, right=20)]
    assert "It ran the paper's defaults itself" in choose(search(), rows, tmp_path).why
    rows = [rows[1], trial("failed", None, **PAPER)]
    assert "came to no result: trial failed failed (DivergedError: step 1)" in choose(search(), rows, tmp_path).why


def test_one_trial_has_no_runner_up_and_none_has_no_winner(trial: Trial, tmp_path: Path) -> None:
    found = choose(search(), [trial("a", 0.5, right=20), trial("x", None)], tmp_path)
    assert found.runner_up is None
    assert "no runner-up" in found.why
    with pytest.raises(PefomedError, match="none to choose"):
        choose(search(), [trial("y", None)], tmp_path)


def test_rows_of_two_corpora_are_not_taken_for_one_anothers(trial: Trial, tmp_path: Path) -> None:
    found = choose(search(), [trial("a", 0.5, right=20, parts=2)], tmp_path)
    rows = read_predictions(tmp_path / "choice" / "a.jsonl")  # which refuses an id that comes twice
    assert found.winner.rescored is not None
    assert found.winner.rescored.n == len(rows) == 2 * ROWS
    assert len({row.group for row in rows}) == 2 * 10


def test_a_judge_decides_by_the_same_rows_of_each_under_one_budget(trial: Trial, tmp_path: Path) -> None:
    """It takes for right what matches no reference word by word."""
    rows = [trial("exact", 0.75, right=36), trial("wordy", 0.5, right=4, otherwise="yes, it is")]
    assert choose(search(), rows, tmp_path).winner.trial == "exact"  # the control
    done: list[tuple[int, int]] = []
    with serving() as judge:
        judge.verdict = lambda item, best: best if item["candidate"] in ("yes", "yes, it is") else 0
        asked = {"model": "m", "base_url": judge.url, "sample": 30}
        found = choose(search(judge=asked), rows, tmp_path, on_judging=lambda *at: done.append(at))
        calls = len(judge.chats)
        again = choose(search(judge=asked), rows, tmp_path)
        assert len(judge.chats) == calls  # nothing is paid twice
    assert found.winner.trial == again.winner.trial == "wordy"
    assert found.judge == again.judge == "m vqa-1"
    assert [row.judged and row.judged.n for row in found.ranking] == [30, 30]
    assert [row.rescored and row.rescored.value for row in found.ranking] == [0.1, 0.9]
    assert found.runner_up is not None
    assert found.runner_up.difference.n == 30
    assert "has a mean verdict by m vqa-1 of" in found.why
    assert done[-1][0] == done[-1][1]
    ids = [{verdict.id for verdict in read_judgements(tmp_path / f"choice/{name}.judge.jsonl")} for name in TRIALS]
    assert ids[0] == ids[1]
    document = json.loads((tmp_path / "choice.json").read_text())
    assert document["judge"] == "m vqa-1"
    assert document["ranking"][0]["judged"]["n"] == 30


@pytest.mark.parametrize(
    ("behaves", "config", "why"),
    [
        ({}, {"max_calls": 2}, "the budget was spent"),
        ({"faults": {"*": ["error_500"] * 1000}}, {"max_retries": 0}, "could not be had"),
        ({"verdict": lambda item, best: best}, {}, "not to be trusted"),
    ],
    ids=["budget", "down", "believes anything"],
)
def test_a_judge_that_cannot_decide_leaves_it_to_the_metric(
    trial: Trial, tmp_path: Path, behaves: dict[str, Any], config: dict[str, Any], why: str
) -> None:
    rows = [trial("a", 0.75, right=36), trial("b", 0.5, right=4)]
    with serving() as judge:
        vars(judge).update(behaves)
        asked = {"model": "m", "base_url": judge.url, **config}
        found = choose(search(judge=asked), rows, tmp_path)
    assert (found.winner.trial, found.judge) == ("a", None)
    assert all(row.judged is None for row in found.ranking)
    assert "No judge decided" in found.why
    assert why in found.why


def test_no_judge_that_may_not_be_asked_is_found_after_hours(trial: Trial, shards: Path, tmp_path: Path) -> None:
    trial("a", 0.5)
    first = load_config(TrainConfig, tmp_path / "trials/a/run.yaml")
    away = build_config(JudgeConfig, {"model": "m", "key_env": "NOBODY_SET_THIS"}, "test")
    with pytest.raises(ConfigError, match="NOBODY_SET_THIS holds no key"):
        check_judge(away, first)
    manifest = load_shard_manifest(shards)
    save_document(manifest.model_copy(update={"licence": "restricted"}), shards / "manifest.json")
    with pytest.raises(RefusedError, match="restricted corpus"):
        check_judge(away, first)
    check_judge(away.model_copy(update={"local": True}), first)


def test_the_pareto_front_holds_what_nothing_beats_for_less() -> None:
    def made(trial: str, value: float | None, parameters: int) -> TrialRow:
        return TrialRow(trial, "finished", value, 4, None, 1, 1, {}, parameters, 1.0, None)

    rows = [
        made("best", 0.9, 40),
        made("more for the same", 0.9, 50),
        made("cheap", 0.5, 10),
        made("worse as cheap", 0.4, 10),
        made("middle", 0.7, 20),
        made("worse and dearer", 0.6, 30),
        made("failed", None, 1),
    ]
    assert pareto_front(rows) == ["cheap", "middle", "best"]


def test_the_winners_bundle_is_taken_or_trained_again(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = build_config(TrainConfig, {"name": "best", "task": "vqa", "data": {"shards": "x"}}, "test")
    found = choose(search(), [trial("a", 0.5, right=20)], tmp_path)
    asked: list[tuple[str | None, bool]] = []

    def train(config: TrainConfig, *, resume: bool) -> Any:
        asked.append((config.output_dir, resume))
        folder = Path(config.output_dir or "")
        folder.mkdir(exist_ok=True)
        if resume:
            (folder / "bundle").mkdir()
        return type("Result", (), {"bundle": folder / "bundle"})

    monkeypatch.setattr(choice_module, "train", train)
    assert winning_bundle(search(), found, best, tmp_path) == Path(found.winner.bundle or "")
    assert asked == []
    again = [winning_bundle(search(retrain=True), found, best, tmp_path) for _ in range(3)]
    assert again == [tmp_path / "best" / "bundle"] * 3
    assert asked == [(str(tmp_path / "best"), False), (str(tmp_path / "best"), True)]  # then it is there
