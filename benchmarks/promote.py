"""From `promote` to the first answer by the new adapter, with the endpoint up all the time, beside starting it anew.

`ours` moves the alias, tells the endpoint and asks it until three answers in a row are by the new adapter; before it,
the adapter was in no replica's memory. `restart` moves the alias, takes the endpoint down, starts it and asks once,
which is what a server that reads its adapter at the start needs. `_small`'s base: a restart that loads billions of
weights takes longer. Wall time; both must answer by the new adapter.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer

from benchmarks._measure import JsonOption, QuickOption, Sample, a_a, finish, per_arm, ratio, run_rounds
from benchmarks._ray import scratch_with_ray
from benchmarks.serve import free_port, make_bundles
from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.registry import promote
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving import deploy
from pefomed_ray.serving.client import Client
from pefomed_ray.serving.keys import client_key
from pefomed_ray.serving.proof import follow

ALIAS = "adapter-0"
TIMEOUT_S = 60.0


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    with scratch_with_ray(2) as folder:
        endpoint = Endpoint(folder)
        arms = {"ours": partial(endpoint.timed, endpoint.told), "restart": partial(endpoint.timed, endpoint.restarted)}

        def check(arm: str, digests: tuple[str, str]) -> None:
            if digests[0] != digests[1]:
                raise AssertionError(f"{arm}: not the new adapter answered")

        rounds = run_rounds(arms, check, 1 if quick else 5)
    finish(
        "promote",
        {"vs_restart": ratio(rounds, "restart", "wall_s")},
        {"vs_restart": a_a(rounds, "wall_s")},
        {"seconds": per_arm(rounds)},
        as_json=json_,
        quick=quick,
    )


class Endpoint:
    """Up, with room for one adapter: each other one must be read."""

    def __init__(self, folder: Path) -> None:
        self._registry = folder / "registry"
        self._bundles = make_bundles(folder)
        self._turn = 0
        promote(self._registry, ALIAS, self._bundles[0])
        self._start()

    def _start(self) -> None:
        self._url = deploy.start(ServeConfig(port=free_port(), max_adapters=1), self._registry, ALIAS).url

    def timed(self, follow_it: Callable[[str], None]) -> tuple[tuple[str, str], Sample]:
        """Move the alias to the next bundle; its digest, and whose answer comes after it was followed."""
        self._turn += 1
        bundle = self._bundles[self._turn % len(self._bundles)]
        began = time.perf_counter()
        follow_it(promote(self._registry, ALIAS, bundle).digest)
        with Client(self._url, client_key(self._registry), TIMEOUT_S) as client:
            said = str(client.ask(ALIAS, [], "Is it normal?", max_tokens=1).digest)
        wall_s = time.perf_counter() - began
        return (verify_bundle(bundle).digest, said), Sample(wall_s, wall_s)

    def told(self, digest: str) -> None:
        """The endpoint stays up."""
        with Client(self._url, client_key(self._registry), TIMEOUT_S) as client:
            follow(client, ALIAS, digest, TIMEOUT_S)

    def restarted(self, digest: str) -> None:
        """The endpoint is started anew."""
        deploy.stop()
        self._start()


if __name__ == "__main__":
    typer.run(main)
