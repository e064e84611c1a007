"""What a serving engine's algorithm configuration says, checked before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from unmask.config import Config, check_known
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.heuristics import FixedSteps
from unmask.policies.learned import Policy
from unmask.policies.registry import make_policy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sampler import DEFAULT_POLICY

logger = logging.getLogger(__name__)

LEARNED_ONLY = ("actions", "policy_temperature", "policy_scale", "alpha")
"""Settings that say something about learned policies only."""
SAMPLING = ("max_new_tokens", "temperature", "seed", *LEARNED_ONLY)
"""Settings that go to :class:`unmask.SamplerConfig` under the same name."""
KNOWN = ("policy", *SAMPLING, "block_size")


class ServingConfig(Config):
    """A policy and the settings of its decoding, for blocks of ``sampling.block_length`` tokens.

    The settings are those of :class:`unmask.SamplerConfig` under the same names.
    """

    policy: UnmaskingPolicy
    sampling: SamplerConfig

    @classmethod
    def parse(cls, settings: Mapping[str, Any], block_length: int) -> ServingConfig:
        """The configuration that ``settings`` spell.

        Args:
            settings: any of ``KNOWN``, of which ``block_size`` is read by the engine alone. ``policy`` is a name as
                :func:`unmask.policies.make_policy` takes it. ``max_new_tokens`` is the length of a completion
                that the policy reckons with; requests may be shorter or longer.
            block_length: tokens per block.

        Raises:
            ValueError: an unknown key, a value out of range, a policy that cannot decode blocks on their own.
            TypeError: ``policy`` is not a string.
            FileNotFoundError, ImportError, CheckpointError: a learned policy that cannot be loaded.
        """
        check_known(settings, KNOWN, "keys of the algorithm config")
        values = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
        policy = make_policy(settings.get("policy", DEFAULT_POLICY))
        given = set(values)
        if isinstance(policy, Policy):  # as it was trained, where nothing else is asked for
            values = {k: v for k, v in policy.config.decoding().items() if k != "block_length"} | values
        length = values.pop("max_new_tokens", None)
        try:
            sampling = SamplerConfig(
                max_new_tokens=block_length if length is None else length, block_length=block_length, **values
            )
        except ValueError as error:
            raise ValueError(f"algorithm config: {error}") from error
        if sampling.actions == "bernoulli":
            raise ValueError(
                'algorithm config: actions="bernoulli" may unmask nothing in a step, but an engine expects progress in '
                'every step; use "bernoulli-argmax", "greedy" or "dpls"'
            )
        if isinstance(policy, Policy):
            check_learned(policy, settings, block_length)
            return cls(policy, sampling)
        if pointless := [name for name in LEARNED_ONLY if name in given]:
            raise ValueError(f"algorithm config: {', '.join(pointless)} means nothing to the policy {policy.spec!r}")
        if isinstance(policy, FixedSteps):
            policy = per_block(policy, length, block_length)
        return cls(policy, sampling)

    @property
    def alpha(self) -> float | None:
        """The trade-off asked of the policy, None if it is not conditioned on one."""
        if not self.policy.conditioned:
            return None
        return float(self.policy.default_alpha if self.sampling.alpha is None else self.sampling.alpha)


def check_learned(policy: Policy, settings: Mapping[str, Any], block_length: int) -> None:
    """Refuse a learned policy that would not see in an engine what it saw in training."""
    name, config = settings["policy"], policy.config
    if config.context != "block":
        raise ValueError(
            f'policy {name!r} has context="{config.context}": it reads the confidences of the whole buffer, and its '
            "positions count from the buffer's start, but an engine that decodes block by block computes logits for "
            'the active block alone. Expected a policy trained with context="block"'
        )
    if settings.get("max_new_tokens") is None and not config.zero_time:
        raise ValueError(
            f"policy {name!r} reads the time, steps taken / max_new_tokens: the algorithm config must set "
            "max_new_tokens, the length of the completions to reckon with (in training: the buffer's)"
        )
    if settings.get("alpha") is not None and not config.alpha_conditioned:
        raise ValueError(f"alpha={settings['alpha']} was given, but policy {name!r} is not conditioned on alpha")
    if config.trained_block_length not in (None, block_length):
        logger.warning(
            "policy %r was trained on blocks of %s tokens and will decode blocks of %d",
            name,
            config.trained_block_length or "all",
            block_length,
        )


def per_block(policy: FixedSteps, length: int | None, block_length: int) -> FixedSteps:
    """The same rule with its share of the steps for one block; an engine shows it each block as if it were alone."""
    steps = int(policy.values[0])
    if length is None:
        raise ValueError(
            f"policy {policy.spec!r} counts steps for the whole buffer: the algorithm config must set max_new_tokens"
        )
    blocks = -(-length // block_length)
    if steps % blocks:
        raise ValueError(
            f"policy {policy.spec!r}: the number of steps must be a multiple of the {blocks} blocks that "
            f"max_new_tokens={length} has, got {steps}"
        )
    return type(policy)(steps // blocks)
