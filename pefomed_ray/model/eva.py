"""The published vision tower, `eva_vit_g.pth` (EVA-CLIP ViT-g, Fang et al. 2022), as the library's `Blip2VisionModel`.

The file is a bare state dict of 40 blocks in float16 for 224 px. The published model (as BLIP-2 before it) keeps 39
blocks and neither final norm nor head, resizes the position embeddings, and puts a fresh LayerNorm after the last
block, which is never trained, saved or loaded: weight 1, bias 0, and another epsilon than the blocks'.

Letters: P patches an image and the class token, D width of the tower.
"""

import re

import torch
from torch import Tensor
from transformers import Blip2VisionConfig

from pefomed_ray.errors import DataError
from pefomed_ray.model.keys import KeyAccount
from pefomed_ray.model.pefomed import interpolate_position_embeddings

BLOCK_EPS = 1e-6
FINAL_EPS = 1e-5
"""Of the LayerNorm after the last block, `ln_vision`."""

_STEM = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_BLOCK = {
    f"{published}.{kind}": f"{ours}.{kind}"
    for published, ours in {
        "norm1": "layer_norm1",
        "attn.proj": "self_attn.projection",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }.items()
    for kind in ("weight", "bias")
} | {"attn.qkv.weight": "self_attn.qkv.weight"}
_HEADS = {
    r"(fc_)?norm\.": "final norm: the published model has none",
    r"(lm_)?head\.": "head of EVA-CLIP's own training",
    r"mask_token$": "mask of EVA-CLIP's own training",
}


def convert_eva(
    state: dict[str, Tensor], account: KeyAccount, *, image_size: int, layers: int, heads: int
) -> tuple[Blip2VisionConfig, dict[str, Tensor]]:
    """The tower's config and tensors, in the dtypes of the file (resized position embeddings: float32).

    `image_size` in pixels; the file tells neither it nor `layers` and `heads`. Raises DataError for a key that is
    missing or has no place.
    """

    def take(key: str) -> Tensor:
        return state[account.use(key)]

    tensors = {ours: take(published) for published, ours in _STEM.items()}
    for layer in range(layers):
        there, here = f"blocks.{layer}.", f"encoder.layers.{layer}."
        tensors |= {here + ours: take(there + published) for published, ours in _BLOCK.items()}
        query_D, value_D = take(there + "attn.q_bias"), take(there + "attn.v_bias")
        tensors[here + "self_attn.qkv.bias"] = torch.cat([query_D, torch.zeros_like(value_D), value_D])
    _ignore_the_rest(state, account, layers)
    width, patch_size = tensors["embeddings.patch_embedding.weight"].shape[0::3]
    try:
        positions_1PD = interpolate_position_embeddings(
            tensors["embeddings.position_embedding"], image_size // patch_size
        )
    except ValueError as error:
        raise DataError(f"{account.file!r}: {error}") from None
    tensors["embeddings.position_embedding"] = positions_1PD
    tensors["post_layernorm.weight"], tensors["post_layernorm.bias"] = torch.ones(width), torch.zeros(width)
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=BLOCK_EPS,
        post_layer_norm_eps=FINAL_EPS,
    )
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def _ignore_the_rest(state: dict[str, Tensor], account: KeyAccount, layers: int) -> None:
    for key in state:
        block = re.match(r"blocks\.(\d+)\.", key)
        if block and int(block[1]) >= layers:
            account.ignore(key, f"block after the published model's {layers}")
        for pattern, reason in _HEADS.items():
            if re.match(pattern, key):
                account.ignore(key, reason)
    account.close()
