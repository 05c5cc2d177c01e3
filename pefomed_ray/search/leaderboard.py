"""The leaderboard: a row for each trial, made from what the trial left in its folder.

<output>/trials/<trial id>/epochs.json     {"best": number from 1, "epochs": [...]}
<output>/trials/<trial id>/bundle/         the best epoch's, taken out of epochs/
<output>/leaderboard.json                  {"metric", "mode", "trials": [...]}, best first
<output>/leaderboard.csv                   the same, a column for each parameter
"""

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from scipy import stats

from pefomed_ray.artifacts.storage import read_json, write_bytes, write_json
from pefomed_ray.errors import PefomedError, original_error
from pefomed_ray.metrics.intervals import CONFIDENCE, Metric
from pefomed_ray.training.journal import EPOCHS_FILE
from pefomed_ray.training.trainer import publish

TRIALS_FOLDER = "trials"
LEADERBOARD_FILE = "leaderboard.json"
CSV_FILE = "leaderboard.csv"


@dataclass(frozen=True)
class EndedTrial:
    """What is known of a trial besides its folder."""

    id: str
    params: dict[str, Any]
    error: str | None = None
    """Why it failed (`reason_of`); None where it did not."""
    stopped: bool = False
    """Before it would have ended by itself, by the scheduler or for lack of time."""


@dataclass(frozen=True)
class TrialRow:
    """A line of the leaderboard."""

    trial: str
    state: str
    """`finished`, `stopped` (by the scheduler, or for lack of time) or `failed`."""
    value: float | None
    """The metric of the best epoch; None for a trial that failed. Of the best of several epochs, so rather too high."""
    n: int | None
    """Validation rows that `value` is the mean of: the first `validation.rows` of the split."""
    ci95: tuple[float, float] | None
    """Of `value`, where it is a share of n rows (`share_interval`); None for other metrics."""
    best_epoch: int | None
    """Counted from 1."""
    epochs: int
    """That were done."""
    params: dict[str, Any]
    trainable_parameters: int | None
    train_s: float
    """Seconds of training, validation and saving not among them."""
    bundle: str | None
    reason: str | None = None
    """Why it failed."""
    rescored: Metric | None = None
    """The metric over the whole validation split, of those trials that were asked again (`choice`)."""
    judged: Metric | None = None
    """A judge's mean verdict on those answers, in [0, 1], where one was asked (`choice.judge`)."""


def trial_row(output: Path, trial: EndedTrial, metric: str) -> TrialRow:
    """The row of a trial of the search in `output`; its best bundle is published.

    May be called again for the same trial.
    """
    folder = output / TRIALS_FOLDER / trial.id
    nothing: dict[str, Any] = {"best": 0, "epochs": []}
    record: dict[str, Any] = read_json(folder / EPOCHS_FILE) if (folder / EPOCHS_FILE).is_file() else nothing
    done: list[dict[str, Any]] = record["epochs"]
    failed = trial.error is not None or not done
    best = None if failed else done[record["best"] - 1]
    return TrialRow(
        trial=trial.id,
        state="failed" if failed else "stopped" if trial.stopped else "finished",
        value=best[metric] if best else None,
        n=int(best["n"]) if best else None,
        ci95=share_interval(best[metric], int(best["n"])) if best and metric == "exact_match" else None,
        best_epoch=record["best"] if best else None,
        epochs=len(done),
        params=trial.params,
        trainable_parameters=done[0]["trainable_parameters"] if done else None,
        train_s=sum(row["train_s"] for row in done),
        bundle=str(_published(folder, record["best"])) if best else None,
        reason=(trial.error or "reported nothing") if failed else None,
    )


def share_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n rows, after Wilson (1927).

    As if rows were independent: which answers were right is not kept each epoch, so rows about one image cannot be
    resampled together. It is then rather too narrow; those of re-scored trials (`choice`) are not.
    """
    interval = stats.binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def ranked(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Best first, of equals the one that trains less; failed trials last."""
    return sorted(
        rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.trainable_parameters or 0, row.trial)
    )


def write_leaderboard(output: Path, metric: str, rows: Sequence[TrialRow]) -> Path:
    """Write `leaderboard.json` and `leaderboard.csv` of ranked rows; answers the former's path."""
    path = output / LEADERBOARD_FILE
    write_json(path, {"metric": metric, "mode": "max", "trials": [asdict(row) for row in rows]})
    write_bytes(output / CSV_FILE, _csv(rows).encode())
    return path


def reason_of(error: BaseException) -> str:
    """Why a trial failed, in one line. Our own errors and torch's are quoted; of others only the kind is said, since
    nobody knows what an unforeseen message quotes."""
    cause = original_error(error)
    if isinstance(cause, RayActorError):
        return "its process was lost: killed, by the system where memory ran out most often, or with its node"
    if not isinstance(cause, PefomedError):
        cause = getattr(error, "cause", None) or error  # inside a RayTaskError
    quoted = isinstance(cause, PefomedError | RuntimeError) and str(cause)
    return f"{type(cause).__name__}: {str(cause).splitlines()[0]}" if quoted else type(cause).__name__


def _published(folder: Path, best: int) -> Path:
    bundle = folder / "bundle"
    if bundle.is_dir() and not (folder / "epochs" / f"{best:03d}").exists():
        return bundle  # by an earlier call
    shutil.rmtree(bundle, ignore_errors=True)  # of an epoch that was the best when the trial ran out of time
    return publish(folder).bundle


def _csv(rows: Sequence[TrialRow]) -> str:
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))  # a conditional parameter is not in every row
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: TrialRow) -> dict[str, Any]:
    """A row with columns for the ends of an interval and, last, one for each parameter."""
    values = asdict(row)
    params, again = values.pop("params"), {name: values.pop(name) or {} for name in ("rescored", "judged")}
    values |= _ends("ci95", values.pop("ci95"))
    for kind, metric in again.items():
        values |= {f"{kind}_{name}": metric.get(name) for name in ("value", "n")}
        values |= _ends(f"{kind}_ci95", metric.get("ci95"))
    return values | params


def _ends(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
