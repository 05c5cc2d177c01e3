"""Two ranks train what one process does, and send each other what `Traffic` says; they start once for all tests."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pefomed_ray.config.schema import LoraConfig, OptimizerConfig, Precision
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.generate import generate_ids
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.precision import FLOAT32
from pefomed_ray.rendering.batches import Batch, Rendered, generation_batch, training_batch, until_stop
from pefomed_ray.training.checkpoint import Checkpoint, gather, restore
from pefomed_ray.training.progress import Progress
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import build_optimizer, mean_loss, train_step
from tests.tiny_bases import make_base
from tests.two_ranks import on_two_ranks

pytestmark = pytest.mark.long

FAMILIES = ("embedded", "llava", "qwen3_vl")
ANSWERS = ("Yes", "Upper left lung", "2", "No")
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, target_modules=("all-linear",))
RATE = 1e-3
NF4 = Precision(quantization="nf4")
STRATEGIES: tuple[Literal["fsdp", "ddp"], ...] = ("fsdp", "ddp")


@dataclass
class Seen:
    """What a run of three steps was seen to do."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation_loss: float = 0.0
    generated: list[list[int]] = field(default_factory=list)
    """Of this rank's rows."""
    freed: bool = True
    """Whether the tower's blocks are in parts again after each use."""
    restored: bool = False
    """Whether what was gathered and doubled at the end came back doubled."""
    traffic: dict[str, Any] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of the last step, by collective."""


def opened(folder: str, precision: Precision = FLOAT32) -> Base:
    base = open_base(folder, "short" if folder == "embedded" else "chat", precision)
    torch.manual_seed(0)
    attach_lora(base, LORA, train_projector=True)
    return base


def rows(base: Base) -> list[Rendered]:
    renderer: Any = base.renderer
    made = []
    for number, answer in enumerate(ANSWERS):
        buffer = io.BytesIO()
        Image.radial_gradient("L").rotate(40 * number).save(buffer, "PNG")
        made.append(renderer.render("vqa", f"What is {number}?", renderer.read((buffer.getvalue(),)), answer, 8))
    return made


def run(base: Base, ranks: Ranks, micro_batches: int, *, validate: bool = True) -> Seen:
    """Three steps over all rows, dealt out to the ranks, each rank's in so many micro-batches; if asked, validation
    after the second and a checkpoint in the end."""
    seen = Seen(traffic=asdict(ranks.distribute(base, micro_batches)))
    pad = base.renderer.pad_token_id
    mine = rows(base)[ranks.rank :: ranks.world_size]
    each = len(mine) // micro_batches
    parts = [training_batch(mine[start : start + each], pad) for start in range(0, len(mine), each)]
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=RATE))
    base.model.train()
    for number in range(3):
        if number == 2 and validate:
            base.model.eval()
            prompts: Batch = generation_batch(mine, pad)
            ids_BT = generate_ids(base.model, base.renderer, prompts, 4, synced_gpus=ranks.world_size > 1)
            seen.generated = [until_stop(ids, base.renderer.stop_token_ids)[0] for ids in ids_BT.tolist()]
            seen.validation_loss = mean_loss(base.model, parts, base.renderer, ranks)
            base.model.train()
            if seen.traffic["strategy"] == "fsdp":
                seen.freed &= _in_parts(base)
                base.model.reshard()  # as for a checkpoint
        with Sent() as sent:
            step = train_step(base.model, optimizer, parts, base.renderer, RATE, 1.0, ranks)
        seen.sent = sent.bytes
        seen.losses.append(step.loss)
        seen.norms.append(step.grad_norm)
        seen.freed &= seen.traffic["strategy"] != "fsdp" or _in_parts(base)
    if not validate:
        return seen
    kept = gather(base.model, optimizer)
    restore(base.model, optimizer, Checkpoint(Progress(step=3), {name: 2 * value for name, value in kept.items()}, ()))
    again = gather(base.model, optimizer)
    seen.restored = all(torch.equal(again[name], 2 * value) for name, value in kept.items())
    return seen


def _in_parts(base: Base) -> bool:
    blocks = [parameter for block in base.tower_blocks for parameter in block.parameters()]
    return bool(blocks) and all(isinstance(parameter, DTensor) for parameter in blocks)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives, as ring algorithms send them on."""

    SHARES = {  # of the bytes of what an operation takes, among two  # noqa: RUF012
        "_allgather_base_": 1.0,
        "all_gather_into_tensor": 1.0,
        "_reduce_scatter_base_": 0.5,
        "reduce_scatter_tensor": 0.5,
        "allreduce_": 1.0,
        "all_reduce": 1.0,
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            given = args[1] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[0]
            if name in self.SHARES:
                tensors = given if isinstance(given, list | tuple) else [given]
                self.bytes[name] += round(self.SHARES[name] * sum(t.numel() * t.element_size() for t in tensors))
            elif name not in ("wait_tensor", "barrier"):
                raise AssertionError(f"what does {name} send?")
        return func(*args, **(kwargs or {}))


def recomputing(base: Base) -> Base:
    base.recompute_layers()
    return base


def read_twice(base: Base, ranks: Ranks) -> Seen:
    """The loss of the same rows twice over, in evaluation mode."""
    ranks.distribute(base)
    mine = [training_batch(rows(base)[ranks.rank :: ranks.world_size], base.renderer.pad_token_id)]
    return Seen(losses=[mean_loss(base.model, mine, base.renderer, ranks) for _ in range(2)])


@contextmanager
def avx512_bf16() -> Iterator[None]:
    """bitsandbytes as on a CPU with AVX512-BF16: it repacks nf4 weights, and reads them by a kernel like its own."""

    def gemv_4bit(x: Tensor, packed: Tensor, out: Tensor | None = None, state: Any = None) -> Tensor:
        outputs, inputs = state.shape
        halves = packed.contiguous().view(torch.uint8).reshape(-1, 32)
        codes = torch.cat([halves & 0xF, halves >> 4], dim=1).reshape(outputs // 32, inputs // 2, 32, 2)
        codes = codes.transpose(1, 2).reshape(outputs, inputs).long()
        scales = state.absmax.float().T.repeat_interleave(state.blocksize, dim=1)
        return nn.functional.linear(x.float(), state.code[codes] * scales).to(x.dtype)

    with (
        mock.patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=True),
        mock.patch("bitsandbytes.functional.gemv_4bit", gemv_4bit),
    ):
        yield


def repack(base: Base) -> Base:
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    return base


def run_name(strategy: str, reduce_dtype: torch.dtype, micro_batches: int) -> str:
    return f"{strategy}, {reduce_dtype}, {micro_batches} micro-batches"


def all_runs(rank: int, folder: Path) -> dict[str, Seen]:
    fsdp = Ranks(rank, 2, strategy="fsdp")
    found = {family: run(opened(_folder(family, folder)), fsdp, 1) for family in FAMILIES}
    for strategy in STRATEGIES:
        for dtype in (torch.float32, torch.bfloat16):
            for micro_batches in (1, 2):
                ranks = replace(fsdp, strategy=strategy, reduce_dtype=dtype)
                name = run_name(strategy, dtype, micro_batches)
                found[name] = run(opened(_folder("llava", folder)), ranks, micro_batches, validate=False)
    found["recomputing"] = run(recomputing(opened(_folder("llava", folder))), fsdp, 1)
    found["offloaded"] = run(opened(_folder("llava", folder)), replace(fsdp, cpu_offload=True), 1)
    found["nf4"] = run(opened("embedded", NF4), fsdp, 1)
    with avx512_bf16():
        found["as it is opened"] = read_twice(opened("embedded", NF4), fsdp)
        found["repacked, whole"] = read_twice(repack(opened("embedded", NF4)), Ranks())
        found["repacked, in parts"] = read_twice(repack(opened("embedded", NF4)), fsdp)
    return found


def _folder(family: str, folder: Path) -> str:
    return family if family == "embedded" else str(folder / family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES[1:]:
        make_base(family, made / family)
    return made


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Seen]]:
    return on_two_ranks(all_runs, folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Seen]:
    found = {family: run(opened(_folder(family, folder)), Ranks(), 2) for family in FAMILIES}
    found["nf4"] = run(opened("embedded", NF4), Ranks(), 2)
    found["as it is opened"] = read_twice(opened("embedded", NF4), Ranks())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_parts_trains_and_answers_as_a_whole_one(
    family: str, together: list[dict[str, Seen]], alone: dict[str, Seen]
) -> None:
    ours, whole = [found[family] for found in together], alone[family]
    assert ours[0].traffic["strategy"] == "fsdp"
    assert ours[0].losses == pytest.approx(whole.losses, abs=1e-5)
    assert ours[0].norms == pytest.approx(whole.norms, rel=1e-4)
    assert ours[0].validation_loss == pytest.approx(whole.validation_loss, abs=1e-5)
    assert [ids for pair in zip(ours[0].generated, ours[1].generated, strict=True) for ids in pair] == whole.generated
    assert whole.losses[2] < whole.losses[0]  # the control: other weights would show
    assert all(seen.freed and seen.restored for seen in ours)


