"""Adapters in slots over one frozen base: a forward pass adds to each row what the adapter of its slot learned.

Each linear layer of the language model has an arena, A [S, R, I] and B [S, O, R]; loading an adapter fills a row of
each. Slot 0 is the base as it is. A slot is only ever filled while no request uses it (`shelf`).

Letters: S slots, R largest rank that is taken, r an adapter's own, K ranks of several adapters together, I inputs and O
outputs of a layer, B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pefomed_ray.artifacts.manifests import BundleManifest, verify_bundle
from pefomed_ray.artifacts.precision import precision_of
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import DataError
from pefomed_ray.model.base import Base
from pefomed_ray.model.bundle import PROJECTOR_FILE
from pefomed_ray.model.lora import ADAPTER_FILE, PEFT_PREFIX, projector_in_float32

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""What PEFT calls an adapter's two matrices of a layer in a file: [r, I] and [O, r]."""
BASE_SLOT = 0
MOST_IDLE = 2
"""A stack of adapters is kept while its ranks add up to no more than so many times those of the rows' own."""


@dataclass(frozen=True)
class AdapterWeights:
    """What a bundle adds to the base; tensors by the names of the base's modules, on the CPU."""

    manifest: BundleManifest
    rank: int
    scale: float
    down: dict[str, Tensor]
    up: dict[str, Tensor]
    projector: dict[str, Tensor]
    """By parameter; empty where the base's own is used."""


def read_adapter(folder: Path, base: Base, base_digest: str, precision: Precision, max_rank: int) -> AdapterWeights:
    """A bundle's weights, every file of it verified.

    Raises DataError, saying which, where a file was changed, the bundle is of another base or precision, its rank is
    above `max_rank`, or its adapter is not plain LoRA on the language model's linear layers.
    """
    manifest = verify_bundle(folder)
    _check_base(folder, manifest, base_digest, precision)
    config = PeftConfig.from_pretrained(str(folder))
    _check_form(config, max_rank)
    root = f"{base.family.adapted}." if base.family.adapted else ""
    tensors = {root + name.removeprefix(PEFT_PREFIX): value for name, value in load_file(folder / ADAPTER_FILE).items()}
    down = {name.removesuffix(DOWN): value for name, value in tensors.items() if name.endswith(DOWN)}
    up = {name.removesuffix(UP): value for name, value in tensors.items() if name.endswith(UP)}
    layers = linear_layers(base)
    wrong = [name for name in down if name not in layers or name not in up]
    rest = len(tensors) - len(down) - len(up)
    if wrong or rest or any(_misfit(layers[name], down[name], up[name], config.r) for name in down):
        what = f"{wrong[0]!r} has no place or no pair" if wrong else "tensors are of other names or sizes"
        raise DataError(f"{ADAPTER_FILE} of bundle {manifest.digest[:16]} does not fit the base: {what}")
    if any(not bool(tensor.isfinite().all()) for tensor in tensors.values()):
        # Zero times NaN is NaN: it would be in everybody's answers.
        raise DataError(f"{ADAPTER_FILE} of bundle {manifest.digest[:16]} holds NaN or infinity; train it again")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    projector = load_file(folder / PROJECTOR_FILE) if (folder / PROJECTOR_FILE).is_file() else {}
    if missing := set(projector) - {name for name, _ in base.model.named_parameters()}:
        raise DataError(f"{PROJECTOR_FILE} of bundle {manifest.digest[:16]} has {min(missing)!r}, and the base has not")
    return AdapterWeights(manifest, config.r, scale, down, up, projector)


def _check_base(folder: Path, manifest: BundleManifest, base_digest: str, precision: Precision) -> None:
    if manifest.base_digest != base_digest:
        raise DataError(
            f"bundle {manifest.digest[:16]} was trained on base {manifest.base_digest[:16]}, "
            f"but {base_digest[:16]} is served here; serve it over its own base"
        )
    if (trained := precision_of(folder)) != precision:
        raise DataError(
            f"bundle {manifest.digest[:16]} was trained over a base held as {_words(trained)}, and here it is held as "
            f"{_words(precision)}; serve it from an endpoint of its own"
        )


