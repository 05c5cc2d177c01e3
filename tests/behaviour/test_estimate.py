"""`pefomed-ray estimate` as a person runs it: answers without torch or Ray, and asks above a limit."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.tiny_runs import write_shards

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs" / "cpu" / "slake.yaml"


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As the command does, and then fails where torch or Ray have come along."""
    code = (
        "import sys\nfrom pefomed_ray.cli.main import main\n"
        "try:\n    main()\nfinally:\n    loaded = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("estimate"))


@pytest.fixture
def space(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    values = yaml.safe_load((ROOT / "search_spaces" / "slake-cpu.yaml").read_text())
    values |= {
        "trials": 6,
        "sampler": {"n_startup_trials": 4},
        "preset": str(PRESET),
        "overrides": values["overrides"] | {"data.shards": str(shards)},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_search_is_estimated_packed_and_not_and_nothing_is_written(space: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = run("estimate", str(space), "--device", "l4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30  # the promise of 5 s is for an idle machine
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "NVIDIA L4 24 GB"
    assert found["packed"]["adapters"] == 4
    assert found["packed"]["fits"]
    assert 0 < found["packed"]["cost_usd"][1] < found["alone"]["cost_usd"][1]
    assert "packed, 4 at once" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_above_the_limit_it_is_refused_unless_one_says_yes(shards: Path, tmp_path: Path) -> None:
    words = ["estimate", str(PRESET), f"data.shards={shards}", "--limit-usd", "0"]
    refused = run(*words, cwd=tmp_path)
    assert refused.returncode == 5
    assert "pass --yes" in refused.stderr
    assert run(*words, "--yes", cwd=tmp_path).returncode == 0
    assert run(*words[:-1], "100", cwd=tmp_path).returncode == 0


def test_what_cannot_be_packed_is_said(space: Path, tmp_path: Path) -> None:
    done = run("estimate", str(space), "space={training.batch_size: {choice: [16, 32]}}", "points=[]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not packed: trials that differ in training.batch_size" in " ".join(done.stderr.split())


def test_a_device_that_is_not_in_the_table_is_named(shards: Path, tmp_path: Path) -> None:
    done = run("estimate", str(PRESET), f"data.shards={shards}", "--device", "h300", cwd=tmp_path)
    assert done.returncode == 2
    assert "'h300' is not in the table of prices" in done.stderr
