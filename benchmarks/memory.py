"""Memory of 8 packed adapters in one process beside 8 PEFT processes with an adapter each, float32, a row each.

Each kind of process runs by itself, alone: it opens the base, trains some steps, and says what it held at most since
the base was open. Eight of the separate ones are one (of the ranks' mean, 16), eight times, but for what processes
share: pages mapped from files (libraries; weights, where they are mapped), which are counted once.

`k8`: the separate processes hold the tower, the packed one has features in its place, as a packed search does.
`k8_cached`: neither holds a tower. The packed one's adapters have ranks 4 to 32, all filled up to 32.

The memory is the kernel's count, so this needs Linux.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks._adapters import (
    LARGE,
    VISION,
    Trained,
    fresh_adapters,
    inputs_of,
    one_batch,
    open_bare,
    packed,
    separate,
    separate_models,
    trials,
    with_features,
)
from benchmarks._bases import make_base
from benchmarks._measure import JsonOption, QuickOption, Spread, finish, spread

ADAPTERS = 8
STEPS = 3
VOCABULARY = {"vocab_size": 32000, "tie_word_embeddings": True}
"""Llama-2's. A language model of 43 million parameters in all."""
MIB = 2**20


@dataclass(frozen=True)
class Held:
    """By one process."""

    peak_bytes: int
    """Resident, since its base was open."""
    file_bytes: int
    """Of them mapped from files, at the end."""
    losses: list[list[float]]

    def times(self, processes: int) -> int:
        """What so many such processes hold together."""
        return processes * (self.peak_bytes - self.file_bytes) + self.file_bytes


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        torch.manual_seed(0)
        make_base(folder, LARGE | VOCABULARY, VISION)
        rounds = [measure(folder) for _ in range(1 if quick else 3)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    finish(
        "memory",
        {"k8": ratio(rounds, "separate"), "k8_cached": ratio(rounds, "separate_cached")},
        {"k8": spread([seen["packed again"].peak_bytes / seen["packed"].peak_bytes for seen in rounds])},
        {"adapters": ADAPTERS, "steps": STEPS, "rounds": [described(seen) for seen in rounds]},
        as_json=json_,
        quick=quick,
    )


def measure(folder: Path) -> dict[str, Held]:
    """One process of each kind, one after the other."""
    kinds = ("packed", "separate", "separate_cached", "packed again")
    return {kind: in_process(folder, kind.removesuffix(" again")) for kind in kinds}


def in_process(folder: Path, kind: str) -> Held:
    """What a process of its own holds. Raises AssertionError where a trial does not learn."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--kind", kind, "--folder", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    held = Held(**json.loads(done.stdout.splitlines()[-1]))
    for losses in held.losses:
        if not losses[-1] < losses[0]:
            raise AssertionError(f"{kind}: a trial does not learn: losses {losses}")
    return held


def ratio(rounds: list[dict[str, Held]], kind: str) -> Spread:
    """What the processes of a kind hold, over what the packed one does."""
    return spread([seen[kind].times(ADAPTERS) / seen["packed"].peak_bytes for seen in rounds])


def described(seen: dict[str, Held]) -> dict[str, Any]:
    """MiB by kind; of a separate process also of all of them."""
    return {
        kind: {
            "peak_mib": round(held.peak_bytes / MIB),
            "file_mib": round(held.file_bytes / MIB),
            "losses": [[round(loss, 4) for loss in losses] for losses in held.losses],
        }
        | ({} if kind.startswith("packed") else {f"mib_of_{ADAPTERS}": round(held.times(ADAPTERS) / MIB)})
        for kind, held in seen.items()
    }


def hold(kind: str, folder: Path) -> Held:
    """In the process itself: train, and look at what it holds."""
    torch.set_num_threads(1)
    base = open_bare(folder, "float32")
    configs = trials(ADAPTERS if kind == "packed" else 1)
    adapters = fresh_adapters(base, configs)
    batch = one_batch(base, 1)
    if kind != "separate":
        batch = with_features(base, batch)
    model: Any = base.model
    if kind == "packed":
        del model.vision_tower
        train = partial(packed, base, configs, adapters, batch, STEPS)
    else:
        inputs = inputs_of(base, batch)
        models = separate_models(folder, torch.float32, configs, adapters)
        del base, model
        if kind == "separate_cached":
            del models[0].model.base_model.model.vision_tower
        train = partial(separate, models, inputs, STEPS)
    return watched(train)


def watched(train: Any) -> Held:
    """What the process holds at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    trained: Trained = train()[0]
    status = Path("/proc/self/status").read_text()
    return Held(kernel_bytes(status, "VmHWM"), kernel_bytes(status, "RssFile"), trained.losses)


def kernel_bytes(status: str, name: str) -> int:
    """A number of `/proc/<pid>/status`."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {name} in {status!r}")
    return int(found[1]) * 1024


def cli(
    json_: JsonOption = False, quick: QuickOption = False, kind: str | None = None, folder: Path | None = None
) -> None:
    """The benchmark, or one of its processes."""
    if kind and folder:
        print(json.dumps(asdict(hold(kind, folder))))
    else:
        main(json_, quick)


if __name__ == "__main__":
    typer.run(cli)
