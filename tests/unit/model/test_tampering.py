"""A bundle that was tampered with never becomes a model, and no pickle is opened on the way."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.save_and_load import load_peft_weights

from pefomed_ray.artifacts.manifests import load_bundle_manifest, save_document
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import DataError
from pefomed_ray.model import load_model
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import open_bundle, save_bundle
from pefomed_ray.model.load import open_generator
from pefomed_ray.model.lora import attach_lora

VALUES = {"name": "t", "task": "vqa", "template": "short", "data": {"shards": "none"}, "lora": {"rank": 2}}
PICKLES = ("adapter_model.bin", "projector.pt", "projector.pth", "optimizer.pkl")


class Trap:
    """Code that runs when it is unpickled: it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "pickle.find_class":
        _watched.append(f"{event} {arguments[0]}.{arguments[1]}")
    if _watched is not None and event == "open" and isinstance(arguments[0], str | Path):
        _watched.append(f"open {Path(arguments[0]).name}")


sys.addaudithook(_hook)  # for good: Python has no way to take one away


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield what is noted while the block runs: files opened, classes unpickled and calls of `torch.load`."""
    global _watched
    seen: list[str] = []
    load = torch.load

    def noted(file: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(f"torch.load {file}")
        return load(file, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", noted)
        _watched = seen
        try:
            yield seen
        finally:
            _watched = None


def pickles_in(seen: list[str]) -> list[str]:
    names = tuple(f"open {name}" for name in PICKLES)
    return [line for line in seen if line.startswith(("pickle.", "torch.load")) or line in names]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tampering") / "bundle"
    base = open_base("embedded", "short")
    config = build_config(TrainConfig, VALUES, "test")
    attach_lora(base, config.lora, train_projector=True)
    trained = {name: p.detach() for name, p in base.model.named_parameters() if p.requires_grad}
    save_bundle(target, base, config, trained, {}, {})
    return target


@pytest.fixture
def bundle(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "bundle")


def flip(bundle: Path) -> str:
    file = bundle / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file.name


def swap_config(bundle: Path) -> str:
    file = bundle / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1000}))
    return file.name


def add_module(bundle: Path) -> str:
    (bundle / "modeling.py").write_text("raise SystemExit\n")
    return "modeling.py"


def link(bundle: Path) -> str:
    (bundle / "adapter_model.safetensors").rename(bundle.parent / "elsewhere")
    (bundle / "adapter_model.safetensors").symlink_to(bundle.parent / "elsewhere")
    return "adapter_model.safetensors"


def replace_manifest(bundle: Path) -> str:
    """By that of a bundle with other weights, which may be as good as this one."""
    manifest = load_bundle_manifest(bundle)
    files = manifest.files | {"projector.safetensors": "0" * 64}
    save_document(manifest.model_copy(update={"files": files}), bundle / "bundle.json")
    return "projector.safetensors"


@pytest.mark.parametrize("damage", [flip, swap_config, add_module, link, replace_manifest])
@pytest.mark.parametrize("opened", [open_bundle, load_model, open_generator])
def test_every_way_to_open_a_changed_bundle_refuses_it(
    damage: Callable[[Path], str], opened: Callable[[Path], object], bundle: Path
) -> None:
    name = damage(bundle)
    with pytest.raises(DataError, match=f"'{name}'"):
        opened(bundle)


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("listed", [False, True])
def test_an_added_pickle_is_refused_unopened(
    name: str, listed: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    if listed:  # whoever can write the folder can write its manifest too
        manifest = load_bundle_manifest(bundle)
        files = manifest.files | {name: sha256_file(bundle / name)}
        save_document(manifest.model_copy(update={"files": files}), bundle / "bundle.json")
    with watching(monkeypatch) as seen, pytest.raises(DataError, match=name):
        load_model(bundle)
    assert pickles_in(seen) == []
    assert "open bundle.json" in seen
    assert not (tmp_path / "ran").exists()


def test_no_pickle_is_opened_from_a_good_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(monkeypatch) as seen:
        load_model(bundle)
    assert pickles_in(seen) == []
    assert "open adapter_config.json" in seen


def test_the_watch_sees_a_pickle_that_is_opened(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same watch on what PEFT alone does with such a folder, and on a pickle that runs code."""
    (bundle / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, bundle / "adapter_model.bin")
    with watching(monkeypatch) as seen:
        load_peft_weights(str(bundle))
    assert any(line.startswith("torch.load") for line in pickles_in(seen))
    assert "open adapter_model.bin" in pickles_in(seen)
    with watching(monkeypatch) as seen:
        pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert any(line.startswith("pickle.find_class") for line in pickles_in(seen))
    assert (tmp_path / "ran").exists()
