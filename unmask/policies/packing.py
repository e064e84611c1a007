"""Weights of a network as its op takes them: one float32 buffer that follows the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.ops.policy_forward import unsupported_sizes


def kernels_take(parameter: Tensor, hidden: int, heads: int, ffn: int, confidences: int = 1) -> bool:
    """Whether the op computes a network of these sizes, with parameters such as this one, on its device."""
    if unsupported_sizes(hidden, heads, ffn, confidences) is not None or parameter.dtype == torch.float64:
        return False  # the kernels compute in float32
    device = parameter.device.type
    return device == "cpu" or (device == "cuda" and bool(ops.build_info()["cuda"]))


class Packing:
    """Packs again only after a parameter changed, moved or was replaced.

    Where possible into the same memory, so that a captured graph reads the update. Changes through ``parameter.data``
    are not noticed; use ``torch.no_grad()`` instead. A copy of it is empty: a copied policy packs its own.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.key: list[tuple[int, int]] | None = None

    def __call__(self, parameters: Sequence[Tensor], tensors: Callable[[], Sequence[Tensor]]) -> Tensor:
        """1-D float32: ``tensors``, which are made from ``parameters``, flattened."""
        try:
            key = [(t.data_ptr(), t._version) for t in parameters]
        except RuntimeError:  # an inference tensor counts no versions
            key = None
        old = self.buffer
        if old is None or key is None or key != self.key:
            with torch.no_grad():
                packed = torch.cat([t.detach().reshape(-1).float() for t in tensors()])
                if (
                    old is not None
                    and not old.is_inference()
                    and (old.device, old.shape) == (packed.device, packed.shape)
                ):
                    packed = old.copy_(packed)
            self.buffer, self.key = packed, key
            return packed
        return old

    def __getstate__(self) -> dict[str, Any]:
        return {"buffer": None, "key": None}
