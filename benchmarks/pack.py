"""Packed trials beside the same trials apart, a step at a time, on one thread.

`k8_b1_fp32` is how many times the CPU time of one packed step of 8 adapters, with a row each and cached features, 8
separate PEFT steps take, each with the tower: what a user does, and what a packed search does. `..._cached`: the
separate steps have cached features too. What packing alone adds is therefore `k8_..._cached` over `k1_..._cached`.

All train from the same initial adapters on the same rows; losses and last weights must agree, and losses fall, trial by
trial. There are four different trials, of ranks 4 to 32; more are these over again, so the separate arms train each of
the four once and count it as often as it stands in the pack, which trains them all. In a pack all are filled up to its
largest rank.

The tower has 22 million parameters, the language model 5, or 27 where a name ends in `lm27m`; all random: what a step
costs does not depend on what they know. The head is small, so logits at all positions, which the separate steps make,
cost them little. Where the processor multiplies bfloat16 matrices no faster than float32 ones, few cases are measured
in it: nobody would train so.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks._adapters import (
    DISTINCT,
    LARGE,
    SMALL,
    VISION,
    VOCABULARY,
    Apart,
    Arm,
    Trained,
    check_equal,
    flat,
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
from benchmarks._measure import JsonOption, QuickOption, Round, Sample, a_a, finish, per_arm, ratio, run_rounds
from benchmarks.gpu_step import matmul_flops_per_s

ADAPTERS = (1, 2, 4, 8, 16)
STEPS = 2
"""An arm: the first moves B matrices and projectors, the second all; its loss shows the first."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MOST_APART = {"fp32": Apart(losses=1e-4, way=1e-3), "bf16": Apart(losses=2e-2, way=0.1)}
"""Seen: 5e-7 and 4e-6 in float32, 8e-5 and 1e-2 in bfloat16. A hundredth more learning rate: a way of 1e-2."""
LANGUAGE_MODELS = {"": SMALL, "_lm27m": LARGE}
TARGETS = {"k8_b1_bf16": 2.5, "k1_b1_fp32": 1.15, "k1_b1_bf16": 1.15}


@dataclass(frozen=True)
class Case:
    """One ratio; `model`: one of LANGUAGE_MODELS."""

    adapters: int
    rows: int
    precision: str = "fp32"
    rounds: int = 5
    model: str = ""

    @property
    def name(self) -> str:
        """As in the ratios."""
        return f"k{self.adapters}_b{self.rows}_{self.precision}{self.model}"


@dataclass
class Outcome:
    """Of one case."""

    rounds: list[Round] = field(default_factory=list)
    apart: dict[str, Apart] = field(default_factory=dict)
    """Each arm from the separate steps with the tower."""
    losses: list[list[float]] = field(default_factory=list)
    tokens_per_row: float = 0.0


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    rates = {name: matmul_rate(dtype) for name, dtype in DTYPES.items()}
    chosen = [Case(1, 1, rounds=1), Case(4, 1, rounds=1)] if quick else all_cases(rates["bf16"] > rates["fp32"])
    measured = measure(chosen, LANGUAGE_MODELS, VISION)
    ratios = {}
    for case in chosen:
        ratios[case.name] = ratio(measured[case].rounds, "separate", "cpu_s")
        ratios[f"{case.name}_cached"] = ratio(measured[case].rounds, "separate_cached", "cpu_s")
    finish(
        "pack",
        ratios,
        {case.name: a_a(measured[case].rounds, "cpu_s") for case in chosen},
        {
            "targets": TARGETS,
            "matmul_gflops_per_s": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
            "steps": STEPS,
            "cases": {case.name: summary(measured[case]) for case in chosen},
        },
        as_json=json_,
        quick=quick,
    )


