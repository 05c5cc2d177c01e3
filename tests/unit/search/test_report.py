"""The page of a search, of many trials and of hardly any."""

import re
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from pefomed_ray.metrics.intervals import Metric, paired_difference
from pefomed_ray.search.choice import Choice, Comparison
from pefomed_ray.search.leaderboard import TrialRow, ranked
from pefomed_ray.search.report import pictures, write_report

TITLES = [
    "How the search went",
    "Epoch by epoch",
    "Metric against parameters that are trained",
    IMPORTANCES := "Which parameters matter",
    "Parameters one by one",
    "Learning rate and rank together",
    "Parameters together",
]


def searched(*states: TrialState) -> tuple[Study, list[TrialRow]]:
    """A study whose trials ended so, and the leaderboard it makes."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    rows = []
    for number, state in enumerate(states):
        trial = study.ask()
        params = {
            "lora.rank": trial.suggest_categorical("lora.rank", [8, 16, 32]),
            "optimizer.learning_rate": trial.suggest_float("optimizer.learning_rate", 1e-4, 1e-2, log=True),
        }
        if state == TrialState.FAIL:
            study.tell(trial, state=state)
            row = TrialRow(f"{number:04d}", "failed", None, None, None, None, 0, params, None, 0.0, None, "<i>lost</i>")
        else:
            values = [0.5 + number / 100, 0.4]
            for epoch, value in enumerate(values if state == TrialState.COMPLETE else values[:1], start=1):
                trial.report(value, epoch)
            study.tell(trial, max(values) if state == TrialState.COMPLETE else None, state=state)
            name = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped"}[state]
            row = TrialRow(f"{number:04d}", name, values[0], 40, (0.3, 0.7), 1, 2, params, 100, 9.0, "b")
        rows.append(row)
    return study, ranked(rows)


COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def test_a_page_of_a_whole_search_needs_nothing_else(tmp_path: Path) -> None:
    study, rows = searched(COMPLETE, PRUNED, COMPLETE, FAIL, *[COMPLETE] * 8)
    best = TrialRow(**{**vars(rows[0]), "rescored": Metric(0.6, 90, 0, (0.55, 0.65))})
    difference = paired_difference([1.0, 0.0], [0.0, 0.0], ["a", "b"])
    choice = Choice(
        "exact_match", [best], Comparison("0002", difference), None, [best.trial], "Because <b>I</b> say so."
    )
    page = write_report(tmp_path, "<b>mine</b>", "exact_match", study, rows, choice).read_text()
    assert "12 trials: 10 finished, 1 stopped early, 1 failed" in page
    assert "Because &lt;b&gt;I&lt;/b&gt; say so." in page
    assert "&lt;i&gt;lost" in page
    assert "<b>mine</b>" not in page
    assert "55.0 – 65.0" in page
    assert "Not drawn" not in page
    assert [re.sub("<.*?>", "", title) for title in re.findall("<h2>(.*?)</h2>", page)][2:] == TITLES
    assert page.count('class="plotly-graph-div"') == len(TITLES)
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page)  # nothing is fetched


@pytest.mark.parametrize(
    ("states", "drawn"),
    [
        ((), []),
        ((FAIL, FAIL), []),
        ((PRUNED,), ["Epoch by epoch"]),
        ((COMPLETE, FAIL), ["Epoch by epoch"]),
        ((COMPLETE, PRUNED, PRUNED, PRUNED), [title for title in TITLES if title != IMPORTANCES]),
        ((COMPLETE,) * 10, TITLES),
    ],
)
def test_what_cannot_be_drawn_says_why(states: tuple[TrialState, ...], drawn: list[str], tmp_path: Path) -> None:
    study, rows = searched(*states)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what Optuna says of too few trials is ours to say
        found = pictures(study, rows, "exact_match")
    assert [picture.title for picture in found] == TITLES
    assert [picture.title for picture in found if picture.html] == drawn
    assert all(picture.note.startswith("Not drawn: ") is (picture.html is None) for picture in found)
    assert (
        "Nobody: no trial came to a result."
        in write_report(tmp_path, "s", "exact_match", study, rows, None).read_text()
    )


def test_stopped_trials_are_in_the_pictures_and_grey_among_the_curves() -> None:
    study, rows = searched(COMPLETE, PRUNED, PRUNED)
    by_title = {picture.title: picture.html or "" for picture in pictures(study, rows, "exact_match")}
    assert by_title["Epoch by epoch"].count('"line":{"color":"#b9c4cf"}') == 2
    history = by_title["How the search went"]
    assert '"x":[0,1,2]' in history
