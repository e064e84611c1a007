"""How many forwards a policy takes at each value of its dial, so that forwards can be asked for.

A learned policy has one dial: a set policy its risk, which takes the place of alpha; a policy of single positions a
*shift* that is added to all its logits. A :class:`Curve` says how many forwards the policy took on average in one
setting at several values of the dial. ``SamplerConfig(target_nfe=8)`` looks up the dial between two of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BeforeValidator

from unmask.config import Config, Count, Finite, NonNegative, Positive, PositiveInt, require

RANGES = {"alpha": (0.001, 3.0), "shift": (-16.0, 16.0)}
"""The ends of each dial."""


class Curve(Config):
    """Mean forwards of a policy in one setting, which fall as the dial rises."""

    max_new_tokens: PositiveInt
    """L."""
    block_length: Count
    """Tokens per block, 0 for full diffusion."""
    temperature: NonNegative
    """Of the tokens."""
    options: str
    """The policy's, such as "hold-eos"; "" for none."""
    drawing: str
    """How actions are drawn, see :func:`unmask.sampling.dials.drawing_of`."""
    dial: tuple[Finite, ...]
    """Ascending."""
    nfe: tuple[Positive, ...]
    """Mean NFE at each."""
    source: str = ""
    """What was decoded, for people: model, task and number of prompts."""

    def __post_init__(self) -> None:
        require(
            len(self.dial) == len(self.nfe) > 1 and list(self.dial) == sorted(set(self.dial)),
            f"a curve needs two or more ascending values of the dial and as many of nfe, got {self.dial}, {self.nfe}",
        )

    def __repr__(self) -> str:
        return f"Curve({self.summary})"

    @property
    def summary(self) -> str:
        return f"{self.setting}: NFE {self.falling[-1]:.2f} to {self.nfe[0]:.2f}"

    @property
    def setting(self) -> str:
        blocks = "full diffusion" if not self.block_length else f"block_length={self.block_length}"
        own = "".join(f", {text}" for text in (self.options, self.drawing) if text)
        return f"max_new_tokens={self.max_new_tokens}, {blocks}, temperature={self.temperature:g}{own}"

    @property
    def falling(self) -> list[float]:
        """``nfe`` without what noise lifts above an earlier value."""
        return list(accumulate(self.nfe, min))

    def at(self, target: float) -> float:
        """The dial at which NFE is ``target``, linear between neighbours; ValueError beyond the ends."""
        nfe = self.falling
        if not nfe[-1] <= target <= nfe[0]:
            raise ValueError(
                f"target_nfe={target:g} is out of the policy's range, {nfe[-1]:.2f} to {nfe[0]:.2f} at {self.setting}"
            )
        i = bisect_left([-value for value in nfe], -target)  # the first that is at most the target
        if i == 0 or nfe[i] == target:
            return self.dial[i]
        share = (nfe[i - 1] - target) / (nfe[i - 1] - nfe[i])
        return between(self.dial[i - 1], self.dial[i], share)


def between(low: float, high: float, share: float) -> float:
    """The value at ``share`` of the way; of positive numbers, such as risks, in their logarithm."""
    if low > 0:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def as_curves(values: Any) -> Any:
    """Curves of a file, which are mappings there."""
    return tuple(Curve.from_dict(v) if isinstance(v, Mapping) else v for v in values)


Curves = Annotated[tuple[Curve, ...], BeforeValidator(as_curves)]


def calibrated(config: Any, curves: tuple[Curve, ...]) -> Any:
    """A policy's ``config`` with ``curves`` in place of those of the same settings."""
    fresh = {curve.setting for curve in curves}
    return config.updated({"calibration": (*(c for c in config.calibration if c.setting not in fresh), *curves)})
