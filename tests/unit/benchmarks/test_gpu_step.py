"""The benchmark of a step on a GPU, tiny and on the CPU: its FLOPs beside torch's own count of them, its course."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._small import ANSWERS, QUESTIONS, make_batches
from benchmarks.gpu_step import OPTIMIZER, Case, main, open_trainable, report, step_flops
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Batch
from pefomed_ray.training.step import build_optimizer, train_step

CPU = torch.device("cpu")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1536,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
    "initializer_range": 0.02,
}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """One whose attention torch can count: not a kernel of its own, but products."""
    opened = open_trainable(tmp_path / "base", TEXT, VISION, CPU)
    opened.model.set_attn_implementation("eager")
    return opened


def counted(base: Base, batch: Batch) -> int:
    optimizer = build_optimizer(base.model, OPTIMIZER)
    with FlopCounterMode(display=False) as counter:
        train_step(base.model, optimizer, [batch], base.renderer, 1e-4, 1.0)
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [1, 4])
def test_flops_are_those_that_torch_counts(rows: int, base: Base) -> None:
    batch = make_batches(base, 1, rows, QUESTIONS, ANSWERS[3:4])[0]
    flops = step_flops(base, batch)
    assert counted(base, batch) == pytest.approx(sum(flops.values()), rel=0.001)
    assert min(flops.values()) > 0.01 * sum(flops.values())  # so that a part left out, or doubled, would be seen


def test_torch_counts_more_where_frozen_weights_ask_for_gradients(base: Base) -> None:
    batch = make_batches(base, 1, 2)[0]
    expected = sum(step_flops(base, batch).values())
    base.decoder_layers.requires_grad_(True)
    assert counted(base, batch) > 1.05 * expected


def test_layers_computed_again_are_no_work_of_the_model(base: Base) -> None:
    batch = make_batches(base, 1, 2)[0]
    before = step_flops(base, batch)
    base.recompute_layers()
    assert step_flops(base, batch) == before
    assert counted(base, batch) > 1.05 * sum(before.values())


def test_the_whole_course_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    cases = (Case(1), Case(2, recompute=True))
    report(TEXT, VISION, 64, CPU, cases, 1, as_json=True, quick=True)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["ratios"]) == {"mfu_b1", "mfu_b2_recomputed"}
    seen = document["detail"]["cases"]
    assert seen["b1"]["tokens_per_row"] == seen["b2_recomputed"]["tokens_per_row"]
    assert all(case["losses"][-1] < case["losses"][0] for case in seen.values())


def test_steps_that_do_not_learn_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(AssertionError, match="do not learn"):
        report(TEXT, VISION, 64, CPU, [Case(1)], 1, as_json=False, quick=True)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(json_=True)
    said, document = capsys.readouterr().out.splitlines()
    assert said == "gpu_step: skipped, no CUDA device"
    assert (json.loads(document)["ratios"], json.loads(document)["skipped"]) == ({}, "no CUDA device")
