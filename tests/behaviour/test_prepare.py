"""`data prepare` as a process that is killed, and on a cluster that loses a node: the same shards in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from pefomed_ray.artifacts.storage import sha256_file

pytestmark = pytest.mark.long

OPTIONS = ["shard_bytes=1500000", "validation_fraction=0"]
WAIT_S = 120


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eighty images of noise, two rows each: some forty shards."""
    root = tmp_path / "corpus"
    root.mkdir()
    for number in range(80):
        noise = Image.frombytes("RGB", (512, 512), random.Random(number).randbytes(3 * 512 * 512))
        noise.save(root / f"i{number}.png", compress_level=1)
    rows = [{"id": f"q{n}", "query": "?", "response": "Left", "image": f"i{n % 80}.png"} for n in range(160)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command(corpus: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "pefomed_ray", "data", "prepare", str(corpus), str(output), *OPTIONS, "--json"]


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_killed_outright_goes_on_to_the_same_shards(corpus: Path, tmp_path: Path) -> None:
    subprocess.run(command(corpus, tmp_path / "clean"), check=True, timeout=WAIT_S, capture_output=True)
    results = tmp_path / ".out.unfinished/.unfinished"
    process = subprocess.Popen(
        command(corpus, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and not list(results.glob("train-*.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the driver and the Ray it started
    process.wait(timeout=30)
    finished = list(results.glob("train-*.json"))
    assert 0 < len(finished) < 40
    assert not (tmp_path / "out").exists()
    again = subprocess.run(
        command(corpus, tmp_path / "out"), check=True, timeout=WAIT_S, capture_output=True, text=True
    )
    assert json.loads(again.stdout.splitlines()[-1])["rows"]["train"] == 160
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


LOSING_A_NODE = """
    import sys, threading, time
    from pathlib import Path
    from pefomed_ray.cli.environment import set_defaults
    set_defaults()
    import ray
    from ray.cluster_utils import Cluster
    from pefomed_ray.data.options import DataOptions
    from pefomed_ray.data.shards import prepare
    corpus, output = sys.argv[1:]
    arguments = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    lost = []
    def on_progress(done, total):
        if not lost:
            lost.append(done)
            cluster.remove_node(node, allow_graceful=False)
    prepare(corpus, output, DataOptions(shard_bytes=1500000, validation_fraction=0), on_progress)
    print("lost a node after", lost[0], "rows")
    ray.shutdown()
    cluster.shutdown()
"""


def test_a_cluster_that_loses_a_node_writes_the_same_shards(corpus: Path, tmp_path: Path) -> None:
    subprocess.run(command(corpus, tmp_path / "clean"), check=True, timeout=WAIT_S, capture_output=True)
    code = textwrap.dedent(LOSING_A_NODE)
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lost a node after" in done.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
