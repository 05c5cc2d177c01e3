"""Two training processes beside one, over the same global batches, by data parallelism and by FSDP2.

Plain processes of one thread each, gloo between them and no Ray: what is measured is what our step and its collectives
make of a second core. `one` takes both halves of a global batch one after the other; `apart` is two processes that take
a half each and send nothing, the most that a second core of this machine can give. `two_vs_one` is of the strategy
that `auto` chooses. Wall time, so anything else that runs here spoils it.

Bytes are those that the kernel says it has sent for each process's TCP connections (Linux), beside what
`training.ranks.Traffic` says beforehand. Traffic counts by rings; gloo's reduce-scatter sends as much as an all-reduce,
so FSDP2 sends a few percent more here than it says.
"""

import multiprocessing
import os
import shutil
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import typer

from benchmarks._measure import JsonOption, QuickOption, Sample, Spread, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks._small import make_base, make_batches, open_trainable
from pefomed_ray.config.schema import OptimizerConfig
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.ranks import Ranks, Traffic
from pefomed_ray.training.step import build_optimizer, train_step, trainable

WORKERS = 2
MICRO_BATCH_ROWS = 8
"""Of one worker; a global batch has as many for each worker, whoever takes them."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
MAX_LOSS_DIFFERENCE = 1e-5
"""Nats, between one process and two."""
TCP_INFO_BYTES, BYTES_SENT_AT = 256, 200
"""`tcpi_bytes_sent` of Linux's `struct tcp_info` (include/uapi/linux/tcp.h), since 4.19."""


@dataclass(frozen=True)
class Ran:
    """What one process says of one run of an arm."""

    losses: list[float]
    sample: Sample
    sent_bytes: int


@dataclass(frozen=True)
class Way:
    """One way to train, in one process: the model as its ranks hold it, and the micro-batches that are its own."""

    base: Base
    ranks: Ranks
    traffic: Traffic
    steps: list[list[Batch]]

    @classmethod
    def of(cls, folder: Path, ranks: Ranks, numbers: list[list[int]]) -> "Way":
        """`numbers` says which micro-batches each step takes here."""
        base = open_trainable(folder / "base")
        batches = make_batches(base, WORKERS * len(numbers), MICRO_BATCH_ROWS)
        return cls(base, ranks, ranks.distribute(base), [[batches[n] for n in step] for step in numbers])

    def run(self) -> Ran:
        """All steps, from the first adapters; they are put back afterwards."""
        learning = trainable(self.base.model)
        start = [parameter.detach().clone() for parameter in learning]
        optimizer = build_optimizer(self.base.model, OPTIMIZER)
        if self.ranks.world_size > 1:
            dist.barrier()
        before = sent_bytes()
        losses, sample = timed(partial(self._steps, optimizer))
        ran = Ran(losses, sample, sent_bytes() - before)
        with torch.no_grad():
            for parameter, value in zip(learning, start, strict=True):
                parameter.copy_(value)
        return ran

    def _steps(self, optimizer: torch.optim.Optimizer) -> list[float]:
        return [
            train_step(
                self.base.model,
                optimizer,
                step,
                self.base.renderer,
                OPTIMIZER.learning_rate,
                OPTIMIZER.max_grad_norm,
                self.ranks,
            ).loss
            for step in self.steps
        ]


def sent_bytes() -> int:
    """That this process's open TCP connections have sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        # Of the descriptors, some are no sockets, some sockets are not TCP's, and the listing's own is closed by now.
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                total += struct.unpack_from("Q", info, BYTES_SENT_AT)[0]
    return total


def rank_main(rank: int, folder: Path, steps: int, orders: Connection) -> None:
    """A process of the pool: runs the arms that it is told to, until it is told None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    own = [[WORKERS * step + rank] for step in range(steps)]
    every = [[WORKERS * step + number for number in range(WORKERS)] for step in range(steps)]
    ways = {
        "ours": Way.of(folder, Ranks(rank, WORKERS, strategy="auto"), own),
        "fsdp": Way.of(folder, Ranks(rank, WORKERS, strategy="fsdp"), own),
        "apart": Way.of(folder, Ranks(), own),
    }
    if rank == 0:
        ways["one"] = Way.of(folder, Ranks(), every)
    orders.send({name: way.traffic for name, way in ways.items()})
    while (name := orders.recv()) is not None:
        orders.send(ways[name].run())
    dist.destroy_process_group()


