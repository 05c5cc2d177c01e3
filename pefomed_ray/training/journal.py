"""What a run writes about itself as it goes: a line a step, the epochs, TensorBoard's events. Rank 0 alone keeps it.

The numbers of TensorBoard's events are told to the trackers of `report_to` too (`trackers`).

<output_dir>/steps.jsonl     {"step", "loss", "grad_norm", "learning_rate", "answer_tokens", "step_s", ...}
<output_dir>/epochs.json     {"best": number from 1, "epochs": [...]}
<output_dir>/tensorboard/    the same for `tensorboard --logdir`
"""

import json
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from pefomed_ray.artifacts.storage import write_bytes, write_json
from pefomed_ray.training.order import TrainingOrder
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.trackers import Trackers

STEPS_FILE = "steps.jsonl"
EPOCHS_FILE = "epochs.json"
NOT_PLOTTED = frozenset({"n", "trainable_parameters", "parameters", "steps", "answer_tokens"})


class Journal:
    """Opened at the step where a run begins or goes on: what was written of later steps is taken back."""

    def __init__(self, output: Path, order: TrainingOrder, progress: Progress, trackers: Trackers) -> None:
        self._output = output
        self._order = order
        self._trackers = trackers
        write_bytes(output / STEPS_FILE, b"".join(_lines_until(output / STEPS_FILE, progress.step)))
        self._steps = open(output / STEPS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._events = SummaryWriter(str(output / "tensorboard"), purge_step=progress.step + 1)

    def step(self, number: int, row: dict[str, Any]) -> None:
        """A step that was taken, counted from 1."""
        rates = {
            "tokens_per_s": row["answer_tokens"] / row["step_s"],
            "rows_per_s": self._order.batch_size / row["step_s"],
        }
        line = {"step": number, "of": self._order.total_steps, **row, **rates, **_memory()}
        self._steps.write(json.dumps(line) + "\n")
        self._steps.flush()
        self._plot("train", number, line)

    def epoch(self, progress: Progress) -> None:
        """An epoch that ended: the last of `progress`."""
        write_json(self._output / EPOCHS_FILE, {"best": progress.best + 1, "epochs": progress.epochs})
        self._plot("epoch", progress.step, progress.epochs[-1])
        self._events.flush()

    def close(self) -> None:
        """The run has ended, and everything is on disk."""
        self._steps.close()
        self._events.close()
        self._trackers.close()

    def _plot(self, group: str, step: int, row: dict[str, Any]) -> None:
        numbers = {
            name: value for name, value in row.items() if isinstance(value, int | float) and name not in NOT_PLOTTED
        }
        for name, value in numbers.items():
            self._events.add_scalar(f"{group}/{name}", value, step)
        self._trackers.log(group, step, numbers)


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Lines of the steps up to one; a torn last line is dropped."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError):
            continue
    return kept


def _memory() -> dict[str, float]:
    """The most that this rank's GPU has held, in GiB."""
    if not torch.cuda.is_available():
        return {}
    return {"max_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
