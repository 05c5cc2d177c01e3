"""What Prometheus scrapes at `/metrics`: how many requests, how they ended, how long they took, how replicas do."""

from collections.abc import Mapping, Sequence
from uuid import uuid4

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY_BUCKETS_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts of one process of the HTTP side. Its label `ingress` keeps several of them apart."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._ingress = uuid4().hex[:8]
        self._requests = Counter(
            "pefomed_requests", "Requests by route and status.", ["ingress", "route", "status"], registry=own
        )
        self._seconds = Histogram(
            "pefomed_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["ingress", "route"],
            registry=own,
            buckets=LATENCY_BUCKETS_S,
        )
        self._tokens = Counter("pefomed_tokens", "Tokens of prompts and answers.", ["ingress", "kind"], registry=own)
        self._under_way = Gauge("pefomed_requests_under_way", "Being answered now.", ["ingress"], registry=own)

    def began(self) -> None:
        """A request came."""
        self._under_way.labels(self._ingress).inc()

    def ended(self, route: str, status: int, seconds: float) -> None:
        """The last byte of its answer is sent."""
        self._under_way.labels(self._ingress).dec()
        self._requests.labels(self._ingress, route, str(status)).inc()
        self._seconds.labels(self._ingress, route).observe(seconds)

    def answered(self, prompt_tokens: int, tokens: int) -> None:
        """What an answer took."""
        self._tokens.labels(self._ingress, "prompt").inc(prompt_tokens)
        self._tokens.labels(self._ingress, "answer").inc(tokens)

    def page(self, replicas: Sequence[Mapping[str, float]]) -> bytes:
        """All of it in Prometheus's text format, and each replica's own counts as `pefomed_replica_<name>`."""
        now = CollectorRegistry()
        for name in sorted({name for stats in replicas for name in stats}):
            gauge = Gauge(f"pefomed_replica_{name}", f"A replica's {name}.", ["replica"], registry=now)
            for number, stats in enumerate(replicas):
                gauge.labels(str(number)).set(stats[name])
        return generate_latest(self._registry) + generate_latest(now)
