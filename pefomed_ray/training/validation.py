"""The number a search looks at: generated answers against references, on a fixed part of the validation split."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pefomed_ray.config import TrainConfig
from pefomed_ray.data.plan import RowIndex, first_rows, read_rows
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import exact_match
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.rendering.batches import Rendered, generation_batch, training_batch
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.training.feed import RecordRenderer, features_of
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import mean_loss


@dataclass(frozen=True)
class ValidationSet:
    """This rank's rendered rows and their references. Every rank holds equally many, the last ones filled up."""

    rows: list[Rendered]
    references: list[str | None]
    """None for a row that only fills up."""
    batch_size: int
    max_new_tokens: int

    @classmethod
    def load(cls, index: RowIndex, config: TrainConfig, renderer: Renderer, ranks: Ranks) -> "ValidationSet":
        """The first `validation.rows` rows, of each part of a mixture by its weight, dealt out to the ranks."""
        chosen = first_rows(index, config.validation.rows)
        count = len(chosen)
        each = -(-count // ranks.world_size)
        numbers = np.arange(ranks.rank * each, (ranks.rank + 1) * each)
        records = read_rows(index, chosen[np.minimum(numbers, count - 1)])
        render = RecordRenderer(renderer, config.data.max_answer_tokens, features_of(config)).render
        rows = [render(record) for record in records]
        references = [r["answer"] if n < count else None for r, n in zip(records, numbers, strict=True)]
        return cls(rows, references, config.validation.batch_size, config.validation.max_new_tokens)

    def measure(self, model: PefomedForConditionalGeneration, renderer: Renderer, ranks: Ranks) -> dict[str, float]:
        """`exact_match`, `rougeL` and `loss` (nats an answer token) over all ranks' rows; every rank must call."""
        model.eval()
        pairs = []
        losses = []
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            references = self.references[start : start + self.batch_size]
            texts = self._generate(model, rows, renderer, ranks)
            pairs += [(text, ref) for text, ref in zip(texts, references, strict=True) if ref is not None]
            losses.append(training_batch(_masked(rows, references), renderer.pad_token_id).to(ranks.device))
        loss = mean_loss(model, losses, renderer.image_spec, ranks.sum)
        model.train()
        everything = ranks.gather(pairs)
        return {
            "exact_match": float(np.mean([exact_match(text, reference) for text, reference in everything])),
            "rougeL": float(np.mean([rouge_l(text, reference) for text, reference in everything])),
            "loss": loss,
            "n": float(len(everything)),
        }

    def _generate(self, model: Any, rows: list[Rendered], renderer: Renderer, ranks: Ranks) -> list[str]:
        batch = generation_batch(rows, renderer.pad_token_id).to(ranks.device)
        ids_BT: torch.Tensor = model.generate(
            input_ids=batch.ids_BT,
            **batch.images(renderer.image_spec),
            attention_mask=batch.mask_BT,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            # Sharded layers are gathered by all ranks together: those that are done go on until the last is.
            synced_gpus=ranks.world_size > 1,
        )
        return [renderer.decode(_until(ids, renderer.eos_token_id)) for ids in ids_BT.tolist()]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _masked(rows: list[Rendered], references: list[str | None]) -> list[Rendered]:
    return [replace(row, weight=int(reference is not None)) for row, reference in zip(rows, references, strict=True)]
