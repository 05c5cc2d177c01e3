"""The number a search looks at: generated answers against references, on a fixed part of the validation split."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from pefomed_ray.config import TrainConfig
from pefomed_ray.data.plan import RowIndex, first_rows, read_rows
from pefomed_ray.metrics.text import rouge_l
from pefomed_ray.metrics.vqa import exact_match
from pefomed_ray.model.generate import generate_ids
from pefomed_ray.model.pack import Pack
from pefomed_ray.rendering.batches import Batch, Rendered, generation_batch, training_batch, until_stop
from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.training.feed import RecordRenderer, features_of
from pefomed_ray.training.packed_step import packed_losses, tiled
from pefomed_ray.training.ranks import Ranks
from pefomed_ray.training.step import count_answer_tokens, mean_loss


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
            batch = generation_batch(rows, renderer.pad_token_id).to(ranks.device)
            texts = self._answers(model, batch, renderer, ranks)
            pairs += [(text, ref) for text, ref in zip(texts, references, strict=True) if ref is not None]
            losses.append(training_batch(_masked(rows, references), renderer.pad_token_id).to(ranks.device))
        loss = mean_loss(model, losses, renderer, ranks)
        model.train()
        return _row(ranks.gather(pairs), loss)

    @torch.no_grad()
    def measure_packed(self, pack: Pack, renderer: AnyRenderer, ranks: Ranks) -> list[dict[str, float]]:
        """What `measure` gives, for each adapter of a pack; as many answers at once as `measure` asks for."""
        pack.base.model.eval()
        pairs: list[list[tuple[str, str]]] = [[] for _ in pack.adapters]
        losses_K = torch.zeros(pack.size, dtype=torch.float64, device=ranks.device)
        tokens = 0
        size = max(self.batch_size // pack.size, 1)
        for start in range(0, len(self.rows), size):
            rows, references = self.rows[start : start + size], self.references[start : start + size]
            pack.shared = True
            asked = tiled(generation_batch(rows, renderer.pad_token_id).to(ranks.device), pack.size)
            texts = self._answers(pack.base.model, asked, renderer, ranks)
            for k, mine in enumerate(pairs):
                own = texts[k * len(rows) : (k + 1) * len(rows)]
                mine += [(text, ref) for text, ref in zip(own, references, strict=True) if ref is not None]
            answered = training_batch(_masked(rows, references), renderer.pad_token_id).to(ranks.device)
            losses_K += packed_losses(pack, [answered] * pack.size, renderer)
            tokens += count_answer_tokens(answered)
        pack.base.model.train()
        means = (ranks.add_up(losses_K) / ranks.sum(tokens)).tolist()
        return [_row(ranks.gather(mine), mean) for mine, mean in zip(pairs, means, strict=True)]

    def _answers(self, model: nn.Module, batch: Batch, renderer: AnyRenderer, ranks: Ranks) -> list[str]:
        ids_BT = generate_ids(model, renderer, batch, self.max_new_tokens, synced_gpus=ranks.world_size > 1)
        return [renderer.decode(until_stop(ids, renderer.stop_token_ids)[0]) for ids in ids_BT.tolist()]


def _row(pairs: list[tuple[str, str]], loss: float) -> dict[str, float]:
    """Of answers and their references."""
    return {
        "exact_match": float(np.mean([exact_match(text, reference) for text, reference in pairs])),
        "rougeL": float(np.mean([rouge_l(text, reference) for text, reference in pairs])),
        "loss": loss,
        "n": float(len(pairs)),
    }


def _masked(rows: list[Rendered], references: list[str | None]) -> list[Rendered]:
    return [replace(row, weight=int(reference is not None)) for row, reference in zip(rows, references, strict=True)]
