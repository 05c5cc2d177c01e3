"""What is large or dear is asked about before it is done."""

import sys

import typer

from pefomed_ray.errors import RefusedError


def accept(subject: str, amount: str, do: str) -> None:
    """Ask a person at a terminal whether `subject` may take `amount`; `do`: what a yes makes happen.

    Raises RefusedError where there is no terminal to ask at, or the answer is no.
    """
    if not sys.stdin.isatty():
        raise RefusedError(f"{subject} takes {amount}, and there is no terminal to ask at; pass --yes to {do}")
    if not typer.confirm(f"It takes {amount}. {do.capitalize()}?", err=True):
        raise RefusedError(f"{subject} takes {amount}, and was not wanted; nothing was written")
