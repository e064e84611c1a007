"""GRPO for unmasking policies, as pure functions (arXiv 2512.09106; Shao et al., "DeepSeekMath", section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_SIGNAL = 1e-6
"""Advantages all below this carry no signal; the batch is skipped."""

MAX_LOG_RATIO = 50.0
"""Larger ratios may overflow, and infinity times an advantage of 0 is NaN."""


def group_advantages(rewards: Tensor, group_size: int, scale: bool = False) -> Tensor:
    """Rewards less their group's mean, (N,); with ``scale`` also divided by the group's deviation.

    ``rewards`` (N,) floating, groups one after the other. ``scale`` divides by the sample deviation (n - 1) + 1e-4 as
    trl does. The paper does not, because an almost always solved problem would count as much as a harder one.

    Raises ValueError for groups of one, or a group size that does not divide N.
    """
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}: one rollout has nothing to compare with")
    if rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.reshape(-1)


def relative_to_best(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (N,) divided by the largest absolute reward of their group; a group of zeros stays as it is."""
    groups = rewards.view(-1, group_size)
    largest = groups.abs().amax(dim=1, keepdim=True)
    return (groups / torch.where(largest > 0, largest, 1.0)).reshape(-1)


def mix_expert(logp: Tensor, num_policy: int, num_expert: int) -> Tensor:
    """Log-likelihood of expert actions under the behaviour ``G/(G+E) pi + 1/(G+E) delta``, of ``logp``'s shape.

    ``logp`` is the policy's; ``num_policy`` G and ``num_expert`` E count the rollouts of a group.
    """
    if num_policy < 1 or num_expert < 1:
        raise ValueError(f"num_policy and num_expert must be positive, got {num_policy} and {num_expert}")
    total = num_policy + num_expert
    return torch.logaddexp(logp + math.log(num_policy / total), logp.new_tensor(-math.log(total)))


def surrogate(logp: Tensor, logp_old: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """``min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)`` with ``r = exp(logp - logp_old)``, elementwise."""
    ratio = (logp - logp_old).clamp(max=MAX_LOG_RATIO).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def step_weights(rollout: Tensor, count: int) -> Tensor:
    """(M,) float64 weights of steps in the mean over rollouts of the mean over each rollout's steps.

    ``rollout`` (M,) int64 is the rollout of each step, ``count`` N; a rollout without a step counts as 0.
    """
    steps = torch.bincount(rollout, minlength=count)
    return 1.0 / (steps[rollout] * count).double()


def clipped_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, active: Tensor, epsilon: float) -> Tensor:
    """The loss: minus the mean over rollouts of the mean over active steps of :func:`surrogate`, a scalar.

    Args:
        logp: (N, T) log-likelihood of each step's whole action; not read where a step is not active.
        logp_old: (N, T) the same under the policy that acted; no gradient flows into it.
        advantages: (N,), shared by all steps of a rollout.
        active: (N, T) bool, steps in which some position was allowed. Floating: the weights of :func:`step_weights`;
            then all tensors are (M,), the steps of some rollouts one after the other.
        epsilon: clipping range, >= 0.

    Raises ValueError for shapes that do not fit, or a negative epsilon.
    """
    if logp_old.shape != logp.shape or active.shape != logp.shape:
        raise ValueError(
            f"logp {tuple(logp.shape)}, logp_old {tuple(logp_old.shape)} and active {tuple(active.shape)} must have "
            "one shape"
        )
    if advantages.shape != logp.shape[:1]:
        raise ValueError(f"advantages must have shape ({logp.shape[0]},), got {tuple(advantages.shape)}")
    if active.dtype != torch.bool and logp.dim() != 1:
        raise ValueError(f"active must be bool for logp (N, T), got {active.dtype}")
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    weights = active
    if active.dtype == torch.bool:
        weights = active.double() / (active.sum(dim=1, keepdim=True).clamp_min(1) * active.shape[0])
        logp, logp_old = torch.where(active, logp, 0.0), torch.where(active, logp_old, 0.0)
        advantages = advantages[:, None]
    return -(surrogate(logp, logp_old.detach(), advantages, epsilon) * weights.to(logp.dtype)).sum()
