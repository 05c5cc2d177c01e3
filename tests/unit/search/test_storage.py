"""The study that a search goes on from, in SQLite and on a PostgreSQL server; what it draws, and how it is damaged."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pgserver
import pytest
from optuna.trial import TrialState

from pefomed_ray.config import SearchConfig, build_config
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.searcher import StudySearch
from pefomed_ray.search.space import output_dir, params_of
from pefomed_ray.search.storage import (
    STUDY_FILE,
    check_storage,
    is_on_plateau,
    open_study,
    remaining,
    sampler,
    unfinished,
)

RATE = "optimizer.learning_rate"
SPACE = {
    RATE: {"loguniform": [1e-5, 1e-1]},
    "lora.rank": {"choice": [4, 8]},
    "lora.alpha": {"times": "lora.rank", "choice": [1, 2]},
}
POINTS = [{RATE: 1e-3, "lora.rank": 8, "lora.alpha": 8}, {RATE: 1e-4, "lora.rank": 4}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a database on a PostgreSQL server of this module's own."""
    with pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete") as running:
        yield running.get_uri()


def search(output: Path, **changes: Any) -> SearchConfig:
    output.mkdir(exist_ok=True)
    found = {"name": "s", "preset": "p", "output_dir": str(output), "space": SPACE, "points": POINTS, "trials": 6}
    return build_config(SearchConfig, found | {"sampler": {"n_startup_trials": 3}} | changes, "s")


def carry_on(config: SearchConfig, trials: int, *, leave_last: bool = False) -> None:
    """What a driver does, with a trial at a time; its last may be left as by a driver that is killed."""
    searcher = StudySearch(config, open_study(config, resume=True))
    for number in range(trials):
        name = f"tune's {number}"
        suggestion = searcher.suggest(name)
        for epoch in (1, 2):
            value = -abs(suggestion["params"][RATE] - 1e-2) - 1 / epoch
            searcher.on_trial_result(name, {config.metric: value, "training_iteration": epoch})
            if leave_last and number == trials - 1:
                return
        searcher.on_trial_complete(name, {config.metric: value, "training_iteration": epoch})


def drawn(config: SearchConfig) -> list[dict[str, Any]]:
    return [dict(trial.params) for trial in open_study(config, resume=True).get_trials()]


@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_a_study_goes_on_where_it_was_left(where: str, server: str, tmp_path: Path) -> None:
    """At any trial, with the trial that ran; the same is drawn as by one driver that did it all."""
    storage = server if where == "postgres" else None
    whole = search(tmp_path / "whole", name="whole", storage=storage)
    carry_on(whole, 6)
    for killed_at in (1, 2, 5):
        config = search(tmp_path / str(killed_at), name=f"killed-{killed_at}", storage=storage)
        carry_on(config, killed_at, leave_last=True)
        study = open_study(config, resume=True)
        assert [trial.number for trial in unfinished(study)] == [killed_at - 1]
        assert remaining(config, study) == 6 - (killed_at - 1)
        carry_on(config, remaining(config, study))
        assert drawn(config) == drawn(whole)
        ended = open_study(config, resume=True).get_trials()
        assert [trial.state for trial in ended] == [TrialState.COMPLETE] * 6
        assert remaining(config, study) == 0
    first, second = (params_of(whole, params) for params in drawn(whole)[:2])
    assert first == POINTS[0]
    assert (second[RATE], second["lora.rank"]) == (1e-4, 4)
    other = search(tmp_path / "other", name="other", storage=storage, seed=43)  # the control: a seed matters
    carry_on(other, 6)
    assert drawn(other)[2:] != drawn(whole)[2:]


def test_one_draw_is_not_the_next(tmp_path: Path) -> None:
    """Each trial has a seed of its own: random ones, before TPE begins, must not be one point again and again."""
    config = search(tmp_path, points=[], sampler={"n_startup_trials": 9})
    carry_on(config, 9)
    assert len({params[RATE] for params in drawn(config)}) == 9
    assert sampler(config, 3)._rng.rng.random() == sampler(config, 3)._rng.rng.random()


