"""The architecture, LoRA and bundles on the embedded base."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER, base_folder, check_lora_targets
from pefomed_ray.artifacts.manifests import load_bundle_manifest, save_document
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model import load_model
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.generate import Generator, Prompt
from pefomed_ray.model.lora import attach_lora, parameter_counts
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration

CONFIG = build_config(
    TrainConfig,
    {
        "name": "test",
        "task": "vqa",
        "template": "short",
        "data": {"shards": "none"},
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["all-linear"]},
    },
    "test",
)


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").point(lambda v: (v + level) % 256).save(buffer, "PNG")
    return buffer.getvalue()


def save(target: Path) -> dict[str, torch.Tensor]:
    """A bundle whose adapter and projector differ visibly from the base's."""
    base = open_base("embedded", "short")
    attach_lora(base, CONFIG.lora, train_projector=True)
    torch.manual_seed(0)
    trained = {n: p + 0.05 * torch.randn_like(p) for n, p in base.model.named_parameters() if p.requires_grad}
    save_bundle(target, base, CONFIG, {n: t.detach() for n, t in trained.items()}, {"source": "x"}, {})
    return trained


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "b"
    save(target)
    return target


def test_paper_sizes_give_the_papers_parameter_counts(parity_dir: Path) -> None:
    expected = json.loads((parity_dir / "params" / "param_count.json").read_text())
    text = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
    config = PefomedConfig(vision_config={"image_size": 448}, text_config=text)
    with torch.device("meta"):
        model = PefomedForConditionalGeneration(config)
    assert config.visual_tokens == expected["visual_tokens"]["tokens"]
    assert sum(p.numel() for p in model.projector.parameters()) == expected["llama_proj"]
    assert sum(p.numel() for p in model.language_model.parameters()) == expected["llm_base"]
    lora = 32 * 2 * 64 * (4096 + 4096)
    assert lora == expected["lora"]
    assert lora + expected["llama_proj"] == expected["trainable_total"]


def test_only_adapters_and_projector_learn() -> None:
    base = open_base("embedded", "short")
    attach_lora(base, CONFIG.lora, train_projector=True)
    learning = {name for name, p in base.model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in base.model.named_parameters() if "lora_" in n or n.startswith("projector.")}
    assert not any("vision_tower" in name for name in learning)
    trainable, total = parameter_counts(base.model)
    assert 0 < trainable < total


def test_lora_counts_follow_from_rank_and_widths() -> None:
    base = open_base("embedded", "short")
    lora = CONFIG.lora.model_copy(update={"target_modules": ("q_proj", "v_proj")})
    attach_lora(base, lora, train_projector=False)
    text = base.model.config.text_config
    assert parameter_counts(base.model)[0] == text.num_hidden_layers * 2 * lora.rank * 2 * text.hidden_size


def test_targets_are_checked_by_name_and_never_reach_the_tower() -> None:
    linear = check_lora_targets(EMBEDDED_FOLDER, ("all-linear",))
    assert linear == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    for target in ("qkv", "fc1", "projector", "lm_head"):
        with pytest.raises(ConfigError, match=f"{target} matches no linear layer of the language model; it has down_"):
            check_lora_targets(EMBEDDED_FOLDER, (target,))


def test_logits_are_computed_only_where_labels_are_and_the_loss_is_the_same() -> None:
    model, _ = load_model("embedded")
    torch.manual_seed(0)
    ids = torch.randint(10, 500, (2, 20))
    labels = ids.clone()
    labels[0, :12] = -100
    labels[1, :15] = -100
    output = model(input_ids=ids, labels=labels)
    assert output.logits.shape[1] == 8
    full = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    halved = model(input_ids=ids, labels=labels, num_items_in_batch=2 * 13).loss
    torch.testing.assert_close(halved, expected / 2)


def test_features_given_once_equal_pixels_given_each_time() -> None:
    model, processor = load_model("embedded")
    image = Image.open(io.BytesIO(picture(0)))
    inputs = processor([image, image], ["Is this a CT?", "What is it?"])
    whole = model(**inputs).logits
    features = model.patch_features(inputs["pixel_values"][:1]).repeat_interleave(2, dim=0)
    shared = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], patch_features=features).logits
    torch.testing.assert_close(whole, shared)
    with pytest.raises(ValueError, match="image tokens stand in the text"):
        model(inputs["input_ids"], patch_features=features[:1])


def test_an_answer_does_not_depend_on_its_batch(bundle: Path) -> None:
    generator = Generator(open_bundle(bundle)[0])
    prompts = [
        Prompt("vqa", "Is this a CT?", (picture(0),)),
        Prompt("vqa", "Which of the organs in this picture is the largest one of all?", (picture(90),)),
        Prompt("vqa", "Where?", (picture(30), picture(60))),
    ]
    alone = [generator.answer([prompt], 8)[0] for prompt in prompts]
    assert generator.answer(prompts, 8) == alone
    assert alone[0].prompt_tokens < alone[1].prompt_tokens < alone[2].prompt_tokens


def test_the_image_reaches_the_answer(bundle: Path) -> None:
    model, processor = load_model(bundle)
    images = [Image.open(io.BytesIO(picture(level))) for level in (0, 128)]
    logits = model(**processor(images, ["Is this a CT?"] * 2)).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    trained = save(tmp_path / "b")
    base, manifest = open_bundle(tmp_path / "b")
    loaded = dict(base.model.named_parameters())
    for name, tensor in trained.items():
        torch.testing.assert_close(loaded[name].detach(), tensor.detach())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {"adapter_config.json", "adapter_model.safetensors", "projector.safetensors"} <= set(manifest.files)
    targets = json.loads((tmp_path / "b/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # PEFT writes a set, in another order in each process: other bytes, other digest
    assert len(targets) > 3
    again, _ = open_bundle(tmp_path / "b", trainable=True)
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == set(trained)


@pytest.mark.parametrize("damage", ["flip", "missing", "extra", "link"])
def test_a_damaged_bundle_is_refused_by_file_name(damage: str, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "b")
    open_bundle(copy)  # the control: the copy itself is good
    file = copy / "projector.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        (copy / "code.py").write_text("x")
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"code\.py" if damage == "extra" else r"projector\.safetensors"):
        open_bundle(copy)


def test_another_base_or_wording_is_refused_with_both_digests(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "b")
    manifest = load_bundle_manifest(copy)
    save_document(manifest.model_copy(update={"base_digest": "0" * 64}), copy / "bundle.json")
    with pytest.raises(DataError, match=r"trained on base 0000000000000000, but 'embedded' is [0-9a-f]{16}"):
        open_bundle(copy)
    save_document(manifest.model_copy(update={"template_digest": "1" * 64}), copy / "bundle.json")
    with pytest.raises(DataError, match=r"1111111111111111, but this version's is [0-9a-f]{16}"):
        open_bundle(copy)


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        base_folder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"is not a base model: it has no config\.json"):
        base_folder(str(tmp_path))
    copy = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "base")
    assert base_folder(str(copy)) == copy
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="holds a 'bert' model"):
        base_folder(str(copy))
    shutil.copy(EMBEDDED_FOLDER / "config.json", copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        base_folder(str(copy))
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(tmp_path / "nothing")
