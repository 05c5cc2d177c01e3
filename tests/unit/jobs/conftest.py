"""Bases that are headers and configs, and shards of phantoms."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from tests.tiny_runs import write_shards

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def write_headers(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    """A `pefomed` base whose weights' file ends where the weights would begin."""
    config = PefomedConfig(vision_config=vision, text_config=text)
    with torch.device("meta"):
        model = PefomedForConditionalGeneration(config)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, folder)
    return folder


@pytest.fixture(scope="session")
def paper_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the paper's size: EVA-CLIP ViT-g at 448 px and Llama-2-7b."""
    return write_headers(tmp_path_factory.mktemp("paper") / "base", LLAMA_2_7B, {"image_size": 448})


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 rows to train on, 6 to validate."""
    return write_shards(tmp_path_factory.mktemp("estimate"))


@pytest.fixture(scope="session")
def paper_values(paper_base: Path, shards: Path) -> Callable[..., dict[str, Any]]:
    """A training config's values at the paper's size; keywords replace whole sections."""

    def values(**sections: Any) -> dict[str, Any]:
        return {
            "name": "run",
            "task": "vqa",
            "base": {"path": str(paper_base), "dtype": "bfloat16"},
            "data": {"shards": str(shards)},
            "training": {"epochs": 9, "batch_size": 2, "micro_batch_size": 1},
            "resources": {"use_gpu": True},
            **sections,
        }

    return values
