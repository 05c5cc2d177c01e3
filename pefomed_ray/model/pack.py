"""Several adapters over one frozen base, in one forward and backward pass: packed LoRA (PLoRA, arXiv 2508.02932).

The rows of a batch stand adapter by adapter, equally many of each. The frozen layers see one large batch; to what a
linear layer gives, a hook adds each adapter's update, all of them by two batched multiplications. An adapter of a
smaller rank, or without that layer, is filled up with zeros: they stay zero, since their gradient is zero, so it learns
what it would alone. Adapters, and projectors where they learn, are rows of one array, and so are their gradients: to
clip, to step, to save one of them is to work on a row.

Letters: K adapters, B rows of one, T tokens, M = B x T, I inputs and O outputs of a linear layer, R the largest rank,
P numbers of an adapter in the array, N images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from pefomed_ray.model.base import Base
from pefomed_ray.model.lora import PeftForm, peft_form, what_learns

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""What PEFT calls an adapter's two matrices in a layer: [r, I] and [O, r]."""


@dataclass(frozen=True)
class Adapter:
    """One adapter apart from the model: what PEFT knows of it, and its trained tensors by their names in the model."""

    form: PeftForm
    rank: int
    scale: float
    dropout: float
    tensors: dict[str, Tensor]
    """Of the projector too, where it learns."""
    learning: dict[str, Any]
    """What `what_learns` says."""


def take_off(base: Base) -> Adapter:
    """Take the adapter out of a base, which is left as it was before one was put in, all of it frozen.

    Every rank must call, where the base is sharded.
    """
    layers = {n: m for n, m in base.model.named_modules() if isinstance(m, BaseTunerLayer)}
    first: Any = next(iter(layers.values()))
    adapter = Adapter(
        form=peft_form(base),
        rank=first.r["default"],
        scale=first.scaling["default"],
        dropout=getattr(first.lora_dropout["default"], "p", 0.0),
        tensors={name: _whole(p) for name, p in base.model.named_parameters() if p.requires_grad},
        learning=what_learns(base),
    )
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(base.model.get_submodule(parent), last, layer.get_base_layer())
    del base.adapted.peft_config
    base.model.requires_grad_(False)
    return adapter


@dataclass(frozen=True)
class Place:
    """Where a parameter stands in the row of every adapter; `shape` with the largest rank."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """One past its last number."""
        return self.start + torch.Size(self.shape).numel()

    def of(self, array_KP: Tensor) -> Tensor:
        """[K, *shape], a view."""
        return array_KP[:, self.start : self.end].view(-1, *self.shape)

    def put(self, array_P: Tensor, tensor: Tensor) -> None:
        """Copy one adapter's own tensor into its row; what it is smaller by stays."""
        array_P[self.start : self.end].view(self.shape)[self._part(tensor.shape)].copy_(tensor)

    def take(self, array_P: Tensor, shape: Sequence[int]) -> Tensor:
        """A copy of one adapter's own tensor, on the CPU."""
        return array_P[self.start : self.end].view(self.shape)[self._part(shape)].cpu().clone().contiguous()

    def _part(self, shape: Sequence[int]) -> tuple[slice, ...]:
        return tuple(slice(size) for size in shape)


@dataclass(frozen=True)
class Part:
    """A stretch of every row whose parameters the optimizer treats alike."""

    start: int
    end: int
    decays: bool
    """Whether weight decay applies: to matrices only."""
    is_up: bool
    """Whether these are LoRA's B matrices."""


@dataclass(frozen=True)
class Draw:
    """What dropout draws for one adapter in a pass: from its own generator, for the tokens that it has alone."""

    dropout: float
    generator: torch.Generator
    tokens: int

    def mask(self, rows: int, tokens: int, width: int, device: torch.device) -> Tensor:
        """[B, T, I] what to multiply by: as torch's own dropout on a CPU draws it, zero beyond the adapter's tokens."""
        noise_BTI = torch.empty(rows, self.tokens, width, device=device)
        noise_BTI.bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)
        return nn.functional.pad(noise_BTI, (0, 0, 0, tokens - self.tokens))


