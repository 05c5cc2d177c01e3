"""The paper's architecture as Hugging Face classes: frozen vision tower, linear projector, causal language model.

Every `patches_per_token` consecutive patch features (raster order: horizontal strips, as the published code does) are
concatenated and projected to one visual token; visual tokens replace the image token's embeddings in the prompt.

Letters: B rows of text, T tokens, N images of the batch, P patches an image, V visual tokens an image,
D width of the tower, H width of the language model, C channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2VisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.utils import ModelOutput

from pefomed_ray.model.loss import answer_loss


class PefomedConfig(PreTrainedConfig):
    """Sizes of the two frozen parts and how they are joined; defaults are the paper's."""

    model_type = "pefomed"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 - the library's own form

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    patches_per_token: int = 4
    image_token_id: int = -1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(self.vision_config, "blip_2_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        super().__post_init__(**kwargs)

    @property
    def visual_tokens(self) -> int:
        """V, visual tokens an image."""
        vision: Any = self.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.patches_per_token


def _sub_config(value: Any, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    return AutoConfig.for_model(fields.pop("model_type", default_type), **fields)


@dataclass
class PefomedOutput(ModelOutput):
    """`logits` [B, K, vocabulary] of the K positions that were asked for; `loss` is the mean over answer tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class PefomedForConditionalGeneration(PreTrainedModel):
    """Tower, projector and language model; `forward` trains, `generate` answers."""

    config_class = PefomedConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, config: PefomedConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.vision_tower = build_tower(vision)
        self.projector = nn.Linear(vision.hidden_size * config.patches_per_token, text.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.post_init()

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        text: Any = self.config.text_config
        return (
            {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
            if text.tie_word_embeddings
            else {}
        )

    @_tied_weights_keys.setter
    def _tied_weights_keys(self, value: Any) -> None:
        """The library assigns it in passing; what is tied follows from the config alone."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """What the library's switches come down to. The frozen tower keeps nothing that could be recomputed."""
        self.language_model._set_gradient_checkpointing(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PefomedForConditionalGeneration":
        """What `to`, `half` and the like come down to. Rotary frequencies stay float32: rounded ones are off by more
        the further a token is from the beginning."""
        rotary = [module for module in self.modules() if "inv_freq" in module._buffers]
        before = [(module, name, module._buffers[name]) for module in rotary for name in module._buffers]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            after = module._buffers[name]
            if after is not None and buffer is not None and after.dtype != buffer.dtype:
                setattr(module, name, buffer.to(after.device))
        return self

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """[N, V, patches_per_token * D] what the projector reads, of normalised pixels [N, C, height, width].

        The tower runs without gradients unless one of its weights asks for them; its class token is dropped.
        """
        if not len(pixel_values):  # a batch of plain text; the tower's attention cannot take none
            width = self.config.vision_config.hidden_size * self.config.patches_per_token
            return pixel_values.new_empty(0, self.config.visual_tokens, width)
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return tower_features(self.vision_tower, pixel_values, self.config.patches_per_token)

    def embed(self, input_ids: Tensor, patch_features: Tensor | None) -> Tensor:
        """[B, T, H] embeddings of the prompt, images in the places of the image token, in order.

        Raises ValueError where the number of image tokens and of visual tokens differ.
        """
        is_image_BT = input_ids == self.config.image_token_id
        # The image token has no embedding of its own: its id may lie beyond the vocabulary.
        embeds_BTH = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image_BT, 0))
        if patch_features is None:
            return embeds_BTH
        visual_NVH = self.projector(patch_features.to(self.projector.weight.dtype))
        seen, given = int(is_image_BT.sum()), visual_NVH.shape[0] * visual_NVH.shape[1]
        if seen != given:
            raise ValueError(
                f"{seen} image tokens stand in the text, but {len(visual_NVH)} images give {given} visual tokens"
            )
        return embeds_BTH.masked_scatter(is_image_BT[..., None], visual_NVH.to(embeds_BTH.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        patch_features: Tensor | None = None,
        **kwargs: Any,
    ) -> PefomedOutput:
        """Logits, and with `labels` [B, T] (-100: ignored) the cross entropy of the next token.

        The loss and which logits come with it are `answer_loss`'s; `num_items_in_batch` is its `num_items`.
        `patch_features` from an earlier call stand in for `pixel_values`: one picture, several questions.
        """
        if pixel_values is not None:
            patch_features = self.patch_features(pixel_values)
        inputs = {"inputs_embeds": self.embed(input_ids, patch_features), "attention_mask": attention_mask, **kwargs}
        if labels is None:
            return PefomedOutput(logits=self.language_model(**{"use_cache": False} | inputs).logits)
        loss, logits = answer_loss(self.language_model, inputs, labels, num_items_in_batch)
        return PefomedOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patch_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """New tokens only, [B, at most max_new_tokens]; prompts padded on the left; keywords are transformers' own.

        `patch_features` stand in for `pixel_values`, as in `forward`.
        """
        if pixel_values is not None:
            patch_features = self.patch_features(pixel_values)
        embeds = self.embed(input_ids, patch_features)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision tower with random weights.

    `post_layer_norm_eps` of its config, where there is one, is the epsilon of the LayerNorm after the last block: the
    published model's differs from that of the blocks, and the library's config has one for all.
    """
    tower = AutoModel.from_config(config)
    if hasattr(config, "post_layer_norm_eps"):
        tower.post_layernorm.eps = config.post_layer_norm_eps
    return tower


def tower_features(tower: nn.Module, pixel_values: Tensor, patches_per_token: int) -> Tensor:
    """[N, V, patches_per_token * D]: a tower's patch features without the class token, consecutive ones joined."""
    features_NPD = tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
    images, patches, width = features_NPD.shape
    return features_NPD.reshape(images, patches // patches_per_token, width * patches_per_token)


def interpolate_position_embeddings(positions_1PD: Tensor, side: int) -> Tensor:
    """float32 [1, 1 + side * side, D]: position embeddings (class token first) for another grid of patches.

    Bicubic, as the published code does between 224 and 448 px; its result is float32 whatever the checkpoint is in.
    The same grid comes back unchanged. Raises ValueError where the patches given do not fill a square.
    """
    patches, width = positions_1PD.shape[1] - 1, positions_1PD.shape[2]
    before = math.isqrt(patches)
    if before**2 != patches:
        raise ValueError(f"{patches} position embeddings do not fill a square of patches")
    if before == side:
        return positions_1PD
    grid_1DSS = positions_1PD[:, 1:].float().reshape(1, before, before, width).permute(0, 3, 1, 2)
    grid_1DSS = F.interpolate(grid_1DSS, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions_1PD[:, :1].float(), grid_1DSS.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


AutoConfig.register("pefomed", PefomedConfig)
AutoModelForImageTextToText.register(PefomedConfig, PefomedForConditionalGeneration)
AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)
