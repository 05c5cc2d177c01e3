"""Which adapters are in memory. Everything here runs on the event loop, but for reading files.

An adapter keeps its slot while a request uses it. Where there is no free slot for another one, the adapter that was
wanted longest ago makes room: at once where none uses it; else it is lent to nobody from then on, and its slot is free
once the last request that has it is through. So nobody waits for ever, however much the others are wanted.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pefomed_ray.rendering.opening import AnyRenderer
from pefomed_ray.serving.contract import AdapterRef
from pefomed_ray.serving.engine.adapters import BASE_SLOT, AdapterSlots, AdapterWeights


@dataclass
class Held:
    """An adapter in memory."""

    slot: int
    renderer: AnyRenderer
    """Of the template that it was trained with."""
    users: int = 0
    """Requests that have it."""


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
        self._waiting: Counter[str] = Counter()
        """Requests for an adapter that is not there yet: it is not sent away before they have it."""
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._taking = asyncio.Lock()
        self._returned = asyncio.Event()
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
        self._waiting[ref.digest] += 1
        try:
            while ref.digest not in self._held:
                if ref.digest not in self._loading:
                    self._loading[ref.digest] = asyncio.create_task(self._load(ref))
                # Shielded: others wait for it too when this request is given up.
                await asyncio.shield(self._loading[ref.digest])
        finally:
            self._waiting[ref.digest] -= 1
        held = self._held.pop(ref.digest)
        self._held[ref.digest] = held
        held.users += 1
        return held

    def release(self, held: Held) -> None:
        """Give a lease back."""
        held.users -= 1
        self._returned.set()

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def _load(self, ref: AdapterRef) -> None:
        loop = asyncio.get_running_loop()
        try:
            weights, renderer = await loop.run_in_executor(self._reader, self._read, ref)
            async with self._taking:  # in the order of asking
                slot = await self._take()
            try:
                await loop.run_in_executor(self._reader, self._slots.fill, slot, weights)
            except BaseException:
                self._free.append(slot)
                raise
            self._held[ref.digest] = Held(slot, renderer)
        finally:
            del self._loading[ref.digest]

    async def _take(self) -> int:
        while not self._free:
            settled = [digest for digest in self._held if not self._waiting[digest]]
            if not settled:  # all have just come, and somebody is about to use them
                await asyncio.sleep(0)
                continue
            digest = next((digest for digest in settled if not self._held[digest].users), settled[0])
            leaving = self._held.pop(digest)
            while leaving.users:
                self._returned.clear()
                await self._returned.wait()
            self._free.append(leaving.slot)
        return self._free.pop()
