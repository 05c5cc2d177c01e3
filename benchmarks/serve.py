"""Goodput of the endpoint beside a plain server: FastAPI, a lock, and `generate` (`_naive_server`).

Both answer the same load from outside over HTTP with the same weights: four adapters, three short answers to a long
one, open loop (`_load`). Goodput is the highest rate at which 95 of a hundred requests are answered within LIMIT_S and
none fails; it is looked for from below. The same requests are asked of both once, one at a time, and
must be answered alike.

The base is `_small`'s: one whose parts compare as those of models that people serve. Ours runs one replica of one
thread beside Ray's own processes; the other has both cores. The load comes from this process, on the same cores.
"""

import asyncio
import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import typer
from PIL import Image

from benchmarks import _small
from benchmarks._load import Sent, open_loop, percentile
from benchmarks._measure import JsonOption, QuickOption, finish, spread
from benchmarks._ray import scratch_with_ray
from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.registry import promote
from pefomed_ray.config import ServeConfig, TrainConfig
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.serving import deploy
from pefomed_ray.serving.keys import client_key

ADAPTERS = 4
SHORT_TOKENS, LONG_TOKENS = 4, 64
LONG_EVERY = 4
LIMIT_S = 3.0
PERCENT = 95.0
STEP = 1.15
LOWEST_PER_S = 1.0
SETTLE_S = 1.0
PICTURES = 32


@dataclass(frozen=True)
class Server:
    """Where to ask, and what it calls the adapters."""

    url: str
    key: str
    names: tuple[str, ...]


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    seconds, rounds = (5.0, 1) if quick else (15.0, 3)
    with scratch_with_ray(2) as folder:
        bundles = make_bundles(folder)
        found: list[dict[str, float]] = []
        with ours(folder, bundles) as our_server, naive(bundles) as naive_server:
            check_alike(our_server, naive_server)
            arms = {"ours": our_server, "naive": naive_server, "ours again": our_server}
            for number in range(rounds):
                order = list(arms)[number % 3 :] + list(arms)[: number % 3]
                found.append({arm: goodput(arms[arm], seconds) for arm in order})
                print(f"serve: round {number + 1}: {found[-1]}", flush=True)
    finish(
        "serve",
        {"goodput_vs_naive": spread([one["ours"] / one["naive"] for one in found])},
        {"goodput_vs_naive": spread([one["ours again"] / one["ours"] for one in found])},
        {
            "requests_per_s": found,
            "limit_s": LIMIT_S,
            "percent": PERCENT,
            "tokens": [SHORT_TOKENS, LONG_TOKENS],
            "long_every": LONG_EVERY,
            "adapters": ADAPTERS,
            "seconds_a_rate": seconds,
        },
        as_json=json_,
        quick=quick,
    )


def make_bundles(folder: Path) -> list[Path]:
    """Four adapters over the small base; their second matrices drawn too, so that they answer differently."""
    base_folder = _small.make_base(folder / "base")
    made = []
    for number in range(ADAPTERS):
        base = open_base(str(base_folder), "short")
        torch.manual_seed(number + 1)
        attach_lora(base, _small.LORA, train_projector=False)
        for name, parameter in base.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.4)
        trained = {name: p.detach() for name, p in base.model.named_parameters() if p.requires_grad}
        values = {"name": "b", "task": "vqa", "template": "short", "base": {"path": str(base_folder)}}
        lora = _small.LORA.model_dump()
        config = TrainConfig.model_validate(values | {"lora": lora, "data": {"shards": "none"}})
        save_bundle(folder / f"bundle{number}", base, config, trained, {"source": "noise"}, {})
        made.append(folder / f"bundle{number}")
    return made


@contextmanager
def ours(folder: Path, bundles: list[Path], **settings: Any) -> Iterator[Server]:
    """The endpoint of this project."""
    registry = folder / "registry"
    for number, bundle in enumerate(bundles):
        promote(registry, f"adapter-{number}", bundle)
    # What comes over a server's capacity is to be seen as late answers here, not as refusals.
    waits = {"max_ongoing_requests": 64, "max_queued_requests": 1000, "request_timeout_s": 120}
    config = ServeConfig.model_validate({"port": free_port()} | waits | settings)
    endpoint = deploy.start(config, registry, "adapter-0")
    try:
        base = endpoint.model.partition(":")[0]
        names = tuple(f"{base}:{verify_bundle(bundle).digest}" for bundle in bundles)
        yield Server(endpoint.url, client_key(registry), names)
    finally:
        deploy.stop()


@contextmanager
def naive(bundles: list[Path]) -> Iterator[Server]:
    """The plain one, in a process of its own."""
    port = free_port()
    words = [sys.executable, "-m", "benchmarks._naive_server", str(port), *map(str, bundles)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen(words, cwd=Path(__file__).parent.parent, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/healthz", process)
        yield Server(f"{url}/v1", "none", tuple(f"adapter-{number}" for number in range(len(bundles))))
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: "subprocess.Popen[bytes]", within_s: float = 120.0) -> None:
    """Until it answers."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False, timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"nobody answers at {url}")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def body_of(names: tuple[str, ...], number: int) -> dict[str, Any]:
    """A request of the load."""
    url = "data:image/png;base64," + _picture(number % PICTURES)
    is_long = number % LONG_EVERY == 0
    text = "Describe what is seen." if is_long else f"Is region {number % 7} normal?"
    image = {"type": "image_url", "image_url": {"url": url}}
    return {
        "model": names[number % len(names)] if not is_long else names[number // LONG_EVERY % len(names)],
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}],
        "max_tokens": LONG_TOKENS if is_long else SHORT_TOKENS,
    }


@cache
def _picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((_small.SIZE_PX, _small.SIZE_PX)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def check_alike(one: Server, other: Server, count: int = 32) -> None:
    """The same questions one at a time; both must answer alike."""
    said = [[_ask(server, number) for number in range(count)] for server in (one, other)]
    if said[0] != said[1] or len(set(said[0])) < ADAPTERS:
        raise AssertionError("the servers do not answer alike, or not by adapter and picture")


def _ask(server: Server, number: int) -> tuple[str, int]:
    headers = {"Authorization": f"Bearer {server.key}"}
    body = body_of(server.names, number)
    reply = httpx.post(f"{server.url}/chat/completions", json=body, headers=headers, trust_env=False, timeout=60).json()
    return reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]


def goodput(server: Server, seconds: float) -> float:
    """The highest rate that is held, requests a second: doubled while it is, then raised from there by STEP."""
    held, factor, rate = 0.0, 2.0, LOWEST_PER_S
    make_body: Callable[[int], dict[str, Any]] = partial(body_of, server.names)
    while True:
        sent = asyncio.run(open_loop(f"{server.url}/chat/completions", server.key, make_body, rate, seconds, 60.0))
        if is_held(sent):
            held = max(held, len(sent) / seconds)
        elif factor == STEP or not held:
            return held
        else:
            rate, factor = rate / factor, STEP
        rate *= factor
        time.sleep(SETTLE_S)


def is_held(sent: list[Sent]) -> bool:
    """Whether all were answered, and enough of them in time."""
    return all(one.status == 200 for one in sent) and percentile([one.seconds for one in sent], PERCENT) <= LIMIT_S


if __name__ == "__main__":
    typer.run(main)