class Pack:
    """K adapters put over a base until `remove`. Nobody else may change the base's layers meanwhile."""

    def __init__(self, base: Base, adapters: Sequence[Adapter], device: torch.device) -> None:
        self.base = base
        self.adapters = adapters
        self.places = _places(adapters)
        self.weights_KP = torch.zeros(len(adapters), self.places[-1].end if self.places else 0, device=device)
        self.gradients_KP = torch.zeros_like(self.weights_KP)
        self.scales_K11 = torch.tensor([adapter.scale for adapter in adapters], device=device)[:, None, None]
        self.shared = False
        """Whether all adapters see the same images in this pass: the tower then runs on those of the first alone."""
        self.images: Sequence[int] = ()
        """How many each adapter has in this pass, where they do not share them."""
        self.draws: Sequence[Draw] | None = None
        """What dropout draws in this pass; None where nothing is dropped."""
        for row, adapter in zip(self.weights_KP, adapters, strict=True):
            self.put(row, adapter.tensors)
        self._leaves = {place.name: self._leaf(place) for place in self.places}
        self._undo: list[Any] = []
        self._hook()

    @property
    def size(self) -> int:
        """K."""
        return len(self.adapters)

    @property
    def parts(self) -> list[Part]:
        """The stretches of a row, in order."""
        parts: list[Part] = []
        for place in self.places:
            kind = (len(place.shape) >= 2, place.name.endswith(UP))
            if parts and (parts[-1].decays, parts[-1].is_up) == kind:
                parts[-1] = Part(parts[-1].start, place.end, *kind)
            else:
                parts.append(Part(place.start, place.end, *kind))
        return parts

    def put(self, row_P: Tensor, tensors: dict[str, Tensor]) -> None:
        """Copy tensors, by their names in the model, into a row of an array of this pack."""
        for place in self.places:
            if place.name in tensors:
                place.put(row_P, tensors[place.name])

    def take(self, row_P: Tensor, adapter: int) -> dict[str, Tensor]:
        """The tensors of an adapter out of its row, copies on the CPU."""
        own = self.adapters[adapter].tensors
        return {place.name: place.take(row_P, own[place.name].shape) for place in self.places if place.name in own}

    def remove(self) -> None:
        """Take the hooks off the base."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _leaf(self, place: Place) -> Tensor:
        leaf = place.of(self.weights_KP).detach().requires_grad_()
        leaf.grad = place.of(self.gradients_KP)
        return leaf

    def _hook(self) -> None:
        for name, module in self.base.model.named_modules():
            if name + DOWN in self._leaves:
                has = [name + DOWN in adapter.tensors for adapter in self.adapters]
                self._undo.append(module.register_forward_hook(partial(self._update, name, has)).remove)
        for name in self.base.family.projector:
            self._replace(name, self._project)
        for name in self.base.family.vision:
            if hasattr(self.base.model, name.split(".")[0]):  # it may be gone, where a feature cache stands in for it
                self._replace(name, self._look_once)

    def _replace(self, name: str, forward: Any) -> None:
        """Give a module, or those of a list, another forward, which gets the old one."""
        found = self.base.model.get_submodule(name)
        many = isinstance(found, nn.ModuleList)
        for full, module in [(f"{name}.{i}", m) for i, m in enumerate(found)] if many else [(name, found)]:
            module.forward = partial(forward, full, module, module.forward)
            self._undo.append(partial(delattr, module, "forward"))

    def _update(self, name: str, has: list[bool], module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """A linear layer's output with every adapter's update: x A' B' alpha / r, in float32 as PEFT does."""
        down_KRI, up_KOR = self._leaves[name + DOWN], self._leaves[name + UP]
        x_KMI = inputs[0].reshape(self.size, -1, inputs[0].shape[-1]).to(down_KRI.dtype)
        if self.draws is not None:
            x_KMI = self._dropped(x_KMI, has, inputs[0].shape)
        low_KMR = torch.bmm(x_KMI, down_KRI.transpose(1, 2)) * self.scales_K11
        flat_KMO = output.reshape(self.size, -1, output.shape[-1]).to(low_KMR.dtype)
        return torch.baddbmm(flat_KMO, low_KMR, up_KOR.transpose(1, 2)).view(output.shape).to(output.dtype)

    def _dropped(self, x_KMI: Tensor, has: list[bool], shape: torch.Size) -> Tensor:
        assert self.draws is not None
        rows, tokens, width = shape[0] // self.size, shape[1], shape[2]
        masks = [
            draw.mask(rows, tokens, width, x_KMI.device)
            if draw.dropout and learns
            else x_KMI.new_ones(1).expand(rows, tokens, width)
            for draw, learns in zip(self.draws, has, strict=True)
        ]
        return x_KMI * torch.stack(masks).view(x_KMI.shape)

    def _project(self, name: str, module: nn.Module, forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A projector's output for every adapter's images: by its own weights, where they learn."""
        learning = [n for n, _ in module.named_parameters() if f"{name}.{n}" in self._leaves]
        # Unbound at once: each row taken by its index would bring a gradient as large as that of all.
        own = {n: self._leaves[f"{name}.{n}"].unbind() for n in learning}
        if not own:
            output: Tensor = forward(x, *args, **kwargs)
            return self._of_all([output] * self.size, name) if self.shared else output
        replaced, module.forward = module.forward, forward  # functional_call is to find the module as it was
        try:
            inputs = [x] * self.size if self.shared else x.split(self.images)
            outputs = [
                functional_call(module, {n: weights[k] for n, weights in own.items()}, (mine, *args), kwargs)
                for k, mine in enumerate(inputs)
            ]
        finally:
            module.forward = replaced
        return self._of_all(outputs, name)

    def _of_all(self, outputs: Sequence[Tensor], name: str) -> Tensor:
        """What a projector gives for each adapter, one after the other; where it stands inside the tower, side by side
        until the tower is through: Qwen2.5-VL's puts its tokens in another order afterwards."""
        inside = any(name.startswith(f"{tower}.") for tower in self.base.family.vision)
        return torch.cat(list(outputs), dim=-1 if self.shared and inside else 0)

    def _look_once(self, name: str, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The tower's output; where all adapters see the same images, for the first one's. `_project` repeats it."""
        if not self.shared:
            return forward(*args, **kwargs)
        holds_projector = any(projector.startswith(f"{name}.") for projector in self.base.family.projector)

        def first(value: Any) -> Any:
            return value[: len(value) // self.size] if isinstance(value, Tensor) and value.ndim else value

        output = forward(*map(first, args), **{key: first(value) for key, value in kwargs.items()})
        if holds_projector:
            for field in set(output) - {"last_hidden_state"}:  # that one is of before the projector
                output[field] = self._one_after_the_other(output[field])
        return output

    def _one_after_the_other(self, projected: Any) -> Any:
        """Adapters side by side, [T, K x H], as [K x T, H]; of each of several projectors, where there are."""
        if isinstance(projected, list | tuple):
            return type(projected)(map(self._one_after_the_other, projected))
        return torch.cat(projected.chunk(self.size, dim=-1))


def _places(adapters: Sequence[Adapter]) -> list[Place]:
    """Of all parameters that some adapter has: A matrices and the projector's, then B matrices, then vectors."""
    rank = max(adapter.rank for adapter in adapters)
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            shapes[name] = tuple(tensor.shape)
            if name.endswith(DOWN):
                shapes[name] = (rank, tensor.shape[1])
            if name.endswith(UP):
                shapes[name] = (tensor.shape[0], rank)
    places: list[Place] = []
    for name in sorted(shapes, key=lambda name: (len(shapes[name]) < 2, name.endswith(UP))):
        places.append(Place(name, shapes[name], places[-1].end if places else 0))
    return places


def _whole(parameter: Tensor) -> Tensor:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu().clone()
