"""Rendered rows to padded batches.

Letters: B batch, T tokens, N images of the whole batch, C channels, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Cross entropy's own default for positions that do not count."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes. `labels_BT` is IGNORED_LABEL everywhere but on answers."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    pixels_NCHW: Tensor
    """uint8; images of all rows, in order."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(*(getattr(self, field).to(device, non_blocking=True) for field in self.__dataclass_fields__))


@dataclass(frozen=True)
class Rendered:
    """One rendered row: prompt ids, answer ids (empty for generation) and pixels."""

    prompt: list[int]
    answer: list[int]
    pixels_NCHW: Tensor
    weight: int = 1
    """0 for a row that only fills the batch up: its answer is masked from the loss."""


def training_batch(rows: Sequence[Rendered], pad_token_id: int) -> Batch:
    """Prompts and answers, padded on the right; labels on the answers of rows with weight 1."""
    return _pad(rows, pad_token_id, left=False)


def generation_batch(rows: Sequence[Rendered], pad_token_id: int) -> Batch:
    """Prompts alone, padded on the left so that every row continues at the same column."""
    prompts = [Rendered(row.prompt, [], row.pixels_NCHW) for row in rows]
    return _pad(prompts, pad_token_id, left=True)


def _pad(rows: Sequence[Rendered], pad_token_id: int, *, left: bool) -> Batch:
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_token_id)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED_LABEL)
    for i, row in enumerate(rows):
        length = len(row.prompt) + len(row.answer)
        start = longest - length if left else 0
        ids_BT[i, start : start + length] = torch.tensor(row.prompt + row.answer)
        mask_BT[i, start : start + length] = 1
        if row.weight:
            labels_BT[i, start + len(row.prompt) : start + length] = torch.tensor(row.answer, dtype=torch.long)
    return Batch(ids_BT, mask_BT, labels_BT, torch.cat([row.pixels_NCHW for row in rows]))
