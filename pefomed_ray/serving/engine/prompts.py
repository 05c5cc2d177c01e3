"""A request becomes a prompt, and prompts become their first logits and the keys and values of what they hold.

A prompt is rendered by the renderer that its adapter was trained with. Over a `pefomed` base, what the vision tower
makes of an image is kept (`image_cache_bytes`, the images seen last), so that a second question about it costs no look;
other families' towers have as many forms of output as there are families, and look each time.

Letters: B rows, V vocabulary, N images, P visual tokens an image, W numbers the projector reads for one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pefomed_ray.artifacts.storage import sha256_bytes
from pefomed_ray.config import ServeConfig
from pefomed_ray.errors import DataError
from pefomed_ray.model.base import Base
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.rendering.batches import Rendered, generation_batch
from pefomed_ray.rendering.images import MAX_PIXELS, image_size, normalise
from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.rendering.renderer import Renderer
from pefomed_ray.serving.contract import Ask
from pefomed_ray.serving.engine.adapters import AdapterSlots
from pefomed_ray.serving.engine.shelf import Held


class ImageCache:
    """What the tower made of images: sha256 of an image's bytes -> [P, W]. The one not asked for longest makes room."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, digest: str) -> Tensor | None:
        """The features, where they are kept."""
        found = self._features.get(digest)
        if found is None:
            self.misses += 1
            return None
        self._features.move_to_end(digest)
        self.hits += 1
        return found

    def put(self, digest: str, features_PW: Tensor) -> None:
        """Keep features."""
        if digest in self._features or features_PW.nbytes > self._most:
            return
        self._features[digest] = features_PW.clone()  # a view would keep its whole batch
        self._bytes += features_PW.nbytes
        while self._bytes > self._most:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.nbytes


@dataclass
class Prompt:
    """A request, checked and rendered."""

    rendered: Rendered
    slot: int
    limit: int
    """Tokens that may be generated."""
    digests: tuple[str, ...] = ()
    """Of its images, where the tower's features are kept."""


@dataclass(frozen=True)
class Prefilled:
    """Some of the prompts after their pass, in order."""

    places: list[int]
    logits_BV: Tensor
    keys_values: DynamicCache
    """Padded on the left."""
    positions: list[int]
    """Of each row's last token, as the model counts them."""


