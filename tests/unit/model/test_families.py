"""Every Hugging Face family, on a tiny random base of it: what trains, what is saved, what is learnt and answered."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pefomed_ray.artifacts.base import check_lora_targets
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.generate import Generator, Prompt, generate_ids
from pefomed_ray.model.lora import attach_lora, load_lora
from pefomed_ray.model.loss import answer_loss
from pefomed_ray.rendering.batches import OF_TOKENS, Rendered, generation_batch, training_batch
from pefomed_ray.rendering.chat import ChatRenderer
from tests.tiny_bases import FAMILIES

LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LANGUAGE_MODEL = dict.fromkeys(FAMILIES, "model.language_model") | {
    "idefics3": "model.text_model",
    "smolvlm": "model.text_model",
}
TWO_LINEAR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
QWEN_MERGER = {f"model.visual.merger.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
PROJECTOR = {
    "llava": TWO_LINEAR,
    "llava_onevision": TWO_LINEAR,
    "qwen2_5_vl": QWEN_MERGER | {"model.visual.merger.ln_q.weight"},
    "qwen3_vl": {
        f"model.visual.{merger}.{layer}.{kind}"
        for merger in ("merger", "deepstack_merger_list.0")
        for layer in ("norm", "linear_fc1", "linear_fc2")
        for kind in ("weight", "bias")
    },
    "gemma3": {
        "model.multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
    },
    "paligemma": {"model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias"},
    "idefics3": {"model.connector.modality_projection.proj.weight"},
    "smolvlm": {"model.connector.modality_projection.proj.weight"},
    "internvl": TWO_LINEAR
    | {"model.multi_modal_projector.layer_norm.weight", "model.multi_modal_projector.layer_norm.bias"},
}
VISION_LAYERS = {
    "llava": ("fc1", "out_proj", "linear_1"),
    "llava_onevision": ("fc2", "out_proj", "linear_2"),
    "qwen2_5_vl": ("qkv", "proj"),
    "qwen3_vl": ("qkv", "linear_fc1"),
    "gemma3": ("fc1", "out_proj"),
    "paligemma": ("fc1", "linear"),
    "idefics3": ("fc1", "proj"),
    "smolvlm": ("fc1", "proj"),
    "internvl": ("fc1", "projection_layer"),
}
QUESTIONS = ["Is this a CT?", "Which of the organs in this picture is the largest one of all?", "Où est la lésion ?"]
ANSWERS = ["yes", "no effusion is seen", "left"]

MakeBase = Callable[[str], Path]


def picture(width: int, height: int, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).point(lambda v: (v + level) % 256).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(60, 40, 0), picture(30, 50, 90), picture(40, 40, 160)]


def config(path: Path, *, train_projector: bool = True, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> TrainConfig:
    values = {
        "name": "test",
        "task": "vqa",
        "template": "chat",
        "base": {"path": str(path)},
        "data": {"shards": "none"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": list(targets)},
        "projector": {"train": train_projector},
    }
    return build_config(TrainConfig, values, "test")


def fresh(bare: Base) -> Base:
    """As if opened anew, but faster."""
    return replace(bare, model=copy.deepcopy(bare.model))


def learner(bare: Base, *, train_projector: bool = True) -> Base:
    """A base whose adapter, and projector if asked, stand somewhere else than at their start."""
    base = fresh(bare)
    torch.manual_seed(0)
    attach_lora(base, config(base.path).lora, train_projector=train_projector)
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return base


def learning(base: Base) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in base.model.named_parameters() if p.requires_grad}


def save(base: Base, target: Path, **settings: Any) -> Path:
    save_bundle(target, base, config(base.path, **settings), learning(base), {"source": "x"}, {})
    return target


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family: str, tiny_base: MakeBase) -> Path:
    return tiny_base(family)


@pytest.fixture(scope="module")
def bare(path: Path) -> Base:
    """Without an adapter; no test changes it."""
    return open_base(str(path), "chat")


@pytest.fixture(scope="module")
def base(bare: Base) -> Base:
    """With an adapter and a projector that were moved; no test changes it."""
    return learner(bare)


@pytest.fixture(scope="module")
def bundle(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `base`."""
    return save(base, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def renderer(bare: Base) -> ChatRenderer:
    assert isinstance(bare.renderer, ChatRenderer)
    return bare.renderer


def counts(family: str) -> tuple[int, ...]:
    """Numbers of pictures that a prompt may have."""
    return (1, 2) if family == "paligemma" else (0, 1, 2)


def row(renderer: ChatRenderer, question: str, images: int, answer: str | None = None, first: int = 0) -> Rendered:
    return renderer.render("vqa", question, renderer.read(PICTURES[first : first + images]), answer)


def logits(model: Any, renderer: ChatRenderer, rows: list[Rendered]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**renderer.inputs(training_batch(rows, renderer.pad_token_id))).logits
    return found


# What trains


@pytest.mark.parametrize("train_projector", [False, True])
def test_exactly_the_intended_parameters_train(family: str, bare: Base, train_projector: bool) -> None:
    base = fresh(bare)
    attach_lora(base, config(base.path).lora, train_projector=train_projector)
    adapters = {
        f"{LANGUAGE_MODEL[family]}.layers.{layer}.self_attn.{target}.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for target in ("q_proj", "v_proj")
        for matrix in "AB"
    }
    assert set(learning(base)) == adapters | (PROJECTOR[family] if train_projector else set())
    assert len(base.decoder_layers) == 2


def test_all_linear_is_all_of_the_language_model_and_nothing_else(family: str, bare: Base) -> None:
    base = fresh(bare)
    attach_lora(base, config(base.path, targets=("all-linear",)).lora, train_projector=False)
    assert {name.removesuffix(".lora_A.default.weight") for name in learning(base) if ".lora_A." in name} == {
        f"{LANGUAGE_MODEL[family]}.layers.{layer}.{part}.{name}"
        for layer in (0, 1)
        for part, names in LINEAR.items()
        for name in names
    }


def test_a_pattern_that_reaches_the_vision_tower_is_refused(family: str, bare: Base) -> None:
    path, vision = bare.path, bare.family.vision[0]
    layers = {name.rsplit(".", 1)[-1] for name, _ in bare.model.named_modules()}
    for target in VISION_LAYERS[family]:
        assert target in layers  # the control: there is such a layer
        with pytest.raises(ConfigError, match=f"{target} matches no linear layer of the language model"):
            check_lora_targets(path, ("q_proj", target))
    for target in (".*", ".*proj", f"{vision}.*", f"{vision}.blocks.0.mlp.up_proj", "lm_head"):
        with pytest.raises(ConfigError, match="matches no linear layer of the language model"):
            check_lora_targets(path, (target,))
    assert check_lora_targets(path, ("q_proj",)) == ["q_proj"]


def test_an_adapter_that_reaches_the_vision_tower_is_refused(bare: Base, tmp_path: Path) -> None:
    """As plain PEFT makes it of names that both parts have."""
    shared = ("up_proj", "q_proj", "attn.proj")
    names = [name for name, _ in bare.model.named_modules() if name.startswith(bare.family.vision)]
    target = next(target for target in shared if any(name.endswith(target) for name in names))
    get_peft_model(fresh(bare).model, LoraConfig(r=2, target_modules=[target])).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=rf"target_modules in .* reach '{bare.family.vision[0]}\."):
        load_lora(fresh(bare), tmp_path)


