"""An adapter exchanged for another one over the same base, from its folder to the first answer that it may give.

`ours` fills a slot of the engine's arena: files hashed and checked, read, copied. `load` is PEFT's `load_adapter` of a
new adapter, with `delete_adapter` of the old one; `hotswap` is PEFT's `hotswap_adapter`, which needs adapters of one
shape. One thread. After each exchange the model's logits must be those of the adapter; PEFT's two do not verify files.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from benchmarks import _small
from benchmarks._measure import JsonOption, QuickOption, Sample, a_a, finish, per_arm, ratio, run_rounds, timed
from benchmarks.serve import make_bundles
from pefomed_ray.artifacts.base import base_digest
from pefomed_ray.config.schema import Precision
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.serving.engine.adapters import AdapterSlots, read_adapter

SLOT = 1
EXCHANGES = 8
"""A sample is so many, by turns of the adapters."""
TOKENS = 16
TOLERANCE = 1e-4
MAX_RANK = 64


def main(json_: JsonOption = False, quick: QuickOption = False) -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bundles = make_bundles(Path(folder))
        base_folder = Path(folder) / "base"
        arms = {"ours": ours(base_folder), "load": load(base_folder, bundles), "hotswap": hotswap(base_folder, bundles)}
        expected = [one() for one in map(partial(_expected, base_folder), bundles)]

        def check(arm: str, said: list[Tensor]) -> None:
            for number, logits_TV in enumerate(said):
                torch.testing.assert_close(logits_TV, expected[number % len(bundles)], atol=TOLERANCE, rtol=0.0)

        rounds = run_rounds(
            {name: partial(_turns, exchange, bundles) for name, exchange in arms.items()}, check, 2 if quick else 9
        )
    finish(
        "swap",
        {"vs_load": ratio(rounds, "load", "cpu_s"), "vs_hotswap": ratio(rounds, "hotswap", "cpu_s")},
        {"vs_load": a_a(rounds, "cpu_s")},
        {"per_exchanges": EXCHANGES, "seconds": per_arm(rounds), "rank": _small.LORA.rank},
        as_json=json_,
        quick=quick,
    )


Exchange = tuple[Callable[[Path], None], Callable[[], Tensor]]
"""Put a bundle in place of what is there; what the model then says."""


def _turns(exchange: Exchange, bundles: list[Path]) -> tuple[list[Tensor], Sample]:
    """Only the exchanges are timed."""
    put, logits = exchange
    said, wall, cpu = [], 0.0, 0.0
    for number in range(EXCHANGES):
        _, took = timed(partial(put, bundles[number % len(bundles)]))
        wall, cpu = wall + took.wall_s, cpu + took.cpu_s
        said.append(logits())
    return said, Sample(wall, cpu)


def ours(base_folder: Path) -> Exchange:
    """A slot of the engine."""
    base = open_base(str(base_folder), "short")
    slots, digest = AdapterSlots(base, SLOT + 1, MAX_RANK, torch.device("cpu")), base_digest(base.path)

    def put(bundle: Path) -> None:
        slots.fill(SLOT, read_adapter(bundle, base, digest, Precision(), MAX_RANK))

    def logits() -> Tensor:
        slots.use([SLOT])
        return _logits(base)

    return put, logits


def load(base_folder: Path, bundles: list[Path]) -> Exchange:
    """PEFT, another adapter beside the one that is there, which then goes."""
    base, model = _peft(base_folder, bundles[0])
    number = [0]

    def put(bundle: Path) -> None:
        old, new = f"adapter{number[0]}", f"adapter{number[0] + 1}"
        number[0] += 1
        model.load_adapter(str(bundle), adapter_name=new)
        model.set_adapter(new)
        model.delete_adapter(old)

    return put, lambda: _logits(base)


def hotswap(base_folder: Path, bundles: list[Path]) -> Exchange:
    """PEFT, other numbers in the adapter that is there."""
    base, model = _peft(base_folder, bundles[0])
    return lambda bundle: hotswap_adapter(model, str(bundle), adapter_name="adapter0"), lambda: _logits(base)


def _peft(base_folder: Path, bundle: Path) -> tuple[Base, Any]:
    base = open_base(str(base_folder), "short")
    return base, PeftModel.from_pretrained(base.adapted, str(bundle), adapter_name="adapter0")


def _expected(base_folder: Path, bundle: Path) -> Callable[[], Tensor]:
    base, _ = _peft(base_folder, bundle)
    return lambda: _logits(base)


@torch.inference_mode()
def _logits(base: Base) -> Tensor:
    """[T, V] of some tokens."""
    model: Any = base.model
    ids_BT = torch.arange(5, 5 + TOKENS)[None]
    logits_TV: Tensor = model.language_model(input_ids=ids_BT).logits[0]
    return logits_TV


if __name__ == "__main__":
    typer.run(main)
