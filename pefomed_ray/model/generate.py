"""Greedy answers in batches: the one way a model is asked anything, offline and behind the endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pefomed_ray.artifacts.records import Task
from pefomed_ray.model.base import Base
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.rendering.batches import Batch, Rendered, generation_batch, until_stop
from pefomed_ray.rendering.opening import AnyRenderer


@dataclass(frozen=True)
class Prompt:
    """A question about encoded images (JPEG or PNG), in reading order, or about what the tower once made of them."""

    task: Task
    question: str
    images: tuple[bytes, ...] = ()
    features_NVW: Tensor | None = None
    """Cached features in place of images (`pefomed` bases only); V visual tokens an image, W numbers the projector
    reads for one."""


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
        model: Any = base.model  # the library's `to` has no usable type
        self.model = model.to(self.device).eval()

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
        ids_BT = generate_ids(self.model, self.renderer, batch, max_new_tokens)
        return [self._answer(row, ids) for row, ids in zip(rows, ids_BT.tolist(), strict=True)]

    def _render(self, prompt: Prompt) -> Rendered:
        if prompt.features_NVW is None:
            images: Any = self.renderer.read(prompt.images)
        else:
            images = {"patch_features": prompt.features_NVW}
        return self.renderer.render(prompt.task, prompt.question, images)

    def _answer(self, row: Rendered, ids: list[int]) -> Answer:
        ids, finished = until_stop(ids, self.renderer.stop_token_ids)
        return Answer(self.renderer.decode(ids), len(row.prompt), len(ids), finished)


def generate_ids(
    model: Any, renderer: AnyRenderer, batch: Batch, max_new_tokens: int, *, synced_gpus: bool = False
) -> Tensor:
    """New tokens only, [B, at most max_new_tokens], greedy; after a row's end token comes padding.

    `synced_gpus`: sharded layers are gathered by all ranks together, so those that are done go on until the last is.
    """
    ids_BT: Tensor = model.generate(
        **renderer.inputs(batch),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(renderer.stop_token_ids),
        pad_token_id=renderer.pad_token_id,
        synced_gpus=synced_gpus,
    )
    # Transformers' models give the prompt back before the answer, ours does not.
    return ids_BT if isinstance(model, PefomedForConditionalGeneration) else ids_BT[:, batch.ids_BT.shape[1] :]
