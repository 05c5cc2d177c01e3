"""Rendered rows to padded batches.

An image comes as pixels, or as the features that the frozen tower once made of it (`patch_features` of the model); all
images of a batch come in one of the two ways.

Letters: B batch, T tokens, N images of the whole batch, C channels, H and W pixels, V visual tokens an image,
W (of features) numbers the projector reads for one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pefomed_ray.rendering.images import ImageSpec, normalise

IGNORED_LABEL = -100
"""Cross entropy's own default for positions that do not count."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes. `labels_BT` is IGNORED_LABEL everywhere but on answers."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    pixels_NCHW: Tensor | None = None
    """uint8; images of all rows, in order."""
    features_NVW: Tensor | None = None
    """Cached features in place of pixels."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def images(self, spec: ImageSpec) -> dict[str, Any]:
        """The images as the model's keyword argument: features where there are any, else normalised pixels."""
        if self.features_NVW is not None:
            return {"patch_features": self.features_NVW}
        return {"pixel_values": normalise(self.pixels_NCHW, spec)}


@dataclass(frozen=True)
class Rendered:
    """One rendered row: prompt ids, answer ids (empty for generation) and its images, in one of the two ways."""

    prompt: list[int]
    answer: list[int]
    pixels_NCHW: Tensor | None = None
    weight: int = 1
    """0 for a row that only fills the batch up: its answer is masked from the loss."""
    features_NVW: Tensor | None = None


def training_batch(rows: Sequence[Rendered], pad_token_id: int) -> Batch:
    """Prompts and answers, padded on the right; labels on the answers of rows with weight 1."""
    return _pad(rows, pad_token_id, left=False)


def generation_batch(rows: Sequence[Rendered], pad_token_id: int) -> Batch:
    """Prompts alone, padded on the left so that every row continues at the same column."""
    return _pad([replace(row, answer=[]) for row in rows], pad_token_id, left=True)


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
    pixels = [row.pixels_NCHW for row in rows if row.pixels_NCHW is not None]
    features = [row.features_NVW for row in rows if row.features_NVW is not None]
    return Batch(
        ids_BT,
        mask_BT,
        labels_BT,
        pixels_NCHW=torch.cat(pixels) if pixels else None,
        features_NVW=torch.cat(features) if features else None,
    )
