"""Bringing the endpoint up and down: checks first, then Ray Serve, then a request to see it alive."""

import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ray import serve

from pefomed_ray.artifacts.registry import resolve
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import PefomedError
from pefomed_ray.serving.app import LOGGING, ServeArgs, build, describe
from pefomed_ray.serving.keys import ensure_key
from pefomed_ray.serving.preflight import check

APPLICATION = "pefomed"
START_TIMEOUT_S = 600.0
"""Loading a base of several billion weights takes minutes."""
PROXY_GRACE_S = 5.0
"""The proxy waits this much longer than the ingress, so that the ingress's own answer is the one that arrives."""
POLL_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that answers."""

    url: str
    """What the `openai` client takes as `base_url`; ends in /v1."""
    model: str
    """`<base>:<alias>`."""
    digest: str
    """Of the adapter."""


def start(config: ServeConfig, registry: Path, alias: str, key_file: Path) -> Endpoint:
    """Serve what `alias` stands for and return once it answers; Ray must be running, `check` is done again.

    Makes a key where the key file does not exist. Raises as `check` does, and PefomedError where the application does
    not come up within START_TIMEOUT_S; Serve is shut down then.
    """
    check(config, registry, alias)
    # This process's part of Serve; the replicas' is set below.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ensure_key(key_file)
    entry = resolve(registry, alias)
    application = build(ServeArgs(alias=alias, registry=str(registry), key_file=str(key_file), config=config))
    model = describe(registry / entry.bundle, alias, entry)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        serve.start(
            http_options=serve.HTTPOptions(
                host=config.host, port=config.port, request_timeout_s=config.request_timeout_s + PROXY_GRACE_S
            ),
            logging_config=LOGGING,
        )
        target = serve.RunTarget(application, name=APPLICATION, route_prefix="/", logging_config=LOGGING)
        # `serve.run` would wait for ever.
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running(f"http://{host}:{config.port}/healthz", time.monotonic() + START_TIMEOUT_S)
    except BaseException:
        stop()
        raise
    return Endpoint(f"http://{host}:{config.port}/v1", model.name, model.digest)


def stop() -> None:
    """Take the endpoint down; Ray stays up."""
    serve.shutdown()


def _wait_until_running(health_url: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        application = serve.status().applications[APPLICATION]
        if application.status == "DEPLOY_FAILED":
            reason = (application.message.strip() or "no reason given").splitlines()[-1]
            raise PefomedError(f"the endpoint could not start: {reason}")
        if application.status == "RUNNING" and _is_healthy(health_url):
            return
        time.sleep(POLL_S)
    raise PefomedError(
        f"the endpoint did not answer within {START_TIMEOUT_S:g} s; see Ray's dashboard or `serve status`"
    )


def _is_healthy(url: str) -> bool:
    # Without the proxies of the environment: this is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
