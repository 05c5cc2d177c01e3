"""Keys and values of the rows that are being answered, where rows come and go between steps.

All rows end at a common right edge, as left-padded prompts do, so that masks, sliding windows and positions are those
of an ordinary batch. A row that joins is copied to the left of the edge; a step writes one column for all; a row that
leaves is replaced by the last one. Nothing else is moved, but when the edge reaches the end of the buffers.

Whatever is no row's own is zero: attention multiplies what the mask hides by zero, and zero times what an adapter
beyond all bounds left behind would be NaN for whoever comes after it.

Letters: R rows there is room for, B rows that are there, H heads, W columns, D numbers a head, T tokens of a prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

FIRST_COLUMNS = 256


class _Window:
    """Which columns hold something; all layers share it."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Columns of each row, up to the edge."""
        self.edge = 0

    @property
    def start(self) -> int:
        """The first column that any row has."""
        return self.edge - max(self.lengths, default=0)


class _Layer(CacheLayerMixin):
    """One layer's buffers, as the library's attention asks for them."""

    is_sliding = False

    def __init__(self, window: _Window, keys_RHWD: Tensor, values_RHWD: Tensor) -> None:
        super().__init__()
        self.window = window
        self.keys, self.values = keys_RHWD, values_RHWD
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new column [B, H, 1, D]; all columns of the window with it."""
        rows, start, edge = len(key_states), self.window.start, self.window.edge
        self.keys[:rows, :, edge] = key_states[:, :, 0]
        self.values[:rows, :, edge] = value_states[:, :, 0]
        return self.keys[:rows, :, start : edge + 1], self.values[:rows, :, start : edge + 1]

    def get_seq_length(self) -> int:
        """Columns before the new one."""
        return self.window.edge - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None: the buffers grow."""
        return -1


class KVSlots:
    """Room for so many rows; `cache` is what a forward pass takes."""

    def __init__(self, rows: int) -> None:
        self._room = rows
        self._window = _Window()
        self.cache = Cache(layers=[])

    def __len__(self) -> int:
        return len(self._window.lengths)

    def join(self, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Take in the rows of a left-padded prefill, whose prompts have these lengths."""
        self._make_room(max(lengths), prefilled)
        edge, first = self._window.edge, len(self)
        for mine, theirs in zip(self.cache.layers, prefilled.layers, strict=True):
            for row, length in enumerate(lengths):
                mine.keys[first + row, :, edge - length : edge] = theirs.keys[row, :, -length:]
                mine.values[first + row, :, edge - length : edge] = theirs.values[row, :, -length:]
        self._window.lengths += lengths

    def leave(self, row: int) -> None:
        """Give a row's place to the last one."""
        last = len(self) - 1
        lengths, edge = self._window.lengths, self._window.edge
        begin, begin_last = edge - lengths[row], edge - lengths[last]
        for layer in self.cache.layers:
            for buffer_RHWD in (layer.keys, layer.values):
                if row != last:
                    buffer_RHWD[row, :, begin_last:edge] = buffer_RHWD[last, :, begin_last:edge]
                    buffer_RHWD[row, :, begin:begin_last] = 0
                buffer_RHWD[last, :, begin_last:edge] = 0
        lengths[row] = lengths[last]
        lengths.pop()

    def clear(self) -> None:
        """Forget all rows."""
        self._window.lengths.clear()

    def mask(self, device: torch.device) -> Tensor:
        """[B, W] which columns are a row's own, the new one included."""
        width = self._window.edge - self._window.start + 1
        starts_B = width - 1 - torch.tensor(self._window.lengths, device=device)
        return (torch.arange(width, device=device) >= starts_B[:, None]).long()

    def prepare(self) -> None:
        """Before a step: room for one column."""
        if self.cache.layers and self._window.edge == self.cache.layers[0].keys.shape[2]:
            self._move(self._window.edge - self._window.start)

    def advance(self) -> None:
        """After a step: its column counts."""
        self._window.edge += 1
        self._window.lengths = [length + 1 for length in self._window.lengths]

    def _make_room(self, columns: int, like: DynamicCache) -> None:
        if not self.cache.layers:
            self.cache.layers = [
                _Layer(self._window, *(self._buffer(t, FIRST_COLUMNS) for t in (layer.keys, layer.values)))
                for layer in like.layers
            ]
        if self._window.edge < columns or self._window.edge >= self.cache.layers[0].keys.shape[2]:
            self._move(max(columns, self._window.edge - self._window.start))

    def _move(self, edge: int) -> None:
        """Put the edge where the longest row begins with the buffers, into larger ones where half of these is not
        enough: so columns are moved seldom."""
        window, rows = self._window, len(self)
        held = window.edge - window.start
        columns = self.cache.layers[0].keys.shape[2]
        while columns < 2 * edge:
            columns *= 2
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                held_RHWD = old[:rows, :, window.start : window.edge].clone()
                moved = self._buffer(old, columns) if columns > old.shape[2] else old.zero_()
                moved[:rows, :, edge - held : edge] = held_RHWD
                setattr(layer, name, moved)
        window.edge = edge

    def _buffer(self, like: Tensor, columns: int) -> Tensor:
        return like.new_zeros(self._room, like.shape[1], columns, like.shape[3])
