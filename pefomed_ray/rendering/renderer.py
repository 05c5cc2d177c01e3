"""Records to token ids and pixels. Generation is rendered as the prefix of the training example, by one function.

Letters: N images, C channels, H and W pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pefomed_ray.artifacts.records import Task
from pefomed_ray.rendering.batches import Batch, Rendered
from pefomed_ray.rendering.images import ImageSpec, decode_pixels, image_pixels, normalise
from pefomed_ray.rendering.template import IMAGE_SLOT, Template

IMAGE_SPEC_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Renderer:
    """A base's tokenizer and image spec with a template: all that turns a record into numbers.

    It needs the `tokenizers` package only: data workers start without paying for an import of transformers.
    """

    tokenizer: Tokenizer
    image_spec: ImageSpec
    template: Template
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    image_token_id: int
    tokens_per_image: int

    @classmethod
    def open(cls, folder: Path, template: Template) -> "Renderer":
        """From the folder of a base (`config.json`, `tokenizer.json`, `preprocessor_config.json`)."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text, vision = config["text_config"], config["vision_config"]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Text from a corpus or a request is never parsed for special tokens: a question that spells </s> stays text.
        tokenizer.encode_special_tokens = True
        return cls(
            tokenizer=tokenizer,
            image_spec=ImageSpec.from_json(json.loads((folder / IMAGE_SPEC_FILE).read_text(encoding="utf-8"))),
            template=template,
            pad_token_id=text["pad_token_id"],
            bos_token_id=text["bos_token_id"],
            eos_token_id=text["eos_token_id"],
            image_token_id=config["image_token_id"],
            tokens_per_image=(vision["image_size"] // vision["patch_size"]) ** 2 // config["patches_per_token"],
        )

    def prompt_ids(self, task: Task, question: str, image_count: int) -> list[int]:
        """BOS and the prompt; each image is `tokens_per_image` times the image token.

        Pieces of text are encoded one by one (as the published code does), so an image never changes how its
        neighbours are tokenized.
        """
        ids = [self.bos_token_id] * self.template.bos_tokens
        for piece in self.template.segments(task, question, image_count):
            if piece == IMAGE_SLOT:
                ids += [self.image_token_id] * self.tokens_per_image
            elif piece:
                ids += self._encode(piece)
        return ids

    def answer_ids(self, answer: str, max_tokens: int | None) -> list[int]:
        """The answer and EOS. A longer one is cut to `max_tokens` and has no EOS: nobody learns to stop early."""
        return [*self._encode(self.template.answer(answer)), self.eos_token_id][:max_tokens]

    @property
    def digest(self) -> str:
        """Identity of the wording."""
        return self.template.digest

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends an answer."""
        return (self.eos_token_id,)

    @property
    def bytes_per_image(self) -> int:
        """What `read` keeps of one image."""
        return 3 * self.image_spec.size_px**2

    def read(self, images: Sequence[bytes]) -> dict[str, Tensor]:
        """Encoded images as what `render` takes."""
        return {"pixel_values": self.pixels(images)}

    def render(
        self,
        task: Task,
        question: str,
        images: dict[str, Tensor],
        answer: str | None = None,
        max_answer_tokens: int | None = None,
    ) -> Rendered:
        """One row. `images` are what `read` gave, or `{"patch_features": [N, V, W]}`; without an answer, a prompt."""
        (tensor,) = images.values()
        prompt = self.prompt_ids(task, question, len(tensor))
        return Rendered(prompt, [] if answer is None else self.answer_ids(answer, max_answer_tokens), images)

    def prompt_length(self, task: Task, question: str, images: Sequence[bytes]) -> int:
        """Tokens of a prompt."""
        return len(self.prompt_ids(task, question, len(images)))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as the model's keyword arguments, without labels; pixels are normalised here, on their device."""
        tensors = dict(batch.tensors)
        if "pixel_values" in tensors:
            tensors["pixel_values"] = normalise(tensors["pixel_values"], self.image_spec)
        return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, **tensors}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens dropped, edges stripped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def pixels(self, image_bytes: Sequence[bytes]) -> Tensor:
        """uint8 [N, C, H, W] of some encoded images, in order; [0, C, H, W] of none."""
        if not image_bytes:
            return torch.empty(0, 3, self.image_spec.size_px, self.image_spec.size_px, dtype=torch.uint8)
        return torch.stack([image_pixels(decode_pixels(data), self.image_spec) for data in image_bytes])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
