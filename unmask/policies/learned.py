"""The learned policy: the network of :mod:`unmask.policies.network` behind the policy interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.ops.reference.checks import wide_dtype
from unmask.ops.reference.policy_forward import network
from unmask.policies.base import Decision, Observation, tensor_addresses
from unmask.policies.config import PolicyConfig
from unmask.policies.network import PolicyNetwork
from unmask.policies.packing import Packing, kernels_take
from unmask.policies.pretrained import Pretrained


class Policy(PolicyNetwork, Pretrained):
    """A trainable unmasking policy (arXiv 2512.09106).

    ``policy(mask, confidence, time, alpha=None)`` returns differentiable logits (B, L); :meth:`decide` computes the
    same for a step of decoding with the fused op, without gradients.

    With ``context="block"`` the network runs on the active block alone: ``mask`` and ``confidence`` are cut to it, and
    positions of the rotary embedding count from the block's start, so a policy does not see which block it is in.
    """

    graph_safe = True
    dial = "shift"
    full_context = True  # a block policy, too, reads the confidences of positions already unmasked

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config or PolicyConfig())
        self.float()  # also where a program has set another default dtype for its model
        self.num_confidences, self.conditioned = self.config.num_confidences, self.config.alpha_conditioned
        self.default_alpha, self.marks_ends = self.config.default_alpha, self.config.marks_ends
        self._packing = Packing()

    @property
    def decoding(self) -> dict[str, Any]:
        return self.config.decoding()

    @property
    def reads(self) -> str:
        c = self.config
        many = f"{c.num_confidences} confidence{'s' * (c.num_confidences > 1)}"
        time = {"steps": "time", "share": "share committed"}[c.time] * (not c.zero_time)
        others = ("mask" * (not c.zero_mask), "ends" * c.marks_ends, time, "alpha" * self.conditioned)
        rule = f"; corrects threshold:{c.rule_threshold:g}" if c.steepness else ""
        where = "buffer" if c.context == "full" else "active block"
        return f"{', '.join(filter(None, (many, *others)))} of the {where}{rule}"

    def forward(
        self,
        mask: Tensor,
        confidence: Tensor,
        time: Tensor,
        alpha: Tensor | float | None = None,
        allowed: Tensor | None = None,
        block_length: int | None = None,
        phase: Tensor | None = None,
    ) -> Tensor:
        """Differentiable logits (B, L).

        A policy with ``context="block"`` takes ``mask`` and ``confidence`` for the block itself, unless ``allowed``
        (B, L) bool and ``block_length`` say which block of a longer buffer is active in each row; ``phase`` (B,) int64
        is where in a block the buffer begins, None: at its start. The logits outside
        of that block are then -inf. With ``context="full"`` these two have no effect.

        Args:
            mask: (B, L) bool, True where still masked.
            confidence: (B, L, k) floating, the k largest probabilities per position, descending.
            time: (B,) floating, steps taken divided by the length of the whole buffer; not read with ``time="share"``.
            alpha: a number >= 0 or (B,), if and only if the policy is conditioned on it.

        Raises ValueError for a wrong shape or dtype, a missing alpha, or an alpha for an unconditioned policy.
        """
        if self.config.context == "full" or allowed is None or block_length is None:
            return super().forward(mask, confidence, time, alpha)
        if phase is None and block_length >= mask.shape[1]:
            return super().forward(mask, confidence, time, alpha)
        block = _Block(allowed, block_length, phase)
        valid = block.inside if phase is not None or mask.shape[1] % block_length else None
        logits = super().forward(block.cut(mask), block.cut(confidence), time, alpha, valid)
        return block.spread(logits)

    @torch.no_grad()
    def decide(self, observation: Observation) -> Decision:
        """Logits (B, L) float32 of one step, -inf where nothing is allowed."""
        logits = self._logits(observation)
        return Decision(logits=logits if observation.shift is None else logits + observation.shift)

    def _logits(self, o: Observation) -> Tensor:
        if o.marks_ends != self.marks_ends:
            raise ValueError(f"the policy needs observation.marks_ends={self.marks_ends}, got {o.marks_ends}")
        condition = o.condition if o.condition is not None or o.alpha is None else self.condition(o.alpha)
        given, valid, block = (o.mask, o.drawn, o.allowed), None, None
        if self.config.context != "full" and (o.phase is not None or o.block_length < o.length):
            block = _Block(o.allowed, o.block_length, o.phase)
            given = (block.cut(o.mask), block.cut(o.drawn), block.cut(o.allowed))
            if o.phase is not None or o.length % o.block_length:
                valid = block.inside  # the keys outside of a shorter first or last block must be hidden
        logits = self._computed(*given, o.time, condition, valid)
        return logits if block is None else block.spread(logits)

    @torch.no_grad()
    def condition(self, alpha: Tensor) -> Tensor | None:
        """Both results of :meth:`alpha_condition` for ``alpha`` (U,), concatenated to (U, D + 1) float32."""
        condition = self.alpha_condition(alpha.shape[0], alpha)
        return None if condition is None else torch.cat(condition, dim=1).float()

    def _computed(
        self,
        mask: Tensor,
        confidence: Tensor,
        allowed: Tensor,
        time: Tensor,
        condition: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Logits (B, L) float32 of a buffer or block, -inf where not ``allowed``.

        The op does not know of ``valid`` keys. Plain torch computes in float64, as rounding to float32 hides that its
        sums depend on the batch's size.
        """
        time = self.clock(mask, time, valid)
        mask = torch.zeros_like(mask) if self.config.zero_mask else mask
        added = shift = None
        if condition is None:
            self.alpha_condition(mask.shape[0], None)  # raises if the policy is conditioned
        else:
            added, shift = condition.split((self.config.hidden_size, 1), dim=1)
        if valid is None and self._kernel_takes():
            logits = ops.policy_forward(self.packed_weights(), mask, confidence.float(), time, allowed, added)
        else:
            wide = wide_dtype(mask.device)
            weights = [weight.to(wide) for weight in self.kernel_parameters()]
            numbers = (
                confidence.to(wide),
                time.to(wide),
                self.rotary.to(wide),
                None if added is None else added.to(wide),
            )
            logits = network(weights, self.config.num_heads, mask, *numbers, valid).float()
            logits = logits.masked_fill(~allowed, float("-inf"))
        if self.config.steepness:
            logits = logits + self.rule_logits(confidence)
        return logits if shift is None else logits + shift

    def _kernel_takes(self) -> bool:
        c = self.config
        return kernels_take(self.mask_embedding.weight, c.hidden_size, c.num_heads, c.ffn_size, c.num_confidences)

    def captured_state(self) -> tuple[int, ...]:
        addresses = tensor_addresses(self)
        if not self._kernel_takes():
            return addresses
        return (*addresses, self.packed_weights().packed.data_ptr())

    def packed_weights(self) -> ops.PolicyWeights:
        """The current weights in the layout of :func:`unmask.ops.policy_forward`; see :class:`Packing`."""
        tensors, c = self.kernel_parameters(), self.config
        packed = self._packing(tensors, lambda: tensors)
        return ops.PolicyWeights(packed, c.hidden_size, c.num_heads, c.ffn_size, c.num_confidences)


class _Block:
    """The active block of each row of a buffer: that of the first ``allowed`` position (block 0 if there is none)."""

    def __init__(self, allowed: Tensor, block_length: int, phase: Tensor | None = None) -> None:
        length = allowed.shape[1]
        positions = torch.arange(length, device=allowed.device)
        first = torch.where(allowed, positions, length).amin(dim=1, keepdim=True) % length  # (B, 1)
        self.start = first - (first if phase is None else first + phase[:, None]) % block_length
        index = self.start + torch.arange(block_length, device=allowed.device)  # (B, BL)
        self.inside = (index >= 0) & (index < length)
        self.index = index.clamp(0, length - 1)
        self.back = positions - self.start  # (B, L) position within the block
        self.active = (self.back >= 0) & (self.back < block_length)

    def cut(self, values: Tensor) -> Tensor:
        """(B, L, ...) -> (B, BL, ...)."""
        rows = torch.arange(values.shape[0], device=values.device)[:, None]
        return values[rows, self.index]

    def spread(self, logits: Tensor) -> Tensor:
        """(B, BL) -> (B, L), -inf outside the block."""
        back = self.back.clamp(0, self.index.shape[1] - 1)
        return logits.gather(1, back).masked_fill(~self.active, float("-inf"))
