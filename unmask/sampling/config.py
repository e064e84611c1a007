"""How a generation is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

ACTIONS = ("bernoulli-argmax", "bernoulli", "greedy", "dpls")
CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of one generation. Frozen: derive variants with :meth:`updated`, which refuses unknown names.

    Raises ValueError naming the field, its value and what was expected.
    """

    max_new_tokens: int = 256
    """L, the length of the buffer, in tokens."""
    block_length: int | None = 32
    """Tokens per block, filled left to right; must divide ``max_new_tokens``. None: one block (full diffusion)."""
    temperature: float = 0.0
    """Temperature of the tokens: 0 takes the most probable, T > 0 draws an exact sample of softmax(logits / T)."""
    policy_temperature: float = 1.0
    """tau: a learned policy's logits are divided by it before actions are drawn."""
    policy_scale: float = 1.0
    """beta: factor on a learned policy's Bernoulli probabilities, clamped to 1 (speed control at test time)."""
    actions: str = "bernoulli-argmax"
    """How actions are drawn from a learned policy's logits: "bernoulli-argmax" (at least one per step),
    "bernoulli", "greedy" (probability above one half, else the highest) or "dpls" (dynamic Plackett-Luce)."""
    alpha: float | None = None
    """Speed preference given to a policy that is conditioned on it."""
    seed: int | None = None
    """Seed of every draw; None means 0. Draws are keyed by it and by a row's number in the call, so that a row gets the
    same ones on any device and whatever its neighbours are; as another row of another call it gets others."""
    max_steps: int | None = None
    """Forwards after which an unfinished row stops; None means L."""
    cache: str = "none"
    """Reuse of keys and values between steps (Fast-dLLM, arXiv 2505.22618), approximate. "none" recomputes everything
    in every step. The others do so when a row enters a block; within the block "prefix" recomputes from the block to
    the end, "dual" the block alone."""
    cache_refresh: int | None = None
    """Also recompute everything every so many steps within a block; 1 makes a cache exact. None: never."""
    stop_at_eos: bool = True
    """Stop a row once an end of sequence is committed and everything before it is too."""
    record: bool = False
    """Keep every step's observation and action: ``result.trajectory``."""
    max_batch_size: int | None = None
    """Rows decoded side by side; further prompts take the place of rows that finish. None: all of them."""
    deterministic: bool = False
    """Run the model on one unpadded row at a time, so that not even rounding depends on a row's neighbours. Slow."""
    cuda_graphs: bool | None = False
    """Launch each step, or where the driver can the whole loop, as one CUDA graph. None: wherever that is possible;
    True: ValueError where it is not; False: never, the default until ``benchmarks/gpu_check.py`` has passed on a GPU.
    Batches are padded with finished rows to a few sizes."""

    def __post_init__(self) -> None:
        require_positive_int("max_new_tokens", self.max_new_tokens)
        if self.block_length is not None:
            require_positive_int("block_length", self.block_length)
            if self.max_new_tokens % self.block_length:
                raise ValueError(
                    f"max_new_tokens={self.max_new_tokens} is not divisible by block_length={self.block_length}: "
                    "choose a block_length that divides it, or None for one block"
                )
        require_non_negative("temperature", self.temperature)
        require_non_negative("policy_scale", self.policy_scale)
        require_non_negative("policy_temperature", self.policy_temperature)
        if self.policy_temperature == 0:
            raise ValueError('policy_temperature must be positive, got 0.0; use actions="greedy" for no randomness')
        if self.alpha is not None:
            require_non_negative("alpha", self.alpha)
        require_choice("actions", self.actions, ACTIONS)
        require_choice("cache", self.cache, CACHES)
        for name in ("max_steps", "max_batch_size", "cache_refresh"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        if self.cuda_graphs is not None and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"cuda_graphs must be True, False or None, got {self.cuda_graphs!r}")
        for name in ("stop_at_eos", "record", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        integer = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if self.seed is not None and not (integer and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")

    def updated(self, overrides: Mapping[str, Any]) -> SamplerConfig:
        """A copy with some fields replaced; TypeError names unknown ones."""
        known = [f.name for f in fields(self)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise TypeError(f"unknown SamplerConfig fields {unknown}; known fields are {known}")
        return replace(self, **overrides) if overrides else self


def require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def require_non_negative(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
