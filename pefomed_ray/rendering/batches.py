"""Rendered rows to padded batches.

What a row holds beside its ids goes by the model's own keyword: `pixel_values` of the images (uint8 for a `pefomed`
base), or `patch_features`, what the frozen tower once made of them, and whatever else a model's own processor makes.

Letters: B batch, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
"""Cross entropy's own default for positions that do not count."""
OF_TOKENS = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Keywords with one number a token, [1, T] in a row; padded with the ids. All others count images, or parts of them."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes. `labels_BT` is IGNORED_LABEL everywhere but on answers."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By the model's keyword; images of all rows, in order."""
    record_ids: tuple[str, ...] = ()
    """Of the rows that count; for messages."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        tensors = {name: there(tensor) for name, tensor in self.tensors.items()}
        return Batch(there(self.ids_BT), there(self.mask_BT), there(self.labels_BT), tensors, self.record_ids)


@dataclass(frozen=True)
class Rendered:
    """One rendered row: prompt ids, answer ids (empty for generation), and its images as the model takes them."""

    prompt: list[int]
    answer: list[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weight: int = 1
    """0 for a row that only fills the batch up: its answer is masked from the loss."""
    record_id: str = ""


def training_batch(rows: Sequence[Rendered], pad_token_id: int) -> Batch:
    """Prompts and answers, padded on the right; labels on the answers of rows with weight 1."""
    return _pad(rows, pad_token_id, left=False)


def generation_batch(rows: Sequence[Rendered], pad_token_id: int) -> Batch:
    """Prompts alone, padded on the left so that every row continues at the same column."""
    return _pad([replace(row, answer=[]) for row in rows], pad_token_id, left=True)


def until_stop(ids: Sequence[int], stop_token_ids: Sequence[int]) -> tuple[list[int], bool]:
    """Generated ids up to the first that ends an answer, that one included; whether there was one."""
    for place, token in enumerate(ids):
        if token in stop_token_ids:
            return list(ids[: place + 1]), True
    return list(ids), False


def _pad(rows: Sequence[Rendered], pad_token_id: int, *, left: bool) -> Batch:
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    starts = [max(lengths) - length if left else 0 for length in lengths]
    ids_BT = torch.full((len(rows), max(lengths)), pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    labels_BT = torch.full_like(ids_BT, IGNORED_LABEL)
    for i, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        ids_BT[i, start : start + length] = torch.tensor(row.prompt + row.answer)
        mask_BT[i, start : start + length] = 1
        if row.weight:
            labels_BT[i, start + len(row.prompt) : start + length] = torch.tensor(row.answer, dtype=torch.long)
    tensors = {}
    for name in dict.fromkeys(name for row in rows for name in row.tensors):
        if name in OF_TOKENS:
            tensors[name] = torch.zeros_like(ids_BT)
            for i, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
                tensors[name][i, start : start + length] = row.tensors[name][0, :length]
        else:
            tensors[name] = _join([row.tensors[name] for row in rows if name in row.tensors])
    return Batch(ids_BT, mask_BT, labels_BT, tensors, tuple(row.record_id for row in rows if row.weight))


def _join(tensors: list[Tensor]) -> Tensor:
    """One after the other; where rows differ in a later size (tiles of an image), zeros fill up, as processors do."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [(0, size - had) for size, had in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(
            F.pad(tensor, [n for pair in reversed(missing) for n in pair]) if any(b for _, b in missing) else tensor
        )
    return torch.cat(padded)
