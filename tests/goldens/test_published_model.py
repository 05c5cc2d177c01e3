"""The converted published model gives the published code's numbers: features, prompts, losses, gradients, answers.

Tolerances are absolute unless said otherwise: visual tokens 1e-5, losses 2e-6, logits 5e-5, gradients 1e-5 of the
tensor's norm. Of the stages inside of the tower, whose values reach 30, a millionth of the largest value where that is
more than 1e-5: float32 hardly has finer steps there.

Letters: B rows, T tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.model.base import Base
from pefomed_ray.model.checkpoint import load_pickled, read_checkpoint, to_published
from pefomed_ray.model.pefomed import tower_features
from pefomed_ray.rendering.batches import Batch, Rendered, generation_batch, training_batch, until_stop
from pefomed_ray.rendering.legacy import LEGACY
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.rendering.template import IMAGE_SLOT

WeightSet = Any
"""Of conftest.py."""


@pytest.fixture(scope="module")
def opened(weights: WeightSet) -> Base:
    base: Base = weights.open(trainable=True)
    return base


def config_of(weights: WeightSet) -> dict[str, Any]:
    """Sizes and ids of a set."""
    return dict(read_json(weights.folder / "config.json"))


# The converter


def test_every_weight_of_language_model_and_adapter_is_the_published_one(weights: WeightSet, opened: Base) -> None:
    ours = {name: t for name, t in opened.model.state_dict().items() if not name.startswith("vision_tower.")}
    theirs = {name: t for name, t in weights.full_state.items() if name.startswith("llama_")}
    theirs = {name: t for name, t in theirs.items() if not name.endswith("inv_freq")}
    found = {weights.published_name(name).replace(".base_layer", ""): tensor for name, tensor in ours.items()}
    assert found.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(found[name], theirs[name].float())] == []


def test_both_namings_of_peft_give_the_same_bundle(weights: WeightSet, tmp_path: Path) -> None:
    older = read_checkpoint(weights.folder / "checkpoint_peft02_names.pth")
    newer = read_checkpoint(weights.folder / "checkpoint.pth")
    assert not any("default" in name for name in load_pickled(weights.folder / "checkpoint_peft02_names.pth")["model"])
    assert older.keys.to_json() | {"file": ""} == newer.keys.to_json() | {"file": ""}
    for one, other in ((older.adapter, newer.adapter), (older.projector, newer.projector)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_comes_back_as_it_was(weights: WeightSet, tmp_path: Path) -> None:
    original = load_pickled(weights.folder / "checkpoint.pth")["model"]
    result = to_published(weights.bundle, tmp_path / "back.pth")
    back = load_pickled(tmp_path / "back.pth")["model"]
    assert back.keys() == {name for name in original if not name.endswith("inv_freq")}
    assert all(torch.equal(back[name], original[name]) and back[name].dtype == original[name].dtype for name in back)
    config = config_of(weights)["lora"]
    assert (result["lora_r"], result["lora_alpha"]) == (config["r"], config["alpha"])
    assert result["lora_target_modules"] == sorted(config["targets"])


def test_the_base_keeps_its_parts_as_they_are_stored_and_makes_the_last_layer_norm_anew(weights: WeightSet) -> None:
    stored = load_file(weights.base / "model.safetensors")
    source = load_file(weights.folder / "llm_base" / "model.safetensors")
    found = {name.removeprefix("language_model."): t for name, t in stored.items() if name.startswith("language_")}
    assert found.keys() == source.keys()
    assert {tensor.dtype for tensor in source.values()} == {torch.float16}
    assert all(torch.equal(found[name], source[name]) and found[name].dtype == source[name].dtype for name in source)
    assert torch.equal(stored["vision_tower.post_layernorm.weight"], torch.ones(config_of(weights)["vit"]["embed_dim"]))
    assert not stored["vision_tower.post_layernorm.bias"].any()


# The tower


def stages(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What the reference stored of the way of an image through the tower and the projector."""
    kept: dict[str, Tensor] = {}
    tower: Any = model.vision_tower

    def keep(name: str, place: nn.Module) -> Any:
        return place.register_forward_hook(lambda _module, _inputs, output: kept.setdefault(name, output))

    hooks = [
        keep("vit_patch_embed", tower.embeddings.patch_embedding),
        keep("vit_block0", tower.encoder.layers[0]),
        keep("vit_out", tower.encoder.layers[-1]),
        keep("ln_vision_out", tower.post_layernorm),
    ]
    with torch.no_grad():
        kept["proj_in"] = tower_features(tower, image, model.config.patches_per_token)
        kept["visual_tokens"] = model.projector(kept["proj_in"])
    for hook in hooks:
        hook.remove()
    kept["vit_patch_embed"] = kept["vit_patch_embed"].flatten(2).transpose(1, 2)
    return kept


