"""How a search is shown: a live table of its trials on a terminal, a line an epoch elsewhere, and the leaderboard."""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from pefomed_ray.cli.console import err, percent, say, table
from pefomed_ray.cli.progress import counted_lines

if TYPE_CHECKING:
    from pefomed_ray.search.leaderboard import TrialRow

MOST_ROWS = 20
"""Of the live table; the other trials, the worst, are counted below it."""


@contextmanager
def shown_trials(metric: str, epochs: int, of: int) -> "Iterator[TrialLines | TrialTable]":
    """Yield what shows each report of a search of `of` trials, each of at most `epochs` epochs, and its re-scoring."""
    if not err.is_terminal:
        yield TrialLines(metric)
        return
    trials = TrialTable(metric, epochs, of)
    with Live(get_renderable=trials.render, console=err, refresh_per_second=2, transient=True):
        yield trials


@contextmanager
def resumable(space: str, words: Sequence[str]) -> Iterator[None]:
    """Say how to go on with the search where somebody interrupts it."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; to go on:\n  pefomed-ray search {shlex.join([space, *words])} --resume")
        raise


class TrialLines:
    """A line for each report of a trial, called with (trial id, its parameters, the epoch's row)."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.rescoring = counted_lines("re-scoring on the whole validation split", "answers")
        self.judging = counted_lines("asking the judge about these answers", "questions")

    def __call__(self, trial: str, params: dict[str, Any], row: dict[str, Any]) -> None:
        say(
            f"trial {trial} epoch {row['training_iteration']}: "
            f"{self.metric} {percent(row[self.metric])} {describe(params)}"
        )

    def failed(self, trial: str, params: dict[str, Any], reason: str) -> None:
        """A trial came to no result."""
        say(f"trial {trial} failed: {reason} ({describe(params)})")


class TrialTable:
    """The trials that have reported, the best first, with the latest of each."""

    def __init__(self, metric: str, epochs: int, of: int) -> None:
        self.metric = metric
        self.epochs = epochs
        self.of = of
        self._began = time.monotonic()
        self._latest: dict[str, dict[str, Any]] = {}
        self._best: dict[str, float] = {}
        self._params: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        self._rescoring: str | None = None

    def __call__(self, trial: str, params: dict[str, Any], row: dict[str, Any]) -> None:
        self._latest[trial] = row
        self._params[trial] = params
        self._best[trial] = max(row[self.metric], self._best.get(trial, 0.0))

    def failed(self, trial: str, params: dict[str, Any], reason: str) -> None:
        """A trial came to no result."""
        self._failed[trial] = f"{reason} ({describe(params)})"

    def rescoring(self, done: int, total: int) -> None:
        """How many answers of a trial that is re-scored are there."""
        self._rescoring = f"re-scoring on the whole validation split: {done}/{total} answers"

    def judging(self, done: int, total: int) -> None:
        """How many questions about them the judge has answered."""
        self._rescoring = f"asking the judge about these answers: {done}/{total} questions"

    def render(self) -> Table:
        """The table as it stands."""
        elapsed_s = int(time.monotonic() - self._began)
        ranked = sorted(self._latest.keys() - self._failed.keys(), key=lambda trial: (-self._best[trial], trial))
        best = percent(self._best[ranked[0]] if ranked else None)
        grid = Table(
            title=f"{len(self._latest.keys() | self._failed.keys())} of {self.of} trials, best {self.metric} {best}, "
            f"{elapsed_s // 3600}:{elapsed_s // 60 % 60:02d}:{elapsed_s % 60:02d}",
            title_justify="left",
        )
        for column in ("trial", "state", "epoch", self.metric, "best", "parameters"):
            grid.add_column(column, justify="left" if column in ("trial", "state", "parameters") else "right")
        for trial in ranked[:MOST_ROWS]:
            grid.add_row(*self._cells(trial), style="bold" if trial == ranked[0] else None)
        for trial, reason in self._failed.items():
            grid.add_row(trial, "failed", "", "", "", reason, style="dim")
        others = f"and {len(ranked) - MOST_ROWS} others, none of them better" if len(ranked) > MOST_ROWS else None
        grid.caption = self._rescoring or others
        return grid

    def _cells(self, trial: str) -> Sequence[str]:
        row = self._latest[trial]
        epoch = row["training_iteration"]
        # Tune says `done` with the report that it stops a trial at.
        state = "finished" if epoch >= self.epochs else "stopped" if row.get("done") else "running"
        values = (percent(row[self.metric]), percent(self._best[trial]))
        return trial, state, f"{epoch}/{self.epochs}", *values, describe(self._params[trial])


def describe(params: dict[str, Any]) -> str:
    """Parameters in a few words: `rank=8 alpha=16 learning_rate=0.0021`."""
    return " ".join(
        f"{key.rsplit('.', 1)[-1]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in params.items()
    )


def leaderboard(rows: "list[TrialRow]", metric: str) -> None:
    """The trials, best first."""
    columns = (
        "trial",
        "state",
        metric,
        "95 % interval",
        "whole split",
        "judge",
        "best epoch",
        "epochs",
        "trained",
        "parameters",
    )
    table(f"leaderboard ({metric} on validation rows)", columns, [_line(row) for row in rows])


def _line(row: "TrialRow") -> Sequence[Any]:
    interval = f"{percent(row.ci95[0])} to {percent(row.ci95[1])}" if row.ci95 else None
    again, judged = (percent(metric.value) if metric else None for metric in (row.rescored, row.judged))
    trained = f"{row.trainable_parameters:,}" if row.trainable_parameters else None
    values = (percent(row.value), interval, again, judged, row.best_epoch, row.epochs, trained)
    return row.trial, row.state, *values, row.reason or describe(row.params)
