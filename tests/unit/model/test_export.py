"""What leaves a bundle: PEFT's folder for those without this package, and a whole model that says the same."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pefomed_ray.artifacts.manifests import load_bundle_manifest, save_document
from pefomed_ray.artifacts.storage import sha256_file, write_json
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.model import load_model, merge
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.card import model_card
from pefomed_ray.model.export import export_merged, export_peft
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.rendering.batches import generation_batch
from tests.tiny_bases import FAMILIES

LINEAGE = {"source": "slake-en", "licence": "open", "rows": 4919, "split": "train", "shards": "ab" * 32, "epoch": 3}
METRICS: dict[str, Any] = {
    "exact_match": {"value": 0.7361, "n": 1061, "unscored": 2, "ci95": [0.707, 0.764]},
    "rougeL": {"value": None, "n": 0, "unscored": 1063, "ci95": None},
    "split": "validation",
    "loss": 0.5,
}


def settings(path: str, **changes: Any) -> TrainConfig:
    values = {
        "name": "test",
        "task": "vqa",
        "template": "short" if path == "embedded" else "chat",
        "base": {"path": path},
        "data": {"shards": "/home/somebody/shards"},
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["all-linear"]},
    }
    return build_config(TrainConfig, values | changes, "test")


def save(target: Path, config: TrainConfig, change: float = 0.05) -> Path:
    """A bundle whose adapter and projector differ visibly from the base's."""
    base = open_base(config.base.path, config.template)
    attach_lora(base, config.lora, train_projector=True)
    torch.manual_seed(0)
    learnt = {n: p.detach() for n, p in base.model.named_parameters() if p.requires_grad}
    trained = {name: value + change * torch.randn_like(value) for name, value in learnt.items()}
    save_bundle(target, base, config, trained, LINEAGE, METRICS)
    return target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bundle") / "b", settings("embedded"))


def about_a_picture(base: Base) -> dict[str, torch.Tensor]:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    row = base.renderer.render("vqa", "Which organ?", base.renderer.read([buffer.getvalue()]))  # type: ignore[arg-type]
    return base.renderer.inputs(generation_batch([row], base.renderer.pad_token_id))


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits.float()
    return found


