"""A base made of parts: every tensor in its place as it was stored, special tokens found, memory that stays small."""

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2VisionConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel

from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model import parts
from pefomed_ray.model.assemble import assemble
from pefomed_ray.model.base import open_base
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration, interpolate_position_embeddings
from pefomed_ray.model.tower import open_tower

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.1,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "initializer_range": 0.1,
}
WORDS = ("<unk>", "<s>", "</s>", "a", "b", "c")
MIB = 1 << 20


def save_blip2(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    model = Blip2VisionModel(Blip2VisionConfig(**VISION | changes))
    model.half().save_pretrained(folder)
    return folder


def save_language_model(folder: Path, kind: str = "llama", words: tuple[str, ...] = WORDS, **changes: Any) -> Path:
    """As Llama 2's folder: `<unk>`, `<s>`, `</s>` in that order, no token to pad with."""
    torch.manual_seed(2)
    fields = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None} | changes
    config = AutoConfig.for_model(kind, **fields)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    # What generation needs is in config.json; the check is that nothing else is asked for.
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.add_special_tokens(list(words[:3]))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": words[0], "bos_token": None, "eos_token": {"content": words[2]}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("parts") / "blip2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("parts") / "llama")


def in_base(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_every_tensor_is_in_its_place_as_it_was_stored(blip2: Path, llama: Path, tmp_path: Path) -> None:
    done = assemble(str(blip2), str(llama), tmp_path / "base", max_shard_bytes=4000)
    found = in_base(tmp_path / "base")
    for folder, prefix in ((blip2, "vision_tower."), (llama, "language_model.")):
        stored = load_file(folder / "model.safetensors")
        assert {n for n in found if n.startswith(prefix)} == {prefix + name for name in stored}
        assert all(torch.equal(found[prefix + n], t) and found[prefix + n].dtype == t.dtype for n, t in stored.items())
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert len(set(index["weight_map"].values())) > 3
    _, loading = PefomedForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(loading.values()), loading
    assert done["parameters"]["projector"] == (4 * 16 + 1) * 16
    assert (done["image_size_px"], done["visual_tokens"]) == (28, 4)
    assert json.loads((tmp_path / "base" / "assembled.json").read_text()) == done["sources"]
    with pytest.raises(ConfigError, match="already exists"):
        assemble(str(blip2), str(llama), tmp_path / "base")


def test_the_base_answers_and_is_its_parts(blip2: Path, llama: Path, tmp_path: Path) -> None:
    done = assemble(str(blip2), str(llama), tmp_path / "base")
    base = open_base(str(tmp_path / "base"), "short")
    text = torch.tensor([[1, 3, 4, 5]])
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(text).logits
    torch.testing.assert_close(base.model(input_ids=text).logits, expected)
    pixels = torch.randn(2, 3, 28, 28)
    features = Blip2VisionModel.from_pretrained(blip2, dtype=torch.float32)(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(base.model.patch_features(pixels), features.reshape(2, 4, 64))
    # The image token has an id that no embedding has.
    assert done["tokens"] == {"bos": 1, "eos": 2, "pad": 0, "image": len(WORDS)}
    assert (base.renderer.pad_token_id, base.renderer.image_token_id) == (0, len(WORDS))
    ids = torch.tensor([[1, *[done["tokens"]["image"]] * 4, 3]])
    generated = base.model.generate(input_ids=ids, pixel_values=pixels[:1], max_new_tokens=3, do_sample=False)
    assert 1 <= generated.shape[1] <= 3


def test_an_image_token_beyond_the_vocabulary_takes_the_pictures_place(blip2: Path, tmp_path: Path) -> None:
    words = (*WORDS, *(f"w{i}" for i in range(40 - len(WORDS))))
    done = assemble(str(blip2), str(save_language_model(tmp_path / "lm", words=words)), tmp_path / "base")
    assert done["tokens"]["image"] == TEXT["vocab_size"]
    model = open_base(str(tmp_path / "base"), "short").model
    ids = torch.tensor([[1, *[done["tokens"]["image"]] * 4, 3]])
    logits = [model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits for _ in range(2)]
    assert logits[0].shape[-1] == TEXT["vocab_size"]
    assert not torch.equal(*logits)


def test_position_embeddings_follow_the_image_size(blip2: Path, llama: Path, tmp_path: Path) -> None:
    done = assemble(str(blip2), str(llama), tmp_path / "base", image_size=56)
    assert (done["image_size_px"], done["visual_tokens"]) == (56, 16)
    stored = load_file(blip2 / "model.safetensors")["embeddings.position_embedding"]
    found = in_base(tmp_path / "base")["vision_tower.embeddings.position_embedding"]
    assert torch.equal(found, interpolate_position_embeddings(stored, 8))
    assert open_base(str(tmp_path / "base"), "short").renderer.image_spec.size_px == 56
    with pytest.raises(ConfigError, match="not a multiple of the tower's 7 px"):
        assemble(str(blip2), str(llama), tmp_path / "odd", image_size=50)
    with pytest.raises(ConfigError, match="9 patches an image cannot be joined by 4"):
        assemble(str(blip2), str(llama), tmp_path / "odd", image_size=21)


def test_the_projector_follows_from_the_seed(blip2: Path, llama: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assemble(str(blip2), str(llama), tmp_path / name, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (in_base(tmp_path / name)["projector.weight"] for name in "abc")
    assert a.dtype == torch.float32
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(7)
    assert torch.equal(a, torch.nn.Linear(64, 16).weight)
    given = {"weight": torch.ones(16, 64), "bias": torch.ones(16)}
    assemble(str(blip2), str(llama), tmp_path / "d", projector=given, sources={"from": "elsewhere"})
    assert torch.equal(in_base(tmp_path / "d")["projector.weight"], given["weight"])
    assert json.loads((tmp_path / "d" / "assembled.json").read_text()) == {"from": "elsewhere"}
    with pytest.raises(DataError, match="does not join tower and language model"):
        assemble(str(blip2), str(llama), tmp_path / "e", projector={"weight": torch.ones(16, 64)})


@pytest.mark.parametrize("in_whole_model", [False, True])
def test_a_clip_tower_alone_or_in_a_whole_model(in_whole_model: bool, llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    fields = {name: value for name, value in VISION.items() if name != "initializer_range"}
    clip = CLIPVisionModel(CLIPVisionConfig(**fields))
    folder = tmp_path / "clip"
    clip.save_pretrained(folder)
    if in_whole_model:  # as the checkpoint of a CLIPModel has it
        tensors = {f"vision_model.{name}": tensor for name, tensor in clip.state_dict().items()}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(tensors | {"text_model.final_layer_norm.bias": torch.zeros(4)}, folder / "model.safetensors")
        vision = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    assemble(str(folder), str(llama), tmp_path / "base", image_size=56)
    base = open_base(str(tmp_path / "base"), "short")
    assert base.renderer.image_spec.mean == (0.5, 0.4, 0.3)
    pixels = torch.randn(1, 3, 56, 56)
    expected = clip(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:].reshape(1, 16, 64)
    torch.testing.assert_close(base.model.patch_features(pixels), expected, rtol=1e-4, atol=1e-4)
    open_tower(str(tmp_path / "base"), "short", "cpu")  # names are those of the tower alone


def test_tied_embeddings_are_stored_once(blip2: Path, tmp_path: Path) -> None:
    words = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b")
    qwen = save_language_model(
        tmp_path / "qwen", "qwen2", words, tie_word_embeddings=True, bos_token_id=None, eos_token_id=[0, 2]
    )
    tensors = load_file(qwen / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # some checkpoints have it twice
    save_file(tensors, qwen / "model.safetensors")
    done = assemble(str(blip2), str(qwen), tmp_path / "base")
    # Of several end tokens it is the tokenizer's own; it also stands for the beginning that Qwen does not have.
    assert done["tokens"] == {"bos": 2, "eos": 2, "pad": 0, "image": 5}
    assert "language_model.lm_head.weight" not in in_base(tmp_path / "base")
    model = open_base(str(tmp_path / "base"), "short").model
    ids = torch.tensor([[3, 4]])
    expected = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_old_checkpoints_tables_are_left_out_and_other_surplus_is_not(blip2: Path, llama: Path, tmp_path: Path) -> None:
    copy = save_language_model(tmp_path / "lm")
    tensors = load_file(copy / "model.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | table, copy / "model.safetensors")
    assemble(str(blip2), str(copy), tmp_path / "base")
    save_file(tensors | {"model.layers.9.norm.weight": torch.ones(4)}, copy / "model.safetensors")
    with pytest.raises(DataError, match=r"has, with no place .* 1 tensors: model\.layers\.9\.norm\.weight"):
        assemble(str(blip2), str(copy), tmp_path / "other")
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(lacking, copy / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks 1 tensors: model\.norm\.weight"):
        assemble(str(blip2), str(copy), tmp_path / "other")
    save_file(lacking | {"model.norm.weight": torch.ones(3)}, copy / "model.safetensors")
    with pytest.raises(DataError, match="in another shape than its config says"):
        assemble(str(blip2), str(copy), tmp_path / "other")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(DataError, match="is not a whole safetensors file"):
        assemble(str(blip2), str(copy), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lm"]  # nothing half-written


def test_parts_of_another_kind_are_refused_saying_why(blip2: Path, llama: Path, tmp_path: Path) -> None:
    def refused(vision: Path, language_model: Path, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            assemble(str(vision), str(language_model), tmp_path / "base")

    siglip = tmp_path / "siglip"
    fields = {name: value for name, value in VISION.items() if name != "initializer_range"}
    SiglipVisionModel(SiglipVisionConfig(**fields)).save_pretrained(siglip)
    refused(siglip, llama, r"\(siglip_vision_model\) gives features of shape \(1, 16, 16\) .* class token")
    refused(llama, llama, r"\(llama\) is no vision tower")
    refused(blip2, blip2, "no causal language model")
    gpt2 = tmp_path / "gpt2"
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    AutoModelForCausalLM.from_config(config).save_pretrained(gpt2)
    refused(blip2, gpt2, "layers at `model.layers`")
    mute = save_language_model(tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    refused(blip2, mute, "has no tokenizer.json")
    endless = save_language_model(tmp_path / "endless", eos_token_id=None)
    (endless / "tokenizer_config.json").unlink()
    refused(blip2, endless, "names an end token")
    pickled = save_language_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(blip2, pickled, r"pytorch_model\.bin is a pickle, which may run code when opened")
    own_code = save_language_model(tmp_path / "own_code")
    (own_code / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    refused(blip2, own_code, "no model that transformers knows")
    quantised = save_language_model(tmp_path / "quantised")
    config_json = json.loads((quantised / "config.json").read_text())
    config_json["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config_json))
    refused(blip2, quantised, "quantised weights")
    refused(tmp_path / "none", llama, "is no folder, nor a Hub id")
    assert not (tmp_path / "base").exists()


def test_a_hub_id_is_pinned_to_its_commit(
    blip2: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "1234567890abcdef1234567890abcdef12345678"
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / commit).symlink_to(llama)
    asked = []

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, any("bin" in pattern for pattern in allow_patterns)))
        if repository != "meta-llama/Llama-2-7b-chat-hf":
            raise parts.LocalEntryNotFoundError("offline")
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr(parts, "snapshot_download", snapshot)
    done = assemble(str(blip2), "meta-llama/Llama-2-7b-chat-hf@main", tmp_path / "base")
    assert asked == [("meta-llama/Llama-2-7b-chat-hf", "main", False)]
    assert done["sources"]["language_model"] == {"source": "meta-llama/Llama-2-7b-chat-hf", "revision": commit}
    with pytest.raises(ConfigError, match=r"the Hugging Face Hub did not give it \(LocalEntryNotFoundError\)"):
        assemble("Salesforce/none", str(llama), tmp_path / "other")


@pytest.fixture
def peak_mib() -> Callable[[Callable[[], Any]], float]:
    """By how much a call raises this process's resident memory at its highest."""

    def field(name: str) -> float:
        found = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def measure(call: Callable[[], Any]) -> float:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten (proc(5))
        except OSError:
            pytest.skip("this system does not let a process reset its own peak of memory")
        before = field("VmRSS")
        call()
        return field("VmHWM") - before

    return measure


def test_memory_does_not_grow_with_the_language_model(
    blip2: Path, tmp_path: Path, peak_mib: Callable[[Callable[[], Any]], float]
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 16_000}
    llama = save_language_model(tmp_path / "lm")
    config = AutoConfig.from_pretrained(llama, **wide)
    config.save_pretrained(llama)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    zeros = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in names.items()}
    save_file(zeros, llama / "model.safetensors")
    del zeros
    size_mib = (llama / "model.safetensors").stat().st_size / MIB
    assert size_mib > 170
    assembling = peak_mib(lambda: assemble(str(blip2), str(llama), tmp_path / "base", max_shard_bytes=16 * MIB))
    held: list[Any] = []  # the control: the same measure, of a model that is whole in memory
    loading = peak_mib(lambda: held.append({n: t.clone() for n, t in load_file(llama / "model.safetensors").items()}))
    assert assembling < size_mib / 3
    assert loading > size_mib * 0.9
