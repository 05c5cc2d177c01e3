"""What autograd keeps of a packed step, counted, beside the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._bases import make_base
from benchmarks._small import make_batches
from pefomed_ray.config import TrainConfig, build_config
from pefomed_ray.config.schema import LoraConfig
from pefomed_ray.jobs.memory import kept_bytes, layer_bytes
from pefomed_ray.jobs.sizes import lora_targets, read_sizes
from pefomed_ray.model.base import Base, open_base
from pefomed_ray.model.lora import attach_lora
from pefomed_ray.model.pack import Draw, Pack, take_off
from pefomed_ray.rendering.batches import IGNORED_LABEL, Batch
from pefomed_ray.training.packed_step import packed_losses

RANKS = (8, 3, 8)
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 1536,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("memory") / "base"
    torch.manual_seed(0)
    make_base(target, TEXT, VISION)
    return target


def config_of(dtype: str, targets: list[str], dropout: float, recompute: bool) -> TrainConfig:
    values = {
        "name": "run",
        "task": "vqa",
        "template": "short",
        "base": {"dtype": dtype},
        "lora": {"rank": max(RANKS), "dropout": dropout, "target_modules": targets},
        "data": {"shards": "none"},
        "training": {"gradient_checkpointing": recompute},
    }
    return build_config(TrainConfig, values, "test")


def pack_of(base: Base, config: TrainConfig) -> Pack:
    adapters = []
    for rank in RANKS:
        lora = LoraConfig(rank=rank, dropout=config.lora.dropout, target_modules=config.lora.target_modules)
        attach_lora(base, lora, train_projector=True)
        adapters.append(take_off(base))
    if config.training.gradient_checkpointing:
        base.recompute_layers()
    base.model.train()
    return Pack(base, adapters, torch.device("cpu"))


def counted(pack: Pack, batch: Batch, dropout: float) -> int:
    """Bytes of all storages that are saved for the backward pass and hold no weights."""
    held: list[Tensor] = [*pack.base.model.parameters(), *pack.base.model.buffers(), pack.weights_KP]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, Any] = {}
    if dropout:
        tokens = batch.ids_BT.shape[1]
        pack.draws = [Draw(dropout, torch.Generator().manual_seed(k), tokens) for k in range(pack.size)]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that its address is not another's later
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses_K = packed_losses(pack, [batch] * pack.size, pack.base.renderer)
    assert losses_K.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("dtype", "targets", "dropout", "recompute"),
    [
        ("float32", ["q_proj", "v_proj"], 0.0, False),
        ("float32", ["all-linear"], 0.0, False),
        ("float32", ["all-linear"], 0.1, False),
        ("bfloat16", ["q_proj", "v_proj"], 0.1, False),
        ("bfloat16", ["all-linear"], 0.0, False),
        ("bfloat16", ["all-linear"], 0.0, True),
    ],
)
def test_the_formula_gives_what_autograd_keeps(
    dtype: str, targets: list[str], dropout: float, recompute: bool, folder: Path
) -> None:
    config = config_of(dtype, targets, dropout, recompute)
    base = open_base(str(folder), "short", config.base)
    batch = make_batches(base, 1, 2)[0]
    found = counted(pack_of(base, config), batch, dropout)
    sizes, names = read_sizes(folder), lora_targets(folder, config.lora)
    rows, tokens = len(RANKS) * len(batch.ids_BT), batch.ids_BT.shape[1]
    expected = kept_bytes(sizes, config, names, rows, tokens, images_per_row=1.0)
    if recompute:  # one layer comes back only in the backward pass
        expected -= rows * tokens * layer_bytes(sizes, config, names, tokens)
    columns = int((batch.labels_BT[:, 1:] != IGNORED_LABEL).any(dim=0).sum())
    expected += 4 * rows * columns * sizes.vocabulary  # the probabilities
    assert 0.9 < expected / found < 1.25


def test_what_the_formula_is_told_makes_a_difference(folder: Path) -> None:
    """The control: each of the settings above moves it by more than the tolerance."""
    sizes = read_sizes(folder)

    def kept(dtype: str, targets: list[str], dropout: float, recompute: bool) -> float:
        config = config_of(dtype, targets, dropout, recompute)
        return kept_bytes(sizes, config, lora_targets(folder, config.lora), 4, 64, 1.0)

    plain = kept("float32", ["q_proj", "v_proj"], 0.0, False)
    assert kept("bfloat16", ["q_proj", "v_proj"], 0.0, False) < plain / 1.3
    assert kept("float32", ["all-linear"], 0.1, False) > 1.3 * plain
    assert kept("float32", ["q_proj", "v_proj"], 0.0, True) < plain / 1.3
