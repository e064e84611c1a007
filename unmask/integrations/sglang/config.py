"""What the algorithm configuration of a server says, checked before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from unmask.config import check_known
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.heuristics import FixedSteps
from unmask.policies.learned import Policy
from unmask.policies.options import Options, with_options
from unmask.policies.registry import make_policy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sampler import DEFAULT_POLICY

logger = logging.getLogger(__name__)

LEARNED_ONLY = ("actions", "policy_temperature", "policy_scale", "alpha")
"""Settings that say something about learned policies only."""
STOP_IDS = "stop_ids"
"""The ids that end a completion, which the engine does not tell; the option hold-eos reads them."""
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("top_p", "repetition_penalty", "beam_width"), 1),
    **dict.fromkeys(("min_p", "frequency_penalty", "presence_penalty", "min_new_tokens"), 0),
    **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag", "sampling_seed", "watermark"), None),
    "logit_bias": {},
}
"""A request's sampling parameters that no block is decoded by, and the values that ask for nothing, as None does."""
REPORTS = ("return_logprob", "return_hidden_states", "return_sampling_mask", "custom_logit_processor")
"""What a request may ask for beside them, in vain."""
ALL_TOKENS = 1 << 30
"""SGLang's top_k that leaves all tokens."""
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", *LEARNED_ONLY)
"""Settings that go to :class:`unmask.SamplerConfig` under the same name."""


def parse(settings: Mapping[str, Any], block_length: int) -> tuple[UnmaskingPolicy, SamplerConfig]:
    """The policy that ``settings`` name and how it decodes blocks of ``block_length`` tokens.

    Args:
        settings: any of ``policy``, a name as :func:`unmask.policies.make_policy` takes it; ``SAMPLING``; ``STOP_IDS``;
            and ``block_size``, which is read by the engine alone. ``max_new_tokens`` is the length of a completion that
            the policy reckons with; requests may be shorter or longer.

    Raises:
        ValueError: an unknown key, a value out of range, a policy that cannot decode blocks on their own.
        TypeError: ``policy`` is not a string.
        FileNotFoundError, ImportError, CheckpointError: a learned policy that cannot be loaded.
    """
    check_known(settings, ("policy", *SAMPLING, STOP_IDS, "block_size"), "keys of the algorithm config")
    name = settings.get("policy", DEFAULT_POLICY)
    policy = make_policy(name)
    given = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
    try:
        # As it was trained, where nothing else is asked for.
        values = {"max_new_tokens": block_length, **policy.decoding, **given, "block_length": block_length}
        sampling = SamplerConfig(**values)
        sampling.check_draws()
        if reason := unsuitable(policy, sampling, given, block_length):
            raise ValueError(f"policy {name!r} {reason}")
        if options_of(policy).hold_eos and not stop_ids(settings):
            raise ValueError(f"policy {name!r} holds back ends of sequence: set {STOP_IDS}, their ids")
    except ValueError as error:
        raise ValueError(f"algorithm config: {error}") from error
    trained = policy.decoding.get("block_length", block_length)
    if trained != block_length:
        text = "policy %r was trained on blocks of %s tokens and will decode blocks of %d"
        logger.warning(text, name, trained or "all", block_length)
    rule = policy.bare
    if isinstance(rule, FixedSteps):  # each block is decoded as if it were alone, and gets its share of the steps
        share = type(rule)(int(rule.values[0]) // -(-sampling.max_new_tokens // block_length))
        policy = with_options(share, options_of(policy))
    return policy, sampling


def options_of(policy: UnmaskingPolicy) -> Options:
    """The options of a policy that :func:`unmask.policies.make_policy` made."""
    return getattr(policy, "options", Options())


def stop_ids(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a completion, none unless given; ValueError for what is no list of ids."""
    ids = settings.get(STOP_IDS) or ()
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{STOP_IDS}: expected a list of ids of at least 0, got {ids!r}")
    return tuple(ids)


def unsuitable(
    policy: UnmaskingPolicy, sampling: SamplerConfig, given: Mapping[str, Any], block_length: int
) -> str | None:
    """Why ``policy`` cannot decode blocks on their own with the settings ``given``; None: it can."""
    no_length, rule = "max_new_tokens" not in given, policy.bare
    if policy.everywhere:
        return "revises tokens of blocks that the engine has finished, of which keys are kept: leave scope=all out"
    if "attention" in policy.needs:
        return "reads the model's attention, which the engine does not give"
    if isinstance(rule, Policy):
        if rule.config.context != "block":
            return (
                f'has context="{rule.config.context}": it reads the confidences of the whole buffer, and its '
                "positions count from the buffer's start, but an engine that decodes blocks one by one has logits of "
                'the active block alone. Expected a policy trained with context="block"'
            )
        if no_length and not rule.config.zero_time:
            return (
                "reads the time, steps taken / max_new_tokens: the algorithm config must set max_new_tokens, the "
                "length of the completions to reckon with (in training: the buffer's)"
            )
        if sampling.actions == "bernoulli":
            return (
                'with actions="bernoulli" may unmask nothing in a step, but an engine expects progress in every step; '
                'use "bernoulli-argmax", "greedy" or "dpls"'
            )
        if "alpha" in given and not policy.conditioned:
            return f"is not conditioned on alpha, got alpha={given['alpha']}"
    elif rule.learned:
        return "is a set policy, which reads the tokens of the whole buffer, but the engine gives it one block"
    elif pointless := [key for key in LEARNED_ONLY if key in given]:
        return f"has no use for {', '.join(pointless)}"
    if isinstance(rule, FixedSteps):
        steps, blocks = int(rule.values[0]), -(-sampling.max_new_tokens // block_length)
        if no_length:
            return "counts steps for the whole buffer: the algorithm config must set max_new_tokens"
        if steps % blocks:
            return (
                f"must have a number of steps that is a multiple of the {blocks} blocks of "
                f"max_new_tokens={sampling.max_new_tokens}, got {steps}"
            )
    return None


def refused(request: Any, settings: Mapping[str, Any]) -> str | None:
    """What ``request``, SGLang's Req, asks for that a server with ``settings`` cannot do; None: nothing.

    A temperature of 1 is what SGLang fills in and says nothing. 0 arrives as top_k=1. Stop tokens, stop strings and the
    number of tokens are the engine's own.
    """
    params, own = request.sampling_params, settings.get("temperature") or 0
    asked = {name: getattr(params, name) for name in NEUTRAL}
    asked = {name: value for name, value in asked.items() if value not in (None, NEUTRAL[name], settings.get(name))}
    if params.top_k not in (-1, 1, ALL_TOKENS, settings.get("top_k")):
        asked["top_k"] = params.top_k
    temperature = 0 if params.top_k == 1 else params.temperature
    if temperature not in (1, own):
        asked["temperature"] = temperature
    asked |= {name: True for name in REPORTS if getattr(request, name)}
    if not asked:
        return None
    given = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    return (
        f"{given}: not possible, as the algorithm config of this server says how all requests are decoded, at "
        f"temperature={own:g}; leave it out"
    )
