"""The policy's update: replay recorded steps through the policy and optimise the clipped objective."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.policies.distributions import DPLS, Bernoulli
from unmask.policies.learned import Policy
from unmask.training.config import TrainerConfig
from unmask.training.grpo import clipped_loss, mix_expert, step_weights
from unmask.training.rollout import Rollouts, Samples


def parameter_groups(policy: Policy, alpha_scale: float) -> list[dict[str, Any]]:
    """The policy's parameters for an optimizer, each group with the "scale" of its learning rate."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in policy.named_parameters():
        groups[name.startswith("alpha_")].append(parameter)
    return [{"params": p, "scale": alpha_scale if of_alpha else 1.0} for of_alpha, p in groups.items() if p]


def ordered_actions(samples: Samples) -> Tensor:
    """(M, L) int64: unmasked positions in their order, padded with -1; an expert's by confidence, highest first."""
    # Ranks differ by 1 or, for an expert, not at all; a third of a confidence breaks only those ties. A sign is a mark.
    key = samples.rank.double() - samples.confidence[..., 0].double().abs() / 3
    order = torch.where(samples.rank >= 0, key, torch.inf).argsort(dim=1, stable=True)
    count = (samples.rank >= 0).sum(dim=1, keepdim=True)
    return torch.where(torch.arange(order.shape[1], device=order.device) < count, order, -1)


