"""Measure how many forwards a policy takes at each value of its dial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from unmask.policies.calibration import RANGES, Curve, between
from unmask.sampling.dials import curve_of, set_dials
from unmask.sampling.infill import parts_of
from unmask.sampling.sampler import Sampler

POINTS = 24
"""Values of the dial: its ends, then again and again the middle of the two of which least is known, see :func:`gap`."""
ROWS = 256
"""Prompts decoded side by side, at most."""


def measure_curve(
    sampler: Sampler,
    prompts: Sequence[Any],
    overrides: Mapping[str, Any] | None = None,
    source: str = "",
    on_value: Callable[[float, float], None] = lambda dial, nfe: None,
) -> Curve:
    """Decode ``prompts`` at :data:`POINTS` values of the policy's dial, and return the mean NFE at each.

    ``overrides`` replace fields of the sampler's config. ``on_value`` is told each value and its NFE. Raises ValueError
    for a policy without a dial, and for no prompts; FloatingPointError for undefined logits.
    """
    policy = sampler.policy
    if policy.dial is None:
        raise ValueError(f"calibration is for learned policies, but {policy.spec} is a rule")
    if not prompts:
        raise ValueError("prompts is empty: calibration needs some")
    config = sampler.settled({**(overrides or {}), "target_nfe": None, "record": False})
    config = config.updated({"max_batch_size": min(config.max_batch_size or ROWS, ROWS)})
    curve_of(policy, config, {0.0: 1.0, 1.0: 1.0}, source)  # refuses what it refuses before any work
    nfe: dict[float, float] = {}

    def measure(value: float) -> None:
        states = [part.state for part in parts_of(sampler, list(prompts), config)]
        for state in states:
            alpha = torch.full_like(state.steps, value, dtype=torch.float32)
            if policy.dial == "alpha":
                set_dials(state, policy, config, alpha)
            else:
                set_dials(state, policy, config, None, shift=value)
            for _ in sampler.steps(state, config):
                pass
            state.raise_if_undefined()
        nfe[value] = torch.cat([state.steps for state in states]).float().mean().item()
        on_value(value, nfe[value])

    for value in RANGES[policy.dial]:
        measure(value)
    while len(nfe) < POINTS:
        (low, _), (high, _) = max(pairwise(sorted(nfe.items())), key=gap)
        measure(between(low, high, 0.5))
    return curve_of(policy, config, dict(sorted(nfe.items())), source)


def gap(pair: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """How little is known between two values of the dial with their NFE.

    It grows with the ratio of NFE and, more slowly, with the distance, so that a cliff, which no target can make use
    of, does not take all values.
    """
    (low, before), (high, after) = pair
    distance = math.log(high / low) if low > 0 else high - low
    return abs(math.log(before / after)) * math.sqrt(distance)
