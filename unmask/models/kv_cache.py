"""Keys and values of a canvas, kept between forwards."""

from __future__ import annotations

import torch
from torch import Tensor


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
        cls,
        num_layers: int,
        rows: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """A cache of zeros, because slots not yet written must be finite."""
        shape = (num_layers, rows, length + 1, kv_heads, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def length(self) -> int:
        """T."""
        return self.keys.shape[2] - 1

    def alone(self, row: int, skip: int) -> KVCache:
        """A view of one row without its first ``skip`` positions, as a cache."""
        return KVCache(self.keys[:, row : row + 1, skip:], self.values[:, row : row + 1, skip:])

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
    """The rows and slots of a cache that one forward computes.

    ``rows`` (N,) int64, None: all rows in use. ``slots`` (N, W) int64 in [0, T], where T discards the value;
    None: all T positions, in order.
    """

    def __init__(self, cache: KVCache, rows: Tensor | None, slots: Tensor | None) -> None:
        self.cache, self.rows, self.slots = cache, rows, slots
        index = torch.arange(cache.rows, device=cache.keys.device) if rows is None else rows
        self.index = index[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``keys`` and ``values`` (N, W, kv_heads, head_dim); returns those of all T positions of the rows."""
        return self._update(self.cache.keys[layer], keys), self._update(self.cache.values[layer], values)

    def _update(self, store: Tensor, new: Tensor) -> Tensor:
        length = self.cache.length
        if self.slots is None:
            if self.rows is None:
                store[: self.cache.rows, :length] = new
            else:
                store[self.rows, :length] = new
            return new
        store[self.index, self.slots] = new
        held = store[: self.cache.rows] if self.rows is None else store[self.rows]
        return held[:, :length]
