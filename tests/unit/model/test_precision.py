"""A frozen base in bfloat16, nf4 and int8; int8 too runs on the CPU here, where a run itself refuses to use it."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import LoraConfig, OptimizerConfig, Precision
from pefomed_ray.errors import ConfigError
from pefomed_ray.model import base as base_module
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.lora import attach_lora, parameter_counts, what_learns
from pefomed_ray.model.precision import check_precision
from pefomed_ray.rendering.batches import Batch, training_batch
from pefomed_ray.training.loop import prepare_model
from pefomed_ray.training.step import build_optimizer, train_step
from tests.tiny_bases import make_base

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
KINDS = {"nf4": Linear4bit, "int8": Linear8bitLt}
NF4, INT8 = Precision(dtype="bfloat16", quantization="nf4"), Precision(quantization="int8")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    return buffer.getvalue()


def batch(base: Base) -> Batch:
    renderer: Any = base.renderer
    images = renderer.read((picture(),))
    rows = [renderer.render("vqa", "What is seen?", images, answer, 8) for answer in ("Lung", "A left liver")]
    return training_batch(rows, renderer.pad_token_id)


def losses(base: Base, steps: int = 2) -> list[float]:
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=3e-3))
    base.model.train()
    made = batch(base)
    return [train_step(base.model, optimizer, [made], base.renderer, 3e-3, 1.0).loss for _ in range(steps)]


def frozen(base: Base) -> dict[str, torch.Tensor]:
    """As bytes: packed numbers of 4 bits, read as bfloat16, may be NaN."""
    return {n: p.detach().clone().view(torch.uint8) for n, p in base.model.named_parameters() if not p.requires_grad}


def types(base: Base, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in base.model.parameters() if p.requires_grad is trained}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check that keeps int8 off CPUs: in one process, unsharded, it is right there."""
    monkeypatch.setattr(base_module, "check_precision", lambda precision, device: None)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("precision", [NF4, INT8], ids=lambda p: p.quantization)
def test_a_quantised_base_loads_and_trains(precision: Precision) -> None:
    base = open_base("embedded", "short", precision)
    whole = open_base("embedded", "short")
    kind = KINDS[precision.quantization]
    quantised = {name for name, module in base.model.named_modules() if isinstance(module, kind)}
    linear = {name for name, module in whole.model.named_modules() if type(module) is nn.Linear}
    assert quantised == {name for name in linear if name.startswith("language_model.model.layers.")}
    assert {"projector", "language_model.lm_head"} <= linear - quantised
    assert parameter_counts(base.model)[1] == parameter_counts(whole.model)[1]
    attach_lora(base, LoraConfig(**LORA), train_projector=True)  # type: ignore[arg-type]
    attach_lora(whole, LoraConfig(**LORA), train_projector=True)  # type: ignore[arg-type]
    assert what_learns(base) == what_learns(whole)
    adapted = [module for module in base.model.modules() if isinstance(module, BaseTunerLayer)]
    assert {type(module).__name__ for module in adapted} == {kind.__name__}  # PEFT's own for weights of this kind
    assert types(base, trained=True) == {torch.float32}
    before = frozen(base)
    found = losses(base)
    assert found[-1] < 0.95 * found[0]
    assert found[0] == pytest.approx(losses(whole, 1)[0], rel=0.1)
    for name, tensor in frozen(base).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("precision", [Precision(dtype="bfloat16"), NF4, INT8], ids=str)
def test_a_bundle_is_opened_in_the_precision_it_was_trained_in(precision: Precision, tmp_path: Path) -> None:
    values = {"name": "t", "task": "vqa", "template": "short", "data": {"shards": "x"}, "lora": LORA}
    more = {"base": precision.model_dump(), "resources": {"use_gpu": True}}
    config = build_config(TrainConfig, values | more, "test")
    base = prepare_model(config, CPU)
    losses(base, 1)
    trained = {n: p.detach() for n, p in base.model.named_parameters() if p.requires_grad}
    save_bundle(tmp_path / "b", base, config, trained, {}, {})
    again, _ = open_bundle(tmp_path / "b")
    assert Counter(type(m) for m in again.model.modules()) == Counter(type(m) for m in base.model.modules())
    inputs = base.renderer.inputs(batch(base))
    with torch.no_grad():
        expected = base.model.eval()(**inputs).logits
        torch.testing.assert_close(again.model(**inputs).logits, expected, rtol=0, atol=0)
        otherwise, _ = open_bundle(tmp_path / "b", precision=Precision())
        assert types(otherwise, trained=False) == {torch.float32}
        difference = (otherwise.model(**inputs).logits - expected).abs()
        assert 0 < difference.mean() < 0.3
    following = config.model_copy(update={"init_from": str(tmp_path / "b"), "base": config.base.model_copy()})
    assert types(prepare_model(following, CPU), trained=True) == {torch.float32}


def test_bfloat16_halves_what_is_frozen_and_leaves_what_is_trained() -> None:
    base = open_base("embedded", "short", Precision(dtype="bfloat16"))
    attach_lora(base, LoraConfig(use_dora=True, **LORA), train_projector=True)  # type: ignore[arg-type]
    assert types(base, trained=False) == {torch.bfloat16}
    assert types(base, trained=True) == {torch.float32}
    tables = {buffer.dtype for name, buffer in base.model.named_buffers() if "inv_freq" in name}
    assert tables == {torch.float32}  # positions of long prompts are not told apart in bfloat16
    found = losses(base)
    assert found[-1] < 0.95 * found[0]
    whole = open_base("embedded", "short")
    attach_lora(whole, LoraConfig(**LORA), train_projector=True)  # type: ignore[arg-type]
    assert found[0] == pytest.approx(losses(whole, 1)[0], rel=0.05)
    answers = Generator(base).answer([Prompt("vqa", "Is this a CT?", (picture(),))], 4)
    assert answers[0].tokens > 0


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "idefics3"])
def test_a_float32_projector_trains_in_a_bfloat16_model_of_any_family(family: str, tmp_path: Path) -> None:
    folder = str(make_base(family, tmp_path / family))
    base = open_base(folder, "chat", Precision(dtype="bfloat16"))
    attach_lora(base, LoraConfig(**LORA), train_projector=True)  # type: ignore[arg-type]
    assert types(base, trained=True) == {torch.float32}
    whole = open_base(folder, "chat")
    attach_lora(whole, LoraConfig(**LORA), train_projector=True)  # type: ignore[arg-type]
    before = {n: p.detach().clone() for n, p in base.model.named_parameters() if p.requires_grad}
    assert losses(base, 1)[0] == pytest.approx(losses(whole, 1)[0], rel=0.05)
    moved = {n for n, p in base.model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert any(name.startswith(base.family.projector) for name in moved)


def test_weights_that_were_stored_quantised_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "base")
    open_base(str(folder), "short")  # the control
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match=r"holds quantised weights \(gptq\); give the 16-bit ones"):
        open_base(str(folder), "short")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_a_machine_cannot_hold_is_refused_with_the_reason(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = Precision(quantization=quantization)  # type: ignore[arg-type]
    if quantization == "int8":
        with pytest.raises(ConfigError, match="int8 needs a CUDA device, and this process computes on the CPU"):
            open_base("embedded", "short", precision)
    else:
        open_base("embedded", "short", precision)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees none on this machine"):
        check_precision(precision, CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_precision(precision, CUDA)
    monkeypatch.setattr("pefomed_ray.model.precision.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes, which is not installed"):
        check_precision(precision, CUDA)
    check_precision(Precision(dtype="bfloat16"), CPU)
