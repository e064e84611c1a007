"""What sets a policy's speed, for each row of a state: alpha, or a shift of its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.config import effective_blocks
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.calibration import Curve
from unmask.policies.options import WithOptions
from unmask.sampling.config import SamplerConfig
from unmask.sampling.state import State

UNTOLD = ("top_k", "top_p", "repetition_penalty", "cfg_scale", "stop", "stop_ids")
"""Settings under which no policy is calibrated."""


def set_dials(
    state: State, policy: UnmaskingPolicy, config: SamplerConfig, alpha: Tensor | None, shift: float | None = None
) -> None:
    """Give ``state`` its alpha (N,) and the ``shift`` of its logits; None: those that ``config`` asks for."""
    like, asked = state.steps[:, None].float(), config.alpha
    if config.target_nfe is not None and alpha is None and shift is None:
        value = dial_for(policy, config)
        asked, shift = (value, None) if policy.dial == "alpha" else (asked, value)
    state.shift = None if shift is None else torch.full_like(like, shift)
    if policy.conditioned:
        if alpha is None:
            alpha = torch.full_like(like[:, 0], float(policy.default_alpha if asked is None else asked))
        state.alpha = alpha
        with torch.no_grad():
            state.condition = condition_of(policy, state.alpha)
    elif config.alpha is not None:
        raise ValueError(f"alpha={config.alpha} was given, but the policy is not conditioned on alpha")


def condition_of(policy: Any, alpha: Tensor) -> Tensor | None:
    """(N, C): the condition that ``policy`` computes from ``alpha`` (N,), or None.

    A matrix product over another number of rows may round differently. So each distinct value is computed by itself,
    and a row gets the same condition in any batch.
    """
    values, inverse = alpha.unique(return_inverse=True)
    parts = [policy.condition(value[None]) for value in values]
    if not parts or parts[0] is None:
        return None
    return torch.cat(parts)[inverse]


def drawing_of(policy: UnmaskingPolicy, config: SamplerConfig) -> str:
    """How actions are drawn from the policy's logits; "" for one that selects."""
    if policy.dial != "shift":
        return ""
    alpha = policy.default_alpha if config.alpha is None else config.alpha
    asked = f", alpha={alpha:g}" if policy.conditioned else ""
    if config.actions == "greedy":
        return f"greedy{asked}"
    return f"{config.actions}, tau={config.policy_temperature:g}, beta={config.policy_scale:g}{asked}"


def curve_of(policy: UnmaskingPolicy, config: SamplerConfig, nfe: Mapping[float, float], source: str) -> Curve:
    """The curve of ``nfe`` by dial, as ``policy`` decodes by ``config``; ValueError for what a curve does not tell."""
    for name in UNTOLD:
        if (value := getattr(config, name)) != getattr(SamplerConfig, name):
            raise ValueError(
                f"{name}={value!r} changes the forwards, and no curve of target_nfe tells how: leave it out"
            )
    return Curve(
        max_new_tokens=config.max_new_tokens,
        block_length=effective_blocks(config.block_length, config.max_new_tokens),
        temperature=config.temperature,
        options=options_of(policy),
        drawing=drawing_of(policy, config),
        dial=tuple(nfe),
        nfe=tuple(nfe.values()),
        source=source,
    )


def dial_for(policy: UnmaskingPolicy, config: SamplerConfig) -> float:
    """The dial that meets ``config.target_nfe``.

    Raises ValueError for a policy without a dial or a curve of this setting, and for a target out of its range.
    """
    asked = f"target_nfe={config.target_nfe:g}"
    if policy.dial is None:
        raise ValueError(f"{asked} is for learned policies, but {policy.spec} is a rule: change its number instead")
    if config.alpha is not None and policy.dial == "alpha":
        raise ValueError(f"give {asked} or alpha={config.alpha:g}, not both")
    known = curves_of(policy)
    setting = curve_of(policy, config, {0.0: 1.0, 1.0: 1.0}, "").setting
    for curve in known:
        if curve.setting == setting:
            return curve.at(float(config.target_nfe or 0))
    raise ValueError(
        f"{asked} needs the policy's forwards at {setting}, but {policy.spec} is calibrated for "
        f"{'; '.join(curve.setting for curve in known) or 'nothing'}: run `unmask calibrate`"
    )


def options_of(policy: UnmaskingPolicy) -> str:
    """The text of the policy's options; "" if it has none."""
    return policy.options.text if isinstance(policy, WithOptions) else ""


def curves_of(policy: UnmaskingPolicy) -> tuple[Curve, ...]:
    """All that are known of ``policy``."""
    return tuple(getattr(getattr(policy.bare, "config", None), "calibration", ()))
