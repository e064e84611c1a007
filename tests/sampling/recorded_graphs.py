"""A stand-in for CUDA graphs that runs anywhere: operations are recorded, then repeated on the same memory.

As in a real capture, nothing is computed while recording, every number that Python held is baked in, results land in
the same tensors each time, and whatever would have to wait for a device is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Records the operations of its body and undoes what they write to memory from outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.own: list[Tensor] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        boolean = func is torch.ops.aten.index.Tensor and any(t.dtype == torch.bool for t in tensors(args[1]))
        if func in WAITS or boolean:
            raise RuntimeError(f"{func} waits for the device")
        mine = {storage(t) for t in self.own}
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(given.get(argument.name)):
                    if storage(t) not in mine and storage(t) not in self.before:
                        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                        self.before[storage(t)] = (whole, whole.clone())
        out = func(*args, **kwargs)
        aliased = {storage(t) for t in tensors((args, kwargs))}
        self.own += [t for t in tensors(out) if storage(t) not in aliased]
        self.calls.append((func, args, kwargs, [t if storage(t) not in aliased else None for t in tensors(out)]))
        return out

    def undo(self) -> None:
        for now, before in self.before.values():
            now.copy_(before)

    def repeat(self) -> None:
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


class RecordedCapture:
    """What :class:`unmask.sampling.graphs.CudaCapture` is on a GPU; it counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        recording = Recording()
        try:
            with recording:
                output = run()
        finally:
            recording.undo()

        def replay() -> None:
            self.replays += 1
            recording.repeat()

        return replay, output
