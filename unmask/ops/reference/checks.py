"""What the ops in plain torch share; the messages of the checks are those of csrc/checks.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensors(sizes: dict[str, int], like: Tensor, **tensors: tuple[Tensor | None, torch.dtype, str]) -> None:
    """Raises TypeError for a wrong dtype, ValueError for a wrong shape or a device other than that of ``like``.

    A shape is given by one letter for each dimension. A letter stands for its entry in ``sizes``, which is made by the
    first tensor that has the letter.
    """
    for name, (tensor, dtype, letters) in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}".replace("torch.", ""))
        if tensor.ndim == len(letters):
            for letter, size in zip(letters, tensor.shape, strict=True):
                sizes.setdefault(letter, size)
        expected = _text([str(sizes.get(letter, letter)) for letter in letters])
        check(_text(list(tensor.shape)) == expected, name, f"shape {expected}", tuple(tensor.shape))
        check(tensor.device == like.device, name, f"device {like.device}", tensor.device)


def check_seed(seed: Tensor | None, drawing: bool, like: Tensor) -> None:
    """The same for the seed, which draws need."""
    if not drawing:
        return
    if seed is None:
        raise TypeError("seed: expected an int64 tensor for draws, got None")
    check_tensors({"1": 1}, like, seed=(seed, torch.int64, "1" if seed.ndim else ""))


def _text(shape: list[Any]) -> str:
    return str(tuple(shape)).replace("'", "")
