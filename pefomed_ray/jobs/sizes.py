"""How large a base is, and what an adapter on it trains, by the headers of its weights alone.

No weight is read: the answer takes milliseconds whatever the base weighs, and files that hold headers only will do.

Letters: I inputs and O outputs of a linear layer, r rank of an adapter.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pefomed_ray.artifacts.base import OF_VISION, check_lora_targets, features_shape, weight_files, weights_header
from pefomed_ray.artifacts.family import PEFOMED
from pefomed_ray.config.schema import LoraConfig, Precision

NOMINAL_SIDE_PX = 1024
"""Side of the picture that is assumed where a model makes more tokens of a larger one."""
PROJECTOR = re.compile(r"(^|\.)(projector|multi_modal_projector|connector|merger|deepstack_merger_list)\.")
LAYER = re.compile(r"(^|\.)layers\.(\d+)\.(.+)\.weight$")
BYTES_OF_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: 4 bits, a byte of scale for 64 of them, and a float32 for 256 scales (arXiv 2305.14314, section 3)."""
BYTES_OF_INT8 = 1.0
"""The scale of a row (arXiv 2208.07339, section 2.1) is left out."""
BYTES = {"float32": 4, "bfloat16": 2}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer, by the number of that and its own last name (`q_proj`, ...)."""

    layer: int
    name: str
    outputs: int
    inputs: int

    @property
    def entries(self) -> int:
        """Of its matrix."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class ImageSizes:
    """What one image becomes; where that depends on its size, a square of NOMINAL_SIDE_PX."""

    tokens: int
    """In the prompt."""
    tiles: int
    """Pieces that the tower sees one by one, the whole picture among them."""
    patches: int
    """Of one piece."""


@dataclass(frozen=True)
class BaseSizes:
    """A base by its parts: shapes of stored tensors by their names."""

    tower: Mapping[str, Shape]
    projector: Mapping[str, Shape]
    layers: Mapping[str, Shape]
    """Of all decoder layers: matrices and vectors."""
    embeddings: Mapping[str, Shape]
    """The head among them, where it is not the embeddings once more."""
    other: Mapping[str, Shape]
    image: "ImageSizes"

    @property
    def width(self) -> int:
        """Of the language model."""
        return next(iter(self.embeddings.values()))[1]

    @property
    def vocabulary(self) -> int:
        """Tokens that the head tells apart."""
        return next(iter(self.embeddings.values()))[0]

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Of all decoder layers."""
        found = [(LAYER.search(name), shape) for name, shape in self.layers.items() if len(shape) == 2]
        return tuple(Linear(int(match[2]), match[3].rpartition(".")[2], *shape) for match, shape in found if match)

    @cached_property
    def depth(self) -> int:
        """Decoder layers."""
        return len({linear.layer for linear in self.linears})

    @cached_property
    def tower_depth(self) -> int:
        """Blocks of the tower."""
        found = (re.search(r"\.(?:layers?|blocks)\.(\d+)\.", name) for name in self.tower)
        return len({match[1] for match in found if match})

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return sum(map(count, (self.tower, self.projector, self.layers, self.embeddings, self.other)))

    def adapted(self, targets: Iterable[str]) -> list[Linear]:
        """The linear layers with these last names."""
        names = set(targets)
        return [linear for linear in self.linears if linear.name in names]

    def frozen_bytes(self, precision: Precision) -> dict[str, float]:
        """What each part takes on a device that holds all of it as a frozen base."""
        each = BYTES[precision.dtype]
        in_layers = {"none": each, "nf4": BYTES_OF_NF4, "int8": BYTES_OF_INT8}[precision.quantization]
        matrices = sum(linear.entries for linear in self.linears)
        return {
            "tower": each * count(self.tower),
            "projector": each * count(self.projector),
            "layers": in_layers * matrices + each * (count(self.layers) - matrices),
            "embeddings": each * (count(self.embeddings) + count(self.other)),
        }


def count(shapes: Mapping[str, Shape]) -> int:
    """Numbers in some tensors."""
    return sum(map(math.prod, shapes.values()))


def read_sizes(folder: Path) -> BaseSizes:
    """The sizes of the base in a folder that `base_folder` has accepted."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts: dict[str, dict[str, Shape]] = {part: {} for part in ("tower", "projector", "layers", "embeddings", "other")}
    for path in weight_files(folder):
        for name, info in weights_header(path)[0].items():
            if name != "__metadata__":
                parts[_part_of(name)][name] = tuple(info["shape"])
    return BaseSizes(image=_image_sizes(folder, config), **parts)


def trained_numbers(sizes: BaseSizes, lora: LoraConfig, targets: Iterable[str], *, train_projector: bool) -> int:
    """What a run trains: r (I + O) for each adapted layer, with DoRA also a length for each output, and the projector.

    `targets`: what `check_lora_targets` makes of `lora.target_modules`. Equal to `model.lora.parameter_counts`.
    """
    adapted = sizes.adapted(targets)
    numbers = sum(lora.rank * (linear.inputs + linear.outputs) for linear in adapted)
    if lora.use_dora:
        numbers += sum(linear.outputs for linear in adapted)
    return numbers + (count(sizes.projector) if train_projector else 0)


def lora_targets(folder: Path, lora: LoraConfig) -> list[str]:
    """Last names of the layers that get an adapter. Raises ConfigError as `check_lora_targets` does."""
    return check_lora_targets(folder, lora.target_modules)


def _image_sizes(folder: Path, config: Mapping[str, Any]) -> ImageSizes:
    vision, processor = config["vision_config"], _processor(folder)
    patch = _side(vision.get("patch_size", 14))
    if config["model_type"].startswith("qwen"):
        merged = vision.get("spatial_merge_size", 2) ** 2
        pixels = min(NOMINAL_SIDE_PX**2, processor.get("size", {}).get("longest_edge", math.inf))
        tokens = int(pixels // (merged * patch**2))
        return ImageSizes(tokens, 1, tokens * merged)
    patches = (_side(vision.get("image_size", 224)) // patch) ** 2
    if config["model_type"] == PEFOMED:
        return ImageSizes(features_shape(folder)[0], 1, patches)
    each = config.get("image_seq_length") or config.get("mm_tokens_per_image")
    tiles = _tiles(config["model_type"], vision, processor)
    return ImageSizes((each or patches // config.get("scale_factor", 1) ** 2) * tiles, tiles, patches)


def _tiles(kind: str, vision: Mapping[str, Any], processor: Mapping[str, Any]) -> int:
    if kind == "internvl" and processor.get("crop_to_patches"):
        return int(processor.get("max_patches", 12)) + 1
    if kind in ("idefics3", "smolvlm"):
        piece = processor.get("max_image_size", {}).get("longest_edge", 364)
        return int(math.ceil(processor.get("size", {}).get("longest_edge", 1456) / piece) ** 2 + 1)
    if kind == "llava_onevision":
        return int(min(math.ceil(NOMINAL_SIDE_PX / vision.get("image_size", 384)) ** 2, 9) + 1)
    return 1


def _processor(folder: Path) -> dict[str, Any]:
    """How images are cut, as the processor's files say it."""
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text(encoding="utf-8"))
            found |= said.get("image_processor", said)
    return found


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def _part_of(name: str) -> str:
    """By a tensor's name as any supported family stores it."""
    if PROJECTOR.search(name):
        return "projector"
    if OF_VISION.search(name):
        return "tower"
    if LAYER.search(name) or re.search(r"(^|\.)layers\.\d+\.", name):
        return "layers"
    return "embeddings" if re.search(r"(^|\.)(embed_tokens|lm_head)\.", name) else "other"
