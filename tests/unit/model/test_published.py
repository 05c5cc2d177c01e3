"""Converting published checkpoints: every key is used, ignored for a reason, or an error that names it."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pefomed_ray.artifacts.storage import read_json
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model.bundle import open_bundle
from pefomed_ray.model.checkpoint import load_pickled, to_published
from pefomed_ray.model.published import Settings, convert_published
from tests.tiny_published import IMAGE_SIZE, RANK, Published, write_published

SETTINGS = Settings(vision_layers=2, vision_heads=2)


@pytest.fixture
def files(tmp_path: Path) -> Published:
    return write_published(tmp_path)


def convert(files: Published, folder: Path, settings: Settings = SETTINGS) -> dict[str, Any]:
    return convert_published(
        files.checkpoint, files.vision, str(files.language_model), folder / "base", folder / "bundle", settings
    )


def change(path: Path, **keys: torch.Tensor | None) -> None:
    """Set keys of a `.pth`, or drop those that are None. Dots are spelled `__`."""
    document = torch.load(path, weights_only=True)
    state = document.get("model", document)
    for name, value in keys.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save(document, path)


def test_each_key_is_accounted_for(files: Published, tmp_path: Path) -> None:
    checkpoint, vision, language = convert(files, tmp_path)["keys"]
    assert (checkpoint["used"], sum(checkpoint["ignored"].values())) == (10, 2)
    assert (vision["used"], vision["ignored"]["block after the published model's 2"]) == (4 + 2 * 13, 13)
    assert vision["used"] + sum(vision["ignored"].values()) == len(load_pickled(files.vision))
    assert language["used"] == len(load_file(files.language_model / "model.safetensors"))


def test_the_bundle_says_where_it_came_from(files: Published, tmp_path: Path) -> None:
    convert(files, tmp_path)
    lineage = read_json(tmp_path / "bundle" / "lineage.json")
    assert len(lineage["converted_from"]["projector"]["sha256"]) == 64
    assert len(lineage["converted_from"]["vision"]["sha256"]) == 64
    base, manifest = open_bundle(tmp_path / "bundle")
    assert manifest.template == "legacy"
    config = read_json(tmp_path / "bundle" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (RANK, 8, ["q_proj", "v_proj"])
    assert base.model.config.vision_config.image_size == IMAGE_SIZE
    assert not any(module.training for module in base.model.modules()), "dropout would change every answer"
    convert(files, tmp_path / "told", Settings(vision_layers=2, vision_heads=2, lora_alpha=32.0))
    assert read_json(tmp_path / "told" / "bundle" / "adapter_config.json")["lora_alpha"] == 32


def test_weights_keep_their_dtypes(files: Published, tmp_path: Path) -> None:
    convert(files, tmp_path)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    interpolated_or_new = {"vision_tower.embeddings.position_embedding"}
    interpolated_or_new |= {f"vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}
    single = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert single == interpolated_or_new | {"projector.weight", "projector.bias"}


def test_there_and_back_again(files: Published, tmp_path: Path) -> None:
    convert(files, tmp_path)
    result = to_published(tmp_path / "bundle", tmp_path / "back.pth")
    original, back = (load_pickled(path)["model"] for path in (files.checkpoint, tmp_path / "back.pth"))
    assert back.keys() == {name for name in original if "inv_freq" not in name}
    assert all(torch.equal(back[name], original[name]) for name in back)
    assert (result["lora_r"], result["lora_alpha"]) == (RANK, 8)
    with pytest.raises(ConfigError, match="already exists"):
        to_published(tmp_path / "bundle", tmp_path / "back.pth")


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("checkpoint", {"llama_proj__bias": None}, r"has no key 'llama_proj\.bias'"),
        ("checkpoint", {"llama_proj__scale": torch.ones(1)}, r"a key 'llama_proj\.scale' that has no place"),
        ("checkpoint", {"llama_proj__weight": torch.ones(32, 60)}, "reads 60 numbers, no multiple of the tower's 16"),
        (
            "checkpoint",
            {"llama_model__base_model__model__model__layers__5__self_attn__q_proj__lora_A__weight": torch.ones(4, 32)},
            r"does not fit the language model at .*layers\.5\.self_attn\.q_proj\.lora_A",
        ),
        (
            "checkpoint",
            {"llama_model__base_model__model__model__layers__0__self_attn__q_proj__lora_B__default__weight": None},
            r"does not fit the language model at .*layers\.0\.self_attn\.q_proj\.lora_B",
        ),
        ("vision", {"blocks__1__attn__q_bias": None}, r"has no key 'blocks\.1\.attn\.q_bias'"),
        ("vision", {"blocks__0__gamma_1": torch.ones(16)}, r"a key 'blocks\.0\.gamma_1' that has no place"),
        ("vision", {"pos_embed": torch.ones(1, 9, 16)}, "8 position embeddings do not fill a square"),
    ],
)
def test_a_key_without_a_place_is_named_and_nothing_is_left(
    file: str, keys: dict[str, Any], message: str, files: Published, tmp_path: Path
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    change(getattr(files, file), **keys)
    with pytest.raises(DataError, match=message):
        convert(files, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_language_model_with_a_tensor_too_many_is_refused(files: Published, tmp_path: Path) -> None:
    path = files.language_model / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert convert(files, tmp_path)["keys"][2]["ignored"] == {
        "rotary frequencies: they follow from the configuration": 1
    }
    save_file(load_file(path) | {"model.extra": torch.ones(4)}, path)
    with pytest.raises(DataError, match=r"model\.extra"):
        convert(files, tmp_path / "other")


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").touch, ())


def test_nothing_in_a_file_is_run(files: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.checkpoint.write_bytes(pickle.dumps({"model": _Runs()}))
    with pytest.raises(DataError, match="does not open as tensors alone"):
        convert(files, tmp_path)
    torch.save({"model": _Runs()}, files.checkpoint)
    with pytest.raises(DataError, match="does not open as tensors alone"):
        convert(files, tmp_path)
    assert not Path("ran").exists()
    torch.load(files.checkpoint, weights_only=False)  # the control: it would have
    assert Path("ran").exists()


def test_files_that_are_no_checkpoint(files: Published, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_pickled(tmp_path / "none.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(DataError, match="holds a list"):
        load_pickled(tmp_path / "list.pth")
    torch.save(load_pickled(files.checkpoint)["model"], files.checkpoint)
    with pytest.raises(DataError, match="has no 'model' with tensors"):
        convert(files, tmp_path)
