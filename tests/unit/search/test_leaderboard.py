"""Rows of trials that left something, from folders made by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from pefomed_ray.artifacts.manifests import BundleManifest, save_document
from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.errors import DivergedError
from pefomed_ray.metrics.intervals import Metric
from pefomed_ray.search.leaderboard import (
    EndedTrial,
    TrialRow,
    ranked,
    reason_of,
    share_interval,
    trial_row,
    write_leaderboard,
)


def leave(output: Path, trial: str, *scores: float) -> None:
    """What a trial leaves whose epochs had these scores: their rows, and the bundles of the best and of the last."""
    folder = output / "trials" / trial
    best = max(range(len(scores)), key=lambda at: (scores[at], -at)) + 1
    rows = [
        {"exact_match": score, "rougeL": score, "n": 40.0, "train_s": 2.5, "trainable_parameters": 100}
        for score in scores
    ]
    for number in {best, len(scores)}:
        bundle = folder / "epochs" / f"{number:03d}"
        bundle.mkdir(parents=True)
        manifest = BundleManifest(
            base="embedded",
            base_digest="a",
            template="short",
            template_digest="b",
            image_size=64,
            files={"n": str(number)},
        )
        save_document(manifest, bundle / "bundle.json")
    write_json(folder / "epochs.json", {"best": best, "epochs": rows})


def row(output: Path, trial: str, error: str | None = None, metric: str = "exact_match", **how: bool) -> TrialRow:
    return trial_row(output, EndedTrial(trial, {"lora.rank": 8}, error, **how), metric)


def test_a_finished_trial_has_its_best_epochs_value_and_bundle(tmp_path: Path) -> None:
    leave(tmp_path, "a", 0.25, 0.5, 0.25)
    found = row(tmp_path, "a")
    assert (found.state, found.value, found.n, found.best_epoch, found.epochs) == ("finished", 0.5, 40, 2, 3)
    assert (found.train_s, found.trainable_parameters, found.params) == (7.5, 100, {"lora.rank": 8})
    assert found.ci95 == share_interval(0.5, 40)
    manifest = json.loads((Path(found.bundle or "") / "bundle.json").read_text())
    assert manifest["files"] == {"n": "2"}
    assert row(tmp_path, "a") == found  # as where a search goes on


def test_a_stopped_trial_counts_with_what_it_had(tmp_path: Path) -> None:
    leave(tmp_path, "a", 0.5, 0.25)
    found = row(tmp_path, "a", stopped=True)
    assert (found.state, found.value, found.best_epoch, found.epochs) == ("stopped", 0.5, 1, 2)


def test_a_trial_that_went_on_has_its_new_best_bundle(tmp_path: Path) -> None:
    leave(tmp_path, "a", 0.25)
    row(tmp_path, "a", stopped=True)
    leave(tmp_path, "a", 0.25, 0.5)
    found = row(tmp_path, "a")
    assert (found.state, found.value, found.best_epoch) == ("finished", 0.5, 2)
    assert json.loads((Path(found.bundle or "") / "bundle.json").read_text())["files"] == {"n": "2"}


def test_a_failed_trial_never_has_a_value(tmp_path: Path) -> None:
    leave(tmp_path, "a", 0.9, 0.9, 0.9)
    found = row(tmp_path, "a", error="DivergedError: step 9")
    assert (found.state, found.value, found.bundle, found.reason) == ("failed", None, None, "DivergedError: step 9")
    assert (found.epochs, found.train_s) == (3, 7.5)  # what it cost all the same
    assert row(tmp_path, "a").value == 0.9  # or else the error were not what decides


def test_a_trial_that_left_nothing_failed(tmp_path: Path) -> None:
    found = row(tmp_path, "never-began")
    assert (found.state, found.reason, found.epochs, found.train_s) == ("failed", "reported nothing", 0, 0)


def test_only_a_share_of_rows_has_an_interval(tmp_path: Path) -> None:
    leave(tmp_path, "a", 0.5)
    assert row(tmp_path, "a", metric="rougeL").ci95 is None


def test_the_interval_of_a_share_is_wilsons() -> None:
    z, n, share = 1.959964, 40, 0.5
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert share_interval(share, n) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)  # centred, since share is 1/2
    low, high = share_interval(0.0, n)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert 0.05 < high < 0.1


def test_best_first_then_less_trained_and_failed_last() -> None:
    def made(trial: str, value: float | None, parameters: int) -> TrialRow:
        return TrialRow(trial, "finished", value, 4, None, 1, 1, {}, parameters, 1.0, None)

    rows = [made("f", None, 0), made("a", 0.5, 20), made("b", 0.5, 10), made("c", 0.75, 99), made("z", 0.0, 1)]
    assert [found.trial for found in ranked(rows)] == ["c", "b", "a", "z", "f"]


def test_json_and_csv_say_the_same(tmp_path: Path) -> None:
    leave(tmp_path, "a", 0.5, 0.5, 0.5)
    rescored = Metric(0.4, 90, 0, (0.3, 0.5))
    rows = [
        TrialRow(**{**vars(row(tmp_path, "a")), "rescored": rescored}),
        trial_row(tmp_path, EndedTrial("b", {"lora.alpha": 16}, "Error, with a comma"), "exact_match"),
    ]
    board: dict[str, Any] = json.loads(write_leaderboard(tmp_path, "exact_match", rows).read_text())
    assert [found["trial"] for found in board["trials"]] == ["a", "b"]
    assert board["trials"][0]["rescored"] == {"value": 0.4, "n": 90, "unscored": 0, "ci95": [0.3, 0.5]}
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        first, second = csv.DictReader(file)
    low, high = share_interval(0.5, 40)
    assert (float(first["ci95_low"]), float(first["ci95_high"])) == (low, high)
    assert (first["rescored_value"], first["rescored_ci95_high"], first["lora.rank"]) == ("0.4", "0.5", "8")
    assert (second["value"], second["rescored_value"], second["lora.rank"], second["lora.alpha"]) == ("", "", "", "16")
    assert second["reason"] == "Error, with a comma"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DivergedError("step 3: the loss is nan\nand more"), "DivergedError: step 3: the loss is nan"),
        (RuntimeError("[enforce fail] no memory"), "RuntimeError: [enforce fail] no memory"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("what is the name of the patient?"), "KeyError"),
    ],
)
def test_reasons_quote_nothing_unforeseen(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_the_reason_of_a_lost_process_is_in_words() -> None:
    assert "its process was lost" in reason_of(RayActorError())