def test_images_become_the_published_visual_tokens(weights: WeightSet, opened: Base) -> None:
    for case in weights.train_cases:
        expected = weights.arrays("train_cases", case)
        for name, found in stages(opened.model, expected["image"]).items():
            tolerance = 1e-5 if name == "visual_tokens" else max(1e-5, 1e-6 * float(expected[name].abs().max()))
            torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance, msg=f"{case}/{name}")


def test_another_epsilon_of_the_last_layer_norm_is_seen(weights: WeightSet, opened: Base) -> None:
    """The control of the test above, and the reason for `post_layer_norm_eps`."""
    tower: Any = opened.model.vision_tower
    assert tower.post_layernorm.eps == 1e-5
    tower.post_layernorm.eps = 1e-3
    expected = weights.arrays("train_cases", next(iter(weights.train_cases)))
    found = stages(opened.model, expected["image"])
    tower.post_layernorm.eps = 1e-5
    assert (found["visual_tokens"] - expected["visual_tokens"]).abs().max() > 1e-5


# The prompts


def segments_of(renderer: Renderer, prompt: list[int]) -> list[list[int]]:
    """A prompt's ids before and after its image."""
    first = prompt.index(renderer.image_token_id)
    assert prompt[first : first + renderer.tokens_per_image] == [renderer.image_token_id] * renderer.tokens_per_image
    return [prompt[:first], prompt[first + renderer.tokens_per_image :]]


def test_training_prompts_are_the_published_ones(weights: WeightSet) -> None:
    for case in weights.train_cases.values():
        for row in case["rows"]:
            renderer, task, question = weights.training_prompt(row["text_input"])
            prompt = renderer.prompt_ids(task, question, 1)
            before, after = segments_of(renderer, prompt)
            assert [before[1:], after] == row["seg_ids"]
            assert before[0] == renderer.bos_token_id
            texts = renderer.template.segments(task, question, 1)
            assert [text for text in texts if text != IMAGE_SLOT] == row["seg_texts"]
            assert renderer.answer_ids(row["answer"], case["max_txt_len"]) == row["answer_ids"]
            assert min(len(prompt) - 1, case["max_context_len"]) == row["n_cond"]


def test_evaluation_prompts_are_the_published_ones(weights: WeightSet) -> None:
    renderer = weights.renderer("legacy")
    for case in weights.gen_cases.values():
        for text_input, expected in zip(case["text_input"], case["seg_ids"], strict=True):
            prompt = weights.evaluation_prompt(text_input)
            assert segments_of(renderer, prompt) == expected
            assert prompt[:2] == [renderer.bos_token_id] * 2
    default = weights.renderer("paper").prompt_ids("vqa", "Where?", 1)
    assert default.count(renderer.bos_token_id) == 1


def test_raw_questions_become_the_published_texts(weights: WeightSet, parity_dir: Path) -> None:
    raw = [row["question"] for row in read_json(parity_dir / "model" / "images" / "vqa_test.json")]
    texts = {"".join(LEGACY.segments("vqa", question, 1)) for question in raw}
    stored = [
        "".join(text).removeprefix("<s>")
        for case in weights.gen_cases.values()
        for text in case["texts"]
        if "[vqa]" in text
    ]
    assert stored
    assert set(stored) <= texts


# Losses, logits, gradients


def training_case(weights: WeightSet, name: str) -> tuple[Batch, dict[str, Tensor]]:
    case, expected = weights.train_cases[name], weights.arrays("train_cases", name)
    limits = case["max_context_len"], case["max_txt_len"]
    batch = training_batch([weights.training_row(row, *limits) for row in case["rows"]], pad_token_id=0)
    return batch, expected


def inputs_of(batch: Batch, image: Tensor) -> dict[str, Tensor]:
    return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "pixel_values": image}


def test_losses_and_logits_are_the_published_ones(weights: WeightSet, opened: Base) -> None:
    compared = 0
    for name, case in weights.train_cases.items():
        batch, expected = training_case(weights, name)
        with torch.no_grad():
            loss = opened.model(**inputs_of(batch, expected["image"]), labels=batch.labels_BT).loss
            logits_BTV = opened.model(**inputs_of(batch, expected["image"])).logits
        assert abs(float(loss) - case["loss"]) <= 2e-6, name
        length = batch.ids_BT.shape[1]
        labels_BT = expected["labels"][:, :length].long()
        assert torch.equal(batch.labels_BT, labels_BT), name
        assert torch.equal(batch.mask_BT, expected["attention_mask"][:, :length].long()), name
        counts_BT = labels_BT[:, 1:] != -100
        logprob = -F.cross_entropy(logits_BTV[:, :-1][counts_BT], labels_BT[:, 1:][counts_BT], reduction="none")
        stored = expected["label_logprob"][:, : length - 1][counts_BT]
        torch.testing.assert_close(logprob, stored, rtol=0, atol=5e-5, msg=name)
        if "logits" in expected:
            compared += 1
            seen_BT = batch.mask_BT.bool()
            stored_BTV = expected["logits"][:, :length]
            torch.testing.assert_close(logits_BTV[seen_BT], stored_BTV[seen_BT], rtol=0, atol=5e-5, msg=name)
    assert compared


