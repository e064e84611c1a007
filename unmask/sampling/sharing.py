"""Which rows of a batch the model has to see, where several are copies of one another, now or of an earlier step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.sampling.canvas import Canvas

Look = Callable[[Canvas], dict[str, Tensor]]
"""What a step's observation says of some rows' logits, by its fields (N, L, ...)."""


@dataclass
class Distinct:
    """Which rows of a canvas differ, where several are copies of one another before their first step."""

    rows: Tensor
    """(D,) int64: one row of each set of copies."""
    copy_of: Tensor
    """(N,) int64: for every row of the canvas, its index in ``rows``."""


def first_of_groups(before: int, fresh: int, group_size: int, device: torch.device) -> Distinct | None:
    """``before`` rows that all differ, then ``fresh`` rows in groups of copies; None if there are no copies."""
    if group_size == 1 or fresh == 0:
        return None
    groups = torch.arange(fresh, device=device) // group_size
    others = torch.arange(before, device=device)
    first = before + torch.arange(0, fresh, group_size, device=device)
    return Distinct(rows=torch.cat((others, first)), copy_of=torch.cat((others, before + groups)))


class SeenCanvases:
    """What the model said of the latest ``capacity`` canvases, so that rollouts which meet again share a forward.

    Rollouts of a prompt that unmask the same positions in a different number of steps come to the same canvas at
    different times. Reads the tokens on the host, so it is for the CPU.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._place: dict[bytes, int] = {}  # of each canvas in the store, the longest unused first
        self._store: dict[str, Tensor] = {}  # (capacity, L, ...) per field

    def recall(self, canvas: Canvas, look: Look) -> dict[str, Tensor]:
        """The same as ``look(canvas)``, which is asked only about rows not in the store, and once of equal ones.

        Raises ValueError if ``canvas`` has more rows than the store.
        """
        keys = row_keys(canvas)
        if len(keys) > self.capacity:
            raise ValueError(f"canvas: expected at most {self.capacity} rows, got {len(keys)}")
        fresh: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key in self._place:
                self._place[key] = self._place.pop(key)  # used last, so not dropped for what comes now
            else:
                fresh.setdefault(key, row)
        if fresh:
            self._keep(list(fresh), look(canvas.take(torch.tensor(list(fresh.values())))))
        places = torch.tensor([self._place[key] for key in keys])
        return {name: values[places] for name, values in self._store.items()}

    def _keep(self, keys: list[bytes], said: dict[str, Tensor]) -> None:
        """Store what was said of ``keys``, in place of what was not used for longest."""
        for key in keys:
            full = len(self._place) == self.capacity
            self._place[key] = self._place.pop(next(iter(self._place))) if full else len(self._place)
        places = torch.tensor([self._place[key] for key in keys])
        for name, values in said.items():
            if name not in self._store:
                self._store[name] = values.new_empty((self.capacity, *values.shape[1:]))
            self._store[name][places] = values


def row_keys(canvas: Canvas) -> list[bytes]:
    """For each row what the model's answer depends on: its tokens and padding, and whether it is done."""
    parts = [canvas.tokens, canvas.done[:, None]] + ([] if canvas.attention is None else [canvas.attention])
    return [row.tobytes() for row in torch.cat(parts, dim=1).numpy()]
