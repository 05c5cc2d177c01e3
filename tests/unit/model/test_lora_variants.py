"""rsLoRA, DoRA and LoRA+ on the embedded base: as PEFT does them, what trains, and what comes back from a bundle."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoModelForImageTextToText

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import OptimizerConfig
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.lora import attach_lora, parameter_counts
from pefomed_ray.model.loss import answer_loss
from pefomed_ray.training.step import build_optimizer, trainable

RANK, ALPHA = 4, 12.0
TARGETS = ("q_proj", "down_proj")
IDS_BT = torch.randint(10, 500, (2, 9), generator=torch.Generator().manual_seed(0))


def config(**lora: Any) -> TrainConfig:
    values = {"name": "t", "task": "vqa", "template": "short", "data": {"shards": "none"}}
    chosen = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": list(TARGETS), **lora}
    return build_config(TrainConfig, values | {"lora": chosen}, "test")


def adapted(*, train_projector: bool = False, **lora: Any) -> Base:
    base = open_base("embedded", "short")
    torch.manual_seed(0)
    attach_lora(base, config(**lora).lora, train_projector=train_projector)
    return base


def learning(base: Base) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in base.model.named_parameters() if parameter.requires_grad}


def moved(base: Base) -> Base:
    """The base with everything that learns somewhere else than at its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(base.model):
            parameter += 0.05 * torch.randn_like(parameter)
    return base


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.model.eval()(input_ids=IDS_BT).logits


def saved(base: Base, target: Path, **lora: Any) -> Path:
    trained = {name: parameter.detach().clone() for name, parameter in learning(base).items()}
    save_bundle(target, base, config(**lora), trained, {}, {})
    return target


def in_plain_peft(bundle: Path) -> torch.Tensor:
    """Logits of the bare language model with the bundle's adapter, by PEFT alone."""
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)
    language_model = PeftModel.from_pretrained(model.language_model.eval(), str(bundle)).eval()
    with torch.no_grad():
        return language_model(input_ids=IDS_BT).logits


VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}]


@pytest.mark.parametrize("lora", VARIANTS, ids=lambda lora: "+".join(lora) or "plain")
def test_a_bundle_comes_back_and_is_the_same_in_plain_peft(lora: dict[str, Any], tmp_path: Path) -> None:
    base = moved(adapted(**lora))
    bundle = saved(base, tmp_path / "b", **lora)
    again, _ = open_bundle(bundle)
    torch.testing.assert_close(logits(again), logits(base), rtol=0, atol=0)
    torch.testing.assert_close(in_plain_peft(bundle), logits(base), rtol=1e-5, atol=1e-5)
    trainable_again, _ = open_bundle(bundle, trainable=True)
    assert set(learning(trainable_again)) == set(learning(base))


def test_the_variants_differ() -> None:
    """The control of the tests above and below: each setting does something."""
    found = [logits(moved(adapted(**lora))) for lora in VARIANTS]
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, ALPHA / RANK), (True, ALPHA / math.sqrt(RANK))])
def test_the_update_is_scaled_by_alpha_over_the_rank_or_its_root(use_rslora: bool, scaling: float) -> None:
    base = moved(adapted(use_rslora=use_rslora))
    layer = base.decoder_layers[0].self_attn.q_proj
    x_TH = torch.randn(3, layer.in_features)
    a_RH, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x_TH) + scaling * x_TH @ a_RH.T @ b_OR.T
    torch.testing.assert_close(layer(x_TH), expected)


def test_exactly_the_variants_own_parameters_train() -> None:
    text: Any = open_base("embedded", "short").model.config.text_config
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    matrices = layers * RANK * ((hidden + hidden) + (inner + hidden))
    assert parameter_counts(adapted().model)[0] == matrices
    assert parameter_counts(adapted(use_rslora=True).model)[0] == matrices
    magnitudes = layers * (hidden + hidden)  # one length for each output of both
    assert parameter_counts(adapted(use_dora=True).model)[0] == matrices + magnitudes
    kinds = {name.split(".lora_")[1].split(".")[0] for name in learning(adapted(use_dora=True))}
    assert kinds == {"A", "B", "magnitude_vector"}
    every = adapted(target_modules="all-linear")
    attention = hidden * 2 * 2 + 2 * (hidden + text.num_key_value_heads * hidden // text.num_attention_heads)
    assert parameter_counts(every.model)[0] == layers * RANK * (attention + 3 * (hidden + inner))
    assert all(".layers." in name and name.startswith("language_model.") for name in learning(every))


def test_doras_magnitudes_start_as_the_weights_lengths_and_train() -> None:
    base = adapted(use_dora=True)
    torch.testing.assert_close(logits(base), logits(open_base("embedded", "short")), rtol=1e-4, atol=1e-4)
    layer = base.decoder_layers[1].self_attn.q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), layer.base_layer.weight.norm(dim=1))
    before = magnitude.detach().clone()
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=1e-2))
    answer_loss(base.model, {"input_ids": IDS_BT}, IDS_BT)[0].backward()
    optimizer.step()
    assert (magnitude.detach() - before).abs().min() > 1e-3


def rates(optimizer: torch.optim.Optimizer, base: Base) -> dict[str, float]:
    named = {id(parameter): name for name, parameter in learning(base).items()}
    return {named[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_loraplus_gives_b_matrices_a_rate_of_their_own_as_peft_does() -> None:
    base = adapted()
    found = rates(build_optimizer(base.model, OptimizerConfig(learning_rate=1e-3), loraplus_lr_ratio=16), base)
    theirs = create_loraplus_optimizer(base.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert found == pytest.approx(rates(theirs, base))
    assert set(found.values()) == {1e-3, 1.6e-2}
    plain = rates(build_optimizer(base.model, OptimizerConfig(learning_rate=1e-3)), base)
    assert set(plain.values()) == {1e-3}


def test_loraplus_leaves_all_else_at_the_rate_that_is_set() -> None:
    """Unlike PEFT's helper, which speeds up every vector: biases and DoRA's magnitudes are no B matrices."""
    base = adapted(use_dora=True, train_projector=True)
    optimizer = build_optimizer(base.model, OptimizerConfig(learning_rate=1e-3), loraplus_lr_ratio=4)
    found = rates(optimizer, base)
    assert set(found) == set(learning(base))
    assert {name for name, rate in found.items() if rate == pytest.approx(4e-3)} == {
        name for name in found if ".lora_B." in name
    }
    assert {found[name] for name in found if ".lora_B." not in name} == {1e-3}
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.05}