@contextmanager
def pool(folder: Path, steps: int) -> Iterator[list[Connection]]:
    """Processes that wait for orders; what they open first is an answer: their `Traffic` by arm."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(WORKERS)]
    processes = [
        context.Process(target=rank_main, args=(rank, folder, steps, theirs)) for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()  # so that a process which dies is seen at once
    try:
        yield [ours for ours, _ in pipes]
        for ours, _ in pipes:
            ours.send(None)
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        make_base(folder / "base")
        steps = 2 if quick else 4
        with pool(folder, steps) as workers:
            measure(workers, steps, rounds=1 if quick else 5, as_json=json_, quick=quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(workers: list[Connection], steps: int, rounds: int, *, as_json: bool, quick: bool) -> None:
    """All arms; two processes that train together must learn what one does."""
    traffic: dict[str, Traffic] = [worker.recv() for worker in workers][-1]  # of both the same, but for `one`
    sent: dict[str, list[float]] = {}

    def arm(name: str) -> tuple[list[Ran], Sample]:
        members = workers[:1] if name == "one" else workers
        for worker in members:
            worker.send(name)
        ran = [worker.recv() for worker in members]
        wall_s = max(each.sample.wall_s for each in ran)
        return ran, Sample(wall_s, sum(each.sample.cpu_s for each in ran))

    (alone,), _ = arm("one")
    apart, _ = arm("apart")
    if not np.mean(alone.losses[-2:]) < alone.losses[0]:
        raise AssertionError(f"the steps do not learn: losses {alone.losses}")

    def check(name: str, ran: list[Ran]) -> None:
        expected = apart if name == "apart" else [alone] * len(ran)
        for rank, (each, other) in enumerate(zip(ran, expected, strict=True)):
            if not np.allclose(each.losses, other.losses, rtol=0, atol=MAX_LOSS_DIFFERENCE):
                raise AssertionError(f"{name}, rank {rank}: losses {each.losses}, expected {other.losses}")
        sent.setdefault(name, []).append(max(each.sent_bytes for each in ran) / steps)

    done = run_rounds({name: partial(arm, name) for name in ("ours", "fsdp", "apart", "one")}, check, rounds)
    ratios = {
        "two_vs_one": ratio(done, "one", "wall_s"),
        "two_vs_one_fsdp": ratio(done, "one", "wall_s", ours="fsdp"),
        "two_apart_vs_one": ratio(done, "one", "wall_s", ours="apart"),
        "fraction_of_two_apart": ratio(done, "apart", "wall_s"),
    }
    rows = steps * WORKERS * MICRO_BATCH_ROWS
    finish(
        "workers",
        ratios,
        {"wall": a_a(done, "wall_s"), "cpu": a_a(done, "cpu_s")},
        {
            "strategy_of_auto": traffic["ours"].strategy,
            "efficiency": {key: efficiency(ratios[key]) for key in ("two_vs_one", "two_vs_one_fsdp")},
            "rows_per_s": {name: round(rows / took["wall_s"], 2) for name, took in per_arm(done).items()},
            "cpu_s": {name: took["cpu_s"] for name, took in per_arm(done).items()},
            "sent_bytes_per_step": {
                name: bytes_beside(median(sent[name]), traffic[name]) for name in ("ours", "fsdp", "apart")
            },
            "steps": steps,
            "rows_per_step": WORKERS * MICRO_BATCH_ROWS,
        },
        as_json=as_json,
        quick=quick,
    )


def efficiency(speed_up: Spread) -> float:
    """What a worker of several does of what it does alone."""
    return round(speed_up.median / WORKERS, 3)


def bytes_beside(measured: float, traffic: Traffic) -> dict[str, Any]:
    """What a rank sent in a step, and what was said beforehand."""
    said = {"fsdp": traffic.fsdp_bytes, "ddp": traffic.ddp_bytes, "alone": 0}[traffic.strategy]
    return {"measured": round(measured), "predicted": said, "ratio": round(measured / said, 4) if said else None}


if __name__ == "__main__":
    typer.run(main)
