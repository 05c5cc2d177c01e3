"""How far a run is, as its newest checkpoint says it; what is in one, without the tensors, so without torch.

<output_dir>/checkpoints/00000120/checkpoint.json     see `checkpoint`
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.storage import read_json, sha256_file

FOLDER = "checkpoints"
STATE_FILE = "state.safetensors"
CHECKPOINT_FILE = "checkpoint.json"


@dataclass
class Progress:
    """How far a run is, and what it saw on the way."""

    step: int = 0
    """Optimizer steps taken."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """A row for each epoch that ended."""
    best: int = -1
    """Position in `epochs` of the best validation metric; the earlier of equals."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """A row for each step since the last epoch ended (`step.Step`)."""
    bad_steps: int = 0
    """Steps that were left out, in the whole run."""

    def end_epoch(self, row: dict[str, Any], metric: str) -> None:
        """One more epoch."""
        self.epochs.append(row)
        self.steps = []
        if self.best < 0 or row[metric] > self.epochs[self.best][metric]:
            self.best = len(self.epochs) - 1


def step_of_newest(output: Path) -> int:
    """Optimizer steps that `newest` would give back; 0 where there is none."""
    return progress_of_newest(output).step


def progress_of_newest(output: Path) -> Progress:
    """What `newest` would give back but for the tensors; that of a run's beginning where there is none."""
    for folder in folders(output):
        try:
            document = read_json(folder / CHECKPOINT_FILE)
            if sha256_file(folder / STATE_FILE) == document["sha256"]:
                return Progress(**document["progress"])
        except Exception:  # as in `newest`
            continue
    return Progress()


def folders(output: Path) -> list[Path]:
    """Of a run's checkpoints, newest first, by their step: clocks may be wrong."""
    folder = output / FOLDER
    found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name), reverse=True)
