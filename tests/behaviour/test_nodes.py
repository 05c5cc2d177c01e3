"""A cluster that loses a node, with notice and without: the run ends with the adapter of one that lost nothing."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

WAIT_S = 420
STEPS = 120
CONFIG = """
name: nodes
task: vqa
template: short
data: {{shards: {shards}}}
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
optimizer: {{learning_rate: 1.0e-4}}
training: {{epochs: 1, batch_size: 2, micro_batch_size: 1, checkpoint_steps: {checkpoint_steps}}}
validation: {{rows: 4, max_new_tokens: 2}}
resources: {{workers: 2, strategy: fsdp, cpus_per_worker: 2, collective_timeout_s: 30, max_failures: {max_failures}}}
"""

ON_NODES = """
    import json, os, sys, threading, time
    from pathlib import Path
    import psutil
    from pefomed_ray.cli.environment import set_defaults
    set_defaults()
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30"
    import ray
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2
    from pefomed_ray.config import TrainConfig, load_config
    from pefomed_ray.training.trainer import train

    preset, output, what, at = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    overrides = sys.argv[5:]
    NOTICE_S = 8

    def ranks(node):
        found = []
        for process in psutil.Process(node.raylet_pid()).children(recursive=True):
            try:
                found += [process] if "RayTrainWorker" in "".join(process.cmdline()) else []
            except psutil.NoSuchProcess:
                pass
        return found

    def steps():
        path = output / "steps.jsonl"
        return len(path.read_bytes().splitlines()) if path.is_file() else 0

    def wait_for(condition):
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline and training.is_alive(), failed or "waited in vain"
            time.sleep(0.002)

    def add_node(cpus):
        node = cluster.add_node(num_cpus=cpus)
        node.raylet_pid = lambda: node.all_processes["raylet"][0].process.pid
        return node

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    nodes = [add_node(2), add_node(2)] if what == "fewer" else [add_node(4)]
    config = load_config(TrainConfig, preset, [f"output_dir={output}", *overrides])
    result, failed, most, lost = [], [], 0, 0

    def fit():
        try:
            result.append(train(config))
        except BaseException as error:
            failed.append(repr(error))

    training = threading.Thread(target=fit)
    training.start()
    wait_for(lambda: steps() >= at)
    victim = next(node for node in reversed(nodes) if ranks(node))
    victims = ranks(victim)
    if what == "preempted":
        nodes.append(add_node(4))
        deadline_ms = int((time.time() + NOTICE_S) * 1000)
        gcs = ray._raylet.GcsClient(address=cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, message = gcs.drain_node(victim.node_id, reason, "spot", deadline_ms)
        assert accepted, message
        end = time.monotonic() + NOTICE_S
        while time.monotonic() < end:
            most = max(most, steps())
            time.sleep(0.002)
    most = max(most, steps())
    cluster.remove_node(victim, allow_graceful=False)
    psutil.wait_procs(victims, timeout=20)
    if what == "killed":
        nodes.append(add_node(4))
    later = []
    while training.is_alive():
        now = steps()
        if now < most and not lost:
            lost = most - now
        most = max(most, now)
        later = max(later, [rank.pid for node in nodes if node is not victim for rank in ranks(node)], key=len)
        time.sleep(0.01)
    (output.parent / "found.json").write_text(json.dumps({
        "failed": failed,
        "bundle": str(result[0].bundle) if result else None,
        "killed": len(victims),
        "left": sum(process.is_running() for process in victims),
        "ranks_after": len(later),
        "steps_lost": lost,
        "loss": result[0].epochs[0]["train_loss"] if result else None,
    }))
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    code = (
        "import sys; from pefomed_ray.data.phantom import write_slake; from pathlib import Path; "
        "write_slake(Path(sys.argv[1]), images=84, questions_per_image=3, seed=5, splits=(80, 2, 2))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "corpus")], check=True, timeout=WAIT_S)
    prepare = [sys.executable, "-m", "pefomed_ray", "data", "prepare", str(folder / "corpus"), str(folder / "shards")]
    subprocess.run(prepare, check=True, timeout=WAIT_S, capture_output=True)
    return folder / "shards"


def weights(bundle: str) -> torch.Tensor:
    tensors = load_file(Path(bundle) / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "preset.yaml").write_text(CONFIG.format(shards=shards, checkpoint_steps=5, max_failures=0))
    words = ["train", str(folder / "preset.yaml"), f"output_dir={folder / 'run'}", "resources.cpus_per_worker=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "pefomed_ray", *words, "--json"],
        check=True, timeout=WAIT_S, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    epochs = json.loads((folder / "run" / "epochs.json").read_text())["epochs"]
    assert epochs[0]["steps"] == STEPS
    return {"bundle": found["bundle"], "loss": epochs[0]["train_loss"]}


def losing_a_node(
    what: str, shards: Path, folder: Path, *overrides: str, step: int = 17, **values: int
) -> dict[str, Any]:
    """What came of a run whose node goes after so many steps."""
    (folder / "preset.yaml").write_text(CONFIG.format(shards=shards, **values))
    words = [str(folder / "preset.yaml"), str(folder / "run"), what, str(step), *overrides]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_NODES), *words],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert not found["failed"]
    assert found["left"] == 0
    return found


@pytest.mark.parametrize("step", [1, 17, 113])
def test_a_killed_node(unbroken: dict[str, Any], shards: Path, tmp_path: Path, step: int) -> None:
    found = losing_a_node("killed", shards, tmp_path, step=step, checkpoint_steps=5, max_failures=3)
    assert found["killed"] == found["ranks_after"] == 2
    assert 1 <= found["steps_lost"] <= 5
    assert torch.equal(weights(found["bundle"]), weights(unbroken["bundle"]))


def test_a_node_that_is_taken_away_with_notice(unbroken: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    """Without the notice all steps would be lost: there is no other checkpoint. It is not counted as a failure."""
    found = losing_a_node("preempted", shards, tmp_path, checkpoint_steps=1000, max_failures=0)
    assert found["killed"] == found["ranks_after"] == 2
    assert found["steps_lost"] <= 1
    assert torch.equal(weights(found["bundle"]), weights(unbroken["bundle"]))


def test_fewer_workers_go_on_where_a_node_is_not_replaced(
    unbroken: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    found = losing_a_node("fewer", shards, tmp_path, "resources.min_workers=1", checkpoint_steps=5, max_failures=3)
    assert (found["killed"], found["ranks_after"]) == (1, 1)
    assert (weights(found["bundle"]) - weights(unbroken["bundle"])).abs().max() < 1e-5
    assert found["loss"] == pytest.approx(unbroken["loss"], abs=1e-6)
