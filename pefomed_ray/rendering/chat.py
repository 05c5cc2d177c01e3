"""Rendering for any Hugging Face vision-language model: its own processor and chat template, our wording inside.

The prompt is what the processor makes of one user turn, images first; the answer is encoded apart and appended, so that
generation is asked for a prefix of the training example whatever the template does. What stands between the two and the
token that ends a turn are read off the template once, by rendering a conversation of known words.

Letters: T tokens; H and W pixels, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pefomed_ray.artifacts.records import Task
from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.errors import ConfigError, DataError
from pefomed_ray.rendering.batches import OF_TOKENS, Batch, Rendered
from pefomed_ray.rendering.images import decode_pixels
from pefomed_ray.rendering.processors import open_processor
from pefomed_ray.rendering.template import Template

PROBE = "xylophone"
"""A word that no template holds."""
USUAL_IMAGE_BYTES = 3 * 1024 * 1024
"""Of a decoded picture; only how many are kept depends on it."""


@dataclass(frozen=True)
class ChatRenderer:
    """A model's processor with a template. Text from a corpus or a request never becomes a special token."""

    processor: Any
    template: Template

    @classmethod
    def open(cls, folder: Path, template: Template) -> "ChatRenderer":
        """From a model's folder.

        Raises ConfigError where it has no processor that can be opened, or no template that can be used.
        """
        renderer = cls(open_processor(folder), template)
        _ = renderer._turn  # a template that cannot be used is refused here
        return renderer

    @property
    def digest(self) -> str:
        """Identity of the wording: the template's and the model's own."""
        return digest_of([self.template.digest, self.processor.chat_template])

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's, else its end token, which the mask hides."""
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: the token that ends a turn, and the tokenizer's own end."""
        return tuple(dict.fromkeys((self._turn.end_token_id, self.processor.tokenizer.eos_token_id)))

    @property
    def bytes_per_image(self) -> int:
        """What `read` keeps of one image, about."""
        return USUAL_IMAGE_BYTES

    def read(self, images: Sequence[bytes]) -> list[np.ndarray]:
        """Encoded images as what `render` takes: uint8 [H, W, C], decoded and upright. Raises DataError."""
        return [decode_pixels(data) for data in images]

    def render(
        self,
        task: Task,
        question: str,
        images: list[np.ndarray],
        answer: str | None = None,
        max_answer_tokens: int | None = None,
    ) -> Rendered:
        """One row; without an answer, a prompt. A longer answer is cut to `max_answer_tokens` and has no end."""
        found = self._prompt(self.words(task, question), [Image.fromarray(image) for image in images])
        prompt: list[int] = found.pop("input_ids")[0].tolist()
        answer_ids = [] if answer is None else self._answer_ids(answer)[:max_answer_tokens]
        found.pop("attention_mask")
        tensors = {name: self._extended(name, value, len(answer_ids)) for name, value in found.items()}
        return Rendered(prompt, answer_ids, tensors)

    def words(self, task: Task, question: str) -> str:
        """What the user's turn says beside its images."""
        return self._plain(self.template.words(task, question))

    def prompt_length(self, task: Task, question: str, images: Sequence[bytes]) -> int:
        """Tokens of a prompt; how many an image takes may depend on its size."""
        return len(self.render(task, question, self.read(images)).prompt)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as the model's keyword arguments, without labels."""
        return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, **batch.tensors}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens dropped, edges stripped."""
        return str(self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _prompt(self, words: str, images: list[Image.Image]) -> dict[str, Tensor]:
        if self._has_suffixes:
            if not images:
                raise DataError("this base answers about images only: give one")
            text = self.processor.tokenizer.decode(self.processor.image_token_id) * len(images) + words
            found = dict(self.processor(text=text, images=images, return_tensors="pt"))
            found.pop("labels", None)
            return found
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": words}]
        return dict(
            self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )

    def _answer_ids(self, answer: str) -> list[int]:
        """Encoded behind the prompt's last character: at the start of a text some tokenizers put a space."""
        turn = self._turn
        head = self._encode(turn.anchor)
        ids = self._encode(turn.anchor + turn.before + self._plain(answer.strip()))
        return [*ids[len(head) :], turn.end_token_id]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _extended(self, name: str, value: Tensor, answer_tokens: int) -> Tensor:
        """What counts tokens goes on over the answer: as text, which PaliGemma alone calls 1, as it does a suffix."""
        if name not in OF_TOKENS:
            return value
        of_answer = 1 if self._has_suffixes else 0
        return torch.cat([value, value.new_full((1, answer_tokens), of_answer)], dim=1)

    @property
    def _has_suffixes(self) -> bool:
        """PaliGemma does not chat: images, a text, a line end, and behind them a suffix that it is to write."""
        return type(self.processor).__name__ == "PaliGemmaProcessor"

    def _plain(self, text: str) -> str:
        """The text with a space in every special token that it spells, so that the tokenizer reads it as text."""
        for token in self._special_tokens:
            while token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    @cached_property
    def _special_tokens(self) -> list[str]:
        """What the tokenizer, or the processor before it, would not read as text; the longest first."""
        tokenizer = self.processor.tokenizer
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= {value for value in vars(self.processor).values() if isinstance(value, str) and value.startswith("<")}
        return sorted((token for token in tokens if len(token) > 1 and not token.isspace()), key=len, reverse=True)

    @cached_property
    def _turn(self) -> "_Turn":
        tokenizer = self.processor.tokenizer
        if self._has_suffixes:
            return _Turn("\n", "", tokenizer.eos_token_id)
        if self.processor.chat_template is None:
            raise ConfigError("base.path: the model's processor has no chat template; take a model tuned for chats")
        asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}]
        prompt = self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole = self.processor.apply_chat_template(answered, tokenize=False)
        head, found, after = whole.partition(PROBE)
        if not found:
            raise ConfigError("base.path: the model's chat template leaves answers out; take another model or mend it")
        # LLaVA-OneVision's turns do not begin as its prompts end; what is generated from is what counts.
        before = head.removeprefix(prompt) if head.startswith(prompt) else ""
        known = tokenizer.added_tokens_decoder  # `all_special_ids` lacks some: Gemma 3's end of a turn
        special = [token for token in self._encode(after) if token in known and known[token].special]
        return _Turn(prompt[-1], before, special[0] if special else tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Turn:
    """How a template frames an answer."""

    anchor: str
    """The last character of a prompt."""
    before: str
    """Text between the prompt and the answer, a space say."""
    end_token_id: int
