"""The size of a feature cache before anything runs: said, and above a limit asked about."""

import sys

import typer

from pefomed_ray.cli.console import say
from pefomed_ray.data.cache_plan import GB, CachePlan
from pefomed_ray.errors import RefusedError


def accept_size(plan: CachePlan, limit_gb: float, *, yes: bool) -> None:
    """Say how large the cache gets. Above the limit, without `--yes`, a person at a terminal is asked.

    Raises RefusedError where there is no terminal to ask at, or the answer is no.
    """
    say(f"feature cache: {plan.describe()}")
    if yes or plan.bytes <= limit_gb * GB:
        return
    size = f"{plan.bytes / GB:,.3g} GB, over limit_gb={limit_gb:g}"
    if not sys.stdin.isatty():
        raise RefusedError(f"the feature cache takes {size}, and there is no terminal to ask at; pass --yes to make it")
    if not typer.confirm(f"It takes {size}. Make it?", err=True):
        raise RefusedError(f"the feature cache takes {size}, and was not wanted; nothing was written")
