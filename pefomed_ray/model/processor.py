"""A Hugging Face style processor over the renderer: pictures and text in, tensors out."""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BatchFeature

from pefomed_ray.rendering.batches import Rendered, generation_batch
from pefomed_ray.rendering.images import image_pixels
from pefomed_ray.rendering.renderer import Renderer


class PefomedProcessor:
    """What `load_model` gives beside the model."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    def __call__(self, images: Sequence[Image], questions: Sequence[str], task: str = "vqa") -> BatchFeature:
        """One image a question -> `input_ids`, `attention_mask` [B, T], left-padded, `pixel_values` [B, C, H, W]."""
        rows = [
            Rendered(
                self.renderer.prompt_ids(task, question, 1),  # type: ignore[arg-type]
                [],
                {"pixel_values": image_pixels(image.convert("RGB"), self.renderer.image_spec)[None]},
            )
            for image, question in zip(images, questions, strict=True)
        ]
        batch = generation_batch(rows, self.renderer.pad_token_id)
        return BatchFeature(self.renderer.inputs(batch))

    def batch_decode(self, ids_BT: Tensor) -> list[str]:
        """Texts of generated ids."""
        return [self.renderer.decode(ids) for ids in ids_BT.to(torch.long).tolist()]
