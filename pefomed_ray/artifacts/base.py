"""The folder of a base model: what must be in it, its identity, and what its weights' names tell."""

import json
import re
import struct
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.family import PEFOMED, Family, family_of_type
from pefomed_ray.artifacts.storage import digest_of, local_path, sha256_bytes, sha256_file
from pefomed_ray.errors import ConfigError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "model" / "embedded"
ALL_LINEAR = "all-linear"
IMAGE_SPEC_FILE = "preprocessor_config.json"
REQUIRED_FILES = ("config.json", "tokenizer.json", IMAGE_SPEC_FILE)
"""Of a `pefomed` base; of others the first only, for their processors differ."""
PROCESSOR_FILES = ("*.json", "*.jinja", "*.model")
VISION_TOWER = "vision_tower."
OF_VISION = re.compile(r"(^|\.)(visual|vision_\w+|connector|multi_modal_projector)\.")


def base_folder(path: str) -> Path:
    """The folder of a base: the package's own for `embedded`.

    Raises ConfigError where it is missing or holds no model of a supported family, saying which file is not there.
    """
    folder = EMBEDDED_FOLDER if path == EMBEDDED else local_path(path)
    if not folder.is_dir():
        raise ConfigError(f"base.path: {str(folder)!r} is not a folder; give a base model's folder or {EMBEDDED!r}")
    required = REQUIRED_FILES if family_of(folder).model_type == PEFOMED else REQUIRED_FILES[:1]
    for name in required:
        _check_is_there(folder, name)
    if not weight_files(folder):
        raise ConfigError(f"base.path: {str(folder)!r} has no *.safetensors weights (pickled weights are not read)")
    return folder


def family_of(folder: Path) -> Family:
    """The family of the base in a folder. Raises ConfigError where its config is missing, broken, or of none."""
    _check_is_there(folder, "config.json")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError:
        raise ConfigError(f"base.path: config.json in {str(folder)!r} is not valid JSON") from None
    return family_of_type(kind, f"base.path: {str(folder)!r}")


def check_not_quantised(folder: Path) -> None:
    """Raise ConfigError where a base's weights were stored quantised: they would run anywhere but where they can."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if stored is not None:
        raise ConfigError(
            f"base.path: {str(folder)!r} holds quantised weights ({stored.get('quant_method')}); give the 16-bit ones, "
            "and set base.quantization to quantise them as they are loaded"
        )


def weight_files(folder: Path) -> list[Path]:
    """The base's weights, by name."""
    return sorted(folder.glob("*.safetensors"))


def base_digest(folder: Path) -> str:
    """Identity of a base: its config, tokenizer, image spec and weights."""
    files = processor_files(folder) + weight_files(folder)
    return digest_of({path.name: sha256_file(path) for path in files})


def processor_files(folder: Path) -> list[Path]:
    """What belongs to a base beside its weights: config, tokenizer, image spec, a processor's other files."""
    if family_of(folder).model_type == PEFOMED:
        return [folder / name for name in REQUIRED_FILES]
    return sorted({path for pattern in PROCESSOR_FILES for path in folder.glob(pattern)})


def tower_digest(folder: Path) -> str:
    """Identity of what makes an image's features: the tower's config and tensors, and how many patches are joined.

    Bases that differ in their language model or projector only have the same one.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for path in weight_files(folder):
        header, start = weights_header(path)
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


def image_size(folder: Path) -> int | None:
    """Side of the square that images become, in pixels; None where the base's own processor decides."""
    return int(image_spec(folder)["size_px"]) if family_of(folder).model_type == PEFOMED else None


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
        for tensor, info in weights_header(path)[0].items():
            if re.search(r"(^|\.)layers\.\d+\.", tensor) and not OF_VISION.search(tensor) and len(info["shape"]) == 2:
                names.add(tensor.removesuffix(".weight").rsplit(".", 1)[-1])
    return names


def _check_is_there(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise ConfigError(f"base.path: {str(folder)!r} is not a base model: it has no {name}")


def weights_header(path: Path) -> tuple[dict[str, Any], int]:
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
