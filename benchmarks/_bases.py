"""Bases with random weights, and the paper's sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER, IMAGE_SPEC_FILE
from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from pefomed_ray.rendering.images import ImageSpec

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
VIT_G = {"image_size": 448, "initializer_range": 0.02}
"""EVA-CLIP ViT-g is what transformers' Blip2VisionConfig holds by default, but for weights drawn at 1e-10: a chip
multiplies what is nearly nothing with less power, and so faster."""


def make_base(
    folder: Path,
    text: dict[str, Any],
    vision: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """A base with the embedded one's tokenizer, these sizes, and random weights of that type, drawn on that device."""
    embedded = json.loads((EMBEDDED_FOLDER / "config.json").read_text())
    special = {name: embedded["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = PefomedConfig(
        vision_config=vision, text_config=text | special, image_token_id=embedded["image_token_id"], dtype=dtype
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = PefomedForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="4GB")
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", folder)
    write_json(folder / IMAGE_SPEC_FILE, ImageSpec(model.config.vision_config.image_size).to_json())
