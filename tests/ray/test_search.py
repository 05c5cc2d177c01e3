"""A search on a real Ray: Optuna's trials, a leaderboard that says what happened, failures that never win."""

import json
from pathlib import Path
from typing import Any

import pytest

from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.config import SearchConfig, TrainConfig, build_config, load_config
from pefomed_ray.errors import ConfigError, DivergedError
from pefomed_ray.search.space import trial_config
from pefomed_ray.search.study import Unwatched, concurrent_trials, run_search
from tests.tiny_runs import weights

pytestmark = pytest.mark.ray


def values(shards: Path) -> dict[str, Any]:
    """The preset every trial starts from."""
    return {
        "name": "preset",
        "task": "vqa",
        "template": "short",
        "data": {"shards": str(shards)},
        "lora": {"dropout": 0.0, "target_modules": ["all-linear"]},
        "training": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4},
        "validation": {"rows": 5, "max_new_tokens": 4},
    }


def search(output: Path, **changes: Any) -> SearchConfig:
    found = {
        "name": "test",
        "preset": "unused",
        "output_dir": str(output),
        "space": {"lora.rank": {"choice": [2, 4]}, "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "points": [{"lora.rank": 4, "optimizer.learning_rate": 1e-3}],
        "trials": 3,
        "asha": {"grace_period_epochs": 1, "reduction_factor": 2},
        "choice": {"rescore": 1},
    }
    return build_config(SearchConfig, found | changes, "test")


class Seen(Unwatched):
    """What a search told."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, int]] = []

    def __call__(self, trial: str, params: dict[str, Any], row: dict[str, Any]) -> None:
        self.reports.append((trial, row["training_iteration"]))


def test_a_search_ends_with_a_leaderboard_and_a_bundle_for_every_trial(phantom_shards: Path, tmp_path: Path) -> None:
    seen = Seen()
    result = run_search(search(tmp_path / "s"), values(phantom_shards), seen)
    board = json.loads(result.leaderboard.read_text())
    assert len(board["trials"]) == len(result.rows) == 3
    assert [row.trial for row in result.rows if row.rescored] == [result.best.trial]
    assert result.bundle == Path(result.best.bundle or "")
    assert result.report.is_file()
    assert all(row.state in {"finished", "stopped"} and row.bundle for row in result.rows)
    assert {"lora.rank": 4, "optimizer.learning_rate": 1e-3} in [row.params for row in result.rows]  # the known point
    assert len({json.dumps(row.params) for row in result.rows}) == 3
    for row in result.rows:
        assert sorted(n for trial, n in seen.reports if trial == row.trial) == list(range(1, row.epochs + 1))
        verify_bundle(Path(row.bundle or ""))
    best = load_config(TrainConfig, result.best_config)
    assert best.lora.rank == result.best.params["lora.rank"]
    assert best.optimizer.learning_rate == result.best.params["optimizer.learning_rate"]


@pytest.mark.long
def test_a_diverged_trial_is_marked_and_never_wins(phantom_shards: Path, tmp_path: Path) -> None:
    space = {"lora.alpha": {"choice": [8, 1e38]}}
    points = [{"lora.alpha": 1e38}, {"lora.alpha": 8}]
    preset = values(phantom_shards)
    preset["optimizer"] = {"learning_rate": 1e-2, "warmup_fraction": 0.0}
    result = run_search(search(tmp_path / "s", space=space, points=points, trials=2), preset)
    states = {row.params["lora.alpha"]: row for row in result.rows}
    assert states[1e38].state == "failed"
    assert "DivergedError" in (states[1e38].reason or "")
    assert result.best is states[8]
    with pytest.raises(DivergedError):
        run_search(search(tmp_path / "t", space={"lora.alpha": {"choice": [1e38]}}, points=[], trials=1), preset)


@pytest.mark.long
def test_a_winner_that_is_trained_again_comes_to_the_same_weights(phantom_shards: Path, tmp_path: Path) -> None:
    """By the trainer, through Ray Train, from best.yaml alone; and once only."""
    choice = {"rescore": 1, "retrain": True}
    config = search(tmp_path / "s", packing="off", trials=2, scheduler="none", choice=choice)
    result = run_search(config, values(phantom_shards))
    assert result.bundle == tmp_path / "s/best/bundle"
    verify_bundle(result.bundle)
    last = "checkpoints/00000008"
    again, trial = weights(tmp_path / "s/best" / last), weights(tmp_path / "s/trials" / result.best.trial / last)
    other = weights(tmp_path / "s/trials" / result.rows[1].trial / last)
    assert (again - trial).abs().max() < 1e-5
    assert other.shape != trial.shape or (other - trial).abs().max() > 1e-5  # the control
    changed = (result.bundle / "bundle.json").stat().st_mtime_ns
    run_search(config, values(phantom_shards), resume=True)
    assert (result.bundle / "bundle.json").stat().st_mtime_ns == changed


def test_concurrency_follows_from_the_cluster(phantom_shards: Path, tmp_path: Path) -> None:
    config = trial_config(values(phantom_shards), {})
    assert concurrent_trials(search(tmp_path), config, [{"CPU": 8.0}]) == 8
    assert concurrent_trials(search(tmp_path, max_concurrent=3), config, [{"CPU": 8.0}]) == 3
    on_gpu = trial_config(values(phantom_shards), {"resources.use_gpu": True})
    assert concurrent_trials(search(tmp_path), on_gpu, [{"CPU": 8.0, "GPU": 2.0}]) == 2
    on_four = trial_config(values(phantom_shards), {"resources.cpus_per_worker": 4})
    assert concurrent_trials(search(tmp_path), on_four, [{"CPU": 4.5}, {"CPU": 8.0}, {"CPU": 9.0}]) == 4
    with pytest.raises(ConfigError, match=r"a trial needs 4\.5 CPU on one node; the cluster's have 3 CPU and 0 GPU; 3"):
        concurrent_trials(search(tmp_path), on_four, [{"CPU": 3.0}, {"CPU": 3.0}])  # six in all, and no place for one
    with pytest.raises(ConfigError, match=r"a trial needs 0\.5 CPU and 1 GPU"):
        concurrent_trials(search(tmp_path), on_gpu, [{"CPU": 8.0}])