def test_the_gradient_reaches_what_learns_and_nothing_else(bare: Base, renderer: ChatRenderer) -> None:
    base = learner(bare)
    rows = [row(renderer, QUESTIONS[0], 1, "yes"), row(renderer, QUESTIONS[1], 2, "no effusion", first=1)]
    batch = training_batch(rows, renderer.pad_token_id)
    answer_loss(base.model, renderer.inputs(batch), batch.labels_BT)[0].backward()
    reached = {name for name, p in base.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(learning(base))


# What is saved


def test_a_bundle_comes_back_and_gives_equal_logits(
    bare: Base, base: Base, bundle: Path, renderer: ChatRenderer
) -> None:
    again, _ = open_bundle(bundle, trainable=True)
    rows = [row(renderer, QUESTIONS[0], 1, "yes")]
    assert torch.equal(logits(again.model, again.renderer, rows), logits(base.model, renderer, rows))
    assert not torch.allclose(logits(bare.model, renderer, rows), logits(base.model, renderer, rows), atol=1e-2)
    assert learning(again).keys() == learning(base).keys()


def test_a_bundle_loads_in_plain_peft(base: Base, bundle: Path, renderer: ChatRenderer) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(base.path, dtype=torch.float32)
    found = PeftModel.from_pretrained(plain, bundle).eval()
    rows = [row(renderer, QUESTIONS[0], 1, "yes")]
    expected = logits(base.model, renderer, rows)
    # PEFT knows of adapters only; the projector's names are the model's own.
    assert not torch.allclose(logits(found, renderer, rows), expected, atol=1e-3)
    assert not plain.load_state_dict(load_file(bundle / "projector.safetensors"), strict=False).unexpected_keys
    torch.testing.assert_close(logits(found, renderer, rows), expected, rtol=0, atol=1e-6)


def test_an_adapter_without_a_projector_needs_nothing_but_peft(
    bare: Base, renderer: ChatRenderer, tmp_path: Path
) -> None:
    ours = learner(bare, train_projector=False)
    bundle = save(ours, tmp_path / "b", train_projector=False)
    assert not (bundle / "projector.safetensors").exists()
    found = PeftModel.from_pretrained(fresh(bare).model, bundle).eval()
    rows = [row(renderer, QUESTIONS[0], 1, "yes")]
    torch.testing.assert_close(logits(found, renderer, rows), logits(ours.model, renderer, rows), rtol=0, atol=1e-6)


# What is learnt from


def loss(base: Base, renderer: ChatRenderer, rows: list[Rendered]) -> torch.Tensor:
    """Summed over answer tokens."""
    batch = training_batch(rows, renderer.pad_token_id)
    with torch.no_grad():
        return answer_loss(base.model, renderer.inputs(batch), batch.labels_BT, num_items=1)[0]


def test_a_rows_loss_does_not_depend_on_its_batch(family: str, base: Base, renderer: ChatRenderer) -> None:
    images = [counts(family)[0], 2, 1]
    rows = [row(renderer, *texts) for texts in zip(QUESTIONS, images, ANSWERS, strict=True)]
    alone = [loss(base, renderer, [each]) for each in rows]
    torch.testing.assert_close(loss(base, renderer, rows), sum(alone), rtol=1e-5, atol=1e-5)
    filling = [rows[0], replace(rows[1], weight=0), rows[2]]
    torch.testing.assert_close(loss(base, renderer, filling), alone[0] + alone[2], rtol=1e-5, atol=1e-5)
    other = row(renderer, QUESTIONS[2], 1, ANSWERS[2], first=2)  # the control: what is seen counts
    assert abs(loss(base, renderer, [other]) - alone[2]) > 1e-4


def test_a_base_in_bfloat16_learns_as_one_in_float32_does(bare: Base, renderer: ChatRenderer) -> None:
    """Adapter and projector are float32 either way; the loss differs by less than a hundredth."""
    rows = [row(renderer, QUESTIONS[0], 1, "yes"), row(renderer, QUESTIONS[1], 2, "no effusion", first=1)]
    base = open_base(str(bare.path), "chat", Precision(dtype="bfloat16"))
    attach_lora(base, config(base.path).lora, train_projector=True)
    assert {parameter.dtype for parameter in learning(base).values()} == {torch.float32}
    assert {p.dtype for p in base.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    batch = training_batch(rows, renderer.pad_token_id)
    found = answer_loss(base.model, renderer.inputs(batch), batch.labels_BT, num_items=1)[0]
    torch.testing.assert_close(found.detach(), loss(bare, renderer, rows), rtol=0.01, atol=0)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in base.model.parameters() if p.requires_grad)
    assert generate_ids(base.model, renderer, generation_batch(rows, renderer.pad_token_id), 2).shape[0] == 2


def test_no_token_of_an_answer_sees_those_after_it(base: Base, renderer: ChatRenderer) -> None:
    taught = row(renderer, QUESTIONS[0], 1, "no effusion")
    changed = replace(taught, answer=[*taught.answer[:-2], taught.answer[0], taught.answer[-1]])
    place = len(taught.prompt) + len(taught.answer) - 2
    before, after = logits(base.model, renderer, [taught])[0], logits(base.model, renderer, [changed])[0]
    torch.testing.assert_close(before[:place], after[:place], rtol=0, atol=1e-5)
    assert not torch.allclose(before[place], after[place], atol=1e-3)  # the control: it was changed there


# What is answered


def prompts(family: str) -> list[Prompt]:
    images = [counts(family)[0], 2, 1]
    return [Prompt("vqa", text, tuple(PICTURES[:n])) for text, n in zip(QUESTIONS, images, strict=True)]


def test_an_answer_does_not_depend_on_its_batch(family: str, base: Base, renderer: ChatRenderer) -> None:
    generator = Generator(base)
    taught = [row(renderer, QUESTIONS[2], 1, ANSWERS[2])]
    before = loss(base, renderer, taught)
    alone = [generator.answer([prompt], 8)[0] for prompt in prompts(family)]
    assert generator.answer(prompts(family), 8) == alone
    assert len({answer.text for answer in alone}) > 1  # the control: not everything is answered alike
    assert torch.equal(loss(base, renderer, taught), before)  # Qwen's models keep positions from call to call


def test_padding_on_the_left_leaves_the_next_token_alone(family: str, base: Base, renderer: ChatRenderer) -> None:
    images = [counts(family)[0], 2, 1]
    rows = [row(renderer, text, number) for text, number in zip(QUESTIONS, images, strict=True)]
    with torch.no_grad():
        together = base.model(**renderer.inputs(generation_batch(rows, renderer.pad_token_id))).logits[:, -1]
        alone = torch.cat([logits(base.model, renderer, [each])[:, -1] for each in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_what_is_generated_is_what_training_would_have_expected(
    family: str, base: Base, renderer: ChatRenderer
) -> None:
    """Greedy answers, put in the place of training answers, are the most likely tokens there too."""
    for each in prompts(family):
        asked = renderer.render(each.task, each.question, renderer.read(each.images))
        batch = generation_batch([asked], renderer.pad_token_id)
        answer = generate_ids(base.model, renderer, batch, 6)[0].tolist()
        taught = renderer.render(each.task, each.question, renderer.read(each.images), "x")
        tensors = {
            name: torch.cat([value, value[:, -1:].expand(1, len(answer) - len(taught.answer))], dim=1)
            if name in OF_TOKENS
            else value
            for name, value in taught.tensors.items()
        }
        found = logits(base.model, renderer, [Rendered(asked.prompt, answer, tensors)])[0]
        first = len(asked.prompt) - 1
        assert found[first : first + len(answer)].argmax(dim=-1).tolist() == answer
