"""The endpoint: `serve`, `query`, and its `keys`."""

import sys
from typing import Annotated

import typer

from pefomed_ray.artifacts.registry import DEFAULT_REGISTRY
from pefomed_ray.cli.console import exits_with_code, finish, say

keys_app = typer.Typer(no_args_is_help=True, help="Keys of the endpoint: named, revocable, kept as hashes.")

Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
Registry = Annotated[str, typer.Option(help="Folder or s3:// URL of aliases and promoted bundles.")]


@exits_with_code
def serve(
    alias: Annotated[str, typer.Option(help="Alias to serve; every bundle over its base can be asked for.")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value of the endpoint: replicas=2, ...")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8000.")] = None,
    registry: Registry = DEFAULT_REGISTRY,
    json: Json = False,
) -> None:
    """Serve an alias behind an OpenAI-compatible endpoint, with a page at /, until interrupted."""
    from pefomed_ray.cli.options import serve_config
    from pefomed_ray.serving.preflight import check

    config = serve_config([*(options or []), *([] if port is None else [f"port={port}"])])
    check(config, registry, alias)
    from pefomed_ray.cli.cluster import cluster
    from pefomed_ray.cli.waiting import wait_for_signal
    from pefomed_ray.serving.deploy import start, stop

    with cluster():
        endpoint = start(config, registry, alias)
        try:
            finish({"url": endpoint.url, "model": endpoint.model, "digest": endpoint.digest}, as_json=json)
            say(f"serving; the page is at {endpoint.url.removesuffix('v1')}; Ctrl-C ends it")
            wait_for_signal()
            say(f"answering what is under way, {config.drain_timeout_s:g} s at most")
        finally:
            stop(config.drain_timeout_s)


@exits_with_code
def query(
    image: str,
    question: str,
    url: Annotated[str, typer.Option(help="The endpoint, up to /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Alias, <base>:<alias>, <base>:<digest> or <base>.")] = "champion",
    registry: Registry = DEFAULT_REGISTRY,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the answer.", min=0.1)] = 60.0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    json: Json = False,
) -> None:
    """Ask the endpoint about a JPEG, PNG or DICOM file. The key: $PEFOMED_API_KEY, else the registry's client.key."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.serving.client import Client, read_picture
    from pefomed_ray.serving.keys import client_key

    with Client(url, client_key(registry), timeout_s) as client:
        picture = read_picture(local_path(image))
        if stream:
            reply = client.ask_aloud(model, [picture], question, _aloud)
            _aloud("\n")
        else:
            reply = client.ask(model, [picture], question)
    finish({"answer": reply.text, "model": reply.model, "digest": reply.digest, "usage": reply.usage}, as_json=json)


def _aloud(piece: str) -> None:
    """To stderr, where progress goes; stdout stays the result's."""
    sys.stderr.write(piece)
    sys.stderr.flush()


@keys_app.command("add")
@exits_with_code
def keys_add(name: str, registry: Registry = DEFAULT_REGISTRY, json: Json = False) -> None:
    """Make a key. It is shown this once; a running endpoint knows it from its next look at the registry."""
    from pefomed_ray.serving.keys import add_key

    finish({"name": name, "key": add_key(registry, name)}, as_json=json)


@keys_app.command("list")
@exits_with_code
def keys_list(registry: Registry = DEFAULT_REGISTRY, json: Json = False) -> None:
    """Names of the keys, and the beginnings of their hashes."""
    from pefomed_ray.serving.keys import read_keys

    finish({name: digest[:12] for name, digest in read_keys(registry).items()}, as_json=json)


@keys_app.command("revoke")
@exits_with_code
def keys_revoke(name: str, registry: Registry = DEFAULT_REGISTRY, json: Json = False) -> None:
    """Take a key away; a running endpoint refuses it from its next look at the registry."""
    from pefomed_ray.serving.keys import revoke_key

    revoke_key(registry, name)
    finish({"revoked": name}, as_json=json)
