"""How far it is: a bar on a terminal, a line now and then elsewhere; and an evaluation's metrics as a table."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.cli.console import err, say, table
from pefomed_ray.evaluation.shown import interval_text, score_text

LINE_INTERVAL_S = 10.0


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `on_progress(done, total)`, which shows how many of what (`rows`) are done, and how many a second."""
    if not err.is_terminal:
        yield counted_lines(what, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    times = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=err, transient=True) as progress:
        started = time.monotonic()
        task = progress.add_task(what, total=None, rate="")

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, rate=_rate(done, started, unit))

        yield on_progress


def counted_lines(what: str, unit: str) -> Callable[[int, int], None]:
    """`on_progress(done, total)`, which says so every ten seconds and at the end."""
    started = time.monotonic()
    last = [started]

    def on_progress(done: int, total: int) -> None:
        if done == total or time.monotonic() - last[0] > LINE_INTERVAL_S:
            last[0] = time.monotonic()
            say(f"{what}: {done}/{total} {unit}, {_rate(done, started, unit)}")

    return on_progress


def _rate(done: int, started: float, unit: str) -> str:
    return f"{done / max(time.monotonic() - started, 1e-3):.0f} {unit}/s"


def metrics_table(path: Path) -> None:
    """An evaluation's metrics beside the controls that its report compares with."""
    metrics = read_json(path)
    names = [name for name, found in metrics.items() if isinstance(found, dict) and "ci95" in found]
    controls = [name for name in metrics["controls"] if name in metrics["against_controls"]]
    rows = []
    for name in names:
        found = metrics[name]
        others = [score_text(metrics["controls"][control].get(name, {}).get("value"), name) for control in controls]
        interval = interval_text(found["ci95"], name)
        rows.append((name, found["n"], score_text(found["value"], name), interval, *others))
    table(f"{metrics['split']} split", ("metric", "n", "model", "95 % interval", *controls), rows)
