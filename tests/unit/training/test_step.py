"""The step: schedule, loss over answer tokens, padding rows, and nothing done with a number that is none."""

import math

import pytest
import torch

from pefomed_ray.config.schema import LoraConfig, OptimizerConfig
from pefomed_ray.errors import DivergedError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.rendering.batches import Batch, Rendered, training_batch
from pefomed_ray.training.step import build_optimizer, learning_rate_at, mean_loss, train_step, trainable

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-4, warmup_start_learning_rate=1e-3)


def fresh() -> Base:
    base = open_base("embedded", "short")
    torch.manual_seed(0)
    attach_lora(base, LoraConfig(rank=4, alpha=8, dropout=0.0), train_projector=True)
    return base


def rows(base: Base, answers: list[str]) -> list[Rendered]:
    renderer = base.renderer
    generator = torch.Generator().manual_seed(1)
    side = renderer.image_spec.size_px
    return [
        Rendered(
            renderer.prompt_ids("vqa", f"What is {i}?", 1),
            renderer.answer_ids(answer, 32),
            {"pixel_values": torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)},
        )
        for i, answer in enumerate(answers)
    ]


def step(base: Base, batches: list[Batch], learning_rate: float = 1e-2) -> float:
    optimizer = build_optimizer(base.model, OPTIMIZER)
    return train_step(base.model, optimizer, batches, base.renderer, learning_rate, 1.0).loss


def weights(base: Base) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable(base.model)]


@pytest.mark.parametrize("total", [1, 2, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
def test_the_schedule_reaches_its_peak_and_its_minimum(total: int, warmup: float) -> None:
    config = OPTIMIZER.model_copy(update={"warmup_fraction": warmup})
    rates = [learning_rate_at(i, total, config) for i in range(total)]
    assert max(rates) == pytest.approx(config.learning_rate)
    if total > 2:
        assert rates[-1] == pytest.approx(config.min_learning_rate)
    if round(warmup * total) >= 1 and total > 2:
        assert rates[0] == config.warmup_start_learning_rate
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_weight_decay_is_on_matrices_only() -> None:
    base = fresh()
    decayed, not_decayed = build_optimizer(base.model, OPTIMIZER).param_groups
    assert decayed["weight_decay"] == 0.05
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert not_decayed["weight_decay"] == 0.0
    assert [parameter.shape for parameter in not_decayed["params"]] == [base.model.projector.bias.shape]


def test_accumulated_micro_batches_equal_one_batch_though_answers_differ_in_length() -> None:
    answers = ["Yes", "Upper Left Lung, Lower Right Lung", "2", "No"]
    whole, parts = fresh(), fresh()
    pad = whole.renderer.pad_token_id
    loss_whole = step(whole, [training_batch(rows(whole, answers), pad)])
    made = rows(parts, answers)
    loss_parts = step(parts, [training_batch(made[:1], pad), training_batch(made[1:], pad)])
    assert loss_whole == pytest.approx(loss_parts, abs=1e-6)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        # Adam's first step is a sign: what is compared is where a gradient is more than rounding.
        assert ((a - b).abs() > 1e-5).float().mean() < 0.01


def test_a_padding_row_changes_nothing() -> None:
    plain, padded = fresh(), fresh()
    pad = plain.renderer.pad_token_id
    made = rows(plain, ["Yes", "No"])
    filler = Rendered(made[0].prompt, made[0].answer, made[0].tensors, weight=0)
    assert step(plain, [training_batch(made, pad)]) == pytest.approx(
        step(padded, [training_batch([*made, filler], pad)]), abs=1e-6
    )
    # A whole micro-batch of padding, as the last step of an epoch may hold.
    only = fresh()
    assert step(only, [training_batch(made, pad), training_batch([filler], pad)]) == pytest.approx(
        mean_loss(fresh().model, [training_batch(made, pad)], plain.renderer), abs=1e-5
    )


def test_steps_lower_the_loss() -> None:
    base = fresh()
    batch = training_batch(rows(base, ["Yes", "No", "Liver", "2"]), base.renderer.pad_token_id)
    optimizer = build_optimizer(base.model, OPTIMIZER)
    losses = [train_step(base.model, optimizer, [batch], base.renderer, 3e-3, 1.0).loss for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("poison", ["weight", "overflow"])
def test_nothing_is_done_with_a_loss_that_is_not_finite(poison: str) -> None:
    base = fresh()
    batch = training_batch(rows(base, ["Yes", "No"]), base.renderer.pad_token_id)
    bias = base.model.projector.bias
    with torch.no_grad():
        bias[0] = math.nan if poison == "weight" else 3e38
    before = weights(base)
    with pytest.raises(DivergedError, match="no step was taken"):
        step(base, [batch])
    for a, b in zip(before, weights(base), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    with torch.no_grad():
        bias[0] = 0.0
    base.model.zero_grad()
    step(base, [batch])  # the control: without the poison the same step goes through and moves the weights
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(base), strict=True))