def all_cases(fast_bfloat16: bool) -> list[Case]:
    """Every number of adapters, one row and four, both precisions where both make sense."""
    grid = [Case(k, rows, rounds=5 if k * rows <= 8 else 3) for rows in (1, 4) for k in ADAPTERS]
    larger = [Case(8, 1, model="_lm27m")]
    if fast_bfloat16:
        return [Case(c.adapters, c.rows, p, c.rounds, c.model) for p in DTYPES for c in grid + larger]
    return [*grid, *larger, Case(1, 1, "bf16", rounds=3), Case(8, 1, "bf16", rounds=3)]


def matmul_rate(dtype: str) -> float:
    """FLOP/s."""
    return matmul_flops_per_s(256, torch.device("cpu"), getattr(torch, dtype))


def measure(
    cases: Sequence[Case], language_models: dict[str, dict[str, Any]], vision: dict[str, Any]
) -> dict[Case, Outcome]:
    """All cases, those of one base together."""
    done: dict[Case, Outcome] = {}
    folder = Path(tempfile.mkdtemp(prefix="pfb-", dir="/tmp"))
    try:
        for model, precision in dict.fromkeys((case.model, case.precision) for case in cases):
            base_folder = folder / f"base{model}"
            if not base_folder.exists():
                torch.manual_seed(0)
                make_base(base_folder, language_models[model] | VOCABULARY, vision)
            of_this = [case for case in cases if (case.model, case.precision) == (model, precision)]
            done |= measure_base(base_folder, DTYPES[precision], of_this)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return done


def measure_base(folder: Path, dtype: str, cases: Sequence[Case]) -> dict[Case, Outcome]:
    """Cases of one base and dtype."""
    base = open_bare(folder, dtype)
    configs = trials(max(case.adapters for case in cases))
    adapters = fresh_adapters(base, configs)
    models = separate_models(folder, getattr(torch, dtype), configs[:DISTINCT], adapters[:DISTINCT])
    start = [flat(adapter.tensors) for adapter in adapters[:DISTINCT]]
    done = {}
    for case in cases:
        batch = one_batch(base, case.rows)
        features = with_features(base, batch)
        some, count = models[: case.adapters], case.adapters
        arms: dict[str, Arm] = {
            "ours": partial(packed, base, configs[:count], adapters[:count], features, STEPS),
            "separate": scaled(partial(separate, some, inputs_of(base, batch), STEPS), count / len(some)),
            "separate_cached": scaled(partial(separate, some, inputs_of(base, features), STEPS), count / len(some)),
        }
        done[case] = measure_case(case, arms, start)
        done[case].tokens_per_row = batch.mask_BT.sum().item() / case.rows
        said = (f"{other} {ratio(done[case].rounds, other, 'cpu_s').median:.2f}" for other in arms if other != "ours")
        print(f"{case.name}: {', '.join(said)}, A/A {a_a(done[case].rounds, 'cpu_s').median:.2f}", flush=True)
    return done


def measure_case(case: Case, arms: dict[str, Arm], start: Sequence[torch.Tensor]) -> Outcome:
    """All rounds; every run of an arm must end where the separate steps with the tower did the first time."""
    expected, _ = arms["separate"]()
    outcome = Outcome(losses=expected.losses)

    def check(arm: str, seen: Trained) -> None:
        most = MOST_APART[case.precision]
        outcome.apart[arm] = check_equal(f"{case.name} {arm}", seen, expected, start, most)

    check("ours", arms["ours"]()[0])
    outcome.rounds = run_rounds(arms, check, case.rounds)
    return outcome


def scaled(arm: Arm, times: float) -> Arm:
    """The arm, its time taken so many times."""

    def run() -> tuple[Trained, Sample]:
        trained, sample = arm()
        return trained, Sample(sample.wall_s * times, sample.cpu_s * times)

    return run


def summary(outcome: Outcome) -> dict[str, Any]:
    """A case for the report."""
    return {
        "seconds": per_arm(outcome.rounds),
        "apart": {arm: asdict(value) for arm, value in outcome.apart.items()},
        "losses": [[round(loss, 4) for loss in losses] for losses in outcome.losses],
        "tokens_per_row": outcome.tokens_per_row,
    }


if __name__ == "__main__":
    typer.run(main)
