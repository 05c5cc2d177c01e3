"""The Serve application: which base, how many replicas, which limits.

Also usable without `pefomed-ray serve`: `serve run pefomed_ray.serving.app:build alias=champion`, or in a Serve YAML
`import_path: pefomed_ray.serving.app:build` with the fields of `ServeArgs` under `args`. Host and port then come from
that file's `http_options`, and its author answers for TLS.
"""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.precision import precision_of
from pefomed_ray.artifacts.registry import DEFAULT_REGISTRY, bundle_folder, resolve
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.guard import RETRY_AFTER_S
from pefomed_ray.serving.ingress import Ingress
from pefomed_ray.serving.keys import read_keys
from pefomed_ray.serving.preflight import absolute
from pefomed_ray.serving.replica import ModelReplica
from pefomed_ray.serving.vllm import VllmReplica
from pefomed_ray.serving.vllm import check as check_vllm

LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's; an access log would be one more place for what people send."""
SPARE_REQUESTS = 8
"""What a process of the HTTP side takes beyond its share of the replicas and its queue, so that it is there to say 429
in OpenAI's shape; and as many more may be on their way to it. Serve's proxy refuses what comes on top, with 429 and
Retry-After but in words of its own: that costs less, and under a flood every millisecond is the answers'."""
BACKPRESSURE = {"status_code": 429, "retry_after_s": RETRY_AFTER_S}


class ServeArgs(BaseModel):
    """What `build` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    """Its bundle says which base is served, and how it is held; every bundle over that base can then be asked for."""
    registry: str = DEFAULT_REGISTRY
    """Folder that every node sees, or `s3://` URL."""
    config: ServeConfig = ServeConfig()


def build(args: ServeArgs) -> serve.Application:
    """The application over the base of what the alias stands for.

    Raises ConfigError for an unknown alias, where there are no keys, or for what vLLM cannot serve; DataError for a
    bundle that was changed.
    """
    registry = absolute(args.registry)
    read_keys(registry)
    folder = bundle_folder(registry, resolve(registry, args.alias).digest)
    manifest, config = load_bundle_manifest(folder), args.config
    if config.engine == "vllm":
        check_vllm(config, folder)
    replicas = serve.deployment(
        VllmReplica if config.engine == "vllm" else ModelReplica,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BACKPRESSURE,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options=_place(config),
        logging_config=LOGGING,
        **_how_many(config),
    ).bind(manifest.base, manifest.template, precision_of(folder), config)
    share = math.ceil((config.max_replicas or config.replicas) * config.max_ongoing_requests / config.replicas)
    return serve.deployment(
        Ingress,
        num_replicas=config.replicas,
        max_ongoing_requests=share + config.max_queued_requests + SPARE_REQUESTS,
        max_queued_requests=SPARE_REQUESTS,
        backpressure_config=BACKPRESSURE,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": 0},
        logging_config=LOGGING,
    ).bind(registry, base_name(manifest.base), manifest.base_digest, config, replicas)


def base_name(base: str) -> str:
    """What clients call a base: the last part of where it was found."""
    return Path(base).name


def _place(config: ServeConfig) -> dict[str, Any]:
    return {"num_gpus": config.gpus_per_replica} if config.use_gpu else {"num_cpus": 1}


def _how_many(config: ServeConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    limits = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
    # A replica answers so many at once; more in a replica means that requests wait there.
    return {"autoscaling_config": {**limits, "target_ongoing_requests": config.max_batch_size}}
