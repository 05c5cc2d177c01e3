"""How a search's packed trials are dealt out: on how many hosts, how many at once on each."""

from collections.abc import Mapping, Sequence
from math import ceil

from pefomed_ray.config import SearchConfig, TrainConfig
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.host import CLIENT_CPUS, Plan, host_bundle
from pefomed_ray.search.space import extremes

RANK = "lora.rank"


def plan_packs(search: SearchConfig, first: TrainConfig, nodes: Sequence[Mapping[str, float]]) -> Plan:
    """As many hosts as nodes with these resources hold, and the trials that are to run at once dealt out to them.

    Raises ConfigError where there is no room for one host: it would be waited for without end.
    """
    workers, bundle = first.resources.workers, host_bundle(first)
    at_once = search.packed_at_once
    ranks = sum(min(int(node.get(name, 0.0) / amount) for name, amount in bundle.items()) for node in nodes)
    left = sum(node.get("CPU", 0.0) for node in nodes) - at_once * CLIENT_CPUS
    hosts = min(ranks // workers, int(left / (workers * bundle["CPU"])), at_once)
    if hosts < 1:
        need = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        raise ConfigError(
            f"a host of packed trials needs {need} for each of its resources.workers={workers}, and {CLIENT_CPUS} CPU "
            f"for each of {at_once} trials; the cluster has room for {ranks} workers"
        )
    return Plan(hosts, ceil(at_once / hosts), _largest_rank(search, first))


def _largest_rank(search: SearchConfig, first: TrainConfig) -> int:
    if RANK not in search.space:
        return first.lora.rank
    return max(int(params[RANK]) for params in extremes(search, RANK, search.space[RANK]))