def test_plain_peft_puts_the_adapter_on_the_bare_language_model(bundle: Path, tmp_path: Path) -> None:
    open_base("embedded", "short").model.language_model.save_pretrained(tmp_path / "lm")
    found = export_peft(bundle, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    text = {"input_ids": torch.arange(20, 40)[None]}
    bare = logits(plain, text)
    tuned = logits(PeftModel.from_pretrained(plain, tmp_path / "out"), text)
    torch.testing.assert_close(tuned, logits(open_bundle(bundle)[0].model.language_model, text))
    assert (tuned - bare).abs().max() > 0.1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "preprocessor_config.json",
        "projector.safetensors",
        "tokenizer.json",
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", found["base_model_name_or_path"])


def test_the_adapter_of_an_assembled_base_names_its_language_model(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "b")
    base = shutil.copytree(open_base("embedded", "short").path, tmp_path / "base")
    commit = "1234567890abcdef1234567890abcdef12345678"
    source = {"source": "meta-llama/Llama-2-7b-chat-hf", "revision": commit}
    write_json(base / "assembled.json", {"vision": {"source": "/tower", "revision": None}, "language_model": source})
    manifest = load_bundle_manifest(copy)
    save_document(manifest.model_copy(update={"base": str(base)}), copy / "bundle.json")
    export_peft(copy, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (source["source"], commit)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == [source["source"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_as_peft_and_as_a_whole(
    family: str, tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tiny_base(family)
    saved = save(tmp_path / "b", settings(str(path)))
    ours = open_bundle(saved)[0]
    inputs = about_a_picture(ours)
    expected = logits(ours.model, inputs)
    bare = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    names = {name for name, _ in bare.named_parameters()}
    before = logits(bare, inputs)
    assert (before - expected).abs().max() > 1e-2  # the control
    export_peft(saved, tmp_path / "peft")
    assert not (tmp_path / "peft" / "projector.safetensors").exists()
    peft_model = PeftModel.from_pretrained(bare, tmp_path / "peft").eval()
    torch.testing.assert_close(logits(peft_model, inputs), expected, rtol=1e-4, atol=1e-4)
    with peft_model.disable_adapter():  # the base's own projector is still there
        torch.testing.assert_close(logits(peft_model, inputs), before)
    found = export_merged(saved, tmp_path / "merged", "float32")
    assert found["merged_difference"] < 1e-5
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert (whole.dtype, {name for name, _ in whole.named_parameters()}) == (torch.float32, names)
    torch.testing.assert_close(logits(whole, inputs), expected, rtol=1e-4, atol=1e-4)
    for file in path.iterdir():
        if file.suffix in (".json", ".jinja", ".model") and file.name != "config.json":
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
        if file.name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json"):
            assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_model_is_a_base_that_answers_as_the_bundle(use_dora: bool, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8, "use_dora": use_dora, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    saved = save(tmp_path / "b", settings("embedded", lora=lora))
    found = export_merged(saved, tmp_path / "float32", "float32")
    assert found["written_difference"] < 1e-5
    inputs = about_a_picture(open_base("embedded", "short"))
    model, _ = load_model(saved)
    expected = logits(model, inputs)
    merged, _ = load_model(tmp_path / "float32")
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    assert (logits(load_model("embedded")[0], inputs) - expected).abs().max() > 0.1  # the control
    assert {tensor.dtype for tensor in load_file(tmp_path / "float32" / "model.safetensors").values()} == {
        torch.float32
    }
    assert merged.generate(**inputs, max_new_tokens=6).tolist() == model.generate(**inputs, max_new_tokens=6).tolist()


def test_a_merged_model_in_half_the_bytes(bundle: Path, tmp_path: Path) -> None:
    found = export_merged(bundle, tmp_path / "out", "bfloat16")
    assert found["merged_difference"] < 1e-5 < found["written_difference"] < found["tolerance"] == 0.05
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "language_model.lm_head.weight" not in stored  # tied
    base = open_base("embedded", "short")
    assert not torch.equal(stored["projector.weight"].float(), base.model.projector.weight)


def test_a_merged_model_keeps_the_wording_it_was_trained_under(tmp_path: Path) -> None:
    saved = save(tmp_path / "b", settings("embedded", template="paper"))
    export_merged(saved, tmp_path / "out", "float32")
    assert load_model(tmp_path / "out")[1].renderer.template.name == "paper"
    assert load_model("embedded")[1].renderer.template.name == "short"  # the control: what a base alone gets
    said = json.loads((tmp_path / "out" / "merged.json").read_text())
    assert said["bundle"] == load_bundle_manifest(saved).digest
    write_json(tmp_path / "out" / "merged.json", said | {"template_digest": "1" * 64})
    with pytest.raises(DataError, match=r"1111111111111111, but this version's is [0-9a-f]{16}"):
        load_model(tmp_path / "out")


def test_a_merge_that_lost_something_is_not_published(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_merge = merge._take_up

    def forgets_a_layer(base: Base, folder: Path) -> None:
        layer = base.model.language_model.model.layers[2].self_attn.v_proj
        layer.lora_B["default"].weight.data.zero_()
        whole_merge(base, folder)

    monkeypatch.setattr(merge, "_take_up", forgets_a_layer)
    with pytest.raises(PefomedError, match="merging did not keep the model") as caught:
        export_merged(bundle, tmp_path / "out", "bfloat16")
    assert caught.value.exit_code == 1
    monkeypatch.setattr(merge, "_take_up", whole_merge)
    save_whole = merge._save

    def saves_another(base: Base, folder: Path, dtype: merge.Dtype) -> None:
        base.model.projector.weight.data.mul_(-1)
        save_whole(base, folder, dtype)

    monkeypatch.setattr(merge, "_save", saves_another)
    with pytest.raises(PefomedError, match="merging did not keep the model"):
        export_merged(bundle, tmp_path / "out", "bfloat16")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(merge, "_save", save_whole)
    export_merged(bundle, tmp_path / "out", "bfloat16")  # the control


def test_quantised_bases_are_not_merged_into(bundle: Path, tmp_path: Path) -> None:
    resources = {"use_gpu": True}
    for quantization in ("nf4", "int8"):
        config = settings("embedded", base={"path": "embedded", "quantization": quantization}, resources=resources)
        saved = save(tmp_path / quantization, config)
        with pytest.raises(ConfigError, match=rf"its base was quantised \({quantization}\) .* without --merged"):
            export_merged(saved, tmp_path / "out", "bfloat16")
        export_peft(saved, tmp_path / f"{quantization}-peft")
    base = shutil.copytree(open_base("embedded", "short").path, tmp_path / "base")
    saved = save(tmp_path / "stored", settings(str(base), template="short"))
    config_json = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config_json | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match=r"its base was quantised \(as stored\)"):
        export_merged(saved, tmp_path / "out", "bfloat16")
    assert not (tmp_path / "out").exists()


def test_what_is_not_whole_or_not_free_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    copy = shutil.copytree(bundle, tmp_path / "b")
    with open(copy / "tokenizer.json", "ab") as file:
        file.write(b" ")
    for export in (export_peft, lambda b, t: export_merged(b, t, "float32")):
        with pytest.raises(ConfigError, match="already exists and is not empty"):
            export(bundle, tmp_path / "full")
        with pytest.raises(DataError, match=r"'tokenizer\.json' does not match its sha256"):
            export(copy, tmp_path / "out")
    infinite = shutil.copytree(bundle, tmp_path / "infinite")
    path = infinite / "adapter_model.safetensors"
    save_file({name: tensor * float("inf") for name, tensor in load_file(path).items()}, path)
    manifest = load_bundle_manifest(infinite)
    files = manifest.files | {path.name: sha256_file(path)}
    save_document(manifest.model_copy(update={"files": files}), infinite / "bundle.json")
    with pytest.raises(DataError, match="is not finite at"):
        export_merged(infinite, tmp_path / "out", "float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "full", "infinite"]
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_the_card_says_what_was_learnt_how_well_and_what_not_to_do(bundle: Path, tmp_path: Path) -> None:
    text = (bundle / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("peft", None, None)
    assert {"medical", "vqa"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("slake-en", "validation", "exact_match")
    assert result.metric_value == 0.7361
    for said in (
        "| exact_match | 0.736 | 0.707 to 0.764 | 1061 | 2 |",
        "| rougeL | none | not computed | 0 | 1063 |",
        "Not for diagnosis",
        "- Corpus: slake-en",
        "- Licence class: open",
        "- Split: train, 4919 rows",
        "rank 4, alpha 8",
    ):
        assert said in text
    assert "/home/somebody" not in text
    assert "control" not in text
    controls = {"blank_image": {"exact_match": {"value": 0.216, "n": 1061, "unscored": 0, "ci95": [0.19, 0.24]}}}
    manifest = load_bundle_manifest(bundle)
    evaluation = METRICS | {"bundle": manifest.digest, "split": "test", "source": "slake-en", "controls": controls}
    write_json(tmp_path / "metrics.json", evaluation | {"normalizer": "strict"})
    export_peft(bundle, tmp_path / "out", tmp_path / "metrics.json")
    exported = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "On the split `test` of slake-en. Answers are compared by the normalizer `strict`." in exported
    assert "| blank_image | exact_match | 0.216 | 0.190 to 0.240 | 1061 | 0 |" in exported
    write_json(tmp_path / "metrics.json", evaluation | {"bundle": "0" * 64})
    with pytest.raises(DataError, match="is about bundle 0000000000000000, not"):
        export_peft(bundle, tmp_path / "other", tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not the metrics\.json of an evaluation"):
        export_peft(bundle, tmp_path / "other", tmp_path / "metrics.json")


@pytest.mark.parametrize("form", ["bundle", "peft", "merged"])
def test_a_card_is_whole_whatever_is_known(form: Any, tiny_base: Callable[[str], Path]) -> None:
    for path in (open_base("embedded", "short").path, tiny_base("llava")):
        card = ModelCard(model_card(settings("embedded"), {}, {}, path, form))
        assert card.data.library_name == ("transformers" if form == "merged" else "peft")
        assert "None were measured." in card.text
        mixture = [{"source": "roco", "weight": 0.7}, {"source": "mimic-cxr", "weight": 0.3}]
        lineage = {"source": "roco + mimic-cxr", "licence": "restricted", "mixture": mixture}
        text = model_card(settings("embedded"), lineage, METRICS, path, form)
        assert "    - mimic-cxr, weight 0.3" in text
        assert "restricted (its terms may cover models" in text
