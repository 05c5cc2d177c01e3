"""The number a search looks at: generated answers against references, on a fixed part of the validation split."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from pefomed_ray.config import TrainConfig
from pefomed_ray.data.plan import RowIndex, first_rows, read_rows
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import exact_match
from pefomed_ray.model.generate import generate_ids
from pefomed_ray.rendering.batches import Rendered, generation_batch, training_batch, until_stop
from pefomed_ray.rendering.opening import AnyRenderer
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
    def load(cls, index: RowIndex, config: TrainConfig, renderer: AnyRenderer, ranks: Ranks) -> "ValidationSet":
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

    def measure(self, model: nn.Module, renderer: AnyRenderer, ranks: Ranks) -> dict[str, float]:
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
        loss = mean_loss(model, losses, renderer, ranks)
        model.train()
        everything = ranks.gather(pairs)
        return {
            "exact_match": float(np.mean([exact_match(text, reference) for text, reference in everything])),
            "rougeL": float(np.mean([rouge_l(text, reference) for text, reference in everything])),
            "loss": loss,
            "n": float(len(everything)),
        }

    def _generate(self, model: nn.Module, rows: list[Rendered], renderer: AnyRenderer, ranks: Ranks) -> list[str]:
        batch = generation_batch(rows, renderer.pad_token_id).to(ranks.device)
        ids_BT = generate_ids(model, renderer, batch, self.max_new_tokens, synced_gpus=ranks.world_size > 1)
        return [renderer.decode(until_stop(ids, renderer.stop_token_ids)[0]) for ids in ids_BT.tolist()]


def _masked(rows: list[Rendered], references: list[str | None]) -> list[Rendered]:
    return [replace(row, weight=int(reference is not None)) for row, reference in zip(rows, references, strict=True)]