def _check_form(config: PeftConfig, max_rank: int) -> None:
    if not isinstance(config, PeftLoraConfig) or config.rank_pattern or config.alpha_pattern or config.bias != "none":
        raise DataError("adapter_config.json is not plain LoRA of one rank; only that can be served beside others")
    if config.use_dora:
        raise DataError(
            "the adapter is DoRA, which is no sum with the base and cannot be served beside others; "
            "`pefomed-ray export --merged` makes a base of it"
        )
    if config.r > max_rank:
        raise DataError(f"the adapter has rank {config.r}, and max_rank is {max_rank} here; serve with a larger one")


def _misfit(layer: nn.Module, down: Tensor, up: Tensor, rank: int) -> bool:
    sizes = (rank, layer.in_features), (layer.out_features, rank)
    return (tuple(down.shape), tuple(up.shape)) != sizes


def _words(precision: Precision) -> str:
    return ", ".join(f"{name} {value}" for name, value in precision.model_dump(mode="json").items())


def linear_layers(base: Base) -> dict[str, nn.Module]:
    """Where adapters can be: every linear layer of the language model's decoder, by its name in the model."""
    within = f"{base.family.layers}."
    return {n: m for n, m in base.model.named_modules() if n.startswith(within) and isinstance(m, nn.Linear)}


@dataclass(frozen=True)
class Rows:
    """Which slot each row of a forward pass is answered by."""

    count: int
    distinct: tuple[int, ...]
    stack: "_Stack | None"
    """Where several adapters are among them; None where one is, or the base alone."""
    others_B1K: Tensor | None
    """Which columns of the stack are not the row's own."""


@dataclass(frozen=True)
class _Stack:
    """The adapters of several slots one below the other: all rows go through all of them, and `Rows.others_B1K` blots
    out what is not a row's own. Two products of whole matrices cost less than two small ones for each row, and a stack
    is kept while the rows that come need no other adapter."""

    slots: tuple[int, ...]
    fills: tuple[int, ...]
    """How often each slot was filled when this was made."""
    ranks: tuple[int, ...]
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """down [K, I] and up [O, K] of each layer, once it was asked for; down times alpha / r."""


@dataclass
class _Arena:
    down_SRI: Tensor
    up_SOR: Tensor