def test_a_stopped_trial_is_pruned_and_a_restarted_one_is_not_told_twice(tmp_path: Path) -> None:
    config = search(tmp_path)
    searcher = StudySearch(config, open_study(config, resume=False))
    searcher.suggest("a")
    for epoch in (1, 2, 1, 2, 3):  # its process was lost after two
        searcher.on_trial_result("a", {"exact_match": epoch / 10 if epoch < 3 else 0.15, "training_iteration": epoch})
    searcher.on_trial_complete("a", {"exact_match": 0.15, "training_iteration": 3})
    searcher.suggest("b")
    searcher.on_trial_complete("b", {"exact_match": 0.05, "training_iteration": 1})  # the report it is stopped at
    searcher.suggest("c")
    searcher.on_trial_complete("c", error=True)
    a, b, c = open_study(config, resume=True).get_trials()
    assert (a.state.name, a.value, a.intermediate_values) == ("COMPLETE", 0.2, {1: 0.1, 2: 0.2, 3: 0.15})
    assert (b.state.name, b.intermediate_values) == ("PRUNED", {1: 0.05})
    assert c.state.name == "FAIL"
    assert "its process was lost" in c.user_attrs["reason"]


def test_a_plateau_is_that_nothing_newer_is_better() -> None:
    def on_plateau(*values: float | None, after: int | None = 2) -> bool:
        config = build_config(SearchConfig, {"name": "s", "preset": "p", "space": SPACE, "plateau_trials": after}, "s")
        trials = [
            optuna.trial.create_trial(value=value, intermediate_values={1: value})
            if value is not None
            else optuna.trial.create_trial(state=TrialState.FAIL)
            for value in values
        ]
        return is_on_plateau(config, trials)

    assert on_plateau(0.5, 0.4, 0.5)
    assert not on_plateau(0.5, 0.4, 0.6)
    assert not on_plateau(0.5, 0.4)  # two are not two after another
    assert not on_plateau(0.5, None, 0.4)  # a failure says nothing
    assert not on_plateau(0.5, 0.4, 0.3, after=None)


def test_a_study_is_of_one_search(server: str, tmp_path: Path) -> None:
    """Two searches of one name on a shared server would mix their trials."""
    mine, theirs = (search(tmp_path / who, name="same", storage=server) for who in ("mine", "theirs"))
    check_storage(mine)
    open_study(mine, resume=False)
    check_storage(mine, resume=True)
    for begin in (lambda: check_storage(theirs), lambda: open_study(theirs, resume=False)):
        with pytest.raises(ConfigError, match="holds a study 'same' already"):
            begin()
    for go_on in (lambda: check_storage(theirs, resume=True), lambda: open_study(theirs, resume=True)):
        with pytest.raises(ConfigError, match=r"the study 'same' in the storage is that of the search in '.*mine'"):
            go_on()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/optuna", "connection failed"),
        ("somewhere", "not the URL of a database"),
        ("nosuch://host/db", "not the URL of a database"),
        ("journal.log", "not the URL of a database"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_storage(search(tmp_path, storage=url))
    assert "s3cret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_driver_killed_while_it_writes_leaves_a_whole_study(tmp_path: Path) -> None:
    """SIGKILL within a transaction whose rows are in the file already: what was committed stays, and it goes on."""
    config = search(tmp_path)
    carry_on(config, 3)
    before = drawn(config)
    code = (
        "import os, signal, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('PRAGMA cache_size=1')\n"
        "db.execute('BEGIN'); db.execute('DELETE FROM trial_params'); db.execute('DELETE FROM trials')\n"
        "db.executemany('INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (1, ?, ?)',\n"
        "               [(str(n), 'x' * 2000) for n in range(200)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / STUDY_FILE)], check=False)
    journal = tmp_path / f"{STUDY_FILE}-journal"
    assert journal.stat().st_size > 0  # the control: there was something to roll back
    assert drawn(config) == before
    carry_on(config, 2)
    assert len([trial for trial in open_study(config, resume=True).get_trials() if trial.state.is_finished()]) == 5


def test_a_study_that_is_no_database_is_named(tmp_path: Path) -> None:
    config = search(tmp_path)
    (output_dir(config) / STUDY_FILE).write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(ConfigError, match=r"study\.db' is not a whole SQLite file"):
        open_study(config, resume=True)


def test_tunes_snapshots_hold_nothing_of_the_storage(tmp_path: Path) -> None:
    import cloudpickle

    config = search(tmp_path)
    searcher = StudySearch(config, open_study(config, resume=False))
    assert STUDY_FILE.encode() not in cloudpickle.dumps(searcher)
    searcher.save_to_dir(str(tmp_path))
    assert not list(tmp_path.glob("searcher-state*"))
