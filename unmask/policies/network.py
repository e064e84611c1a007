"""The policy network of "Learning Unmasking Policies for Diffusion Language Models" (arXiv 2512.09106).

One small transformer block reads, for every position of the generation buffer, whether it is still masked and how
confident the language model is there, and returns one logit per position: how much that position wants to be
unmasked now. This is the plain, differentiable module; :func:`unmask.ops.policy_forward` computes the same for
inference in one call.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
# log1p(alpha) runs from 0 to about 2.5 over the trade-offs in use; these periods tell apart steps of 0.05 in it.
ALPHA_FREQUENCIES = (0.25, 8.0)

ACTIONS_IN_USE = {"bernoulli": "bernoulli-argmax", "dpls": "dpls"}
"""How a policy's actions are drawn in training, and how they are then drawn in use, where no step may be wasted."""

_BLOCK_LAYERS = (
    "norm1", "ada_conditioning", "q_proj", "k_proj", "v_proj", "out_proj", "norm2", "linear1", "linear2",
)  # fmt: skip

NUMBERS = ("max_period", "min_frequency", "max_frequency", "default_alpha", "trained_temperature", "output_bias")
"""Fields of a configuration that are numbers, some of them optional."""


@dataclass(frozen=True)
class PolicyConfig:
    """Shape and behaviour of a policy network; the defaults are the published configuration.

    Time frequencies: the published network uses ``f_i = exp(-ln(max_period) * i / (D/2))`` with ``max_period`` 1, so
    every f_i is 1. With ``min_frequency`` and ``max_frequency`` (both or neither) the D/2 frequencies are spaced
    geometrically between the two instead; 1 to 50 resolves single steps of a 256-step generation.

    Raises:
        ValueError: a size, frequency or name is out of range (the message names the field).
    """

    num_confidences: int = 1
    """k: how many of the largest probabilities per position are read."""
    hidden_size: int = 128
    num_heads: int = 2
    ffn_size: int = 512
    max_period: float = 1.0
    min_frequency: float | None = None
    max_frequency: float | None = None
    output_bias: float = -2.0
    """Initial bias of the output: sigmoid(-2) = 0.12, so an untrained policy starts slowly."""
    context: str = "full"
    """"full": sees the whole generation buffer; "block": only the active block."""
    alpha_conditioned: bool = False
    """Takes the speed/accuracy trade-off alpha as a further input."""
    default_alpha: float = 1.0
    """The alpha that a policy conditioned on it takes when none is asked for."""
    trained_alphas: tuple[float, float] | None = None
    """Least and largest alpha of training; whoever asks for less or more gets these. None: any alpha as it is."""
    trained_block_length: int | None = None
    """Tokens per block in training, 0 for full diffusion; a Sampler without a configuration of its own decodes so."""
    trained_temperature: float | None = None
    """tau in training, by which logits are divided; likewise."""
    trained_actions: str | None = None
    """How actions were drawn in training, "bernoulli" or "dpls"; likewise, with at least one position per step."""
    zero_time: bool = False
    """Ablation: the time input is always 0."""
    zero_mask: bool = False
    """Ablation: the mask input is always 0."""

    def __post_init__(self) -> None:
        for name in ("num_confidences", "hidden_size", "num_heads", "ffn_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("alpha_conditioned", "zero_time", "zero_mask"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in NUMBERS:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and not (value is None and getattr(type(self), name) is None):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads ({2 * self.num_heads}): "
                "rotary embedding needs an even head size"
            )
        if self.context not in ("full", "block"):
            raise ValueError(f'context must be "full" or "block", got {self.context!r}')
        if (self.min_frequency is None) != (self.max_frequency is None):
            raise ValueError("min_frequency and max_frequency are given together or not at all")
        for name in ("max_period", "min_frequency", "max_frequency"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if not (math.isfinite(self.default_alpha) and self.default_alpha >= 0):
            raise ValueError(f"default_alpha must be finite and >= 0, got {self.default_alpha!r}")
        self._check_trained_alphas()
        trained = self.trained_block_length
        if trained is not None and (isinstance(trained, bool) or not isinstance(trained, int) or trained < 0):
            raise ValueError(f"trained_block_length must be an integer >= 0, got {trained!r}")
        if self.trained_temperature is not None and not (
            math.isfinite(self.trained_temperature) and self.trained_temperature > 0
        ):
            raise ValueError(f"trained_temperature must be positive and finite, got {self.trained_temperature!r}")
        if self.trained_actions is not None and self.trained_actions not in ACTIONS_IN_USE:
            raise ValueError(
                f"trained_actions must be one of {', '.join(ACTIONS_IN_USE)}, got {self.trained_actions!r}"
            )
        if not math.isfinite(self.output_bias):
            raise ValueError(f"output_bias must be finite, got {self.output_bias!r}")

    def _check_trained_alphas(self) -> None:
        if self.trained_alphas is None:
            return
        values = tuple(self.trained_alphas) if isinstance(self.trained_alphas, (list, tuple)) else ()
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        if len(values) != 2 or not numbers or not 0 <= values[0] <= values[1]:
            raise ValueError(f"trained_alphas must be a pair 0 <= low <= high, got {self.trained_alphas!r}")
        object.__setattr__(self, "trained_alphas", values)  # JSON has lists

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def decoding(self) -> dict[str, Any]:
        """Fields of a SamplerConfig with which the policy decodes as it was trained, as far as that is known."""
        settings: dict[str, Any] = {}
        if self.trained_block_length is not None:
            settings["block_length"] = self.trained_block_length or None
        if self.trained_temperature is not None:
            settings["policy_temperature"] = self.trained_temperature
        if self.trained_actions is not None:
            settings["actions"] = ACTIONS_IN_USE[self.trained_actions]
        return settings

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicyConfig:
        """The configuration with these fields; a key that is none raises ValueError."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown policy configuration keys: {', '.join(unknown)}")
        return cls(**values)


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


def sinusoidal_embedding(value: Tensor, frequencies: Tensor) -> Tensor:
    """``[cos(v f), sin(v f)]``: (B,) and (D/2,) -> (B, D)."""
    angles = value[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_frequencies(head_dim: int) -> Tensor:
    """(head_dim / 2,) float32: ``base ** (-2i / head_dim)``."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (ROTARY_BASE**-exponent).float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of ``x`` (B, H, L, d) by tables (L, d/2); the halves end up ``[even', odd']``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


class PolicyBlock(nn.Module):
    """One DiT block: attention and feed-forward, each scaled and shifted by the conditioning vector."""

    inv_freq: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.ffn_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(d, eps=NORM_EPS)
        self.ada_conditioning = nn.Linear(d, 6 * d)
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, eps=NORM_EPS)
        self.linear1 = nn.Linear(d, f)
        self.linear2 = nn.Linear(f, d)
        self.register_buffer("inv_freq", rotary_frequencies(config.head_dim), persistent=False)
        nn.init.zeros_(self.ada_conditioning.weight)
        nn.init.zeros_(self.ada_conditioning.bias)

    def forward(self, x: Tensor, cond: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        """``x`` (B, L, D); ``cond`` (B, 2, D) for mask 0 and 1; ``mask`` (B, L) bool; ``valid`` (B, L) bool keys."""
        # Two conditioning vectors per sequence are all there are, so `ada` runs on those and not on L positions.
        both = self.ada_conditioning(cond)  # (B, 2, 6D)
        ada = torch.where(mask[..., None], both[:, 1:2], both[:, 0:1])  # (B, L, 6D)
        g1, b1, a1, g2, b2, a2 = ada.chunk(6, dim=-1)
        h = self.norm1(x) * (1 + g1) + b1
        x = x + self.out_proj(self._attention(h, valid)) * (1 + a1)
        h = self.norm2(x) * (1 + g2) + b2
        return x + self.linear2(F.gelu(self.linear1(h))) * (1 + a2)

    def _attention(self, h: Tensor, valid: Tensor | None) -> Tensor:
        batch, length, d = h.shape
        split = (batch, length, self.num_heads, d // self.num_heads)
        q = self.q_proj(h).view(split).transpose(1, 2)
        k = self.k_proj(h).view(split).transpose(1, 2)
        v = self.v_proj(h).view(split).transpose(1, 2)
        positions = torch.arange(length, device=h.device, dtype=self.inv_freq.dtype)
        angles = positions[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        keys = None if valid is None else valid[:, None, None, :]
        out = F.scaled_dot_product_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, attn_mask=keys)
        return out.transpose(1, 2).reshape(batch, length, d)


class PolicyNetwork(nn.Module):
    """Per-position unmasking logits from mask, confidences and time.

    Parameter names are those of the published checkpoints (without their ``base_policy.`` prefix).
    """

    frequencies: Tensor
    alpha_frequencies: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.time_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.mask_embedding = nn.Embedding(2, d)
        self.confidence_proj = nn.Linear(config.num_confidences, d)
        self.transformer_blocks = nn.ModuleList([PolicyBlock(config)])
        self.final_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.output_proj = nn.Linear(d, 1)
        nn.init.constant_(self.output_proj.bias, config.output_bias)
        self.register_buffer("frequencies", time_frequencies(config), persistent=False)
        self.alpha_mlp: nn.Sequential | None = None
        if config.alpha_conditioned:
            last = nn.Linear(d, d)
            nn.init.zeros_(last.weight)  # starts as the policy without alpha
            nn.init.zeros_(last.bias)
            self.alpha_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), last)
            # The straight way from alpha to speed: a higher logit everywhere is a faster policy. Through the block's
            # scales and shifts alone, reinforcement learning hardly finds it.
            self.alpha_shift = nn.Linear(d, 1, bias=False)
            nn.init.zeros_(self.alpha_shift.weight)
            self.register_buffer(
                "alpha_frequencies", geometric_frequencies(*ALPHA_FREQUENCIES, d // 2), persistent=False
            )

    def kernel_parameters(self) -> list[Tensor]:
        """The tensors of the op's packed weight buffer, in its order (see ``csrc/ops/policy_forward.h``)."""
        # Through the modules' dictionaries: this runs at every step of decoding, and their attributes are slow.
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

        None for a policy that takes none.

        Raises:
            ValueError: alpha is missing, or given to a policy that was not trained with it.
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
        elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a finite number >= 0 or a tensor ({batch},), got {alpha!r}")
        else:
            alpha = torch.full((batch,), float(alpha), device=weight.device, dtype=weight.dtype)
        if self.config.trained_alphas is not None:
            alpha = alpha.clamp(*self.config.trained_alphas)
        embedding = sinusoidal_embedding(alpha.log1p(), self.alpha_frequencies)  # (B, D)
        return self.alpha_mlp(embedding), self.alpha_shift(embedding)

    def forward(
        self,
        mask: Tensor,
        confidence: Tensor,
        time: Tensor,
        alpha: Tensor | float | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L), in the parameters' dtype.

        Args:
            mask: (B, L) bool, True where the position is still masked.
            confidence: (B, L, k) floating, the k largest probabilities of each position, descending.
            time: (B,) floating, steps taken / L.
            alpha: a number >= 0 or (B,), for a policy conditioned on it.
            valid: (B, L) bool, keys to attend to; None = all. Logits elsewhere mean nothing.

        Raises:
            ValueError: a shape or dtype does not fit (the message names the argument).
        """
        self._check(mask, confidence, time)
        dtype = self.mask_embedding.weight.dtype
        extra = self.alpha_condition(mask.shape[0], alpha)
        time = torch.zeros_like(time) if self.config.zero_time else time
        mask = torch.zeros_like(mask) if self.config.zero_mask else mask
        shared = self.time_mlp(sinusoidal_embedding(time.to(dtype), self.frequencies))  # (B, D)
        if extra is not None:
            shared = shared + extra[0]
        cond = shared[:, None] + self.mask_embedding.weight  # (B, 2, D): for mask 0 and mask 1
        x = self.confidence_proj(confidence.to(dtype))
        for block in self.transformer_blocks:
            x = block(x, cond, mask, valid)
        logits = self.output_proj(self.final_norm(x)).squeeze(-1)
        return logits if extra is None else logits + extra[1]

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
