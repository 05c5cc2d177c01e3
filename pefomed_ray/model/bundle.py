"""The adapter bundle: what training ships. PEFT's own files, the projector beside them, and how it all came about."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pefomed_ray.artifacts.base import base_digest, base_folder
from pefomed_ray.artifacts.manifests import BundleManifest, save_document, verify_bundle
from pefomed_ray.artifacts.storage import publishing, sha256_file, write_json
from pefomed_ray.config import TrainConfig, save_config
from pefomed_ray.errors import DataError
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import load_lora, make_trainable
from pefomed_ray.rendering.templates import template_named

RENDERER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
PROJECTOR_FILE = "projector.safetensors"
ADAPTER_PREFIX = "language_model."
PROJECTOR_PREFIX = "projector."


def save_bundle(
    target: Path,
    base: Base,
    config: TrainConfig,
    trained: dict[str, Tensor],
    lineage: dict[str, Any],
    metrics: dict[str, Any],
) -> BundleManifest:
    """Publish `trained` (full, unsharded tensors by their names in the model) and its history as a bundle folder.

    Raises ConfigError where `target` already holds something.
    """
    projector = {
        k.removeprefix(PROJECTOR_PREFIX): v.contiguous() for k, v in trained.items() if k.startswith(PROJECTOR_PREFIX)
    }
    adapter = {k.removeprefix(ADAPTER_PREFIX): v for k, v in trained.items() if k.startswith(ADAPTER_PREFIX)}
    language_model: Any = base.model.language_model
    with publishing(target) as folder:
        language_model.save_pretrained(folder, state_dict=adapter)
        if projector:
            save_file(projector, folder / PROJECTOR_FILE)
        for name in RENDERER_FILES:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, folder / name)
        write_json(folder / "lineage.json", lineage)
        write_json(folder / "metrics.json", metrics)
        save_config(config, folder / "run.yaml")
        (folder / "README.md").write_text(_model_card(config, lineage, metrics), encoding="utf-8")
        manifest = BundleManifest(
            base=config.base.path,
            base_digest=base_digest(base.path),
            template=config.template,
            template_digest=base.renderer.template.digest,
            image_size=base.renderer.image_spec.size_px,
            files={p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        )
        save_document(manifest, folder / "bundle.json")
    return manifest


def open_bundle(directory: Path, *, trainable: bool = False) -> tuple[Base, BundleManifest]:
    """Verify a bundle, open its base and put the adapter and projector in place.

    Raises DataError where a file does not match its sha256, the base is another one than trained on, or the template
    of that name reads differently today than it did in training: both digests are named.
    """
    manifest = verify_bundle(directory)
    digest = base_digest(base_folder(manifest.base))
    if digest != manifest.base_digest:
        raise DataError(
            f"bundle {str(directory)!r} was trained on base {manifest.base_digest[:16]}, "
            f"but {manifest.base!r} is {digest[:16]}; point base to the one it was trained on"
        )
    template = template_named(manifest.template)
    if template.digest != manifest.template_digest:
        raise DataError(
            f"bundle {str(directory)!r} was trained with template {manifest.template!r} of digest "
            f"{manifest.template_digest[:16]}, but this version's is {template.digest[:16]}; train it again"
        )
    base = open_base(manifest.base, manifest.template)
    load_lora(base.model, str(directory), trainable=trainable)
    if (directory / PROJECTOR_FILE).is_file():
        base.model.projector.load_state_dict(load_file(directory / PROJECTOR_FILE))
    if trainable:
        make_trainable(base.model, train_projector=(directory / PROJECTOR_FILE).is_file())
    return base, manifest


def _model_card(config: TrainConfig, lineage: dict[str, Any], metrics: dict[str, Any]) -> str:
    values = {name: value["value"] for name, value in metrics.items() if isinstance(value, dict) and "value" in value}
    return "\n".join(
        [
            f"# {config.name}",
            "",
            "LoRA adapter and projector of a medical vision-language model, made with PeFoMed-Ray.",
            "**Not for diagnosis or any clinical use.**",
            "",
            f"- Task: {config.task}; template: {config.template}",
            f"- Base: {config.base.path}",
            f"- LoRA: rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {', '.join(config.lora.target_modules)}",
            f"- Data: {lineage.get('source', 'unknown')} (shards {str(lineage.get('shards', ''))[:16]})",
            f"- Validation: {json.dumps(values)}",
            "",
        ]
    )
