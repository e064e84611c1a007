"""Keys and values of a canvas, kept between forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.models.transformer_config import TransformerConfig


class KVCache:
    """Rotated keys and values of every layer for up to B rows of T positions, allocated once.

    ``keys`` and ``values`` are (layers, B, T + 1, kv_heads, head_dim). The slot behind the last position
    receives discarded values, so that windows of unequal size fit one shape. Attention never reads it.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int | None = None) -> None:
        """``rows``: how many of the B rows are in use, from the first on; None: all."""
        self.keys, self.values = keys, values
        self.rows = keys.shape[1] if rows is None else rows

    @classmethod
    def allocate(
        cls, config: TransformerConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """A cache of zeros, because slots not yet written must be finite."""
        shape = (config.num_layers, rows, length + 1, config.kv_heads, config.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def length(self) -> int:
        """T."""
        return self.keys.shape[2] - 1

    def alone(self, row: int, skip: int) -> KVCache:
        """A view of one row without its first ``skip`` positions, as a cache."""
        return KVCache(self.keys[:, row : row + 1, skip:], self.values[:, row : row + 1, skip:])

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions. The store at least doubles, so that growing costs little in all."""
        held = self.length
        for name in ("keys", "values") if length > held else ():
            old = getattr(self, name)
            new = old.new_zeros((*old.shape[:2], max(length, 2 * held) + 1, *old.shape[3:]))
            new[:, :, :held] = old[:, :, :held]
            setattr(self, name, new)

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Move rows ``keep`` (R,) to the front, in this order, and put ``fresh`` rows to be written behind them.

        Works in place, layer by layer. Raises ValueError if the rows do not fit.
        """
        kept = keep.shape[0]
        if kept + fresh > self.keys.shape[1]:
            raise ValueError(f"{kept} + {fresh} rows do not fit a cache of {self.keys.shape[1]}")
        for store in (self.keys, self.values):
            for layer in store:
                layer[:kept] = layer[keep]
        self.rows = kept + fresh


class KVWindow:
    """The rows and positions of a cache that one forward computes.

    ``rows`` (N,) int64, None: all rows in use. ``computed`` (N, W) int64 positions, the canvas's length for an empty
    place; None: all of the cache. ``limit``: queries see positions below it; None: all of the cache.

    On the CPU empty places cost nothing: :meth:`pack` leaves them out, so that only attention sees rectangles.
    """

    def __init__(
        self, cache: KVCache, computed: Tensor | None = None, rows: Tensor | None = None, limit: int | None = None
    ) -> None:
        self.cache, self.computed, self.rows = cache, computed, rows
        self.limit = cache.length if limit is None else limit
        index = torch.arange(cache.rows, device=cache.keys.device) if rows is None else rows
        self.index = index[:, None]
        self.slots = None if computed is None else computed.clamp_max(cache.length)
        self.packed: Tensor | None = None
        """(M,) int64: the places of all rows, flat, that are not empty; None: places are not packed."""
        if computed is not None and computed.device.type == "cpu":
            real = (computed < cache.length).flatten()
            if not bool(real.all()):
                self.packed = real.nonzero().flatten()
                self.index = self.index.expand_as(computed).flatten()[self.packed]
                self.slots = computed.flatten()[self.packed]

    def pack(self, x: Tensor) -> Tensor:
        """(N, W, ...) as (1, M, ...) without empty places; itself if places are not packed."""
        return x if self.packed is None else x.flatten(0, 1)[self.packed][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, M, ...) as (N, W, ...), zeros at empty places."""
        if self.packed is None or self.computed is None:
            return x
        out = x.new_zeros((self.computed.numel(), *x.shape[2:]))
        return out.index_copy_(0, self.packed, x[0]).view(*self.computed.shape, *x.shape[2:])

    def numbers(self, shape: torch.Size) -> Tensor:
        """(N, W) int64: the place of each computed position among all that are packed, counted through the rows."""
        if self.packed is None:
            return torch.arange(shape.numel(), device=self.index.device).view(shape)
        numbers = torch.zeros(shape.numel(), dtype=torch.int64)
        return numbers.index_copy_(0, self.packed, torch.arange(len(self.packed))).view(shape)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store packed ``keys`` and ``values`` (..., kv_heads, head_dim); returns what queries see, (N, limit, ...)."""
        return self._update(self.cache.keys[layer], keys), self._update(self.cache.values[layer], values)

    def _update(self, store: Tensor, new: Tensor) -> Tensor:
        if self.slots is None:
            if self.rows is None:
                store[: self.cache.rows, : self.cache.length] = new
            else:
                store[self.rows, : self.cache.length] = new
            return new
        store[self.index, self.slots] = new if self.packed is None else new[0]
        held = store[: self.cache.rows] if self.rows is None else store[self.rows]
        return held[:, : self.limit]
