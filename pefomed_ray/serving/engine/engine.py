"""Continuous batching: rows join and leave between steps, so a short answer never waits for a long one beside it.

Callers await on an event loop; one thread owns the model. It takes in what has been rendered (at most one prefill
between two steps, so that those who are being answered go on), makes one step for all rows, and hands out what each
said. A step that fails, for want of memory for example, fails the rows that were in it and nothing else.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from pefomed_ray.artifacts.base import base_digest
from pefomed_ray.artifacts.registry import local_copy
from pefomed_ray.config import ServeConfig
from pefomed_ray.config.schema import Precision
from pefomed_ray.errors import ConfigError, DataError, PefomedError
from pefomed_ray.model.base import Base
from pefomed_ray.model.bundle import check_template
from pefomed_ray.model.pefomed import PefomedForConditionalGeneration
from pefomed_ray.rendering.opening import AnyRenderer, open_renderer
from pefomed_ray.serving.contract import AdapterRef, Ask, CannotServeError, Completion, Ended, Piece, Stats
from pefomed_ray.serving.engine.adapters import AdapterSlots, AdapterWeights, read_adapter
from pefomed_ray.serving.engine.kv import KVSlots
from pefomed_ray.serving.engine.prompts import Prompt, Prompts
from pefomed_ray.serving.engine.sampling import Sampler, Text, next_tokens
from pefomed_ray.serving.engine.shelf import Held, Shelf

RENDERERS = 2
"""Threads that decode images and render prompts."""

logger = logging.getLogger("ray.serve")


@dataclass
class _Row:
    """A request that is being answered. The engine's thread writes, its caller reads what is put into `events`."""

    prompt: Prompt
    sampler: Sampler
    text: Text
    stop_token_ids: tuple[int, ...]
    digest: str | None
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Piece | Exception]" = field(default_factory=asyncio.Queue)
    retired: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False
    token: int = 0
    """The last one, which the next step reads."""
    position: int = 0
    """Of the last token but one, as the model counts."""

    def take(self, token: int) -> bool:
        """One token; whether it was the last."""
        self.token = token
        piece = self.text.add(token)
        is_end = token in self.stop_token_ids
        if not (is_end or self.text.stopped or len(self.text.ids) >= self.prompt.limit):
            if piece:
                self.tell(Piece(piece))
            return False
        piece += self.text.end()
        ended: Ended = "stop" if is_end or self.text.stopped else "length"
        prompt_tokens, tokens = len(self.prompt.rendered.prompt), len(self.text.ids)
        self.tell(Piece(piece, Completion(self.text.whole, ended, prompt_tokens, tokens, self.digest)))
        return True

    def tell(self, event: Piece | Exception) -> None:
        """To the caller."""
        self._soon(self.events.put_nowait, event)

    def retire(self) -> None:
        """The engine is done with it: its adapter may be taken out of memory."""
        self._soon(self.retired.set)

    def _soon(self, what: Any, *words: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(what, *words)
        except RuntimeError:  # the caller's loop is closed: nobody listens
            self.cancelled = True


class Engine:
    """A base on a device, and the adapters that are asked for."""

    def __init__(self, base: Base, precision: Precision, config: ServeConfig, device: str = "cpu") -> None:
        self._base = base
        self._precision = precision
        self._config = config
        self._device = torch.device(device)
        self._digest = base_digest(base.path)
        self._renderers: dict[str, AnyRenderer] = {base.renderer.template.name: base.renderer}
        model: Any = base.model  # the library's `to` has no usable type
        model.to(self._device).eval()
        self._slots = AdapterSlots(base, config.max_adapters + 1, config.max_rank, self._device)
        self._shelf = Shelf(self._slots, self._read, base.renderer)
        self._prompts = Prompts(base, self._slots, config, self._device)
        self._kv = KVSlots(config.max_batch_size)
        self._rendering = ThreadPoolExecutor(RENDERERS, "render")
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._work = threading.Condition()
        self._is_closed = False
        self._steps = self._tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """An answer piece by piece; to close the iterator early ends the work on it.

        Raises CannotServeError where the bundle is refused, DataError where an image or the prompt's length is,
        PefomedError where a step failed.
        """
        if self._is_closed:
            raise PefomedError("the engine is closed")
        held = await self._lease(ask.adapter)
        try:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._rendering, self._prompts.make, ask, held)
            row = self._row(ask, held, prompt, loop)
            self._admit(row)
            try:
                while True:
                    event = await row.events.get()
                    if isinstance(event, Exception):
                        raise event
                    yield event
                    if event.completion is not None:
                        break
            finally:
                row.cancelled = True
                if self._thread.is_alive():
                    await row.retired.wait()
        finally:
            self._shelf.release(held)

    async def load(self, ref: AdapterRef) -> None:
        """Have an adapter in memory, where none that is wanted must go for it. Raises CannotServeError."""
        self._shelf.release(await self._lease(ref))

    async def answer(self, ask: Ask) -> Completion:
        """A whole answer. Raises as `stream` does."""
        pieces = self.stream(ask)
        try:
            async for piece in pieces:
                if piece.completion is not None:
                    return piece.completion
        finally:
            await pieces.aclose()
        raise PefomedError("the engine ended without an answer")

    def healthy(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def stats(self) -> Stats:
        """How it is doing."""
        images = self._prompts.images
        counts = len(self._rows), len(self._waiting), len(self._shelf.loaded), self._steps, self._tokens
        return Stats(*counts, images.hits, images.misses)

    def close(self) -> None:
        """Fail what is under way and end the thread."""
        with self._work:
            self._is_closed = True
            self._work.notify()
        self._thread.join()
        self._shelf.close()
        self._rendering.shutdown(wait=False, cancel_futures=True)

    async def _lease(self, ref: AdapterRef | None) -> Held:
        try:
            return await self._shelf.lease(ref)
        except (DataError, ConfigError) as error:
            raise CannotServeError(str(error)) from None

    def _read(self, ref: AdapterRef) -> tuple[AdapterWeights, AnyRenderer]:
        folder = local_copy(ref.bundle, ref.digest)
        weights = read_adapter(folder, self._base, self._digest, self._precision, self._config.max_rank)
        manifest = weights.manifest
        if manifest.digest != ref.digest:
            raise DataError(f"the registry's bundle {ref.digest[:16]} holds {manifest.digest[:16]}; promote it again")
        if manifest.template not in self._renderers:
            family = self._base.family
            self._renderers[manifest.template] = open_renderer(self._base.path, family, manifest.template)
        check_template(folder, manifest, self._renderers[manifest.template])
        return weights, self._renderers[manifest.template]

    def _row(self, ask: Ask, held: Held, prompt: Prompt, loop: asyncio.AbstractEventLoop) -> _Row:
        text = Text(held.renderer, ask.sampling.stop)
        digest = ask.adapter.digest if ask.adapter else None
        return _Row(prompt, Sampler(ask.sampling), text, held.renderer.stop_token_ids, digest, loop)

    def _admit(self, row: _Row) -> None:
        with self._work:
            if self._is_closed:
                raise PefomedError("the engine is closed")
            self._waiting.append(row)
            self._work.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._await_work():
            self._drop_cancelled()
            self._attempt(self._prefill, self._joining())
            self._attempt(self._step, list(self._rows))
        for row in [*self._rows, *self._waiting]:
            row.tell(PefomedError("the endpoint is closing"))
            row.retire()

    def _await_work(self) -> bool:
        with self._work:
            self._work.wait_for(lambda: self._is_closed or self._waiting or self._rows)
            return not self._is_closed

    def _joining(self) -> list[_Row]:
        room = self._config.max_batch_size - len(self._rows)
        joining: list[_Row] = []
        while self._waiting and len(joining) < room:
            row = self._waiting.popleft()
            if row.cancelled:
                row.retire()
            else:
                joining.append(row)
        return joining

    def _drop_cancelled(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._rows[place].cancelled:
                self._leave(place)

    def _attempt(self, what: Any, rows: list[_Row]) -> None:
        if not rows:
            return
        try:
            what(rows)
        except Exception as error:
            # Its text may hold anything; its class is enough to look it up.
            logger.error("a step of %d rows failed: %s", len(rows), type(error).__name__, exc_info=False)
            self._fail(rows, PefomedError(f"the model failed ({type(error).__name__}); ask again"))

    def _fail(self, rows: list[_Row], error: Exception) -> None:
        failed = {id(row) for row in rows}
        for place in reversed(range(len(self._rows))):
            if id(self._rows[place]) in failed:
                self._kv.leave(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()
        for row in rows:
            row.tell(error)
            row.retire()

    def _prefill(self, joining: list[_Row]) -> None:
        renderer = self._base.renderer
        for found in self._prompts.prefill([row.prompt for row in joining], renderer):
            rows = [joining[place] for place in found.places]
            self._kv.join(found.keys_values, [len(row.prompt.rendered.prompt) for row in rows])
            self._rows += rows
            for row, position in zip(rows, found.positions, strict=True):
                row.position = position
            self._hand_out(rows, found.logits_BV)

    def _step(self, rows: list[_Row]) -> None:
        self._kv.prepare()
        self._slots.use([row.prompt.slot for row in rows])
        positions_B1 = torch.tensor([[row.position + 1] for row in rows], device=self._device)
        axes = self._prompts.position_axes
        logits_B1V = self._language_model(
            input_ids=torch.tensor([[row.token] for row in rows], device=self._device),
            attention_mask=self._kv.mask(self._device),
            position_ids=positions_B1.expand(axes, -1, -1) if axes else positions_B1,
            past_key_values=self._kv.cache,
            use_cache=True,
        ).logits
        self._kv.advance()
        self._steps += 1
        for row in rows:
            row.position += 1
        self._hand_out(rows, logits_B1V[:, -1])

    @property
    def _language_model(self) -> Any:
        model: Any = self._base.model
        return model.language_model if isinstance(model, PefomedForConditionalGeneration) else model

    def _hand_out(self, rows: list[_Row], logits_BV: torch.Tensor) -> None:
        tokens = next_tokens(logits_BV, [row.sampler for row in rows])
        self._tokens += len(tokens)
        done = {id(row) for row, token in zip(rows, tokens, strict=True) if row.take(token)}
        for place in reversed(range(len(self._rows))):
            if id(self._rows[place]) in done:
                self._leave(place)

    def _leave(self, place: int) -> None:
        row = self._rows[place]
        self._kv.leave(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        row.retire()
