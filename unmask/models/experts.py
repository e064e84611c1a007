"""Mixtures of experts: a router sends each token to a few of many SwiGLU networks, whose outputs are weighed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.config import Config, Count, Positive, PositiveInt, require


class MixtureConfig(Config, kw_only=True):
    """The experts of some layers, under the names that checkpoints use.

    A token's score of an expert is the ``router`` function of its logits. With ``expert_bias``, a stored bias is added
    for the choice alone. Of ``n_group`` groups of experts, the ``topk_group`` with the largest sums of their two best
    scores are kept, and of their experts the best ``num_experts_per_tok``. Outputs are weighed by the scores, divided
    by their sum with ``norm_topk_prob``, times ``routed_scaling_factor``.
    """

    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    sparse_layers: tuple[Count, ...]
    """The layers that have experts; others have one SwiGLU of the decoder's ``intermediate_size``."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    routed_scaling_factor: Positive = 1.0
    expert_bias: bool = False
    shared_intermediate_size: Count = 0
    """Width of a SwiGLU that every token passes beside its experts; 0: there is none."""

    def __post_init__(self) -> None:
        experts, groups, kept = self.num_experts, self.n_group, self.topk_group
        require(experts % groups == 0, f"num_experts must be a multiple of n_group={groups}, got {experts}")
        require(groups == 1 or experts > groups, f"n_group must leave two experts to a group, got {groups}")
        require(kept <= groups, f"topk_group must be at most n_group={groups}, got {kept}")
        most = experts // groups * kept
        fits = self.num_experts_per_tok <= most
        require(fits, f"num_experts_per_tok must be at most {most}, got {self.num_experts_per_tok}")


class Router(nn.Module):
    """Chooses and weighs experts, in float32 at least."""

    expert_bias: nn.Parameter | None

    def __init__(self, width: int, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = expert_weights(config.num_experts, width)
        bias = nn.Parameter(torch.zeros(config.num_experts)) if config.expert_bias else None
        self.register_parameter("expert_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # The bias follows .to(device), but rounding it by .to(dtype) would choose other experts.
        kept = None if self.expert_bias is None else self.expert_bias.detach()
        super()._apply(fn, recurse)
        if kept is not None and self.expert_bias is not None and self.expert_bias.dtype.itemsize < 4:
            bias = torch.empty_like(self.expert_bias, dtype=torch.float32)
            bias = bias if kept.is_meta else bias.copy_(kept)
            self.expert_bias = nn.Parameter(bias, requires_grad=self.expert_bias.requires_grad)
        return self

    def logits(self, x: Tensor) -> Tensor:
        """(N, experts) for tokens ``x`` (N, width)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(exact), self.weight.to(exact))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts (N, k) int64 of tokens ``x`` (N, width), and their weights (N, k)."""
        c, logits = self.config, self.logits(x)
        scores = logits.softmax(dim=-1) if c.router == "softmax" else logits.sigmoid()
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        if c.topk_group < c.n_group:
            best = choice.unflatten(-1, (c.n_group, -1)).topk(2, dim=-1).values.sum(dim=-1)
            kept = best.topk(c.topk_group, dim=-1).indices
            dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
            choice = choice.masked_fill(dropped.repeat_interleave(c.num_experts // c.n_group, dim=-1), -math.inf)
        experts = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Mixture(nn.Module):
    """The feed-forward part of a sparse layer. Experts are stacked to (experts, out, in)."""

    gate_proj: nn.Parameter | nn.ParameterList
    up_proj: nn.Parameter | nn.ParameterList
    down_proj: nn.Parameter | nn.ParameterList

    def __init__(self, width: int, config: MixtureConfig) -> None:
        super().__init__()
        experts, inner = config.num_experts, config.moe_intermediate_size
        self.router = Router(width, config)
        self.gate_proj, self.up_proj = (expert_weights(experts, inner, width) for _ in range(2))
        self.down_proj = expert_weights(experts, width, inner)
        shared = config.shared_intermediate_size
        self.shared = SwiGLU(width, shared) if shared else None

    @property
    def grouped(self) -> bool:
        """Whether a forward takes the grouped product, which never waits for the host."""
        stacks = (self.gate_proj, self.down_proj)
        return all(isinstance(w, Tensor) and has_grouped_product(w.dtype, w.device, w.shape) for w in stacks)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., width). All tokens of an expert are computed at once, in its order of tokens."""
        tokens = x.flatten(0, -2)
        experts, weights = self.router(tokens)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        numbers = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(chosen[order], numbers, right=True).to(torch.int32)
        sent = tokens[order // experts.shape[1]]
        inner = F.silu(grouped_linear(sent, self.gate_proj, ends)) * grouped_linear(sent, self.up_proj, ends)
        sent = grouped_linear(inner, self.down_proj, ends)
        back = torch.empty_like(sent).index_copy(0, order, sent).unflatten(0, experts.shape)
        out = (back * weights[..., None]).sum(dim=1).to(x.dtype).view(x.shape)
        return out if self.shared is None else out + self.shared(x)


def expert_weights(*shape: int) -> nn.Parameter:
    """A parameter initialised as ``nn.Linear`` does."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def grouped_linear(x: Tensor, weight: Tensor | nn.ParameterList, ends: Tensor) -> Tensor:
    """Rows of ``x`` (N, in), sorted by group, times their group's ``weight`` (groups, out, in)^T: (N, out).

    ``ends`` (groups,) int32 are where groups end. Quantised weights are a list of matrices. Without a grouped
    product the sizes of groups are read on the host.
    """
    if isinstance(weight, Tensor) and has_grouped_product(x.dtype, x.device, weight.shape):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = [F.linear(part, weight[i]) for i, part in enumerate(x.split(sizes)) if len(part)]
    return torch.cat(parts) if parts else x.new_empty(0, weight[0].shape[0])


def has_grouped_product(dtype: torch.dtype, device: torch.device, shape: Any) -> bool:
    """Whether torch multiplies groups at once: in bfloat16, with rows of a multiple of 16 bytes, from SM 80 on."""
    if dtype != torch.bfloat16 or any(size % 8 for size in shape[1:]) or device.type not in ("cpu", "cuda", "meta"):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
