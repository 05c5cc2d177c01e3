"""A published PeFoMed or MiniGPT-v2 checkpoint, its vision tower and its language model -> a base and a bundle.

The checkpoint holds what was trained, `eva_vit_g.pth` the tower, a folder of the library's the language model. All of
them together make the model that the published code builds; each key of each file is accounted for.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pefomed_ray import __version__
from pefomed_ray.artifacts.base import family_of
from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import check_output_is_free, read_json, sha256_file
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.errors import DataError
from pefomed_ray.model.assemble import assemble
from pefomed_ray.model.base import Base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.checkpoint import ROTARY_KEY, ROTARY_REASON, Checkpoint, load_pickled, read_checkpoint
from pefomed_ray.model.eva import convert_eva
from pefomed_ray.model.keys import KeyAccount
from pefomed_ray.model.lora import PEFT_PREFIX, attach_lora
from pefomed_ray.model.parts import find_part, stored_tensors
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from pefomed_ray.rendering.opening import open_renderer

TEMPLATE = "legacy"
"""The checkpoint's numbers come with the prompts it was evaluated with."""


@dataclass(frozen=True)
class Settings:
    """What the files do not tell. Defaults are the published model's."""

    task: Task = "vqa"
    """What the checkpoint was trained for."""
    image_size: int | None = None
    """In pixels. None: as the checkpoint's own configuration says, else 448."""
    vision_layers: int = 39
    vision_heads: int = 16
    lora_alpha: float | None = None
    """None: as the checkpoint's own configuration says, else 16."""


def convert_published(
    checkpoint: Path,
    vision: Path,
    language_model: str,
    base_out: Path,
    bundle_out: Path,
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """Write `base_out`, a base, and `bundle_out`, an adapter bundle on it; give what became of each file's keys.

    `vision` is `eva_vit_g.pth`; `language_model` the folder or Hub id of a causal language model in safetensors.
    Weights keep the dtypes they are stored in. Raises ConfigError where an output exists or the language model is not
    found, DataError for a file that is not what it should be or a key without a place; nothing is left then.
    """
    for output in (base_out, bundle_out):
        check_output_is_free(output)
    published, text = read_checkpoint(checkpoint), find_part(language_model)
    base_out.parent.mkdir(parents=True, exist_ok=True)
    sources = {
        "vision": {"source": vision.name, "sha256": sha256_file(vision)},
        "language_model": {"source": text.source, "revision": text.revision},
        "projector": {"source": checkpoint.name, "sha256": sha256_file(checkpoint)},
    }
    with tempfile.TemporaryDirectory(dir=base_out.parent) as folder:
        vision_keys = _write_tower(vision, Path(folder), published, settings)
        width = read_json(Path(folder) / "config.json")["hidden_size"]
        assemble(
            folder,
            str(text.folder),
            base_out,
            patches_per_token=_joined_patches(published, width),
            projector=published.projector,
            sources=sources,
        )
    keys = [account.to_json() for account in (published.keys, vision_keys, _language_keys(text.folder))]
    lineage = {
        "source": f"published checkpoint {checkpoint.name}",
        "converted_from": sources,
        "keys": keys,
        "code_version": __version__,
    }
    try:
        _write_bundle(published, base_out, bundle_out, settings, lineage)
    except BaseException:
        shutil.rmtree(base_out)
        raise
    return {"base": str(base_out), "bundle": str(bundle_out), "keys": keys}


def _joined_patches(published: Checkpoint, width: int) -> int:
    """Patches that make one visual token, by the projector's input and the tower's width."""
    columns = published.projector["weight"].shape[-1]
    if columns % width:
        raise DataError(
            f"{published.keys.file!r}: llama_proj reads {columns} numbers, no multiple of the tower's {width}"
        )
    return columns // width


def _write_tower(vision: Path, folder: Path, published: Checkpoint, settings: Settings) -> KeyAccount:
    """The tower as a folder of the library's, `config.json` and `model.safetensors`."""
    state = load_pickled(vision)
    keys = KeyAccount(str(vision), state)
    config, tensors = convert_eva(
        state,
        keys,
        image_size=settings.image_size or int(published.settings.get("image_size", 448)),
        layers=settings.vision_layers,
        heads=settings.vision_heads,
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return keys


def _language_keys(folder: Path) -> KeyAccount:
    """Of a language model that was assembled: what has no place in it was refused there."""
    names = stored_tensors(folder)
    keys = KeyAccount(str(folder), names)
    for name in names:
        if ROTARY_KEY.fullmatch(name):
            keys.ignore(name, ROTARY_REASON)
        else:
            keys.use(name)
    return keys


def _write_bundle(
    published: Checkpoint, base_out: Path, bundle_out: Path, settings: Settings, lineage: dict[str, Any]
) -> None:
    config = _run_of(published, base_out, settings)
    family = family_of(base_out)
    with torch.device("meta"):  # names and sizes are needed, no weights
        model = PefomedForConditionalGeneration(PefomedConfig.from_pretrained(base_out))
    base = Base(base_out, model, open_renderer(base_out, family, TEMPLATE), family)
    attach_lora(base, config.lora, train_projector=True)
    trained = {
        f"{family.adapted}.{name.removeprefix(PEFT_PREFIX).removesuffix('.weight')}.default.weight": value
        for name, value in published.adapter.items()
    } | {f"projector.{name}": value for name, value in published.projector.items()}
    wanted = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    given = {name: value.shape for name, value in trained.items()}
    for name, shape in sorted(wanted.items() ^ given.items()):
        raise DataError(f"{published.keys.file!r} does not fit the language model at {name!r}, {list(shape)}")
    save_bundle(bundle_out, base, config, trained, lineage, {})


def _run_of(published: Checkpoint, base_out: Path, settings: Settings) -> TrainConfig:
    """The run as far as the checkpoint tells it; which data it saw is not recorded there."""
    name, tensor = next(iter(published.adapter.items()))
    return build_config(
        TrainConfig,
        {
            "name": "published",
            "task": settings.task,
            "template": TEMPLATE,
            "base": {"path": str(base_out)},
            "lora": {
                "rank": min(tensor.shape),
                "alpha": settings.lora_alpha or float(published.settings.get("lora_alpha", 16)),
                "target_modules": sorted({name.split(".")[-3] for name in published.adapter}),
            },
            "data": {"shards": "unknown"},
        },
        f"what {name} tells",
    )
