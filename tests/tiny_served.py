"""Small bases and bundles whose answers depend on the picture, the question and the adapter."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pefomed_ray.artifacts.manifests import verify_bundle
from pefomed_ray.artifacts.storage import write_json
from pefomed_ray.config import TrainConfig
from pefomed_ray.model.base import open_base
from pefomed_ray.model.bundle import save_bundle
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.pefomed import PefomedConfig, PefomedForConditionalGeneration
from pefomed_ray.rendering.images import ImageSpec
from pefomed_ray.serving.contract import AdapterRef

SIZE_PX = 32
SPREAD = 0.3
"""Of an adapter's second matrices."""


def make_base(folder: Path, seed: int = 0) -> None:
    """A random base whose weights are large enough that an answer depends on the picture."""
    torch.manual_seed(seed)
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = PefomedConfig(
        vision_config={"model_type": "blip_2_vision_model", "image_size": SIZE_PX, "patch_size": 8, **vision},
        text_config={"model_type": "llama", "max_position_embeddings": 256, "initializer_range": 0.3, **text, **tokens},
        image_token_id=3,
    )
    model = PefomedForConditionalGeneration(config)
    for parameter in model.vision_tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.projector.weight, std=1.0)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "preprocessor_config.json", ImageSpec(SIZE_PX).to_json())


def make_bundle(
    target: Path,
    base_path: Path,
    *,
    template: str = "short",
    train_projector: bool = True,
    seed: int = 0,
    weight: float = SPREAD,
    **lora: Any,
) -> AdapterRef:
    """A freshly initialised adapter, its second matrix drawn too: as it comes, it changes nothing."""
    torch.manual_seed(seed)
    base = open_base(str(base_path), template)
    values = {"name": "t", "task": "vqa", "template": template, "base": {"path": str(base_path)}, "lora": lora}
    config = TrainConfig.model_validate(values | {"data": {"shards": "none"}})
    attach_lora(base, config.lora, train_projector=train_projector)
    for name, parameter in base.model.named_parameters():
        if "lora_A" in name:
            parameter.data *= weight / SPREAD
        elif "lora_B" in name:
            parameter.data = weight * torch.randn_like(parameter)
        elif parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    trained = {name: p.detach() for name, p in base.model.named_parameters() if p.requires_grad}
    lineage = {"source": "phantom", "shards": "f" * 64}
    save_bundle(target, base, config, trained, lineage, {"exact_match": {"value": 0.5}})
    return AdapterRef(verify_bundle(target).digest, str(target))


def png(shade: int) -> bytes:
    """A picture that darkens from left to right, the faster the smaller the shade."""
    ramp = torch.linspace(255, shade, SIZE_PX).to(torch.uint8).expand(SIZE_PX, SIZE_PX)
    buffer = io.BytesIO()
    Image.fromarray(ramp.numpy().copy()).save(buffer, "PNG")
    return buffer.getvalue()
