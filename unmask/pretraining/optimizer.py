"""Muon for matrices: momentum, then the nearest orthogonal matrix as the update direction (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of the Muon reference: singular values end in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately orthogonalize a stack of matrices (N, rows, columns) by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for 2-d parameters only."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``dtype``: of the matrix products."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append((p, p.grad))
            for shape, params in by_shape.items():
                updates = []
                for p, grad in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(grad, 1 - group["momentum"])
                    updates.append(grad.lerp(buffer, group["momentum"]))
                # A wide matrix keeps its scale; a tall one is scaled so that its rows move as far.
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), update in zip(params, orthogonalize(torch.stack(updates).to(self.dtype)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def matrices_and_rest(layers: nn.Module, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of ``layers``, for Muon, and all other parameters of ``model``."""
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    return matrices, [p for p in model.parameters() if id(p) not in chosen]
