"""Replicas killed, adapters reloaded, clients that dawdle: nobody's answer is lost, late or by other weights."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks._load import HUNG, NO_ANSWER, Sent, open_loop
from pefomed_ray.artifacts.registry import promote
from pefomed_ray.serving.client import Client
from tests.served_here import QUESTION, Served, messages, serving
from tests.tiny_served import png

pytestmark = [pytest.mark.ray, pytest.mark.long]

TOKENS = 24
TIMEOUT_S = 30.0
SHADES = 8


@pytest.fixture(scope="module")
def two(local_ray: Path) -> Iterator[Served]:
    """Two replicas that keep one adapter each: another one takes its place."""
    with serving(adapters=2, replicas=2, max_adapters=1, max_rank=16, request_timeout_s=5.0, refresh_s=0.2) as endpoint:
        yield endpoint


def body(number: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "champion",
        "messages": messages(png(number % SHADES), QUESTION),
        "max_tokens": TOKENS,
        "seed": number,
    } | more


def under_load(
    served: Served, what: Callable[[], None], rate_per_s: float = 15, duration_s: float = 12, **more: Any
) -> list[Sent]:
    """What became of the requests of a load, a third into which `what` was done."""
    timer = threading.Timer(duration_s / 3, what)
    timer.start()
    url = f"{served.endpoint.url}/chat/completions"
    sent = asyncio.run(
        open_loop(url, served.key, lambda n: body(n, **more), rate_per_s, duration_s, timeout_s=TIMEOUT_S)
    )
    timer.join()
    return sent


def wrong(served: Served, sent: list[Sent]) -> list[int]:
    """Numbers of those that the weights they name would not have said."""
    return [
        one.number
        for one in sent
        if one.body
        and one.status == 200
        and one.body["choices"][0]["message"]["content"]
        != served.offline(png(one.number % SHADES), QUESTION, one.body["system_fingerprint"], TOKENS)
    ]


def workers(local_ray: Path, name: str) -> list[psutil.Process]:
    """Processes of this tier's own Ray whose title begins so."""
    mine = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.is_running() and process.name() == "raylet"
    ]
    found = [child for raylet in mine for child in raylet.children()]
    return [child for child in found if " ".join(child.cmdline()).startswith(name)]


def kill_one(local_ray: Path, name: str) -> Callable[[], None]:
    def kill() -> None:
        os.kill(workers(local_ray, name)[0].pid, signal.SIGKILL)

    return kill


def test_nobody_notices_that_one_of_two_replicas_is_killed(two: Served, local_ray: Path) -> None:
    replicas = "ray::ServeReplica:pefomed:ModelReplica"
    assert len(workers(local_ray, replicas)) == 2
    sent = under_load(two, kill_one(local_ray, replicas))
    assert len(sent) > 100
    assert [one for one in sent if one.status != 200] == []
    assert wrong(two, sent) == []
    started = time.monotonic()
    while len(workers(local_ray, replicas)) < 2:
        assert time.monotonic() < started + 30
        time.sleep(0.2)


def test_streams_go_on_at_the_other_replica(two: Served, local_ray: Path) -> None:
    """Long answers that are on their way when their replica is killed: none is cut, all are what offline is."""
    progress: dict[int, str] = {}

    def one(shade: int) -> tuple[str, str | None]:
        with two.client() as client:
            text, progress[shade] = "", "asked"
            chunks = client.chat.completions.create(
                model="champion", messages=messages(png(shade), QUESTION), max_tokens=120, stream=True
            )
            for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                progress[shade] = "speaking" if text else "asked"
            progress[shade] = "done"
            return text, chunk.choices[0].finish_reason

    _both_ready(two, local_ray)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(one, shade) for shade in range(8)]
        while list(progress.values()).count("speaking") < 6:
            time.sleep(0.001)
        kill_one(local_ray, "ray::ServeReplica:pefomed:ModelReplica")()
        assert "done" not in progress.values()
        said = [answer.result(timeout=60) for answer in answers]
    expected = [two.offline(png(shade), QUESTION, tokens=120) for shade in range(8)]
    assert [text for text, _ in said] == expected
    assert all(reason is not None for _, reason in said)


def test_a_killed_http_side_comes_back(two: Served, local_ray: Path) -> None:
    """At most what was under way in it fails, nothing hangs, and the rest is answered."""
    _both_ready(two, local_ray)
    sent = under_load(two, kill_one(local_ray, "ray::ServeReplica:pefomed:Ingress"))
    failed = [one for one in sent if one.status != 200]
    assert len(failed) <= 15
    assert {one.status for one in failed} <= {500, 503, NO_ANSWER}
    assert HUNG not in {one.status for one in sent}
    assert all(one.due_s < 12 / 3 + 10 for one in failed)
    assert wrong(two, sent) == []


def test_twenty_reloads_under_load_and_no_answer_by_other_weights(two: Served, local_ray: Path) -> None:
    _both_ready(two, local_ray)
    refs = two.bundles
    seen: list[str] = []

    def flip() -> None:
        with Client(two.endpoint.url, two.key, TIMEOUT_S) as client:
            for number in range(20):
                ref = refs[(number + 1) % 2]
                promote(two.registry, "champion", Path(ref.bundle))
                standing = client.refresh()
                assert standing["not_followed"] == {}
                seen.append(standing["aliases"]["champion"])
                time.sleep(0.3)

    sent = under_load(two, flip, rate_per_s=12, duration_s=18)
    assert seen == [refs[(number + 1) % 2].digest for number in range(20)]
    assert [one for one in sent if one.status != 200] == []
    answered_by = [one.body["system_fingerprint"] for one in sent if one.body]
    assert min(answered_by.count(ref.digest) for ref in refs) > 20
    assert wrong(two, sent) == []
    # The control: had the weights not been those that an answer names, it would differ.
    swapped = {refs[0].digest: refs[1].digest, refs[1].digest: refs[0].digest}
    texts = {
        (ref.digest, shade): two.offline(png(shade), QUESTION, ref.digest, TOKENS)
        for ref in refs
        for shade in range(SHADES)
    }
    assert all(texts[digest, shade] != texts[swapped[digest], shade] for digest, shade in texts)


def test_clients_that_dawdle_hold_nobody_up(two: Served, local_ray: Path) -> None:
    """Two hundred open sockets that say nothing, ten bodies that never end: others are answered, bodies are cut off."""
    _both_ready(two, local_ray)
    host, port = two.endpoint.url.removeprefix("http://").removesuffix("/v1").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(200)]
    slow = [socket.create_connection((host, int(port))) for _ in range(10)]
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {two.key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    try:
        started = time.monotonic()
        for one in slow:
            one.sendall(head.encode())
        sent = under_load(two, lambda: None, duration_s=4)
        assert {one.status for one in sent} == {200}
        for one in slow:
            one.settimeout(10)
            assert one.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 5.0 + 5
    finally:
        for one in [*idle, *slow]:
            one.close()


def _both_ready(served: Served, local_ray: Path) -> None:
    """Until both replicas and both processes of the HTTP side are there and follow the registry."""
    deadline = time.monotonic() + 60
    root = served.endpoint.url.removesuffix("/v1")
    while time.monotonic() < deadline:
        page = httpx.get(
            f"{root}/metrics", headers={"Authorization": f"Bearer {served.key}"}, trust_env=False, timeout=10
        )
        sides = len(workers(local_ray, "ray::ServeReplica:pefomed:Ingress"))
        if page.is_success and 'pefomed_replica_running{replica="1"}' in page.text and sides == 2:
            return
        time.sleep(0.2)
    raise AssertionError("the replicas did not come back")
