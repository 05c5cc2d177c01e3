"""Files as the published code and its parts have them, tiny and random: a checkpoint, a tower, a language model."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pefomed_ray.artifacts.base import EMBEDDED_FOLDER

WIDTH, BLOCKS, LAYERS, HIDDEN, RANK = 16, 3, 2, 32, 4
"""Of the tower: its width and the blocks in the file. Of the language model: layers and width. Of LoRA."""
IMAGE_SIZE = 56


@dataclass(frozen=True)
class Published:
    """Where the files lie."""

    checkpoint: Path
    vision: Path
    language_model: Path


def write_published(folder: Path) -> Published:
    """Write all three."""
    torch.manual_seed(7)
    files = Published(folder / "checkpoint.pth", folder / "eva_vit_g.pth", folder / "llama")
    torch.save(
        {"model": checkpoint(), "config": {"model": {"lora_alpha": 8, "image_size": IMAGE_SIZE}}}, files.checkpoint
    )
    torch.save(tower(), files.vision)
    config = LlamaConfig(
        vocab_size=1536,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).half().save_pretrained(files.language_model)
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", files.language_model)
    return files


def checkpoint() -> dict[str, Tensor]:
    """The `model` of a checkpoint."""
    state = {}
    for layer in range(LAYERS):
        attention = f"llama_model.base_model.model.model.layers.{layer}.self_attn"
        for name in ("q_proj", "v_proj"):
            state[f"{attention}.{name}.lora_A.default.weight"] = torch.randn(RANK, HIDDEN)
            state[f"{attention}.{name}.lora_B.default.weight"] = torch.randn(HIDDEN, RANK)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.rand(4)
    return state | {"llama_proj.weight": torch.randn(HIDDEN, 4 * WIDTH), "llama_proj.bias": torch.randn(HIDDEN)}


def tower() -> dict[str, Tensor]:
    """A bare ViT with a surplus block, a final norm and a head, for 42 px."""
    state = {
        "cls_token": torch.randn(1, 1, WIDTH),
        "pos_embed": torch.randn(1, 10, WIDTH),
        "patch_embed.proj.weight": torch.randn(WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": torch.randn(WIDTH),
        "norm.weight": torch.randn(WIDTH),
        "norm.bias": torch.randn(WIDTH),
        "head.weight": torch.randn(5, WIDTH),
        "head.bias": torch.randn(5),
    }
    for number in range(BLOCKS):
        block = f"blocks.{number}"
        state |= {f"{block}.attn.{name}_bias": torch.randn(WIDTH) for name in "qv"}
        state[f"{block}.attn.qkv.weight"] = torch.randn(3 * WIDTH, WIDTH)
        for name, (rows, columns) in {
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (40, WIDTH),
            "mlp.fc2": (WIDTH, 40),
        }.items():
            state |= {f"{block}.{name}.weight": torch.randn(rows, columns), f"{block}.{name}.bias": torch.randn(rows)}
        for name in ("norm1", "norm2"):
            state |= {f"{block}.{name}.{kind}": torch.randn(WIDTH) for kind in ("weight", "bias")}
    return {name: tensor.half() for name, tensor in state.items()}
