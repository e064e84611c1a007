"""Distributions over actions, given the policy's logits: which of the allowed positions are unmasked in a step.

Everything here is batched over leading dimensions and differentiable in the logits. Logits of positions that are not
allowed have no effect (they may be -inf or NaN). Results are in the dtype of the logits, at least float32. The sampler
draws with :func:`unmask.ops.unmask_`, which follows the same laws with keyed random numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.config import Config, Finite, NonNegative, Positive

_ABSENT = -1e30  # the logit of what cannot be drawn: finite, so that no gradient is inf - inf


class Bernoulli(Config):
    """Draws each allowed position by itself: ``u_i ~ Bernoulli(min(1, scale * sigmoid(logit_i / temperature)))``.

    The action is a bool tensor (..., L). It may be empty: a wasted step, which training allows. (arXiv 2512.09106)
    """

    temperature: Positive = 1.0
    scale: NonNegative = 1.0

    @torch.no_grad()
    def sample(
        self, logits: Tensor, allowed: Tensor, at_least_one: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw actions (..., L) bool for ``logits`` (..., L) and ``allowed`` (..., L) bool.

        With ``at_least_one`` the highest allowed logit (the first of equals) is unmasked where nothing was drawn;
        :meth:`log_prob` is of the draw without this. ``generator`` is on the device of the logits.
        """
        _check(logits, allowed)
        z = self._scaled(logits, allowed)
        uniform = torch.rand(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        action = (uniform < self.scale * torch.sigmoid(z)) & allowed
        if at_least_one and z.shape[-1]:
            best = F.one_hot(_first_argmax(torch.where(allowed, z, -torch.inf), allowed), z.shape[-1]).bool()
            action = torch.where(action.any(-1, keepdim=True), action, best & allowed)
        return action

    def log_prob(self, actions: Tensor, logits: Tensor, allowed: Tensor) -> Tensor:
        """Log-probability (...,) of whole ``actions`` (..., L) bool; -inf for one that unmasks what is not allowed.

        ``logits`` (..., L), ``allowed`` (..., L) bool; a row with nothing allowed has log-probability 0.
        """
        _check(logits, allowed)
        if actions.dtype != torch.bool or actions.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"actions must be bool with a last dimension of {logits.shape[-1]}, got {actions.dtype} "
                f"{tuple(actions.shape)}"
            )
        z = self._scaled(logits, allowed)
        if self.scale == 1.0:
            each = F.logsigmoid(torch.where(actions, z, -z))
        else:
            yes, no = self._log_probs(z)
            each = torch.where(actions, yes, no)
        total = torch.where(allowed, each, 0.0).sum(-1)
        return total.masked_fill((actions & ~allowed).any(-1), -torch.inf)

    def entropy(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Entropy (...,) in nats of the whole action."""
        _check(logits, allowed)
        z = self._scaled(logits, allowed).clamp(-80.0, 80.0)  # beyond, entropy and slope are 0 in float32
        if self.scale == 1.0:
            yes, no = F.logsigmoid(z), F.logsigmoid(-z)
        else:
            yes, no = (t.clamp_min(-1e4) for t in self._log_probs(z))
        each = -(yes.exp() * yes + no.exp() * no)
        return torch.where(allowed, each, 0.0).sum(-1)

    def divergence(self, logits: Tensor, other: Tensor, allowed: Tensor) -> Tensor:
        """KL divergence (...,) in nats of the whole action's distribution from that by the logits ``other`` (..., L).

        Raises ValueError with a ``scale`` other than 1.
        """
        _check(logits, allowed)
        _check(other, allowed)
        if self.scale != 1.0:
            raise ValueError(f"the divergence needs scale=1, got {self.scale}")
        z, r = (self._scaled(t, allowed) for t in (logits, other))
        each = torch.sigmoid(z) * (z - r) - F.softplus(z) + F.softplus(r)
        return torch.where(allowed, each, 0.0).sum(-1)

    def _scaled(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """logits / temperature in at least float32, with 0 where not allowed (where it must have no effect)."""
        return torch.where(allowed, _at_least_float32(logits), 0.0) / self.temperature

    def _log_probs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log(1 - p) for p = min(1, scale * sigmoid(z))."""
        if self.scale == 0.0:
            return torch.full_like(z, -torch.inf), torch.zeros_like(z)
        log_p = F.logsigmoid(z) + math.log(self.scale)
        certain = log_p >= 0
        below = torch.where(certain, -1.0, log_p)  # keeps the gradient of the branch not taken finite
        # log(1 - e^x) has a form without cancellation on each side of -log 2; -0.1 and -1 replace values of the other.
        near = below > -math.log(2.0)
        no = torch.where(
            near,
            torch.log(-torch.expm1(torch.where(near, below, -0.1))),
            torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
        )
        return torch.where(certain, 0.0, log_p), torch.where(certain, -torch.inf, no)


class DPLS(Config):
    """Dynamic Plackett-Luce with STOP: draws positions one by one without replacement, until STOP is drawn.

    The first position is drawn by a softmax over the allowed logits; each further draw is by a softmax over the logits
    of the allowed positions left and ``stop_logit``. Once none is left, STOP is certain. The action is the ordered
    index tensor (..., L) int64, padded with -1. (arXiv 2512.09106)
    """

    stop_logit: Finite = 0.0
    temperature: Positive = 1.0
    """Divides the logits, not ``stop_logit``."""

    @torch.no_grad()
    def sample(self, logits: Tensor, allowed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions (..., L) int64: at least one position where any is allowed, none elsewhere.

        ``logits`` (..., L), ``allowed`` (..., L) bool; ``generator`` is on their device.
        """
        _check(logits, allowed)
        u = torch.where(allowed, logits.double() / self.temperature, _ABSENT)
        if u.shape[-1] == 0:
            return torch.empty(u.shape, dtype=torch.int64, device=u.device)
        # Position i arrives at time E_i exp(-u_i) with E_i exponential. The order of arrivals is that of the draws.
        # STOP arrives after the first position, by an exponential time of rate exp(stop_logit).
        arrival = _log_exponential(u.shape, u, generator) - u
        arrival, order = arrival.sort(dim=-1)
        stop = _log_exponential((*u.shape[:-1], 1), u, generator) - self.stop_logit
        drawn = arrival < torch.logaddexp(arrival[..., :1], stop)
        drawn[..., 0] = True  # rounding may have made both times equal
        return order.masked_fill(~(drawn & allowed.gather(-1, order)), -1)

    def log_prob(self, actions: Tensor, logits: Tensor, allowed: Tensor) -> Tensor:
        """Log-probability (...,) of ordered actions, STOP included, in O(L) memory.

        -inf for an action that cannot be drawn: a position not allowed or twice, or none although some are allowed.
        ``actions`` (..., M) int64 with M <= L, padded with -1; ``logits`` and ``allowed`` (..., L). A row with nothing
        allowed has log-probability 0 for the empty action.
        """
        _check(logits, allowed)
        length = logits.shape[-1]
        if actions.dtype != torch.int64 or actions.shape[-1] > length:
            raise ValueError(
                f"actions must be int64 with a last dimension of at most {length}, got {actions.dtype} "
                f"{tuple(actions.shape)}"
            )
        u = torch.where(allowed, _at_least_float32(logits) / self.temperature, _ABSENT)
        batch = torch.broadcast_shapes(actions.shape[:-1], u.shape[:-1])
        u, allowed = u.expand(*batch, length), allowed.expand(*batch, length)
        actions = actions.expand(*batch, actions.shape[-1])
        if length == 0:
            return u.sum(-1)
        chosen = actions >= 0
        index = actions.clamp(0, length - 1)
        picked = torch.where(chosen, u.gather(-1, index), _ABSENT)  # (..., M)
        times = torch.zeros_like(u).scatter_add(-1, index, chosen.to(u.dtype))  # how often each position is chosen
        left = allowed & (times == 0)
        # Denominators, back to front: first STOP and what is never drawn, then one more chosen position at a time.
        never = torch.logaddexp(
            torch.logsumexp(torch.where(left, u, _ABSENT), dim=-1), u.new_tensor(self.stop_logit)
        )  # (...,)
        backwards = torch.cat((never[..., None], picked.flip(-1)), dim=-1)
        denominators = torch.logcumsumexp(backwards, dim=-1)[..., 1:].flip(-1)  # (..., M): at each draw
        first = chosen & (chosen.long().cumsum(-1) == 1)
        without_stop = torch.logsumexp(u, dim=-1, keepdim=True)
        draws = torch.where(chosen, picked - torch.where(first, without_stop, denominators), 0.0).sum(-1)
        total = draws + torch.where(left.any(-1), self.stop_logit - never, 0.0)

        impossible = (times > allowed.to(times.dtype)).any(-1) | (actions >= length).any(-1)
        some = allowed.any(-1)
        total = torch.where(some, total, 0.0)
        return total.masked_fill(impossible | (some & ~chosen.any(-1)), -torch.inf)


def _check(logits: Tensor, allowed: Tensor) -> None:
    if not logits.is_floating_point() or logits.dim() < 1:
        raise ValueError(f"logits must be floating with shape (..., L), got {logits.dtype} {tuple(logits.shape)}")
    if allowed.dtype != torch.bool or allowed.shape[-1:] != logits.shape[-1:]:
        raise ValueError(
            f"allowed must be bool with a last dimension of {logits.shape[-1]}, got {allowed.dtype} "
            f"{tuple(allowed.shape)}"
        )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _first_argmax(values: Tensor, allowed: Tensor) -> Tensor:
    """Index of the largest allowed value; the first allowed where none exceeds the others (all NaN or -inf)."""
    values = torch.where(values.isnan(), -torch.inf, values)
    best = values.amax(-1, keepdim=True)
    return ((values == best) & allowed).to(torch.uint8).argmax(-1)


def _log_exponential(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Logarithms of standard exponential draws, float64 on the device of ``like``."""
    draw = torch.empty(shape, dtype=torch.float64, device=like.device).exponential_(generator=generator)
    return draw.clamp_min(torch.finfo(torch.float64).tiny).log()