class Prompts:
    """Renders on any thread; prefills on the engine's."""

    def __init__(self, base: Base, slots: AdapterSlots, config: ServeConfig, device: torch.device) -> None:
        self._base = base
        self._slots = slots
        self._config = config
        self._device = device
        self._positions: Tensor | None = None
        self.images = ImageCache(config.image_cache_bytes)
        language_model = base.model.get_submodule(base.family.language_model)
        rotary = next(m for m in language_model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
        rotary.register_forward_pre_hook(self._see_positions, with_kwargs=True)

    @property
    def position_axes(self) -> int:
        """0 where a position is a number; 3 where it is one of time, height and width (Qwen)."""
        assert self._positions is not None
        return 0 if self._positions.ndim == 2 else len(self._positions)

    def make(self, ask: Ask, held: Held) -> Prompt:
        """Raises DataError where an image cannot be read, the images are too large together, or the prompt leaves too
        little of the model's context for the answer."""
        pixels = sum(width * height for width, height in map(image_size, ask.images))
        if pixels > MAX_PIXELS:
            raise DataError(f"the images of a request have {pixels} pixels together; at most {MAX_PIXELS}")
        images: Any = held.renderer.read(ask.images)
        rendered = held.renderer.render(ask.task, ask.question, images)
        keeps = isinstance(held.renderer, Renderer)
        digests = tuple(map(sha256_bytes, ask.images)) if keeps else ()
        return Prompt(rendered, held.slot, self._limit(ask, len(rendered.prompt)), digests)

    def _limit(self, ask: Ask, prompt_tokens: int) -> int:
        wanted = ask.sampling.max_tokens
        room = self._base.context_tokens - prompt_tokens
        if room < (wanted or 1):
            raise DataError(
                f"the prompt has {prompt_tokens} tokens and leaves {max(room, 0)} of the model's "
                f"{self._base.context_tokens} for the answer; ask shorter or set a smaller max_tokens"
            )
        return wanted or min(room, self._config.max_new_tokens)

    def prefill(self, prompts: Sequence[Prompt], renderer: AnyRenderer) -> list[Prefilled]:
        """One pass for all of a `pefomed` base; else one for each projector: those are read inside the models."""
        if isinstance(self._base.model, PefomedForConditionalGeneration):
            return [self._prefill_pefomed(self._base.model, prompts, renderer)]
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(self._slots.projector_of(prompt.slot), []).append(place)
        found = []
        for projector, places in groups.items():
            self._slots.use_projector(projector)
            self._slots.use([prompts[place].slot for place in places])
            rows = [prompts[place].rendered for place in places]
            batch = generation_batch(rows, renderer.pad_token_id).to(self._device)
            found.append(self._first(self._base.model, places, renderer, renderer.inputs(batch)))
        return found

    def _prefill_pefomed(
        self, model: PefomedForConditionalGeneration, prompts: Sequence[Prompt], renderer: AnyRenderer
    ) -> Prefilled:
        features = self._features(model, prompts, renderer)
        rows = [Rendered(prompt.rendered.prompt, []) for prompt in prompts]
        batch = generation_batch(rows, renderer.pad_token_id).to(self._device)
        embeds = []
        for place, prompt in enumerate(prompts):
            self._slots.use_projector(self._slots.projector_of(prompt.slot))
            own = features[place]
            embeds.append(model.embed(batch.ids_BT[place : place + 1], own if len(own) else None))
        self._slots.use([prompt.slot for prompt in prompts])
        inputs = {"inputs_embeds": torch.cat(embeds), "attention_mask": batch.mask_BT}
        return self._first(model.language_model, list(range(len(prompts))), renderer, inputs)

    def _features(
        self, model: PefomedForConditionalGeneration, prompts: Sequence[Prompt], renderer: AnyRenderer
    ) -> list[Tensor]:
        """Of each prompt, [N, P, W]; the tower looks once at each image that is not kept."""
        known: dict[str, Tensor] = {}
        new: dict[str, Tensor] = {}
        for prompt in prompts:
            for digest, pixels in zip(prompt.digests, prompt.rendered.tensors["pixel_values"], strict=True):
                if digest not in known and digest not in new:
                    kept = self.images.get(digest)
                    known.update({digest: kept} if kept is not None else {})
                    new.update({digest: pixels} if kept is None else {})
        if new:
            assert isinstance(renderer, Renderer)
            pixels_NCHW = normalise(torch.stack(list(new.values())).to(self._device), renderer.image_spec)
            for digest, features in zip(new, model.patch_features(pixels_NCHW), strict=True):
                known[digest] = features
                self.images.put(digest, features)
        return [torch.stack([known[d] for d in p.digests]) if p.digests else torch.empty(0) for p in prompts]

    def _first(self, model: Any, places: list[int], renderer: AnyRenderer, inputs: dict[str, Tensor]) -> Prefilled:
        """The library's own first step: positions, masks and what a family adds are as in offline generation."""
        keys_values = DynamicCache()  # of no config: it keeps what sliding layers would drop
        found = model.generate(
            **inputs,
            past_key_values=keys_values,
            max_new_tokens=1,
            do_sample=False,
            eos_token_id=list(renderer.stop_token_ids),
            pad_token_id=renderer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert self._positions is not None
        last = self._positions[..., -1]
        positions = (last if last.ndim == 1 else last.amax(0)).tolist()
        # Positions without a batch axis of their own are the same for all.
        return Prefilled(places, found.logits[0], keys_values, positions * (len(places) // len(positions)))

    def _see_positions(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
