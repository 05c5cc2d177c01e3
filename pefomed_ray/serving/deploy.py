"""Bringing the endpoint up and down: checks first, then Ray Serve, then a look that it serves what it should."""

import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ray import serve
from ray.serve.handle import DeploymentHandle

from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.registry import bundle_folder, resolve
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import DataError, PefomedError
from pefomed_ray.serving.app import LOGGING, ServeArgs, base_name, build
from pefomed_ray.serving.contract import Standing
from pefomed_ray.serving.ingress import Ingress
from pefomed_ray.serving.keys import ensure_key
from pefomed_ray.serving.preflight import absolute, check

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


def start(config: ServeConfig, registry: str | Path, alias: str) -> Endpoint:
    """Serve the base of what `alias` stands for and return once it answers; Ray must be running, `check` is done again.

    Makes a key where a local registry has none. Raises as `check` does, DataError where the alias's bundle cannot be
    served with this config, and PefomedError where the application does not come up within START_TIMEOUT_S; Serve is
    shut down then.
    """
    check(config, registry, alias)
    # This process's part of Serve; the replicas' is set in `build`.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ensure_key(registry)
    there = absolute(registry)
    application = build(ServeArgs(alias=alias, registry=there, config=config))
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
        digest = _served(alias)
    except BaseException:
        serve.shutdown()
        raise
    base = base_name(load_bundle_manifest(bundle_folder(there, resolve(there, alias).digest)).base)
    return Endpoint(f"http://{host}:{config.port}/v1", f"{base}:{alias}", digest)


def stop(drain_timeout_s: float = 0.0) -> None:
    """Take the endpoint down; Ray stays up. New requests are refused with 503 while those under way are answered."""
    if drain_timeout_s:
        try:
            _drain(drain_timeout_s)
        except Exception as error:  # whatever is wrong with it, it is to go down
            logging.getLogger("ray.serve").warning("the endpoint could not be drained: %s", type(error).__name__)
    serve.shutdown()


def _drain(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    _ingress().broadcast("close").results(timeout_s=timeout_s)
    while time.monotonic() < deadline:
        if not any(_ingress().broadcast("under_way").results(timeout_s=timeout_s)):
            return
        time.sleep(POLL_S)


def _ingress() -> DeploymentHandle:
    return serve.get_deployment_handle(Ingress.__name__, APPLICATION)


def _served(alias: str) -> str:
    """Digest of what the alias stands for at every ingress."""
    found: list[Standing] = _ingress().broadcast("refresh").results(timeout_s=START_TIMEOUT_S)
    for standing in found:
        if alias in standing.not_followed:
            raise DataError(f"alias {alias!r}: {standing.not_followed[alias]}")
    return found[0].aliases[alias]


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
