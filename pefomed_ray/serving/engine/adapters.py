"""Adapters in slots over one frozen base: a forward pass adds to each row what the adapter of its slot learned.

Each linear layer of the language model has an arena, A [S, R, I] and B [S, O, R]; loading an adapter fills a row of
each. Slot 0 is the base as it is. A slot is only ever filled while no request uses it (`shelf`).

Letters: S slots, R largest rank that is taken, r an adapter's own, I inputs and O outputs of a layer, B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

    slots_B: Tensor
    distinct: tuple[int, ...]
    rank: int
    """The largest of these slots' adapters; 0 where all rows are the base's."""


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
        self._scale_S = torch.zeros(slots, device=device)
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
            arena.down_SRI[slot].zero_()
            arena.up_SOR[slot].zero_()
            if name in weights.down:
                arena.down_SRI[slot, : weights.rank].copy_(weights.down[name])
                arena.up_SOR[slot, :, : weights.rank].copy_(weights.up[name])
        self._scale_S[slot] = weights.scale
        self._ranks[slot] = weights.rank
        self._projectors[slot] = {name: value.to(self._device).float() for name, value in weights.projector.items()}

    def projector_of(self, slot: int) -> int:
        """The slot whose projector a request of this slot needs: its own, or the base's."""
        return slot if self._projectors[slot] else BASE_SLOT

    def use(self, slots: Sequence[int]) -> None:
        """The rows of the next forward passes of the language model."""
        distinct = tuple(sorted(set(slots)))
        slots_B = torch.tensor(slots, device=self._device)
        self._rows = Rows(slots_B, distinct, max(self._ranks[slot] for slot in distinct))

    def use_projector(self, slot: int) -> None:
        """The projector of the next forward passes."""
        self._projector_slot = slot

    def _add(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A layer's output with each row's update: x A' B' alpha / r, in float32 as PEFT does."""
        rows, arena = self._rows, self._arenas.get(name)
        if rows is None or rows.rank == 0 or arena is None:
            return None
        x_BTI = inputs[0].reshape(len(rows.slots_B), -1, inputs[0].shape[-1]).to(arena.down_SRI.dtype)
        if len(rows.distinct) == 1:
            slot = rows.distinct[0]
            low_BTR = F.linear(x_BTI, arena.down_SRI[slot, : rows.rank])
            update_BTO = F.linear(low_BTR, arena.up_SOR[slot, :, : rows.rank]) * self._scale_S[slot]
        else:
            low_BTR = torch.bmm(x_BTI, arena.down_SRI[rows.slots_B, : rows.rank].transpose(1, 2))
            update_BTO = torch.bmm(low_BTR, arena.up_SOR[rows.slots_B, :, : rows.rank].transpose(1, 2))
            update_BTO = update_BTO * self._scale_S[rows.slots_B][:, None, None]
        return (output + update_BTO.view(output.shape)).to(output.dtype)

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
