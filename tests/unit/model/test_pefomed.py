"""The architecture as a Hugging Face class: saving, attention, caches, checkpointing, precision, its processor."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER, tower_digest
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration, build_tower
from pefomed_ray.model.processor import PefomedProcessor
from pefomed_ray.model.tower import open_tower

PICTURES = [Image.radial_gradient("L").rotate(angle).convert("RGB") for angle in (0, 90)]
QUESTIONS = ["Is this a CT?", "Which of these organs is the largest one?"]


def opened(folder: Path = EMBEDDED_FOLDER, **kwargs: Any) -> PefomedForConditionalGeneration:
    model = AutoModelForImageTextToText.from_pretrained(folder, **{"dtype": torch.float32} | kwargs)
    assert isinstance(model, PefomedForConditionalGeneration)
    return model


@pytest.fixture(scope="module")
def model() -> PefomedForConditionalGeneration:
    return opened()


@pytest.fixture(scope="module")
def processor() -> PefomedProcessor:
    found = AutoProcessor.from_pretrained(EMBEDDED_FOLDER, template="short")
    assert isinstance(found, PefomedProcessor)
    return found


def training(model: PefomedForConditionalGeneration, processor: PefomedProcessor) -> dict[str, torch.Tensor]:
    inputs = dict(processor(PICTURES, QUESTIONS))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return inputs | {"labels": labels}


def test_saved_and_loaded_it_is_the_same(
    model: PefomedForConditionalGeneration, processor: PefomedProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = opened(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor_again, PefomedProcessor)
    assert processor_again.renderer.template == processor.renderer.template
    inputs, inputs_again = (p(PICTURES, QUESTIONS) for p in (processor, processor_again))
    assert all(torch.equal(inputs[name], inputs_again[name]) for name in inputs)
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_a_processor_alone_needs_no_base(processor: PefomedProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    alone = PefomedProcessor.from_pretrained(tmp_path)
    assert torch.equal(alone(PICTURES, QUESTIONS)["input_ids"], processor(PICTURES, QUESTIONS)["input_ids"])
    assert PefomedProcessor.from_pretrained(tmp_path, template="legacy").renderer.template.name == "legacy"


def test_several_pictures_a_question_go_where_they_belong(
    model: PefomedForConditionalGeneration, processor: PefomedProcessor
) -> None:
    alone = model(**processor([PICTURES], QUESTIONS[:1])).logits[0, -1]
    beside = model(**processor([PICTURES[0], PICTURES], [QUESTIONS[1], QUESTIONS[0]])).logits[1, -1]
    torch.testing.assert_close(alone, beside)
    swapped = model(**processor([PICTURES[::-1]], QUESTIONS[:1])).logits[0, -1]
    assert (alone - swapped).abs().max() > 1e-3


def test_attention_is_chosen_for_both_parts(processor: PefomedProcessor) -> None:
    inputs = processor(PICTURES, QUESTIONS)
    logits = []
    for name in ("eager", "sdpa"):
        chosen = opened(attn_implementation=name)
        assert chosen.vision_tower.config._attn_implementation == name
        assert chosen.language_model.config._attn_implementation == name
        logits.append(chosen(**inputs).logits[:, -1])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert PefomedForConditionalGeneration._supports_flash_attn


def test_answers_are_the_same_without_a_cache(
    model: PefomedForConditionalGeneration, processor: PefomedProcessor
) -> None:
    inputs = processor(PICTURES, QUESTIONS)
    cached, plain = (model.generate(**inputs, max_new_tokens=6, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_checkpointing_recomputes_the_language_model_alone(processor: PefomedProcessor) -> None:
    model = opened().train()
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    batch = training(model, processor)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradient = model.projector.weight.grad
        assert gradient is not None
        return loss.detach(), gradient.clone()

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.language_model.model.layers[0].self_attn.register_forward_hook(count)
    plain = run()
    assert calls == 1
    model.activation_checkpointing_enable()
    checkpointing = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    assert checkpointing
    assert all(name.startswith("language_model.") for name in checkpointing)
    recomputed = run()
    assert calls == 3, "one forward pass, one recomputation"
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_float32(dtype: torch.dtype, model: PefomedForConditionalGeneration) -> None:
    expected = model.language_model.model.rotary_emb.inv_freq
    for changed in (opened(dtype=dtype), opened().to(dtype)):
        assert changed.projector.weight.dtype == dtype
        rotary = changed.language_model.model.rotary_emb
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, expected)
    assert not torch.equal(expected.to(dtype).float(), expected), "the control: rounding would show"


def test_the_last_layer_norm_may_have_an_epsilon_of_its_own(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["post_layer_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    changed = opened(folder)
    assert changed.vision_tower.post_layernorm.eps == 0.5
    assert build_tower(changed.config.vision_config).post_layernorm.eps == 0.5
    changed.save_pretrained(tmp_path / "again")
    assert opened(tmp_path / "again").vision_tower.post_layernorm.eps == 0.5
    assert tower_digest(folder) != tower_digest(EMBEDDED_FOLDER)
    PICTURES[0].save(tmp_path / "picture.png")
    images = [(tmp_path / "picture.png").read_bytes()]
    one, other = (open_tower(str(base), "short", "cpu")(images) for base in (folder, EMBEDDED_FOLDER))
    assert (one - other).abs().max() > 1e-3
