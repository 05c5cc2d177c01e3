"""The leaderboard: a row for each trial, made from what the trial left in its folder.

<output>/trials/<trial id>/epochs.json     {"best": number from 1, "epochs": [...]}
<output>/trials/<trial id>/bundle/         the best epoch's, taken out of epochs/
<output>/leaderboard.json                  {"metric", "mode", "trials": [...]}, best first
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.errors import PefomedError, original_error
from pefomed_ray.training.journal import EPOCHS_FILE
from pefomed_ray.training.trainer import publish

TRIALS_FOLDER = "trials"
LEADERBOARD_FILE = "leaderboard.json"


@dataclass(frozen=True)
class EndedTrial:
    """What is known of a trial besides its folder."""

    id: str
    params: dict[str, Any]
    error: str | None = None
    """Why it failed (`reason_of`); None where it did not."""


@dataclass(frozen=True)
class TrialRow:
    """A line of the leaderboard. `value` is the best epoch's metric; None for a trial that reported nothing."""

    trial: str
    state: str
    """`finished`, `stopped` (by ASHA, before its last epoch) or `failed`."""
    value: float | None
    best_epoch: int | None
    epochs: int
    params: dict[str, Any]
    bundle: str | None
    reason: str | None = None


def trial_row(output: Path, trial: EndedTrial, metric: str, epochs: int) -> TrialRow:
    """The row of a trial of the search in `output`, whose trials have `epochs` epochs; its best bundle is published.

    May be called again for the same trial.
    """
    folder = output / TRIALS_FOLDER / trial.id
    record = read_json(folder / EPOCHS_FILE) if (folder / EPOCHS_FILE).is_file() else {"epochs": []}
    done = len(record["epochs"])
    if trial.error is not None or not done:
        return TrialRow(trial.id, "failed", None, None, done, trial.params, None, trial.error or "reported nothing")
    return TrialRow(
        trial=trial.id,
        state="finished" if done >= epochs else "stopped",
        value=record["epochs"][record["best"] - 1][metric],
        best_epoch=record["best"],
        epochs=done,
        params=trial.params,
        bundle=str(_published(folder, record["best"])),
    )


def ranked(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Best first; failed trials last."""
    return sorted(rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.trial))


def write_leaderboard(output: Path, metric: str, rows: list[TrialRow]) -> Path:
    """Write `leaderboard.json` of ranked rows."""
    path = output / LEADERBOARD_FILE
    write_json(path, {"metric": metric, "mode": "max", "trials": [asdict(row) for row in rows]})
    return path


def reason_of(error: BaseException) -> str:
    """One line for people. Our own errors and torch's are quoted; of others only the kind is said, since nobody knows
    what an unforeseen message quotes."""
    cause = original_error(error)
    if not isinstance(cause, PefomedError):
        cause = getattr(error, "cause", None) or error  # inside a RayTaskError
    quoted = isinstance(cause, PefomedError | RuntimeError) and str(cause)
    return f"{type(cause).__name__}: {str(cause).splitlines()[0]}" if quoted else type(cause).__name__


def _published(folder: Path, best: int) -> Path:
    bundle = folder / "bundle"
    if bundle.is_dir() and not (folder / "epochs" / f"{best:03d}").exists():
        return bundle  # by an earlier call
    return publish(folder).bundle
