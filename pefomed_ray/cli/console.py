"""What a person or a program sees: rich on a terminal, plain lines elsewhere, one JSON line for `--json`."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.table import Table

from pefomed_ray.errors import PefomedError

P = ParamSpec("P")
R = TypeVar("R")

WIDTH_IN_FILES = 160
"""Columns of a table where there is no terminal to ask."""

err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDTH_IN_FILES)


def finish(result: dict[str, Any], *, as_json: bool) -> None:
    """The verb's result: with `--json` the last line of stdout, else `key: value` lines."""
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
        sys.stdout.flush()
        return
    for key, value in result.items():
        sys.stdout.write(f"{key}: {_plain(value)}\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stderr, where progress goes; stdout stays the result's."""
    grid = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    err.print(grid)


def say(message: str) -> None:
    """A line of progress."""
    err.print(message, markup=False, soft_wrap=True)


def exits_with_code(verb: Callable[P, R]) -> Callable[P, R]:
    """Turn a PefomedError into one line on stderr and its exit code; any other exception is ours, with traceback."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except PefomedError as error:
            err.print(f"[bold red]error[/bold red] ({type(error).__name__}): ", end="")
            err.print(str(error), markup=False, soft_wrap=True)
            raise SystemExit(error.exit_code) from None

    return run


def percent(value: float | None) -> str:
    """0.634 -> `63.4`; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
