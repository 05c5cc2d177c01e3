"""A bundle that was tampered with is refused by name, wherever bundles are verified, before anything else is opened."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.registry import promote, resolve
from pefomed_ray.artifacts.storage import sha256_file
from pefomed_ray.errors import DataError

MakeBundle = Callable[[Path, str], str]
WEIGHTS = "inner/weights.safetensors"


def flip_a_bit(folder: Path) -> str:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[0] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    return WEIGHTS


def swap_the_config(folder: Path) -> str:
    (folder / "run.yaml").write_text("task: vqb\n")
    return "run.yaml"


def remove_a_file(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    return WEIGHTS


def remove_a_folder(folder: Path) -> str:
    shutil.rmtree(folder / "inner")
    return WEIGHTS


def add(name: str) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        return name

    change.__name__ = f"add {name}"
    return change


def add_an_empty_folder(folder: Path) -> str:
    (folder / "inner" / "empty").mkdir()
    return "inner/empty"


def add_a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.json")
    return "pipe.json"


def put_a_pipe_in_place_of_a_file(folder: Path) -> str:
    (folder / "run.yaml").unlink()
    os.mkfifo(folder / "run.yaml")
    return "run.yaml"


def link_a_file_outside(folder: Path) -> str:
    moved = folder.parent / "elsewhere"
    (folder / WEIGHTS).rename(moved)
    (folder / WEIGHTS).symlink_to(moved)
    return WEIGHTS


def link_a_file_inside(folder: Path) -> str:
    (folder / "inner" / "again.safetensors").symlink_to("weights.safetensors")
    return "inner/again.safetensors"


def link_a_listed_file_inside(folder: Path) -> str:
    copy_into_manifest(folder, "inner/again.safetensors")
    (folder / "inner" / "again.safetensors").symlink_to("weights.safetensors")
    return "inner/again.safetensors"


def link_a_folder_outside(folder: Path) -> str:
    moved = folder.parent / "elsewhere"
    (folder / "inner").rename(moved)
    (folder / "inner").symlink_to(moved)
    return "inner"


def link_a_folder_inside(folder: Path) -> str:
    (folder / "again").symlink_to("inner")
    return "again"


def link_to_nothing(folder: Path) -> str:
    (folder / "run.json").symlink_to("nowhere")
    return "run.json"


def link_the_manifest(folder: Path) -> str:
    (folder / "bundle.json").rename(folder.parent / "manifest")
    (folder / "bundle.json").symlink_to(folder.parent / "manifest")
    return "bundle.json"


def copy_into_manifest(folder: Path, name: str) -> None:
    """List `name` with the digest of the weights, as if it had always been there."""
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"][name] = manifest["files"][WEIGHTS]
    (folder / "bundle.json").write_text(json.dumps(manifest))


def list_and_add(name: str) -> Callable[[Path], str]:
    """Rewrite bundle.json so that it lists a copy of the weights under a name that it may not list."""

    def change(folder: Path) -> str:
        if not Path(name).is_absolute():
            shutil.copy(folder / WEIGHTS, folder / name)
        copy_into_manifest(folder, name)
        return name

    change.__name__ = f"list and add {name}"
    return change


def list_what_is_not_there(folder: Path) -> str:
    copy_into_manifest(folder, "inner/more.safetensors")
    return "inner/more.safetensors"


def garble_the_manifest(folder: Path) -> str:
    (folder / "bundle.json").write_text("{}")
    return "bundle.json"


def remove_the_manifest(folder: Path) -> str:
    (folder / "bundle.json").unlink()
    return "bundle.json"


DAMAGE: tuple[Callable[[Path], str], ...] = (
    flip_a_bit,
    swap_the_config,
    remove_a_file,
    remove_a_folder,
    *(add(f"inner/x{suffix}") for suffix in (".bin", ".pt", ".pth", ".pkl", ".py", ".safetensors", ".json", "")),
    add("adapter_model.bin"),
    add("code/module.py"),
    add(".hidden"),
    add_an_empty_folder,
    add_a_pipe,
    put_a_pipe_in_place_of_a_file,
    link_a_file_outside,
    link_a_file_inside,
    link_a_listed_file_inside,
    link_a_folder_outside,
    link_a_folder_inside,
    link_to_nothing,
    link_the_manifest,
    *(list_and_add(f"x{suffix}") for suffix in (".bin", ".pt", ".pth", ".pkl", ".py", ".so", "")),
    list_and_add("../x.safetensors"),
    list_and_add("inner/../x.safetensors"),
    list_and_add("./x.safetensors"),
    list_and_add("/etc/x.safetensors"),
    list_what_is_not_there,
    garble_the_manifest,
    remove_the_manifest,
)


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: MakeBundle) -> Path:
    make_bundle(tmp_path / "bundle", "weights")
    return tmp_path / "bundle"


@pytest.mark.timeout(20)  # a pipe that were opened would wait for ever
@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_a_changed_bundle_is_refused_by_file_name_and_not_promoted(
    change: Callable[[Path], str], bundle: Path, tmp_path: Path
) -> None:
    verify_bundle(bundle)  # the control: it was good
    registry = tmp_path / "registry"
    entry = promote(registry, "champion", bundle)
    name = change(bundle)
    with pytest.raises(DataError) as refused:
        verify_bundle(bundle)
    assert repr(name) in str(refused.value) or f"/{name}'" in str(refused.value)
    with pytest.raises(DataError):
        promote(registry, "challenger", bundle)
    assert resolve(registry, "champion") == entry
    # The registry's own copy is held against the same rules each time it is asked for.
    change(registry / "bundles" / entry.digest)
    with pytest.raises(DataError) as refused:
        resolve(registry, "champion")
    assert repr(name) in str(refused.value) or f"/{name}'" in str(refused.value)


def test_a_replaced_manifest_that_fits_its_files_is_another_bundle(
    bundle: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    registry = tmp_path / "registry"
    entry = promote(registry, "champion", bundle)
    make_bundle(tmp_path / "other", "other weights")
    verify_bundle(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "bundle.json", registry / "bundles" / entry.digest)
    with pytest.raises(DataError, match=r"'inner/weights\.safetensors' does not match its sha256"):
        resolve(registry, "champion")
    shutil.copy(tmp_path / "other" / WEIGHTS, registry / "bundles" / entry.digest / WEIGHTS)
    verify_bundle(registry / "bundles" / entry.digest)
    with pytest.raises(DataError, match="holds bundle"):
        resolve(registry, "champion")


def test_what_is_not_listed_is_refused_before_it_is_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("pefomed_ray.artifacts.manifests.sha256_file", watched)
    (bundle / "x.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.bin"):
        verify_bundle(bundle)
    assert hashed == []
    (bundle / "x.bin").unlink()
    verify_bundle(bundle)
    assert sorted(hashed) == ["run.yaml", "weights.safetensors"]
