"""The shape of a policy network, and how the policy was trained."""

from __future__ import annotations

from typing import Any, Literal

from unmask.config import Config, Count, Finite, NonNegative, Positive, PositiveInt, Range, require

ACTIONS_IN_USE = {"bernoulli": "bernoulli-argmax", "dpls": "dpls"}
"""How a policy's actions are drawn in training, and how they are then drawn in use, where no step may be wasted."""


class PolicyConfig(Config):
    """Shape and behaviour of a policy network; the defaults are the published configuration.

    Time frequencies: the published network uses ``f_i = exp(-ln(max_period) * i / (D/2))`` with ``max_period`` 1, so
    every f_i is 1. With ``min_frequency`` and ``max_frequency`` (both or neither) the D/2 frequencies are spaced
    geometrically between the two instead; 1 to 50 resolves single steps of a 256-step generation.

    Raises ValueError where a field is out of range; the message names it.
    """

    num_confidences: PositiveInt = 1
    """k: how many of the largest probabilities per position are read."""
    hidden_size: PositiveInt = 128
    num_heads: PositiveInt = 2
    ffn_size: PositiveInt = 512
    max_period: Positive = 1.0
    min_frequency: Positive | None = None
    max_frequency: Positive | None = None
    output_bias: Finite = -2.0
    """Initial bias of the output: sigmoid(-2) = 0.12, so an untrained policy starts slowly."""
    context: Literal["full", "block"] = "full"
    """"full": sees the whole generation buffer; "block": only the active block."""
    alpha_conditioned: bool = False
    """Takes the speed/accuracy trade-off alpha as a further input."""
    default_alpha: NonNegative = 1.0
    """The alpha that a policy conditioned on it takes when none is asked for."""
    trained_alphas: Range | None = None
    """Least and largest alpha of training; whoever asks for less or more gets these. None: any alpha as it is."""
    trained_block_length: Count | None = None
    """Tokens per block in training, 0 for full diffusion; a Sampler without a configuration of its own decodes so."""
    trained_temperature: Positive | None = None
    """tau in training, by which logits are divided; likewise."""
    trained_actions: Literal["bernoulli", "dpls"] | None = None
    """How actions were drawn in training; likewise, with at least one position per step."""
    zero_time: bool = False
    """Ablation: the time input is always 0."""
    zero_mask: bool = False
    """Ablation: the mask input is always 0."""

    def __post_init__(self) -> None:
        even = 2 * self.num_heads
        require(
            self.hidden_size % even == 0,
            f"hidden_size must be a multiple of 2 * num_heads={even}, as rotary embedding needs an even head size, got "
            f"{self.hidden_size}",
        )
        require(
            (self.min_frequency is None) == (self.max_frequency is None),
            "min_frequency and max_frequency are given together or not at all",
        )

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
