"""Two processes in a torch process group, as two workers are, without Ray."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

LIMIT_S = 240
"""Ranks that hang are killed then, and the test fails."""
PRELOADED = ["pefomed_ray.model.bundle", "pefomed_ray.training.step", "pefomed_ray.training.ranks", "bitsandbytes"]
"""Imported once, by the process that the ranks are forked from: on a busy machine this is what takes longest."""


def on_two_ranks(work: Callable[[int, Path], Any], folder: Path, backend: str = "gloo") -> list[Any]:
    """What `work(rank, folder)`, a module's own function, returns on each of two ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [context.Process(target=_rank, args=(work, rank, folder, backend), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    until = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], f"exit codes of the ranks (None: killed after {LIMIT_S} s): {codes}"
    return [torch.load(folder / f"returned-{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(work: Callable[[int, Path], Any], rank: int, folder: Path, backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        returned = work(rank, folder)
        torch.save(returned, folder / f"returned-{rank}.pt")
    finally:
        dist.destroy_process_group()
