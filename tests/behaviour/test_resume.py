"""`train` killed outright, and gone on with by the command that it would have printed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

WAIT_S = 300
CHECKPOINT_STEPS = 2
CONFIG = """
name: killed
task: vqa
template: short
data: {{shards: {shards}}}
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
optimizer: {{learning_rate: 1.0e-3}}
training: {{epochs: 3, batch_size: 8, micro_batch_size: 4, checkpoint_steps: {checkpoint_steps}}}
validation: {{rows: 4, max_new_tokens: 2}}
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pefomed_ray", "train", *words, "--json"]


def last_state(output: Path) -> torch.Tensor:
    """Trained weights and AdamW's moments after the last of twelve steps."""
    tensors = load_file(output / "checkpoints/00000012/state.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    code = (
        "import sys; from pefomed_ray.data.phantom import write_slake; from pathlib import Path; "
        "write_slake(Path(sys.argv[1]), images=13, questions_per_image=3, seed=5, splits=(9, 2, 2))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "corpus")], check=True, timeout=WAIT_S)
    prepare = [sys.executable, "-m", "pefomed_ray", "data", "prepare", str(folder / "corpus"), str(folder / "shards")]
    subprocess.run(prepare, check=True, timeout=WAIT_S, capture_output=True)
    (folder / "preset.yaml").write_text(CONFIG.format(shards=folder / "shards", checkpoint_steps=CHECKPOINT_STEPS))
    return folder / "preset.yaml"


@pytest.fixture(scope="module")
def whole(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing befell."""
    output = tmp_path_factory.mktemp("whole") / "run"
    words = command(str(preset), f"output_dir={output}")
    subprocess.run(words, check=True, timeout=WAIT_S, capture_output=True)
    return output


def begin(preset: Path, output: Path, step: int) -> subprocess.Popen[str]:
    """A run that has taken so many steps of twelve."""
    process = subprocess.Popen(
        command(str(preset), f"output_dir={output}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + WAIT_S
    steps = output / "steps.jsonl"
    while time.monotonic() < deadline and not (steps.is_file() and len(steps.read_bytes().splitlines()) >= step):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    return process


def taken(output: Path) -> int:
    """Steps, so far."""
    return len((output / "steps.jsonl").read_bytes().splitlines())


def goes_on(output: Path, whole: Path, before: int) -> None:
    """To the very end of the other run, with no more steps done again than lie between two checkpoints.

    `before`: steps taken when it was killed. A rank that outlives its driver may have taken some more.
    """
    again = subprocess.run(
        command(str(output / "run.yaml"), "--resume"), timeout=WAIT_S, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout.splitlines()[-1])
    gone_on = re.search(r"going on after step (\d+)", again.stderr)
    assert int(gone_on[1] if gone_on else 0) >= before - CHECKPOINT_STEPS
    assert found["epochs"] == 3
    assert Path(found["report"]).is_file()
    assert torch.equal(last_state(output), last_state(whole))


@pytest.mark.parametrize("step", [1, 6, 11])
def test_a_driver_killed_outright(preset: Path, whole: Path, tmp_path: Path, step: int) -> None:
    output = tmp_path / "run"
    process = begin(preset, output, step)
    before = taken(output)
    os.killpg(process.pid, signal.SIGKILL)  # the driver and the Ray it started
    process.wait(timeout=30)
    assert not (output / "bundle").exists()
    for snapshot in output.rglob("*snapshot*.json"):
        snapshot.write_bytes(snapshot.read_bytes()[:20])  # what Ray remembers is torn, and of no use anyway
    refused = subprocess.run(
        command(str(output / "run.yaml")), timeout=WAIT_S, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2  # the folder is taken
    goes_on(output, whole, before)


@pytest.mark.parametrize("step", [3, 10])
def test_a_killed_controller(preset: Path, whole: Path, tmp_path: Path, step: int) -> None:
    output = tmp_path / "run"
    process = begin(preset, output, step)
    before = taken(output)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "TrainController" in "".join(child.cmdline()):
            child.kill()
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "the process that leads the run was lost" in said
    assert "--resume" in said
    goes_on(output, whole, before)
