"""Greedy answers in batches: the one way a model is asked anything, offline and behind the endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pefomed_ray.artifacts.records import Task
from pefomed_ray.model.base import Base
from pefomed_ray.rendering.batches import Rendered, generation_batch


@dataclass(frozen=True)
class Prompt:
    """A question about encoded images (JPEG or PNG), in reading order, or about what the tower once made of them."""

    task: Task
    question: str
    images: tuple[bytes, ...] = ()
    features_NVW: Tensor | None = None
    """Cached features in place of images; V visual tokens an image, W numbers the projector reads for one."""


@dataclass(frozen=True)
class Answer:
    """What came back. `tokens` counts the end token; `finished` is False where the limit cut it off."""

    text: str
    prompt_tokens: int
    tokens: int
    finished: bool


class Generator:
    """A loaded model that answers prompts."""

    def __init__(self, base: Base, device: torch.device | str = "cpu") -> None:
        self.renderer = base.renderer
        self.device = torch.device(device)
        self.model = base.model.to(self.device).eval()

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """One answer a prompt, greedy. Raises DataError for an image that cannot be read."""
        answers: dict[int, Answer] = {}
        for cached in (False, True):  # a batch holds images or features
            at = [i for i, prompt in enumerate(prompts) if (prompt.features_NVW is not None) is cached]
            if at:
                found = self._generate([self._render(prompts[i]) for i in at], max_new_tokens)
                answers |= dict(zip(at, found, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _generate(self, rows: list[Rendered], max_new_tokens: int) -> list[Answer]:
        batch = generation_batch(rows, self.renderer.pad_token_id).to(self.device)
        ids_BT = self.model.generate(
            input_ids=batch.ids_BT,
            **batch.images(self.renderer.image_spec),
            attention_mask=batch.mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return [self._answer(row, ids.tolist()) for row, ids in zip(rows, ids_BT, strict=True)]

    def _render(self, prompt: Prompt) -> Rendered:
        if prompt.features_NVW is not None:
            ids = self.renderer.prompt_ids(prompt.task, prompt.question, len(prompt.features_NVW))
            return Rendered(ids, [], features_NVW=prompt.features_NVW)
        ids = self.renderer.prompt_ids(prompt.task, prompt.question, len(prompt.images))
        return Rendered(ids, [], self.renderer.pixels(prompt.images))

    def _answer(self, row: Rendered, ids: list[int]) -> Answer:
        finished = self.renderer.eos_token_id in ids
        count = ids.index(self.renderer.eos_token_id) + 1 if finished else len(ids)
        return Answer(self.renderer.decode(ids[:count]), len(row.prompt), count, finished)