def test_a_projector_slightly_off_is_seen_in_the_loss(weights: WeightSet, opened: Base) -> None:
    """The control of the test above, on the case that the model knows least by heart."""
    name, case = max(weights.train_cases.items(), key=lambda item: item[1]["loss"])
    batch, expected = training_case(weights, name)
    weight = opened.model.get_parameter("projector.weight")
    with torch.no_grad():
        weight *= 1.001
        loss = opened.model(**inputs_of(batch, expected["image"]), labels=batch.labels_BT).loss
        weight /= 1.001
    assert abs(float(loss) - case["loss"]) > 2e-6


def gradients(weights: WeightSet, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a case, computed in `dtype`, by published name, as float64."""
    base = weights.open(trainable=True)
    batch, expected = training_case(weights, name)
    inputs = inputs_of(batch, expected["image"].to(dtype))
    if dtype == torch.float32:
        loss = base.model(**inputs, labels=batch.labels_BT).loss
    else:  # the same, but for the model's own loss being computed in float32
        logits_BTV = base.model.to(dtype)(**inputs).logits
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    found: dict[str, nn.Parameter] = weights.trained(base)
    return {key: parameter.grad.double() for key, parameter in found.items() if parameter.grad is not None}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Distance of each tensor over the norm of the other one."""
    return {name: float((one[name] - tensor).norm() / tensor.norm()) for name, tensor in other.items()}


def test_gradients_are_the_published_ones(weights: WeightSet) -> None:
    """Within 1e-5 of each tensor's norm, beyond what float32 itself takes away.

    A model that knows its answers by heart (loss 0.006) has gradients made of 1 - p with p near 1, of which float32
    keeps few digits: the reference is as far from the exact gradient as our own float32 is. What is lost is measured,
    by our gradients in float64, and bounded.
    """
    for name in read_json(weights.folder / "grads.json"):
        reference = {key: tensor.double() for key, tensor in weights.arrays("grads", name).items()}
        ours, exact = gradients(weights, name, torch.float32), gradients(weights, name, torch.float64)
        assert ours.keys() == reference.keys()
        lost = apart(ours, exact)
        assert max(lost.values()) < 3e-4, name
        for found in (ours, exact):
            assert {n: far for n, far in apart(found, reference).items() if far > 1e-5 + lost[n]} == {}, name
        # The control: a gradient a thousandth too long is told apart, in every tensor.
        too_long = apart({key: 1.001 * tensor for key, tensor in exact.items()}, reference)
        assert [n for n, far in too_long.items() if far <= 1e-5 + lost[n]] == [], name


# Answers


def test_answers_are_the_published_ones(weights: WeightSet, opened: Base) -> None:
    renderer = weights.renderer("legacy")
    for name, case in weights.gen_cases.items():
        expected = weights.arrays("gen_cases", name)
        rows = [Rendered(weights.evaluation_prompt(text), []) for text in case["text_input"]]
        batch = generation_batch(rows, renderer.pad_token_id)
        assert [len(row.prompt) for row in rows] == case["context_lengths"], name
        ids_BT = opened.model.generate(
            **inputs_of(batch, expected["image"]),
            max_new_tokens=case["generate_kwargs"]["max_new_tokens"],
            num_beams=case["generate_kwargs"]["num_beams"],
            do_sample=False,
        )
        found = [until_stop(ids, renderer.stop_token_ids)[0] for ids in ids_BT.tolist()]
        # The reference starts with a beginning token that transformers 4.31 put there.
        stored = [until_stop(ids[1:], renderer.stop_token_ids)[0] for ids in expected["output_ids"].tolist()]
        assert found == stored, name
        for ids, answer in zip(found, case["answers"], strict=True):
            if is_plain(ids[:-1], answer, weights):
                assert renderer.decode(ids) == answer, name
        if "step0_scores" in expected:
            with torch.no_grad():
                first_BV = opened.model(**inputs_of(batch, expected["image"]), **positions(batch)).logits[:, -1]
            torch.testing.assert_close(first_BV, expected["step0_scores"], rtol=0, atol=5e-5, msg=name)


def is_plain(ids: list[int], answer: str, weights: WeightSet) -> bool:
    """No special token inside and no broken character: of those the published code made text in its own way."""
    special = config_of(weights)["all_special_ids"]
    return not set(ids) & set(special) and "\ufffd" not in answer


def positions(batch: Batch) -> dict[str, Tensor]:
    """Of rows padded on the left: counted from the first token, as `generate` does."""
    return {"position_ids": (batch.mask_BT.cumsum(-1) - 1).clamp(min=0)}
