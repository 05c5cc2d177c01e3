"""The size of a feature cache before anything runs: said, and above a limit asked about."""

from pefomed_ray.cli.console import say
from pefomed_ray.cli.limits import accept
from pefomed_ray.data.cache_plan import GB, CachePlan


def accept_size(plan: CachePlan, limit_gb: float, *, yes: bool) -> None:
    """Say how large the cache gets. Above the limit, without `--yes`, a person at a terminal is asked.

    Raises RefusedError where there is no terminal to ask at, or the answer is no.
    """
    say(f"feature cache: {plan.describe()}")
    if not yes and plan.bytes > limit_gb * GB:
        accept("the feature cache", f"{plan.bytes / GB:,.3g} GB, over limit_gb={limit_gb:g}", "make it")
