"""A Hugging Face style processor over the renderer: pictures and text in, tensors out.

Letters: B rows, T tokens, N images of all rows, C channels, H and W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor, BatchFeature

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import read_json, write_json
from pefomed_ray.model.pefomed import PefomedConfig
from pefomed_ray.rendering.batches import generation_batch
from pefomed_ray.rendering.images import ImageSpec, image_pixels
from pefomed_ray.rendering.renderer import IMAGE_SPEC_FILE, Renderer
from pefomed_ray.rendering.templates import template_named

PROCESSOR_FILE = "processor_config.json"
NUMBERS = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "tokens_per_image")
"""What the renderer knows beside its tokenizer, image spec and template."""


class PefomedProcessor:
    """What `load_model` and `AutoProcessor` give beside the model."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, template: str | None = None, **kwargs: Any
    ) -> "PefomedProcessor":
        """Of a base's folder, or of one that `save_pretrained` wrote.

        `template` by name; by default the one that was saved, else `paper`. Other keywords are the library's own and
        have no meaning here. Raises ConfigError for a template that is not known.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / PROCESSOR_FILE).is_file():
            return cls(Renderer.open(folder, template_named(template or "paper")))
        saved = read_json(folder / PROCESSOR_FILE)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # as `Renderer.open`
        return cls(
            Renderer(
                tokenizer=tokenizer,
                image_spec=ImageSpec.from_json(read_json(folder / IMAGE_SPEC_FILE)),
                template=template_named(template or saved["template"]),
                **{name: saved[name] for name in NUMBERS},
            )
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write all that `from_pretrained` reads: tokenizer, image spec, template's name, token ids."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {name: getattr(self.renderer, name) for name in NUMBERS}
        named = {"processor_class": type(self).__name__, "template": self.renderer.template.name}
        self.renderer.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / IMAGE_SPEC_FILE, self.renderer.image_spec.to_json())
        write_json(folder / PROCESSOR_FILE, named | numbers)

    def __call__(
        self, images: Sequence[Image | Sequence[Image]], questions: Sequence[str], task: Task = "vqa"
    ) -> BatchFeature:
        """One image, or several, a question -> what the model's `generate` takes.

        `input_ids` and `attention_mask` [B, T], padded on the left, `pixel_values` [N, C, H, W], normalised.
        """
        rows = []
        for given, question in zip(images, questions, strict=True):
            pictures = [given] if isinstance(given, Image) else list(given)
            spec = self.renderer.image_spec
            pixels_NCHW = torch.stack([image_pixels(picture.convert("RGB"), spec) for picture in pictures])
            rows.append(self.renderer.render(task, question, {"pixel_values": pixels_NCHW}))
        return BatchFeature(self.renderer.inputs(generation_batch(rows, self.renderer.pad_token_id)))

    def batch_decode(self, ids_BT: Tensor) -> list[str]:
        """Texts of generated ids."""
        return [self.renderer.decode(ids) for ids in ids_BT.to(torch.long).tolist()]


AutoProcessor.register(PefomedConfig, PefomedProcessor)
