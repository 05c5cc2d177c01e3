"""`search` killed outright at three moments, and gone on with; a second driver; a folder that is taken."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

WAIT_S = 400
TRIALS = 4
PRESET = """
name: preset
task: vqa
template: short
data: {{shards: {shards}}}
lora: {{dropout: 0.1}}
training: {{epochs: 2, batch_size: 8, micro_batch_size: 4, checkpoint_steps: 2}}
validation: {{rows: 4, max_new_tokens: 2, metric: rougeL}}
"""
SPACE = """
name: killed
preset: preset.yaml
space:
  lora.rank: {choice: [2, 4]}
  lora.alpha: {times: lora.rank, choice: [1, 2]}
  optimizer.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
points:
  - {lora.rank: 4, lora.alpha: 8, optimizer.learning_rate: 3.0e-3}
trials: 4
max_concurrent: 1
metric: rougeL
asha: {reduction_factor: 2}
sampler: {n_startup_trials: 2}
"""


def command(space: Path, output: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pefomed_ray", "search", str(space), f"output_dir={output}", *words, "--json"]


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, timeout=WAIT_S, capture_output=True, text=True, check=False)


def rows(found: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What the leaderboard says of each trial, seconds left out."""
    board = json.loads(Path(found["leaderboard"]).read_text())["trials"]
    return {
        row["trial"]: (row["state"], row["value"], row["best_epoch"], row["epochs"], row["params"]) for row in board
    }


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    code = (
        "import sys; from pefomed_ray.data.phantom import write_slake; from pathlib import Path; "
        "write_slake(Path(sys.argv[1]), images=13, questions_per_image=3, seed=5, splits=(9, 2, 2))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "corpus")], check=True, timeout=WAIT_S)
    prepare = [sys.executable, "-m", "pefomed_ray", "data", "prepare", str(folder / "corpus"), str(folder / "shards")]
    subprocess.run(prepare, check=True, timeout=WAIT_S, capture_output=True)
    (folder / "preset.yaml").write_text(PRESET.format(shards=folder / "shards"))
    (folder / "space.yaml").write_text(SPACE)
    return folder / "space.yaml"


@pytest.fixture(scope="module")
def whole(space: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a search answers that nothing befell."""
    done = ask(*command(space, tmp_path_factory.mktemp("whole") / "search"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def begin(
    space: Path, output: Path, until: Callable[[], bool], stderr: IO[bytes] | int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command(space, output), stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def gone(group: int) -> bool:
    """Whether all processes of the group have ended, or do so soon."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


def in_its_first_steps(output: Path) -> bool:
    steps = output / "trials/0000/steps.jsonl"
    return steps.is_file() and steps.stat().st_size > 0


def between_two_epochs(output: Path) -> bool:
    return (output / "trials/0001/epochs.json").is_file()


def drawing_its_last(output: Path) -> bool:
    """The row is there, its trial is not."""
    with sqlite3.connect(f"file:{output / 'study.db'}?mode=ro", uri=True) as study:
        return bool(study.execute("SELECT COUNT(*) FROM trials").fetchone()[0] == TRIALS)


def test_a_search_that_somebody_interrupts(space: Path, tmp_path: Path) -> None:
    """As by Ctrl-C on a terminal: it ends, chooses nobody, and says how to go on."""
    output = tmp_path / "search"
    with open(tmp_path / "stderr.txt", "wb") as stderr:
        process = begin(space, output, lambda: between_two_epochs(output), stderr)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) != 0
    said = (tmp_path / "stderr.txt").read_text()
    assert f"to go on:\n  pefomed-ray search {space} output_dir={output} --resume" in said
    assert not (output / "leaderboard.json").exists()
    assert gone(process.pid)
    done = ask(*command(space, output, "trials=2", "--resume"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["trials"] == 2


@pytest.mark.parametrize("moment", [in_its_first_steps, between_two_epochs, drawing_its_last])
def test_a_driver_killed_outright(
    space: Path, whole: dict[str, Any], tmp_path: Path, moment: Callable[[Path], bool]
) -> None:
    output = tmp_path / "search"
    study = output / "study.db"
    process = begin(space, output, lambda: study.is_file() and study.stat().st_size > 100_000 and moment(output))
    os.killpg(process.pid, signal.SIGSTOP)  # at this very moment
    second = ask(*command(space, output, "--resume"))
    assert second.returncode == 2
    assert f"already running as process {process.pid} on " in second.stderr
    os.killpg(process.pid, signal.SIGKILL)  # the driver and the Ray it started
    process.wait(timeout=30)
    assert not (output / "leaderboard.json").exists()
    begun = len(list(output.glob("trials/*")))
    snapshots = [*output.glob("tune-1/*.json"), *output.glob("tune-1/*.pkl")]
    for snapshot in snapshots:
        snapshot.write_bytes(snapshot.read_bytes()[:20])  # what Tune remembers is torn, and is not asked
    refused = ask(*command(space, output))
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = ask(*command(space, output, "--resume"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] == TRIALS
    assert found["failed"] == 0
    assert rows(found) == rows(whole)
    assert found["best"]["params"] == whole["best"]["params"]
    (state,) = output.glob("tune-2/experiment_state-*.json")
    begun_later = len(json.loads(state.read_text())["trial_data"])
    assert TRIALS <= begun + begun_later <= TRIALS + 1
    assert snapshots
