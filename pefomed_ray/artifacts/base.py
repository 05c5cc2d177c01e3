"""The folder of a base model: what must be in it, its identity, and what its weights' names tell."""

import json
import struct
from pathlib import Path

from pefomed_ray.artifacts.storage import digest_of, local_path, sha256_file
from pefomed_ray.errors import ConfigError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "model" / "embedded"
MODEL_TYPE = "pefomed"
ALL_LINEAR = "all-linear"
REQUIRED_FILES = ("config.json", "tokenizer.json", "preprocessor_config.json")
LANGUAGE_MODEL = "language_model."


def base_folder(path: str) -> Path:
    """The folder of a base: the package's own for `embedded`.

    Raises ConfigError where it is missing or is not the folder of a `pefomed` base, saying which file is not there.
    """
    folder = EMBEDDED_FOLDER if path == EMBEDDED else local_path(path)
    if not folder.is_dir():
        raise ConfigError(f"base.path: {str(folder)!r} is not a folder; give a base model's folder or {EMBEDDED!r}")
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            raise ConfigError(f"base.path: {str(folder)!r} is not a base model: it has no {name}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError:
        raise ConfigError(f"base.path: config.json in {str(folder)!r} is not valid JSON") from None
    if kind != MODEL_TYPE:
        raise ConfigError(f"base.path: {str(folder)!r} holds a {kind!r} model; supported: {MODEL_TYPE!r}")
    if not weight_files(folder):
        raise ConfigError(f"base.path: {str(folder)!r} has no *.safetensors weights (pickled weights are not read)")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The base's weights, by name."""
    return sorted(folder.glob("*.safetensors"))


def base_digest(folder: Path) -> str:
    """Identity of a base: its config, tokenizer, image spec and weights."""
    files = [folder / name for name in REQUIRED_FILES] + weight_files(folder)
    return digest_of({path.name: sha256_file(path) for path in files})


def linear_layers(folder: Path) -> set[str]:
    """Last names of the language model's linear layers (`q_proj`, ...), read from the weights' headers.

    Format: 8 bytes little-endian length, then a JSON object of tensor name -> dtype, shape, offsets.
    """
    names: set[str] = set()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for tensor, info in header.items():
            if tensor.startswith(LANGUAGE_MODEL) and ".layers." in tensor and len(info["shape"]) == 2:
                names.add(tensor.removesuffix(".weight").rsplit(".", 1)[-1])
    return names


def check_lora_targets(folder: Path, targets: tuple[str, ...]) -> list[str]:
    """The names of the layers that `lora.target_modules` means.

    Raises ConfigError for one that no linear layer of the language model has; the tower is out of reach by
    construction.
    """
    linear = linear_layers(folder)
    if targets == (ALL_LINEAR,):
        return sorted(linear)
    missing = sorted(set(targets) - linear)
    if missing or not targets:
        raise ConfigError(
            f"lora.target_modules: {', '.join(missing) or 'nothing'} matches no linear layer of the language model; "
            f"it has {', '.join(sorted(linear))}, or [{ALL_LINEAR}] for all of them"
        )
    return sorted(set(targets))
