"""The adapter bundle: what training ships. PEFT's own files, the projector beside them, and how it all came about."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pefomed_ray.artifacts.base import base_digest, base_folder, image_size, processor_files
from pefomed_ray.artifacts.manifests import BundleManifest, save_document, verify_bundle
from pefomed_ray.artifacts.precision import precision_of
from pefomed_ray.artifacts.storage import publishing, sha256_file, write_json
from pefomed_ray.config import TrainConfig, save_config
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import DataError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.card import model_card
from pefomed_ray.model.lora import PeftForm, load_lora, make_trainable, peft_form, projector_in_float32, save_lora
from pefomed_ray.rendering.opening import AnyRenderer

PROJECTOR_FILE = "projector.safetensors"
NOT_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Of a base's small files: they belong to its weights."""


def save_bundle(
    target: Path,
    base: Base,
    config: TrainConfig,
    trained: dict[str, Tensor],
    lineage: dict[str, Any],
    metrics: dict[str, Any],
    form: PeftForm | None = None,
) -> BundleManifest:
    """Publish `trained` (full, unsharded tensors by their names in the model) and its history as a bundle folder.

    `form` is the adapter's; by default that of the one which is in the base.
    Raises ConfigError where `target` already holds something.
    """
    projector = {name: tensor.contiguous() for name, tensor in trained.items() if "lora_" not in name}
    with publishing(target) as folder:
        save_lora(form or peft_form(base), trained, folder)
        if projector:
            save_file(projector, folder / PROJECTOR_FILE)
        for path in processor_files(base.path):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)
        write_json(folder / "lineage.json", lineage)
        write_json(folder / "metrics.json", metrics)
        save_config(config, folder / "run.yaml")
        (folder / "README.md").write_text(model_card(config, lineage, metrics, base.path, "bundle"), encoding="utf-8")
        manifest = BundleManifest(
            base=config.base.path,
            base_digest=base_digest(base.path),
            template=config.template,
            template_digest=base.renderer.digest,
            image_size=image_size(base.path),
            files={p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        )
        save_document(manifest, folder / "bundle.json")
    return manifest


def open_bundle(
    directory: Path,
    *,
    trainable: bool = False,
    precision: Precision | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Base, BundleManifest]:
    """Verify a bundle, open its base on a device and put the adapter and projector in place.

    The base is held as it was in training, unless `precision` says otherwise. Raises ConfigError where the device
    cannot hold it so, and DataError where a file does not match its sha256, the base is another one than trained on, or
    the template of that name reads differently today than it did in training: both digests are named.
    """
    base, manifest = open_base_of(directory, precision, device)
    put_on(base, directory, trainable=trainable)
    return base, manifest


def open_base_of(
    directory: Path, precision: Precision | None = None, device: torch.device | str = "cpu"
) -> tuple[Base, BundleManifest]:
    """What `open_bundle` does, but for the adapter and projector. Raises as it does."""
    manifest = verify_bundle(directory)
    digest = base_digest(base_folder(manifest.base))
    if digest != manifest.base_digest:
        raise DataError(
            f"bundle {str(directory)!r} was trained on base {manifest.base_digest[:16]}, "
            f"but {manifest.base!r} is {digest[:16]}; point base to the one it was trained on"
        )
    base = open_base(manifest.base, manifest.template, precision or precision_of(directory), device)
    check_template(directory, manifest, base.renderer)
    return base, manifest


def check_template(directory: Path, manifest: BundleManifest, renderer: AnyRenderer) -> None:
    """Raise DataError where the bundle's template reads differently today than it did in training."""
    if renderer.digest != manifest.template_digest:
        raise DataError(
            f"bundle {str(directory)!r} was trained with template {manifest.template!r} of digest "
            f"{manifest.template_digest[:16]}, but this version's is {renderer.digest[:16]}; train it again"
        )


def put_on(base: Base, directory: Path, *, trainable: bool = False) -> None:
    """Put a verified bundle's adapter and projector into its base. Raises DataError where they do not fit."""
    load_lora(base, directory)
    if (directory / PROJECTOR_FILE).is_file():
        _load_projector(base, directory / PROJECTOR_FILE)
    if trainable:
        make_trainable(base, train_projector=(directory / PROJECTOR_FILE).is_file())


def _load_projector(base: Base, path: Path) -> None:
    tensors = load_file(path)
    wanted = {name for name, _ in base.model.named_parameters() if name.startswith(_within(base.family.projector))}
    if set(tensors) != wanted:
        raise DataError(
            f"{str(path)!r} does not fit the base: it lacks {sorted(wanted - set(tensors))[:3]}, and "
            f"{sorted(set(tensors) - wanted)[:3]} have no place"
        )
    projector_in_float32(base)
    base.model.load_state_dict(tensors, strict=False)


def _within(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in modules)
