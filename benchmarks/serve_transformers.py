"""Goodput of the endpoint beside `transformers serve`, both with the same LLaVA of random weights and no adapter, which
`transformers serve` does not take. As `serve` otherwise: the same load, the same limit.

Its continuous batching is for language models alone; a vision-language model answers one request after the other.
Prompts are each server's own way with the model's chat template, so answers are not compared, but how many tokens they
have: both must say as many as are asked for.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import typer

from benchmarks._measure import JsonOption, QuickOption, finish, spread
from benchmarks._ray import scratch_with_ray
from benchmarks.serve import LIMIT_S, Server, body_of, free_port, goodput, ours, wait_for
from tests import tiny_bases
from tests.tiny_served import make_bundle

TEXT = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
}
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    seconds, rounds = (5.0, 1) if quick else (15.0, 3)
    with scratch_with_ray(2) as folder:
        base = make_llava(folder)
        bundle = Path(make_bundle(folder / "bundle", base, template="chat", rank=4).bundle)
        found: list[dict[str, float]] = []
        with ours(folder, [bundle]) as endpoint, theirs(base) as their_server:
            our_server = replace(endpoint, names=(endpoint.names[0].partition(":")[0],))
            for server in (our_server, their_server):
                check_tokens(server)
            arms = {"ours": our_server, "theirs": their_server, "ours again": our_server}
            for number in range(rounds):
                order = list(arms)[number % 3 :] + list(arms)[: number % 3]
                found.append({arm: goodput(arms[arm], seconds) for arm in order})
                print(f"serve_transformers: round {number + 1}: {found[-1]}", flush=True)
    finish(
        "serve_transformers",
        {"goodput_vs_transformers_serve": spread([one["ours"] / one["theirs"] for one in found])},
        {"goodput_vs_transformers_serve": spread([one["ours again"] / one["ours"] for one in found])},
        {"requests_per_s": found, "limit_s": LIMIT_S, "seconds_a_rate": seconds},
        as_json=json_,
        quick=quick,
    )


def make_llava(folder: Path) -> Path:
    """The tests' LLaVA, as large as `_small`'s base."""
    tiny_bases.TEXT.update(TEXT)
    tiny_bases.VISION.update(VISION)
    return tiny_bases.make_base("llava", folder / "llava")


@contextmanager
def theirs(base: Path) -> Iterator[Server]:
    """`transformers serve` in a process of its own."""
    port = free_port()
    words = [str(Path(sys.executable).with_name("transformers")), "serve", str(base), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen([*words, "--device", "cpu", "--host", "127.0.0.1"], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health", process)
        yield Server(f"{url}/v1", "none", (str(base),))
    finally:
        process.terminate()
        process.wait(30)


def check_tokens(server: Server) -> None:
    """It says as many tokens as it is asked for."""
    for number in range(2):
        body = body_of(server.names, number)
        headers = {"Authorization": f"Bearer {server.key}"}
        url = f"{server.url}/chat/completions"
        reply = httpx.post(url, json=body, headers=headers, trust_env=False, timeout=120).json()
        if reply["usage"]["completion_tokens"] != body["max_tokens"]:
            raise AssertionError(f"{server.url} said {reply['usage']} of {body['max_tokens']} tokens")


if __name__ == "__main__":
    typer.run(main)
