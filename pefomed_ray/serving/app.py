"""The Serve application: which bundle, how many replicas, which limits.

Also usable without `pefomed-ray serve`: `serve run pefomed_ray.serving.app:build alias=champion`, or in a Serve YAML
`import_path: pefomed_ray.serving.app:build` with the fields of `ServeArgs` under `args`. Host and port then come from
that file's `http_options`, and its author answers for TLS.
"""

import json
from datetime import datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict
from ray import serve

from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.registry import DEFAULT_REGISTRY, AliasEntry, resolve
from pefomed_ray.artifacts.storage import local_path
from pefomed_ray.config import ServeConfig
from pefomed_ray.serving.api import ServedModel
from pefomed_ray.serving.ingress import RETRY_AFTER_S, Ingress
from pefomed_ray.serving.keys import KEY_FILE, read_hashes
from pefomed_ray.serving.replica import ModelReplica

LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's; an access log would be one more place for what people send."""
SPARE_REQUESTS = 64
"""What the ingress takes beyond replicas and queue, so that it is there to say 429 in OpenAI's shape; and as many more
may be on their way to it. Serve's proxy refuses what comes on top, with 429 and Retry-After but in words of its own."""


class ServeArgs(BaseModel):
    """What `build` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    registry: str = DEFAULT_REGISTRY
    key_file: str | None = None
    """Default: `server.keys` in the registry."""
    config: ServeConfig = ServeConfig()


def build(args: ServeArgs) -> serve.Application:
    """The application for what the alias stands for now; a later promotion changes nothing in one that runs.

    Raises ConfigError for an unknown alias or a missing key file, DataError for a bundle that was changed.
    """
    registry = local_path(args.registry)
    hashes = read_hashes(local_path(args.key_file) if args.key_file else registry / KEY_FILE)
    entry = resolve(registry, args.alias)
    folder = registry / entry.bundle
    model = describe(folder, args.alias, entry)
    config = args.config
    backpressure = {"status_code": 429, "retry_after_s": RETRY_AFTER_S}
    replicas = serve.deployment(
        ModelReplica,
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=backpressure,
        ray_actor_options={"num_gpus": 1} if config.use_gpu else {"num_cpus": 1},
        logging_config=LOGGING,
    ).bind(str(folder), model.task, config)
    return serve.deployment(
        Ingress,
        num_replicas=config.replicas,
        max_ongoing_requests=config.replicas * config.max_ongoing_requests
        + config.max_queued_requests
        + SPARE_REQUESTS,
        max_queued_requests=SPARE_REQUESTS,
        backpressure_config=backpressure,
        ray_actor_options={"num_cpus": 0},
        logging_config=LOGGING,
    ).bind(model, hashes, config, replicas)


def describe(folder: Path, alias: str, entry: AliasEntry) -> ServedModel:
    """What the endpoint says about a bundle: names, digests, lineage and metrics."""
    manifest = load_bundle_manifest(folder)
    run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    lineage = {
        "base_digest": manifest.base_digest,
        "template": manifest.template,
        "template_digest": manifest.template_digest,
        "promoted_at": entry.promoted_at,
        "trained_on": json.loads((folder / "lineage.json").read_text(encoding="utf-8")),
        "metrics": json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
    }
    created = int(datetime.fromisoformat(entry.promoted_at).timestamp())
    return ServedModel(Path(manifest.base).name, alias, entry.digest, run["task"], created, lineage)
