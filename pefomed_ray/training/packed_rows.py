"""Rows for packed runs, each of which stands somewhere else in the same order: rendered in the host, ahead of use.

Runs that stand at the same step get the very same batch. With a feature cache a row's images cost no more than reading
them from a mapped file; without, they are decoded here, once for all runs.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from pefomed_ray.config import TrainConfig
from pefomed_ray.data.plan import read_rows
from pefomed_ray.rendering.batches import Batch, training_batch
from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.training.feed import RecordRenderer, features_of
from pefomed_ray.training.order import PADDING, TrainingOrder

STEPS_AHEAD = 2
"""Rendered by a thread while the model computes."""


class PackedRows:
    """Micro-batches of an order, at any of its steps."""

    def __init__(self, order: TrainingOrder, config: TrainConfig, renderer: AnyRenderer) -> None:
        features = features_of(config)
        self.has_features = features is not None
        self._order = order
        self._renderer = renderer
        self._render = RecordRenderer(renderer, config.data.max_answer_tokens, features).render

    def batches(self, positions: Sequence[int], steps: int, numbers: Sequence[int]) -> Iterator[dict[int, list[Batch]]]:
        """For each of the next steps: this rank's micro-batches by their numbers, one for each run.

        `positions`: steps that each run has taken.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
            ahead: list[Future[dict[int, list[Batch]]]] = []
            for step in range(steps + STEPS_AHEAD):
                if step < steps:
                    ahead.append(pool.submit(self._step, [position + step for position in positions], numbers))
                if step >= STEPS_AHEAD:
                    yield ahead.pop(0).result()

    def _step(self, positions: Sequence[int], numbers: Sequence[int]) -> dict[int, list[Batch]]:
        made = {
            (position, number): self._micro_batch(position, number) for position in set(positions) for number in numbers
        }
        return {number: [made[position, number] for position in positions] for number in numbers}

    def _micro_batch(self, step: int, number: int) -> Batch:
        rows = self._order.rows_at(step, number)
        real = rows[rows != PADDING]
        # Where there is no row at all, the shapes of any will do; as on the data workers of a run alone.
        records = read_rows(self._order.index, real if len(real) else np.zeros(1, dtype=np.int64))
        rendered = [replace(self._render(record), record_id=record["id"]) for record in records]
        mine = rendered if len(real) else []
        filler = replace(rendered[0], weight=0)
        return training_batch(mine + [filler] * (len(rows) - len(mine)), self._renderer.pad_token_id)
