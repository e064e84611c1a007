"""The shape of a policy network, and how the policy was trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from unmask.config import Config, Count, Finite, NonNegative, Positive, PositiveInt, Range, require
from unmask.policies.calibration import Curves

ACTIONS_IN_USE = {"bernoulli": "bernoulli-argmax", "dpls": "dpls", "greedy": "greedy"}
"""Actions of training, and those of decoding with the same policy, which commit at least one token per step."""


class PolicyConfig(Config):
    """Shape and behaviour of a policy network; the defaults are the published configuration.

    Time frequencies: the published network uses ``f_i = exp(-ln(max_period) * i / (D/2))`` with ``max_period`` 1, so
    every f_i is 1. With ``min_frequency`` and ``max_frequency`` (both or neither) the D/2 frequencies are spaced
    geometrically between the two instead; 1 to 50 resolves single steps of a 256-step generation.
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
    """Whether the speed/accuracy trade-off alpha is a further input."""
    default_alpha: NonNegative = 1.0
    """The alpha that a policy conditioned on it uses when none is given."""
    trained_alphas: Range | None = None
    """Smallest and largest alpha of training; other alphas are clamped to them. None: no clamping."""
    trained_block_length: Count | None = None
    """Tokens per block in training, 0 for full diffusion. It is the default of a Sampler without a configuration."""
    trained_temperature: Positive | None = None
    """tau in training, by which logits are divided. It is a Sampler's default in the same way."""
    trained_actions: Literal["bernoulli", "dpls", "greedy"] | None = None
    """How actions were drawn in training. A Sampler draws them so by default, but at least one per step."""
    calibration: Curves = ()
    """Forwards at several shifts of the logits, for ``target_nfe``."""
    time: Literal["steps", "share"] = "steps"
    """The time input: "steps", those taken divided by the buffer's length, as published; "share", that of the positions
    the network sees which are committed: the same at any length and speed."""
    marks_ends: bool = False
    """Whether the probability of a proposed end of sequence is read with a minus sign."""
    steepness: NonNegative = 0.0
    """Above 0 the policy corrects a rule (as UPO, arXiv 2510.05725): the network adds to the logits
    ``steepness * (logit(p) - logit(rule_threshold))``, p the proposal's probability. A fresh one adds 0."""
    rule_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
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
        require(
            self.min_frequency is None or self.max_frequency is None or self.min_frequency <= self.max_frequency,
            f"min_frequency={self.min_frequency} is above max_frequency={self.max_frequency}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def decoding(self) -> dict[str, Any]:
        """The SamplerConfig fields of training, as far as they are known."""
        settings: dict[str, Any] = {}
        if self.trained_block_length is not None:
            settings["block_length"] = self.trained_block_length or None
        if self.trained_temperature is not None:
            settings["policy_temperature"] = self.trained_temperature
        if self.trained_actions is not None:
            settings["actions"] = ACTIONS_IN_USE[self.trained_actions]
        return settings


class SetPolicyConfig(Config):
    """Shape of a set policy and how it decodes."""

    vocab_size: PositiveInt
    """V, of the language model."""
    embedding_size: PositiveInt | None = None
    """Width of the language model's own embedding, of which the network reads a projection; None: the network has an
    embedding of its own, for small vocabularies."""
    num_confidences: PositiveInt = 5
    """k: how many of the largest probabilities per position are read."""
    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2
    ffn_size: PositiveInt = 256
    sure: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Predicted probability above which a proposal is picked at no cost."""
    max_runs: PositiveInt = 12
    """Runs of the network in one step, at most. On CUDA, where nothing waits for the device, exactly."""
    default_risk: NonNegative = 0.05
    """The risk where none is asked for."""
    trained_block_length: Count | None = None
    """Tokens per block in training, of several those of most rounds; 0: full diffusion. It is a Sampler's default."""
    calibration: Curves = ()
    """Forwards at several risks, for ``target_nfe``."""

    def __post_init__(self) -> None:
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            f"hidden_size must be a multiple of 2 * num_heads={2 * self.num_heads}, got {self.hidden_size}",
        )

    def decoding(self) -> dict[str, Any]:
        """The SamplerConfig fields of training; "greedy", as no action is drawn."""
        blocks = self.trained_block_length
        return {"actions": "greedy", **({} if blocks is None else {"block_length": blocks or None})}
