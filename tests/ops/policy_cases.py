"""Random policy networks and inputs shared by the tests of ``policy_forward``."""

from __future__ import annotations

import math

import torch
from on_reference import truth
from torch import Tensor

from unmask.ops import PolicyWeights, policy_forward
from unmask.policies.config import PolicyConfig
from unmask.policies.network import PolicyNetwork


def random_network(hidden: int, heads: int, ffn: int, k: int, seed: int = 0, scale: float = 1.0) -> PolicyNetwork:
    """Every tensor is drawn, the adaptive layers included; ``scale`` multiplies all matrices."""
    generator = torch.Generator().manual_seed(seed)
    config = PolicyConfig(
        num_confidences=k, hidden_size=hidden, num_heads=heads, ffn_size=ffn, min_frequency=1.0, max_frequency=50.0
    )
    network = PolicyNetwork(config)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(std=0.5, generator=generator)
            if p.dim() == 2 and "mask_embedding" not in name:
                p.mul_(2 * scale / math.sqrt(p.shape[1]))
            if "ada" in name:
                p.mul_(0.3)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return network


def pack(network: PolicyNetwork, device: torch.device | str = "cpu") -> PolicyWeights:
    c = network.config
    packed = torch.cat([p.detach().reshape(-1) for p in network.kernel_parameters()]).to(device)
    return PolicyWeights(packed, c.hidden_size, c.num_heads, c.ffn_size, c.num_confidences)


def inputs(batch: int, length: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (B, L), descending confidences (B, L, k), time (B,)."""
    generator = torch.Generator().manual_seed(seed + 1000)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    confidence = torch.rand(batch, length, k, generator=generator).sort(-1, descending=True).values
    return mask, confidence.contiguous(), torch.rand(batch, generator=generator)


def worst_error(
    size: tuple[int, int, int], k: int, length: int, batch: int, device: torch.device | str = "cpu"
) -> float:
    """Largest difference from float64 of one random case, in which half the rows need a logit where ``k`` is even."""
    weights = pack(random_network(*size, k, seed=length))
    mask, confidence, time = inputs(batch, length, k)
    generator = torch.Generator().manual_seed(7)
    rows = torch.rand(batch, length, generator=generator) < 0.5 if k % 2 == 0 else None
    cond = torch.randn(batch, size[0], generator=generator) if length % 2 else None
    arguments = (mask, confidence, time, rows, cond)
    expected = truth(policy_forward, weights, *arguments)
    weights = weights._replace(packed=weights.packed.to(device))
    logits = policy_forward(weights, *(None if t is None else t.to(device) for t in arguments)).cpu()
    assert logits.dtype == torch.float32
    wanted = torch.ones_like(mask) if rows is None else rows
    assert (logits[~wanted] == -math.inf).all()
    assert batch * length < 20 or expected[wanted].std() > 0.01  # logits that differ, or the comparison says little
    error = (logits - expected)[wanted].abs()
    return error.max().item() if error.numel() else 0.0
