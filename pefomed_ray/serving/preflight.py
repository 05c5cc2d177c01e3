"""What can be wrong with an endpoint before Ray starts; answers in a second, so nothing here imports torch or Ray."""

import socket
from pathlib import Path

from pefomed_ray.artifacts.base import base_folder
from pefomed_ray.artifacts.folders import open_folder
from pefomed_ray.artifacts.manifests import load_bundle_manifest
from pefomed_ray.artifacts.precision import check_has_gpu
from pefomed_ray.artifacts.registry import bundle_folder, resolve
from pefomed_ray.config import ServeConfig
from pefomed_ray.config.address import is_loopback
from pefomed_ray.errors import ConfigError, RefusedError


def check(config: ServeConfig, registry: str | Path, alias: str) -> None:
    """Everything that can be wrong and is found without Ray, in seconds.

    Raises RefusedError for a host other than loopback without `tls_in_front`, ConfigError for a port in use or an
    unknown alias, a missing base, a bundle that needs a GPU or one that vLLM is to serve and cannot, DataError for a
    bundle that was changed.
    """
    if not is_loopback(config.host) and not config.tls_in_front:
        raise RefusedError(
            f"host {config.host!r} is not loopback and the endpoint speaks plain HTTP: keys and images could be read "
            "on the way. Put a TLS proxy in front and set tls_in_front=true, or use 127.0.0.1 and an SSH tunnel"
        )
    bundle = bundle_folder(registry, resolve(registry, alias).digest)
    base_folder(load_bundle_manifest(bundle).base)
    check_has_gpu(bundle, use_gpu=config.use_gpu)
    if config.engine == "vllm":
        from pefomed_ray.serving.vllm import check as check_vllm

        check_vllm(config, bundle)
    check_port(config)


def absolute(registry: str | Path) -> str:
    """A registry's absolute path or URL: replicas have a working folder of their own."""
    return open_folder(registry).url


def check_port(config: ServeConfig) -> None:
    """Raise ConfigError where somebody listens on the port already."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"port: cannot listen on {config.host}:{config.port} ({error.strerror}); choose another port or host"
            ) from None
