"""Which adapters are in memory. Everything here runs on the event loop, but for reading files.

An adapter has a slot while any request wants it; among those that none wants, the one that was wanted longest ago makes
room. Where all slots are wanted, the next adapter waits until one is not.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.serving.contract import AdapterRef
from pefomed_ray.serving.engine.adapters import BASE_SLOT, AdapterSlots, AdapterWeights


@dataclass(frozen=True)
class Held:
    """An adapter in memory."""

    slot: int
    renderer: AnyRenderer
    """Of the template that it was trained with."""


Read = Callable[[AdapterRef], tuple[AdapterWeights, AnyRenderer]]
"""A bundle's weights, verified, and its renderer. Raises DataError or ConfigError."""


class Shelf:
    """Hands out slots, and loads what is asked for."""

    def __init__(self, slots: AdapterSlots, read: Read, base: AnyRenderer) -> None:
        self._slots = slots
        self._read = read
        self._base = Held(BASE_SLOT, base)
        self._held: dict[str, Held] = {}
        """By digest, the one that was wanted last at the end."""
        self._free = list(range(slots.slots - 1, BASE_SLOT, -1))
        self._wanted: Counter[str] = Counter()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        # One thread: a slot is filled by one at a time.
        self._reader = ThreadPoolExecutor(1, "adapters")

    @property
    def loaded(self) -> list[str]:
        """Digests in memory."""
        return list(self._held)

    async def lease(self, ref: AdapterRef | None) -> Held:
        """An adapter that stays where it is until `release`. Raises what reading it raises."""
        if ref is None:
            return self._base
        self._wanted[ref.digest] += 1
        try:
            while ref.digest not in self._held:
                if ref.digest not in self._loading:
                    self._loading[ref.digest] = asyncio.create_task(self._load(ref))
                # Shielded: others wait for it too when this request is given up.
                await asyncio.shield(self._loading[ref.digest])
        except BaseException:
            self.release(ref)
            raise
        held = self._held.pop(ref.digest)
        self._held[ref.digest] = held
        return held

    def release(self, ref: AdapterRef | None) -> None:
        """Give a lease back."""
        if ref is not None:
            self._wanted[ref.digest] -= 1
            self._changed.set()

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def _load(self, ref: AdapterRef) -> None:
        loop = asyncio.get_running_loop()
        try:
            weights, renderer = await loop.run_in_executor(self._reader, self._read, ref)
            while (slot := self._take()) is None:
                self._changed.clear()
                await self._changed.wait()
            await loop.run_in_executor(self._reader, self._slots.fill, slot, weights)
            self._held[ref.digest] = Held(slot, renderer)
        finally:
            del self._loading[ref.digest]

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        for digest, held in self._held.items():
            if not self._wanted[digest]:
                del self._held[digest], self._wanted[digest]
                return held.slot
        return None
