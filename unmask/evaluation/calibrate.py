"""Measure how many forwards a policy takes at each value of its dial."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from unmask.files import write_atomically
from unmask.policies.calibration import RANGES, Curve, between
from unmask.sampling.dials import curve_of, set_dials
from unmask.sampling.infill import parts_of
from unmask.sampling.sampler import Sampler
from unmask.text import read_text

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
    known: Mapping[float, float] = MappingProxyType({}),
) -> Curve:
    """Decode ``prompts`` at :data:`POINTS` values of the policy's dial, and return the mean NFE at each.

    ``overrides`` replace fields of the sampler's config. ``on_value`` is told each value and its NFE. ``known``
    are NFE by values measured before by the same call, which are taken over. Raises ValueError
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

    def measure(value: float) -> float:
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
        return torch.cat([state.steps for state in states]).float().mean().item()

    while len(nfe) < POINTS:
        if len(nfe) < len(RANGES[policy.dial]):
            value = RANGES[policy.dial][len(nfe)]
        else:
            (low, _), (high, _) = max(pairwise(sorted(nfe.items())), key=gap)
            value = between(low, high, 0.5)
        nfe[value] = known[value] if value in known else measure(value)
        on_value(value, nfe[value])
    return curve_of(policy, config, dict(sorted(nfe.items())), source)


class Notes:
    """What a calibration has measured so far, in a file, so that one that was stopped goes on."""

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        """``of`` says what is measured, in JSON's types; notes of anything else in the file are dropped."""
        self.path, self.of = path, json.dumps(of, sort_keys=True)
        lines = read_text(path).splitlines() if path.is_file() else []
        self.nfe: dict[float, float] = dict(map(json.loads, lines[1:])) if lines[:1] == [self.of] else {}
        """By values of the dial."""

    def add(self, dial: float, nfe: float) -> None:
        if dial in self.nfe:
            return
        self.nfe[dial] = nfe
        text = "\n".join([self.of, *(json.dumps(pair) for pair in self.nfe.items())])
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def gap(pair: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """How little is known between two values of the dial with their NFE.

    It grows with the ratio of NFE and, more slowly, with the distance, so that a cliff, which no target can make use
    of, does not take all values.
    """
    (low, before), (high, after) = pair
    distance = math.log(high / low) if low > 0 else high - low
    return abs(math.log(before / after)) * math.sqrt(distance)
