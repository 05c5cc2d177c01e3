"""The training loss, the same for every architecture.

Letters: B rows, T tokens, K columns in which some row has a label, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pefomed_ray.rendering.batches import IGNORED_LABEL


def answer_loss(
    model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor, num_items: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, logits [B, K, V]): cross entropy of the next token in nats, summed over labels, divided by `num_items`.

    By default `num_items` is the number of labels here; give the global batch's, and micro-batches and ranks add up to
    one mean. Logits are asked for only where some row has a label: the head of a large vocabulary over every prompt
    token is wasted work, and so is the loss that transformers' models would compute of all.
    """
    logits_BKV, targets_BK = answer_logits(model, inputs, labels_BT)
    total = F.cross_entropy(
        logits_BKV.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    count = (targets_BK != IGNORED_LABEL).sum() if num_items is None else num_items
    return total / count, logits_BKV


def answer_logits(model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [B, K, V], targets [B, K]): what is predicted in the columns in which some row has a label, and what
    should be."""
    keep_K = (labels_BT[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()[:, 0]
    logits_BKV = model(**inputs, logits_to_keep=keep_K, use_cache=False).logits
    return logits_BKV, labels_BT[:, 1:][:, keep_K]
