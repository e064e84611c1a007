"""The checks of the ops in plain torch, with the messages of csrc/checks.h."""

from __future__ import annotations

import torch
from torch import Tensor


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises TypeError for another dtype, ValueError for another shape or a device other than that of ``like``."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}".replace("torch.", ""))
    check(tensor.shape == shape, name, f"shape {tuple(shape)}", tuple(tensor.shape))
    check(tensor.device == like.device, name, f"device {like.device}", tensor.device)


def check_seed(seed: Tensor | None, drawing: bool, like: Tensor) -> None:
    """The same for the seed, which draws need."""
    if drawing and seed is None:
        raise TypeError("seed: expected an int64 tensor for draws, got None")
    if drawing and seed is not None:
        check_tensor("seed", seed, torch.int64, () if seed.ndim == 0 else (1,), like)
