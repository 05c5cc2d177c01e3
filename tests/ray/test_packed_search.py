"""Packed trials under a real Ray Tune: what plain ones come to, whoever is killed meanwhile."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pefomed_ray.config import SearchConfig, build_config
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.planner import Plan, plan_packs
from pefomed_ray.search.space import trial_config
from pefomed_ray.search.study import SearchResult, run_search
from tests.tiny_runs import weights

pytestmark = pytest.mark.ray

TRIALS = 4
EPOCHS = 3


def values(shards: Path, features: Path | None = None) -> dict[str, Any]:
    return {
        "name": "preset",
        "task": "vqa",
        "template": "short",
        "data": {"shards": str(shards)} | ({"feature_cache": str(features)} if features else {}),
        "lora": {"dropout": 0.05},
        "training": {"epochs": EPOCHS, "batch_size": 8, "micro_batch_size": 4, "checkpoint_steps": 2},
        "validation": {"rows": 5, "max_new_tokens": 4},
    }


def search(output: Path, **changes: Any) -> SearchConfig:
    found = {
        "name": "test",
        "preset": "unused",
        "output_dir": str(output),
        "space": {
            "lora.rank": {"choice": [2, 4, 8]},
            "lora.alpha": {"times": "lora.rank", "choice": [0.5, 2]},
            "optimizer.learning_rate": {"loguniform": [1e-4, 3e-3]},
        },
        "trials": TRIALS,
        "max_concurrent": TRIALS,
        "scheduler": "none",
        "choice": {"rescore": 1},
    }
    return build_config(SearchConfig, found | changes, "test")


@pytest.fixture(scope="module")
def packed(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A search that nothing befell."""
    return run_search(search(tmp_path_factory.mktemp("packed") / "s", packing="on"), values(phantom_shards))


def last(result: SearchResult, trial: str) -> torch.Tensor:
    return weights(result.output / f"trials/{trial}/checkpoints/{EPOCHS * 4:08d}")


@pytest.mark.long
def test_packed_trials_come_to_what_plain_ones_do(packed: SearchResult, phantom_shards: Path, tmp_path: Path) -> None:
    plain = run_search(search(tmp_path / "s", packing="off"), values(phantom_shards, packed.output / "features"))
    by_trial = {row.trial: row for row in packed.rows}
    assert len(by_trial) == len(plain.rows) == TRIALS
    for row in plain.rows:
        same = by_trial[row.trial]
        assert (same.params, same.state, same.epochs) == (row.params, row.state, row.epochs)
        assert same.trainable_parameters == row.trainable_parameters
        assert (last(packed, row.trial) - last(plain, row.trial)).abs().max() < 1e-5
    steps = (packed.output / "trials/0000/steps.jsonl").read_text().splitlines()
    assert json.loads(steps[0])["packed"] > 1
    assert len(list(packed.output.glob("trials/*/steps.jsonl"))) == TRIALS


def processes(name: str) -> list[psutil.Process]:
    """Of this test's Ray."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if name in "".join(process.info["cmdline"] or []) and _is_ours(process):
            found.append(process)
    return found


def _is_ours(process: psutil.Process) -> bool:
    try:
        return any(parent.pid == psutil.Process().pid for parent in process.parents())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
@pytest.mark.parametrize("victim", ["ray::Host", "ray::ImplicitFunc"])
def test_a_search_survives_the_loss_of_a_process(
    victim: str, packed: SearchResult, phantom_shards: Path, tmp_path: Path
) -> None:
    """A host, or a trial (so Tune calls it), in the middle of an epoch: all end, with the weights of those that
    nothing befell."""
    output, killed, over = tmp_path / "s", [], threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not killed and not over.is_set():
            lines = sum(len(path.read_bytes().splitlines()) for path in output.glob("trials/*/steps.jsonl"))
            if lines >= 3 and (found := processes(victim)):
                found[0].kill()
                killed.append(found[0].pid)
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    result = run_search(search(output, packing="on"), values(phantom_shards, packed.output / "features"))
    over.set()
    thread.join()
    assert killed
    assert {row.state for row in result.rows} == {"finished"}
    for row in result.rows:
        # Not the very same bits: it may have been packed with others than before.
        assert (last(result, row.trial) - last(packed, row.trial)).abs().max() < 1e-5


def test_hosts_and_places_follow_from_the_cluster(phantom_shards: Path, tmp_path: Path) -> None:
    config = trial_config(values(phantom_shards), {})
    sixteen = search(tmp_path, trials=16, max_concurrent=None)
    assert plan_packs(sixteen, config, [{"CPU": 2.0}]) == Plan(hosts=2, places=5, largest_rank=8)  # ten are random
    thirty = search(tmp_path, trials=30, max_concurrent=None)
    assert plan_packs(thirty, config, [{"CPU": 2.0}]) == Plan(2, 8, 8)
    assert plan_packs(search(tmp_path, trials=16, max_concurrent=16), config, [{"CPU": 2.0}]) == Plan(2, 8, 8)
    assert plan_packs(search(tmp_path, trials=1, max_concurrent=None), config, [{"CPU": 64.0}]) == Plan(1, 1, 8)
    on_gpu = trial_config(values(phantom_shards), {"resources.use_gpu": True, "resources.workers": 2})
    assert plan_packs(sixteen, on_gpu, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]) == Plan(2, 5, 8)
    with pytest.raises(ConfigError, match=r"needs 1 GPU and 1 CPU for each of its resources\.workers=2"):
        plan_packs(sixteen, on_gpu, [{"CPU": 8.0, "GPU": 1.0}])
    # What two hosts would leave is nothing, and a trial asks for something: one fewer.
    assert (
        plan_packs(
            sixteen, trial_config(values(phantom_shards), {"resources.cpus_per_worker": 0.6}), [{"CPU": 2.0}]
        ).hosts
        == 1
    )
