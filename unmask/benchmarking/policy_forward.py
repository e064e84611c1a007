"""``policy_forward`` against the same network as an eager torch module."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.captured import library
from unmask.benchmarking.timing import Comparison
from unmask.policies.config import PolicyConfig
from unmask.policies.learned import Policy

LENGTH, BLOCK = 256, 32


def random_policy(device: torch.device) -> Policy:
    """The reference configuration with weights of order one everywhere, adaptive layers included."""
    torch.manual_seed(0)
    policy = Policy(PolicyConfig()).to(device).eval()
    with torch.no_grad():
        for p in policy.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return policy


def inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer whose second block is being filled: mask (B, L), confidence (B, L, 1), time (B,)."""
    mask = torch.zeros(batch, LENGTH, dtype=torch.bool, device=device)
    mask[:, BLOCK:] = True
    confidence = torch.rand(batch, LENGTH, 1, device=device)
    return mask, confidence, torch.full((batch,), 0.1, device=device)


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """Batch 1 and 16; logits needed in one block of 32, or everywhere."""
    policy, out = random_policy(device), []
    for batch in (1,) if quick else (1, 16):
        for selected, cpu_goal in ((BLOCK, 4.0), (LENGTH, 2.0)):
            goal: float | None = cpu_goal
            mask, confidence, time = inputs(batch, device)
            rows = torch.zeros_like(mask)
            rows[:, -selected:] = True

            @torch.no_grad()
            def ours(m: Tensor = mask, c: Tensor = confidence, t: Tensor = time, r: Tensor = rows) -> Tensor:
                return ops.policy_forward(policy.packed_weights(), m, c, t, rows=r)

            @torch.no_grad()
            def eager(m: Tensor = mask, c: Tensor = confidence, t: Tensor = time) -> Tensor:
                return policy(m, c, t)

            contenders = library(ours, device)

            def check(contenders=contenders, eager=eager, r: Tensor = rows) -> None:  # type: ignore[no-untyped-def]
                for call in contenders.values():
                    error = (call()[r] - eager()[r]).abs().max().item()
                    assert error < 1e-4, f"logits are off by {error}"

            if device.type == "cuda":
                goal = 20.0 if batch == 1 and selected == BLOCK else None
            out.append(
                Comparison(
                    "policy_forward",
                    f"batch {batch}, L = {LENGTH}, {selected} active",
                    {**contenders, "eager": eager},
                    check,
                    goal=goal,
                    # Feed-forward and scores of the active rows: what no algebra removes.
                    calls=1,
                    flops=batch * selected * (2 * 2 * 128 * 512 + 2 * 128 * LENGTH),
                )
            )
    return out
