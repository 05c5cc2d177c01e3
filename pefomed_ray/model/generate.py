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
    """A loaded model that answers prompts, at most `batch_size` at once."""

    def __init__(self, base: Base, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        self.renderer = base.renderer
        self.device = torch.device(device)
        self.batch_size = batch_size
        model: Any = base.model  # the library's `to` has no usable type
        self.model = model.to(self.device).eval()

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int | Sequence[int]) -> list[Answer]:
        """One answer a prompt, greedy, at most so many tokens: one limit for all, or one for each.

        In float32 an answer does not depend on what is asked beside it, nor on the order. Prompts of like length are
        answered together, the longest first: what does not fit into memory fails at once. Raises DataError for an image
        that cannot be read.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        rows = [self._render(prompt) for prompt in prompts]
        answers: dict[int, Answer] = {}
        for cached in (False, True):  # a batch holds images or features
            places = [i for i, prompt in enumerate(prompts) if (prompt.features_NVW is not None) is cached]
            places.sort(key=lambda i: len(rows[i].prompt), reverse=True)
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                found = self._generate([rows[i] for i in batch], [limits[i] for i in batch])
                answers |= dict(zip(batch, found, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _generate(self, rows: list[Rendered], limits: list[int]) -> list[Answer]:
        batch = generation_batch(rows, self.renderer.pad_token_id).to(self.device)
        # A greedy answer goes on as it began: one that was given more room is cut to its own limit.
        ids_BT = generate_ids(self.model, self.renderer, batch, max(limits))
        return [self._answer(row, ids[:limit]) for row, ids, limit in zip(rows, ids_BT.tolist(), limits, strict=True)]

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
