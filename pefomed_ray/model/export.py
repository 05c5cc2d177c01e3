"""A bundle for those who do not have this package: PEFT's own folder, or a whole model."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import load_file, save_file

from pefomed_ray.artifacts.base import base_folder, family_of
from pefomed_ray.artifacts.family import PEFOMED, Family
from pefomed_ray.artifacts.manifests import BundleManifest, verify_bundle
from pefomed_ray.artifacts.storage import check_output_is_free, publishing, read_json
from pefomed_ray.config import TrainConfig, load_config
from pefomed_ray.errors import DataError
from pefomed_ray.model.bundle import PROJECTOR_FILE
from pefomed_ray.model.card import model_card
from pefomed_ray.model.lora import ADAPTER_FILE, PEFT_PREFIX
from pefomed_ray.model.merge import Dtype, merge
from pefomed_ray.model.parts import SOURCES_FILE

NOT_A_PROCESSORS = (
    "README.md",
    "adapter_config.json",
    ADAPTER_FILE,
    PROJECTOR_FILE,
    "lineage.json",
    "metrics.json",
    "run.yaml",
)
"""Files of a bundle; the others are the processor's."""


def export_merged(bundle: Path, target: Path, dtype: Dtype, metrics_file: Path | None = None) -> dict[str, Any]:
    """Publish the base with the adapter in its weights; raises what `merge` raises, and as `card_metrics` does."""
    manifest = verify_bundle(bundle)
    metrics = card_metrics(bundle, manifest, metrics_file)
    found = merge(bundle, target, dtype, metrics)
    return {"folder": str(target), "form": "merged", "digest": manifest.digest, "dtype": dtype, **found}


def export_peft(bundle: Path, target: Path, metrics_file: Path | None = None) -> dict[str, Any]:
    """Publish the adapter as a folder that plain `peft` loads: onto the whole model, or for a `pefomed` base onto its
    language model. A trained projector goes into the adapter (`modules_to_save`), for `pefomed` into a file beside it.

    Raises ConfigError where the base is not there or `target` holds something, DataError where the bundle is not whole.
    """
    check_output_is_free(target)
    manifest = verify_bundle(bundle)
    metrics = card_metrics(bundle, manifest, metrics_file)
    base = base_folder(manifest.base)
    family = family_of(base)
    peft_config = PeftConfig.from_pretrained(str(bundle))
    peft_config.base_model_name_or_path, peft_config.revision = _adapted_model(base, manifest.base)
    with publishing(target) as folder:
        for name in manifest.files:
            if name not in NOT_A_PROCESSORS:
                shutil.copyfile(bundle / name, folder / name)
        if family.model_type == PEFOMED:
            peft_config.task_type = "CAUSAL_LM"
            for name in (ADAPTER_FILE, PROJECTOR_FILE):
                if name in manifest.files:
                    shutil.copyfile(bundle / name, folder / name)
        else:
            _write_with_projector(bundle, folder, family, peft_config)
        peft_config.save_pretrained(str(folder))
        config = load_config(TrainConfig, bundle / "run.yaml")
        card = model_card(config, read_json(bundle / "lineage.json"), metrics, base, "peft")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return {
        "folder": str(target),
        "form": "peft",
        "digest": manifest.digest,
        "base_model_name_or_path": peft_config.base_model_name_or_path,
    }


def card_metrics(bundle: Path, manifest: BundleManifest, metrics_file: Path | None) -> dict[str, Any]:
    """What the model card reports: an evaluation's `metrics.json`, else the bundle's own, of validation rows.

    Raises DataError where the file is no evaluation's, or of another bundle.
    """
    if metrics_file is None:
        own: dict[str, Any] = read_json(bundle / "metrics.json")
        return own
    try:
        metrics: dict[str, Any] = read_json(metrics_file)
        measured = metrics["bundle"] or "none at all"  # a base, or an endpoint
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(f"{str(metrics_file)!r} is not the metrics.json of an evaluation") from None
    if measured != manifest.digest:
        raise DataError(f"{str(metrics_file)!r} is about bundle {measured[:16]}, not {manifest.digest[:16]}")
    return metrics


def _adapted_model(base: Path, named: str) -> tuple[str, str | None]:
    """Name and revision of what PEFT puts the adapter on: of an assembled base the language model, else the base."""
    path = base / SOURCES_FILE
    source = read_json(path)["language_model"] if path.is_file() else {"source": named}
    return source["source"], source.get("revision")


def _write_with_projector(bundle: Path, folder: Path, family: Family, peft_config: Any) -> None:
    projector = load_file(bundle / PROJECTOR_FILE) if (bundle / PROJECTOR_FILE).is_file() else {}
    adapter = load_file(bundle / ADAPTER_FILE)
    save_file(adapter | {PEFT_PREFIX + name: tensor for name, tensor in projector.items()}, folder / ADAPTER_FILE)
    peft_config.modules_to_save = _modules(projector, family) or None


def _modules(names: Iterable[str], family: Family) -> list[str]:
    """Modules that hold these parameters. Of a list of modules each one: PEFT cannot wrap the list."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, family.projector))})(\.\d+)?\.")
    return sorted({found[0].removesuffix(".") for name in names if (found := pattern.match(name))})
