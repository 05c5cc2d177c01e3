"""What workers leave for whoever starts them again: why to stop, what else went wrong, how much fits into memory.

<output_dir>/stopped.json        {"kind", "message"}: an error that another try would meet again
<output_dir>/failures.jsonl      {"rank", "error"}: one that it may not; a killed worker leaves none itself
<output_dir>/micro_batch.json    {"micro_batch_size"}: what is left of the config's after running out of memory
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pefomed_ray import errors
from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.errors import PefomedError

if TYPE_CHECKING:  # a packed trial's process has no use for it
    import torch

STOPPED_FILE = "stopped.json"
FAILURES_FILE = "failures.jsonl"
MICRO_BATCH_FILE = "micro_batch.json"


def record_stop(output: Path, error: PefomedError) -> None:
    """Say why the run cannot go on."""
    write_json(output / STOPPED_FILE, {"kind": type(error).__name__, "message": str(error)})


def record_failure(output: Path, rank: int, error: Exception) -> None:
    """Say why a worker gives up, for people: Ray starts it again.

    Of torch's errors (a collective that timed out, a peer that is gone) the first line; of others only the kind, since
    nobody knows what an unforeseen message quotes.
    """
    message = f": {str(error).splitlines()[0]}" if isinstance(error, RuntimeError) and str(error) else ""
    with open(output / FAILURES_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"rank": rank, "error": f"{type(error).__name__}{message}"}) + "\n")


def is_stopped(output: Path) -> bool:
    """Whether some worker said so."""
    return (output / STOPPED_FILE).is_file()


def raise_stop(output: Path) -> None:
    """Raise what was recorded, if anything was."""
    if is_stopped(output):
        found = read_json(output / STOPPED_FILE)
        raise getattr(errors, found["kind"])(found["message"])


def clear_stop(output: Path) -> None:
    """Before a run goes on."""
    (output / STOPPED_FILE).unlink(missing_ok=True)


def that_fits(config: TrainConfig, output: Path) -> TrainConfig:
    """The config with the micro-batch that an earlier try was left with; the global batch is the same."""
    path = output / MICRO_BATCH_FILE
    size = min(read_json(path)["micro_batch_size"], config.training.micro_batch_size) if path.is_file() else None
    return _with_micro_batch(config, size) if size else config


def halve(config: TrainConfig, output: Path, error: "torch.OutOfMemoryError") -> TrainConfig:
    """The config with half the micro-batch, written down for the next try.

    Raises PefomedError where there is nothing to halve, or the global batch would not come out even.
    """
    size = config.training.micro_batch_size
    if size % 2:
        raise PefomedError(
            f"out of memory with training.micro_batch_size {size}, which cannot be halved: {error}. Take "
            "training.gradient_checkpointing=true, base.dtype=bfloat16, or resources.strategy=fsdp with more workers"
        ) from None
    write_json(output / MICRO_BATCH_FILE, {"micro_batch_size": size // 2})
    return _with_micro_batch(config, size // 2)


def _with_micro_batch(config: TrainConfig, size: int) -> TrainConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": size})})
