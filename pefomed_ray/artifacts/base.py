"""The folder of a base model: what must be in it, its identity, and what its weights' names tell."""

import json
import struct
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.storage import digest_of, local_path, sha256_bytes, sha256_file
from pefomed_ray.errors import ConfigError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "model" / "embedded"
MODEL_TYPE = "pefomed"
ALL_LINEAR = "all-linear"
IMAGE_SPEC_FILE = "preprocessor_config.json"
REQUIRED_FILES = ("config.json", "tokenizer.json", IMAGE_SPEC_FILE)
LANGUAGE_MODEL = "language_model."
VISION_TOWER = "vision_tower."


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


def tower_digest(folder: Path) -> str:
    """Identity of what makes an image's features: the tower's config and tensors, and how many patches are joined.

    Bases that differ in their language model or projector only have the same one.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for path in weight_files(folder):
        header, start = _weights_header(path)
        with open(path, "rb") as file:
            for name in sorted(name for name in header if name.startswith(VISION_TOWER)):
                first, last = header[name]["data_offsets"]
                file.seek(start + first)
                tensors[name] = [header[name]["dtype"], header[name]["shape"], sha256_bytes(file.read(last - first))]
    return digest_of([config["vision_config"], config["patches_per_token"], tensors])


def image_spec(folder: Path) -> dict[str, Any]:
    """How the base wants its images, as its file says it."""
    spec: dict[str, Any] = json.loads((folder / IMAGE_SPEC_FILE).read_text(encoding="utf-8"))
    return spec


def features_shape(folder: Path) -> tuple[int, int]:
    """Visual tokens of an image, and numbers that the projector reads for one of them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision, joined = config["vision_config"], config["patches_per_token"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return patches // joined, vision["hidden_size"] * joined


def linear_layers(folder: Path) -> set[str]:
    """Last names of the language model's linear layers (`q_proj`, ...), read from the weights' headers."""
    names: set[str] = set()
    for path in weight_files(folder):
        for tensor, info in _weights_header(path)[0].items():
            if tensor.startswith(LANGUAGE_MODEL) and ".layers." in tensor and len(info["shape"]) == 2:
                names.add(tensor.removesuffix(".weight").rsplit(".", 1)[-1])
    return names


def _weights_header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor name -> dtype, shape, offsets; and where in the file the offsets count from.

    Format: 8 bytes little-endian length, then a JSON object.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


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