def pick_steps(rollout: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """(M,) bool: at most ``most`` steps of each rollout, chosen uniformly, so that means over its steps stay unbiased.

    ``rollout`` (M,) int64 is the rollout of each step; ``generator`` is on the CPU.
    """
    count = rollout.shape[0]
    draw = torch.rand(count, generator=generator, dtype=torch.float64).to(rollout.device)
    order = draw.argsort()
    order = order[rollout[order].argsort(stable=True)]  # by rollout, in random order within
    owner = rollout[order]
    first = torch.searchsorted(owner, owner)  # where each step's rollout begins
    place = torch.arange(count, device=rollout.device) - first
    picked = torch.zeros(count, dtype=torch.bool, device=rollout.device)
    picked[order] = place < most
    return picked


@dataclass
class UpdateStatistics:
    """Averages over the replayed steps and the passes; the last three are of the first pass."""

    loss: float
    grad_norm: float
    clip_ratio: float
    """Share of steps whose likelihood ratio left the clipping range."""
    unmask_probability: float
    """Mean of sigmoid(logit / tau) over the allowed positions of the policy's own steps."""
    entropy: float
    """Nats per allowed position of the policy's own steps (Bernoulli; 0 for DPLS)."""
    kl: float
    """Nats per step from the policy that the run began with; 0 if nothing is asked of it."""


class Learner:
    """Optimises a policy on rollouts, a bounded number of steps at a time."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        average: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> None:
        """``average`` averages a tensor over all processes."""
        self.policy, self.optimizer, self.config, self.average = policy, optimizer, config, average
        self.reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coef else None
        self.distribution: Bernoulli | DPLS
        self.distribution = (DPLS if config.actions == "dpls" else Bernoulli)(temperature=config.policy_temperature)

    def update(self, rollouts: Rollouts, advantages: Tensor, samples: Samples) -> UpdateStatistics:
        """Take ``num_iterations`` optimizer steps on ``samples``, some or all steps of ``rollouts``.

        Each rollout weighs the same, and so does each of its steps in ``samples``; ``advantages`` (N,).
        Raises FloatingPointError for a loss, gradient or weight that is not finite.
        """
        c = self.config
        weight = step_weights(samples.rollout, advantages.shape[0])
        old: list[Tensor] = []
        totals: dict[str, float] = {}
        for number in range(c.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            for i, index in enumerate(self._chunks(samples)):
                part = samples.take(index).cut()
                logp, logits = self._log_prob(part, rollouts)
                if c.expert_rollouts:  # an expert's steps count as drawn from a mixture with the policy
                    mixed = mix_expert(logp, c.num_generations, c.expert_rollouts)
                    logp = torch.where(rollouts.expert[part.rollout], mixed, logp)
                if number == 0:  # the policy that acted is the one before the first pass
                    old.append(logp.detach())
                    self._describe(part, rollouts, logits.detach(), totals)
                loss = clipped_loss(logp, old[i], advantages[part.rollout], weight[index], c.epsilon)
                if self.reference is not None:
                    kl = (self._divergence(part, rollouts, logits) * weight[index].to(logits.dtype)).sum()
                    loss = loss + c.kl_coef * kl
                    _add(totals, kl=kl.item() * (number == 0))
                loss.backward()
                ratio = (logp.detach() - old[i]).exp()
                _add(totals, loss=loss.item(), clipped=((ratio - 1).abs() > c.epsilon).sum().item())
            _add(totals, norm=self._step(totals.get("loss", 0.0)))
        steps = max(1, samples.rollout.shape[0]) * c.num_iterations
        positions = max(1.0, totals.get("positions", 0.0))
        return UpdateStatistics(
            loss=totals.get("loss", 0.0) / c.num_iterations,
            grad_norm=totals["norm"] / c.num_iterations,
            clip_ratio=totals.get("clipped", 0.0) / steps,
            unmask_probability=totals.get("probability", 0.0) / positions,
            entropy=totals.get("entropy", 0.0) / positions,
            kl=totals.get("kl", 0.0),
        )

    def imitate(self, rollouts: Rollouts, worth: Tensor, samples: Samples) -> dict[str, float]:
        """Take one optimizer step towards the actions of ``rollouts``, weighted by their ``worth`` (N,), >= 0.

        The loss is the mean over rollouts of the mean over their steps of minus the action's log-likelihood.
        Raises FloatingPointError for a loss, gradient or weight that is not finite.
        """
        weight = worth[samples.rollout] * step_weights(samples.rollout, worth.shape[0])  # (M,)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index in self._chunks(samples):
            logp, _ = self._log_prob(samples.take(index).cut(), rollouts)
            loss = -(logp * weight[index].to(logp.dtype)).sum()
            loss.backward()
            total += loss.item()
        return {"imitation_loss": total, "grad_norm": self._step(total)}

    @torch.no_grad()
    def check_logits(self, rollouts: Rollouts, samples: Samples) -> None:
        """Raise FloatingPointError if the policy's logits for a first chunk of ``samples`` are not finite.

        Rollouts of such a policy unmask nothing, which looks like a round without a signal.
        """
        for index in self._chunks(samples):
            part = samples.take(index).cut()
            _, logits = self._log_prob(part, rollouts)
            _require_finite("the policy's logits", float(logits[part.allowed].abs().max()))
            return

    def _chunks(self, samples: Samples) -> Iterator[Tensor]:
        for group in samples.alike():
            yield from group.split(self.config.replay_chunk_size) if len(group) else ()

    def _log_prob(self, part: Samples, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Differentiable log-likelihoods (M,) float32 of whole actions, and the logits (M, L) they come from."""
        logits = self._logits(self.policy, part, rollouts)
        actions = ordered_actions(part) if isinstance(self.distribution, DPLS) else part.rank >= 0
        return self.distribution.log_prob(actions, logits, part.allowed), logits

    def _logits(self, policy: Policy, part: Samples, rollouts: Rollouts) -> Tensor:
        alpha = rollouts.alpha[part.rollout] if policy.conditioned else None
        where = (part.allowed, rollouts.block_length, part.phase)
        logits: Tensor = policy(part.mask, part.confidence, part.time, alpha, *where).float()
        return logits

    def _divergence(self, part: Samples, rollouts: Rollouts, logits: Tensor) -> Tensor:
        """(M,): KL divergence in nats of each step's actions from those of the policy that the run began with."""
        assert isinstance(self.distribution, Bernoulli)
        assert self.reference is not None
        with torch.no_grad():
            other = self._logits(self.reference, part, rollouts)
        return self.distribution.divergence(logits, other, part.allowed)

    def _describe(self, part: Samples, rollouts: Rollouts, logits: Tensor, totals: dict[str, float]) -> None:
        allowed = part.allowed & ~rollouts.expert[part.rollout, None]
        probability = torch.where(allowed, (logits / self.distribution.temperature).sigmoid(), 0.0).sum().item()
        _add(totals, positions=allowed.sum().item(), probability=probability)
        if isinstance(self.distribution, Bernoulli):
            _add(totals, entropy=self.distribution.entropy(logits, allowed).sum().item())

    def _step(self, loss: float) -> float:
        """Average the gradient over the processes, clip it and step; returns its norm before clipping."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:  # no rollout here had a step to learn from
                p.grad = torch.zeros_like(p)
        flat = self.average(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf).item()
        _require_finite("the loss", loss)
        _require_finite("the gradient's norm", norm)
        self.optimizer.step()
        _require_finite("the norm of the policy's weights", float(nn.utils.get_total_norm(parameters)))
        return norm


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} became {value}: training has diverged, and stops before it writes anything worse than its last "
            "checkpoint. Begin anew with a lower learning_rate, with init_policy=CHECKPOINT/policy to keep what was "
            "learned"
        )


def _add(totals: dict[str, float], **values: float) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value