def test_layers_may_be_recomputed_in_parts(together: list[dict[str, Seen]], alone: dict[str, Seen]) -> None:
    assert together[0]["recomputing"].losses == pytest.approx(alone["llava"].losses, abs=1e-5)
    assert together[0]["recomputing"].norms == pytest.approx(alone["llava"].norms, rel=1e-4)


def test_no_gradient_goes_through_the_tower(folder: Path) -> None:
    base = recomputing(opened(_folder("llava", folder)))
    inputs = base.renderer.inputs(training_batch(rows(base), base.renderer.pad_token_id))
    seen: list[bool] = []
    base.tower_blocks[0].register_forward_hook(lambda block, taken, given: seen.append(given.requires_grad))
    base.model.train()
    base.model(**inputs)
    base.model.enable_input_require_grads()  # the control: what the library does by itself
    base.model(**inputs)
    assert seen == [False, True]


def test_what_is_kept_on_the_cpu_trains_the_same(together: list[dict[str, Seen]], alone: dict[str, Seen]) -> None:
    """On CPUs, where only the code path is another."""
    for seen in (found["offloaded"] for found in together):
        assert seen.losses == pytest.approx(alone["llava"].losses, abs=1e-5)
        assert seen.norms == pytest.approx(alone["llava"].norms, rel=1e-4)
        assert seen.freed
        assert seen.restored


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bytes_that_are_sent_are_those_that_are_foretold(
    strategy: str, micro_batches: int, together: list[dict[str, Seen]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for found in together:
            seen = found[run_name(strategy, dtype, micro_batches)]
            # Parameters with an odd number of rows are padded, and norm, loss and tokens are summed up.
            assert seen.sent.total() == pytest.approx(seen.traffic[f"{strategy}_bytes"], rel=0.01)
    once, twice = (together[0][run_name(strategy, torch.float32, n)].sent for n in (1, 2))
    if strategy == "fsdp":  # weights travel for each micro-batch, gradients once a step
        assert twice["_allgather_base_"] == 2 * once["_allgather_base_"]
        assert twice["_reduce_scatter_base_"] == once["_reduce_scatter_base_"]
    else:
        assert twice == once


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_travel_in_what_they_are_told_to(
    strategy: str, micro_batches: int, together: list[dict[str, Seen]], alone: dict[str, Seen]
) -> None:
    exact, rounded = (
        together[0][run_name(strategy, dtype, micro_batches)] for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.norms[0] == pytest.approx(alone["llava"].norms[0], rel=1e-6)
    assert exact.losses == pytest.approx(alone["llava"].losses, abs=1e-5)
    assert rounded.norms[0] == pytest.approx(exact.norms[0], rel=2**-8)
    assert rounded.norms[0] != pytest.approx(exact.norms[0], rel=1e-6)  # the control
    assert rounded.losses == pytest.approx(exact.losses, abs=1e-2)
    carrier = "_reduce_scatter_base_" if strategy == "fsdp" else "allreduce_"
    messages = micro_batches if strategy == "fsdp" else 1  # bfloat16 ones do not wait to be added up
    assert rounded.sent[carrier] == pytest.approx(messages * exact.sent[carrier] / 2, rel=0.01)


def test_nf4_in_parts_trains_as_a_whole(together: list[dict[str, Seen]], alone: dict[str, Seen]) -> None:
    ours, whole = together[0]["nf4"], alone["nf4"]
    assert ours.losses == pytest.approx(whole.losses, abs=1e-2)
    assert ours.norms == pytest.approx(whole.norms, rel=1e-2)
    assert ours.validation_loss == pytest.approx(whole.validation_loss, abs=1e-2)


def test_nf4_in_parts_is_read_twice_as_once(together: list[dict[str, Seen]], alone: dict[str, Seen]) -> None:
    found = {name: seen.losses for name, seen in together[0].items()}
    expected = alone["as it is opened"].losses[0]
    assert found["as it is opened"] == pytest.approx([expected] * 2, abs=1e-5)
    # The control: left to repack, a whole model stays right (absmax is rounded to bfloat16), one in parts does not.
    assert found["repacked, whole"] == pytest.approx([expected] * 2, abs=0.05)
    first, second = found["repacked, in parts"]
    assert first == pytest.approx(expected, abs=0.05)
    assert abs(second - expected) > 0.2
