"""The policy network of "Learning Unmasking Policies for Diffusion Language Models" (arXiv 2512.09106).

One small transformer block reads, for every position of the generation buffer, whether it is still masked and how
confident the language model is there, and returns one logit per position: the higher, the more likely it
is unmasked now. This is the plain, differentiable module; :func:`unmask.ops.policy_forward` computes the same for
inference in one call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unmask.config import NonNegative, checked
from unmask.ops.reference.policy_forward import network, rotary_frequencies, sinusoidal_embedding
from unmask.ops.reference.select_set import rule_logit
from unmask.policies.config import PolicyConfig

# log1p(alpha) runs from 0 to about 2.5 in practice; these frequencies resolve steps of 0.05 in it.
ALPHA_FREQUENCIES = (0.25, 8.0)

_BLOCK_LAYERS = (
    "norm1", "ada_conditioning", "q_proj", "k_proj", "v_proj", "out_proj", "norm2", "linear1", "linear2",
)  # fmt: skip


def time_frequencies(config: PolicyConfig) -> Tensor:
    """(D/2,) float32: the frequencies of the time embedding."""
    count = config.hidden_size // 2
    if config.min_frequency is None or config.max_frequency is None:
        exponent = torch.arange(count, dtype=torch.float64) / count
        return torch.exp(-math.log(config.max_period) * exponent).float()
    return geometric_frequencies(config.min_frequency, config.max_frequency, count)


def geometric_frequencies(low: float, high: float, count: int) -> Tensor:
    """(count,) float32 from ``low`` to ``high`` in equal ratios."""
    exponent = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
    return (low * (high / low) ** exponent).float()


def _block(config: PolicyConfig) -> nn.ModuleDict:
    """The layers of one DiT block: attention and feed-forward, each scaled and shifted by the conditioning vector."""
    d, f = config.hidden_size, config.ffn_size
    sizes = {"ada_conditioning": (d, 6 * d), "linear1": (d, f), "linear2": (f, d)}
    layers = {n: nn.LayerNorm(d) if n.startswith("norm") else nn.Linear(*sizes.get(n, (d, d))) for n in _BLOCK_LAYERS}
    nn.init.zeros_(layers["ada_conditioning"].weight)
    nn.init.zeros_(layers["ada_conditioning"].bias)
    return nn.ModuleDict(layers)


class PolicyNetwork(nn.Module):
    """Per-position unmasking logits from mask, confidences and time.

    Parameter names are those of the published checkpoints (without their ``base_policy.`` prefix).
    """

    config_type = PolicyConfig
    model_type = "unmask-policy"
    frequencies: Tensor
    rotary: Tensor
    alpha_frequencies: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.time_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.mask_embedding = nn.Embedding(2, d)
        self.confidence_proj = nn.Linear(config.num_confidences, d)
        self.transformer_blocks = nn.ModuleList([_block(config)])
        self.final_norm = nn.LayerNorm(d)
        self.output_proj = nn.Linear(d, 1)
        nn.init.constant_(self.output_proj.bias, 0.0 if config.steepness else config.output_bias)
        if config.steepness:
            nn.init.zeros_(self.output_proj.weight)
        self.register_buffer("frequencies", time_frequencies(config), persistent=False)
        self.register_buffer("rotary", rotary_frequencies(config.head_dim), persistent=False)
        self.alpha_mlp: nn.Sequential | None = None
        if config.alpha_conditioned:
            last = nn.Linear(d, d)
            nn.init.zeros_(last.weight)  # starts as the policy without alpha
            nn.init.zeros_(last.bias)
            self.alpha_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), last)
            # A higher logit everywhere makes a policy faster. Through the block's scales and shifts alone,
            # reinforcement learning hardly finds that.
            self.alpha_shift = nn.Linear(d, 1, bias=False)
            nn.init.zeros_(self.alpha_shift.weight)
            self.register_buffer(
                "alpha_frequencies", geometric_frequencies(*ALPHA_FREQUENCIES, d // 2), persistent=False
            )

    def kernel_parameters(self) -> list[Tensor]:
        """The tensors of the op's packed weight buffer, in its order (see ``csrc/ops/policy_forward.h``)."""
        # This runs at every step of decoding, and the modules' attributes are slower than their dictionaries.
        top = self._modules
        time, block = top["time_mlp"]._modules, top["transformer_blocks"]._modules["0"]._modules  # type: ignore[union-attr]
        layers = [time["0"], time["2"], top["confidence_proj"]]
        layers += [block[name] for name in _BLOCK_LAYERS]
        layers += [top["final_norm"], top["output_proj"]]
        tensors = [self._buffers["frequencies"], top["mask_embedding"]._parameters["weight"]]  # type: ignore[union-attr]
        for layer in layers:
            parameters = layer._parameters  # type: ignore[union-attr]
            tensors += (parameters["weight"], parameters["bias"])
        return tensors  # type: ignore[return-value]

    def alpha_condition(self, batch: int, alpha: Tensor | float | None) -> tuple[Tensor, Tensor] | None:
        """What ``alpha`` (a number, or (B,)) adds to the conditioning (B, D) and to the logits (B, 1).

        None for an unconditioned policy. Raises ValueError if alpha is missing, or given to an unconditioned policy.
        """
        if self.alpha_mlp is None:
            if alpha is not None:
                raise ValueError("alpha was given, but this policy is not conditioned on it (alpha_conditioned=False)")
            return None
        if alpha is None:
            raise ValueError("this policy is conditioned on alpha: pass alpha, a number >= 0 or a tensor (B,)")
        weight = self.output_proj.weight
        if isinstance(alpha, Tensor):
            if alpha.shape not in ((), (batch,)):
                raise ValueError(f"alpha must be a number or have shape ({batch},), got {tuple(alpha.shape)}")
            alpha = alpha.to(weight).expand(batch)
        else:
            number = checked("alpha", alpha, NonNegative)
            alpha = torch.full((batch,), number, device=weight.device, dtype=weight.dtype)
        if self.config.trained_alphas is not None:
            alpha = alpha.clamp(*self.config.trained_alphas)
        embedding = sinusoidal_embedding(alpha.log1p(), self.alpha_frequencies)  # (B, D)
        return self.alpha_mlp(embedding), self.alpha_shift(embedding)

    def clock(self, mask: Tensor, time: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B,) floating: the time input, from ``time`` (B,) or the share of the ``valid`` positions not in ``mask``."""
        if self.config.zero_time:
            return torch.zeros_like(time)
        if self.config.time == "steps":
            return time
        seen = torch.ones_like(mask) if valid is None else valid
        return 1 - (mask & seen).sum(dim=1).float() / seen.sum(dim=1).clamp_min(1)

    def forward(
        self,
        mask: Tensor,
        confidence: Tensor,
        time: Tensor,
        alpha: Tensor | float | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L), in the parameters' dtype.

        The arguments are those of :meth:`unmask.policies.Policy.forward`, and ``valid`` (B, L) bool, the keys to attend
        to; None: all. Logits of other positions are undefined.
        Raises ValueError naming an argument whose shape or dtype does not fit.
        """
        self._check(mask, confidence, time)
        dtype = self.mask_embedding.weight.dtype
        extra = self.alpha_condition(mask.shape[0], alpha)
        time = self.clock(mask, time, valid)
        mask = torch.zeros_like(mask) if self.config.zero_mask else mask
        logits = network(
            self.kernel_parameters(),
            self.config.num_heads,
            mask,
            confidence.to(dtype),
            time.to(dtype),
            self.rotary,
            None if extra is None else extra[0],
            valid,
        )
        if self.config.steepness:
            logits = logits + self.rule_logits(confidence).to(logits)
        return logits if extra is None else logits + extra[1]

    def rule_logits(self, confidence: Tensor) -> Tensor:
        """(B, L) float32: what the rule that the network corrects says of ``confidence`` (B, L, k)."""
        return self.config.steepness * rule_logit(confidence[..., 0].float(), self.config.rule_threshold)

    def _check(self, mask: Tensor, confidence: Tensor, time: Tensor) -> None:
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool (B, L), got {mask.dtype} {tuple(mask.shape)}")
        expected = (*mask.shape, self.config.num_confidences)
        if confidence.shape != expected or not confidence.is_floating_point():
            raise ValueError(
                f"confidence must be floating (B, L, k) = {tuple(expected)}, got {confidence.dtype} "
                f"{tuple(confidence.shape)}"
            )
        if time.shape != mask.shape[:1] or not time.is_floating_point():
            raise ValueError(f"time must be floating (B,) = ({mask.shape[0]},), got {time.dtype} {tuple(time.shape)}")
