"""Published PeFoMed and MiniGPT-v2 checkpoints: opening one, and writing a bundle as one.

A checkpoint is a pickled dict whose `model` holds what was trained: LoRA of the language model and the projector, under
the names of the published code (`llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`,
without `default` under peft before 0.3; `llama_proj.weight`). transformers before 4.32 saved rotary frequencies too.
Files are opened without running anything in them (`weights_only`).
"""

import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pefomed_ray.artifacts.base import base_folder, family_of
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.storage import read_json, write_bytes
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.model.bundle import PROJECTOR_FILE
from pefomed_ray.model.keys import KeyAccount
from pefomed_ray.model.lora import ADAPTER_FILE
from pefomed_ray.model.parts import read_tensor, stored_tensors

ADAPTER_KEY = re.compile(
    r"llama_model\.(base_model\.model\.model\.layers\.\d+\.[\w.]+\.lora_[AB])(?:\.default)?\.weight"
)
ROTARY_KEY = re.compile(r".*\.rotary_emb\.inv_freq")
ROTARY_REASON = "rotary frequencies: they follow from the configuration"
PROJECTOR_KEYS = {"llama_proj.weight": "weight", "llama_proj.bias": "bias"}


@dataclass(frozen=True)
class Checkpoint:
    """What a published checkpoint holds, under this project's names."""

    adapter: dict[str, Tensor]
    """By PEFT's names in `adapter_model.safetensors`: `base_model.model.model.layers.0....lora_A.weight`."""
    projector: dict[str, Tensor]
    """`weight` and `bias`."""
    settings: dict[str, Any]
    """`model` of the run's own configuration, where the file carries it: `lora_alpha`, `image_size`, ..."""
    keys: KeyAccount


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a published `.pth`.

    Raises DataError where it is no such file, or holds a key that has no place in the model, naming the key.
    """
    document = load_pickled(path)
    state = document.get("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{str(path)!r} has no 'model' with tensors; it holds {', '.join(map(str, document))}")
    keys = KeyAccount(str(path), state)
    adapter = {}
    for key in state:
        if found := ADAPTER_KEY.fullmatch(key):
            adapter[f"{found[1]}.weight"] = state[keys.use(key)]
        elif ROTARY_KEY.fullmatch(key):
            keys.ignore(key, ROTARY_REASON)
    projector = {ours: state[keys.use(key)] for key, ours in PROJECTOR_KEYS.items()}
    keys.close()
    if not adapter:
        raise DataError(f"{str(path)!r} holds no LoRA (llama_model....lora_A.weight); give a fine-tuned checkpoint")
    config = document.get("config")
    return Checkpoint(adapter, projector, dict((config or {}).get("model", {})), keys)


def load_pickled(path: Path) -> dict[str, Any]:
    """The dict in a `.pth`, on the CPU, nothing in it run. Raises DataError where there is none that opens this way."""
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{str(path)!r} does not open as tensors alone, and nothing else is opened: {reason}") from None
    if not isinstance(document, dict):
        raise DataError(f"{str(path)!r} holds a {type(document).__name__}, not a dict of tensors")
    return document


def to_published(bundle: Path, target: Path) -> dict[str, Any]:
    """Write a bundle's trained tensors as the published code saves and loads them; give the settings it needs for them.

    Raises ConfigError where `target` exists or the published code has no such adapter (DoRA, rsLoRA, another family),
    DataError where the bundle was changed or holds a tensor without a published name.
    """
    if target.exists():
        raise ConfigError(f"output {str(target)!r} already exists; name another one or remove it first")
    base = base_folder(verify_bundle(bundle).base)
    config = read_json(bundle / "adapter_config.json")
    if family_of(base).model_type != PEFOMED or config.get("use_dora") or config.get("use_rslora"):
        raise ConfigError(
            f"bundle {str(bundle)!r} has no form in the published code, which knows plain LoRA on a {PEFOMED} base only"
        )
    state = {_published_name(key, bundle): value for key, value in load_file(bundle / ADAPTER_FILE).items()}
    projector = _projector(bundle, base)
    state |= {published: projector[f"projector.{ours}"] for published, ours in PROJECTOR_KEYS.items()}
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, buffer.getvalue())
    return {
        "checkpoint": str(target),
        "tensors": len(state),
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_target_modules": sorted(config["target_modules"]),
    }


def _published_name(key: str, bundle: Path) -> str:
    name = f"llama_model.{key.removesuffix('.weight')}.default.weight"
    if not ADAPTER_KEY.fullmatch(name):
        raise DataError(f"bundle {str(bundle)!r}: {key!r} has no name in a published checkpoint")
    return name


def _projector(bundle: Path, base: Path) -> dict[str, Tensor]:
    """The bundle's, or the base's where it was not trained: the published code loads one either way."""
    if (bundle / PROJECTOR_FILE).is_file():
        return load_file(bundle / PROJECTOR_FILE)
    return {n: read_tensor(tensor) for n, tensor in stored_tensors(base).items() if n.startswith("projector.")}