class AdapterSlots:
    """Slots over a base, whose layers and projector are this object's from here on."""

    def __init__(self, base: Base, slots: int, max_rank: int, device: torch.device) -> None:
        self.slots = slots
        self._max_rank = max_rank
        self._device = device
        self._layers = linear_layers(base)
        self._arenas: dict[str, _Arena] = {}
        self._ranks = [0] * slots
        self._fills = [0] * slots
        self._scales = [0.0] * slots
        self._stack: _Stack | None = None
        self._projectors: list[dict[str, Tensor]] = [{} for _ in range(slots)]
        self._rows: Rows | None = None
        self._projector_slot = BASE_SLOT
        for name, layer in self._layers.items():
            layer.register_forward_hook(partial(self._add, name))
        # Bundles hold projectors in float32, whatever the base is held in.
        for module in projector_in_float32(base):
            name = next(n for n, m in base.model.named_modules() if m is module)
            module.forward = partial(self._project, name, module, module.forward)

    def fill(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot that no running request uses."""
        for name in weights.down.keys() - self._arenas.keys():
            layer: Any = self._layers[name]
            self._arenas[name] = _Arena(
                torch.zeros(self.slots, self._max_rank, layer.in_features, device=self._device),
                torch.zeros(self.slots, layer.out_features, self._max_rank, device=self._device),
            )
        for name, arena in self._arenas.items():
            # What lies beyond the adapter's rank is never read.
            down_rI, up_Or = arena.down_SRI[slot, : weights.rank], arena.up_SOR[slot, :, : weights.rank]
            if name in weights.down:
                down_rI.copy_(weights.down[name])
                up_Or.copy_(weights.up[name])
            else:
                down_rI.zero_()
                up_Or.zero_()
        self._scales[slot] = weights.scale
        self._ranks[slot] = weights.rank
        self._fills[slot] += 1
        self._projectors[slot] = {name: value.to(self._device).float() for name, value in weights.projector.items()}

    def projector_of(self, slot: int) -> int:
        """The slot whose projector a request of this slot needs: its own, or the base's."""
        return slot if self._projectors[slot] else BASE_SLOT

    def use(self, slots: Sequence[int]) -> None:
        """The rows of the next forward passes of the language model."""
        distinct = tuple(sorted(set(slots)))
        if len(distinct) == 1:
            self._rows = Rows(len(slots), distinct, None, None)
            return
        stack = self._stack = self._stack_of(tuple(slot for slot in distinct if slot != BASE_SLOT))
        of_column_K = [slot for slot, rank in zip(stack.slots, stack.ranks, strict=True) for _ in range(rank)]
        others = [[slot != own for slot in of_column_K] for own in slots]
        self._rows = Rows(len(slots), distinct, stack, torch.tensor(others, device=self._device)[:, None, :])

    def _stack_of(self, slots: tuple[int, ...]) -> _Stack:
        """The stack there is, where it holds these slots as they are now and not much else; else a new one."""
        ranks = tuple(self._ranks[slot] for slot in slots)
        known = self._stack
        if known is not None and sum(known.ranks) <= MOST_IDLE * sum(ranks):
            fills = dict(zip(known.slots, known.fills, strict=True))
            if all(fills.get(slot) == self._fills[slot] for slot in slots):
                return known
        return _Stack(slots, tuple(self._fills[slot] for slot in slots), ranks)

    def use_projector(self, slot: int) -> None:
        """The projector of the next forward passes."""
        self._projector_slot = slot

    def _add(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A layer's output with each row's update: x A' B' alpha / r, in float32 as PEFT does."""
        rows, arena = self._rows, self._arenas.get(name)
        if rows is None or arena is None or rows.distinct == (BASE_SLOT,):
            return None
        x_BTI = inputs[0].reshape(rows.count, -1, inputs[0].shape[-1]).to(arena.down_SRI.dtype)
        if rows.stack is None:
            slot = rows.distinct[0]
            rank = self._ranks[slot]
            low_BTR = F.linear(x_BTI, arena.down_SRI[slot, :rank])
            update_BTO = F.linear(low_BTR, arena.up_SOR[slot, :, :rank]) * self._scales[slot]
        else:
            assert rows.others_B1K is not None
            down_KI, up_OK = self._layer_of(rows.stack, name, arena)
            # Blotted out and not multiplied by zero: another adapter may have gone beyond what a float holds.
            update_BTO = F.linear(F.linear(x_BTI, down_KI).masked_fill(rows.others_B1K, 0.0), up_OK)
        return (output + update_BTO.view(output.shape)).to(output.dtype)

    def _layer_of(self, stack: _Stack, name: str, arena: _Arena) -> tuple[Tensor, Tensor]:
        if name not in stack.layers:
            parts = list(zip(stack.slots, stack.ranks, strict=True))
            # Times the scale here and not in `up`, where what went beyond bounds would not be blotted out.
            down_KI = torch.cat([arena.down_SRI[slot, :rank] * self._scales[slot] for slot, rank in parts])
            up_OK = torch.cat([arena.up_SOR[slot, :, :rank] for slot, rank in parts], dim=1)
            stack.layers[name] = down_KI, up_OK
        return stack.layers[name]

    def _project(self, name: str, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        prefix = f"{name}."
        projector = self._projectors[self._projector_slot]
        own = {n.removeprefix(prefix): value for n, value in projector.items() if n.startswith(prefix)}
        if not own:
            return forward(*args, **kwargs)
        replaced, module.forward = module.forward, forward  # functional_call is to find the module as it was
        try:
            return functional_call(module, own, args, kwargs)
        finally:
            module.forward = replaced
