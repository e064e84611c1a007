"""The one denoising step: observe the logits, let the policy decide, commit tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.logits import narrowed, penalised
from unmask.sampling.state import State

Statistics = dict[str, Tensor]
"""Fields of an :class:`Observation` that come from logits, each (N, S, ...) for S positions per row."""

OF_BLOCK = ("logits", "positions", "attention")
"""Statistics that are of the active block alone, and are never spread over the buffer."""


def observe(
    logits: Tensor, state: State, policy: UnmaskingPolicy, config: SamplerConfig, positions: Tensor | None = None
) -> Observation:
    """Reduce the logits of one step to what the policy reads.

    Args:
        logits: (N, S, V) float32, bfloat16 or float16, aligned: each row predicts the token at its own position.
        positions: (N, S) int64, the buffer positions of the logits; None: all L, in order.
    """
    state = replace(state, ready=prepared(state, policy))
    values = statistics(logits, state, policy, config, positions)
    return observation(spread(values, positions, state.length), state, policy, config)


def commit(state: State, observation: Observation, decision: Decision, config: SamplerConfig) -> Tensor:
    """Draw an action from the decision's logits, if it has logits, and commit it to ``state`` in place.

    Returns the rank (N, L) int32 of every position: 0 where a token was committed, or for ``actions="dpls"`` the order
    of the draw; :data:`unmask.ops.unmask_.REVISED` where one was revised; else -1. Raises TypeError for what is no
    :class:`Decision`, and for one without exactly one of ``select`` and ``logits``.
    """
    action = Decision.action(decision)
    unmask = partial(
        ops.unmask_,
        candidates=observation.candidates,
        max_steps=state.max_steps,
        eos=state.stop_ids,
        temperature=config.policy_temperature,
        scale=config.policy_scale,
        seed=state.seed,
        revise=decision.revise,
        max_post=state.max_post,
        everywhere=state.everywhere,
        settled_stop=state.settled_stop,
    )
    if decision.select is None and decision.keep is not None:  # draw on a copy, commit what is left
        copies = {name: getattr(state, name).clone() for name in ("tokens", "mask", "allowed", "rows")}
        drawn = unmask(replace(state, **copies), action=action, mode=config.actions)
        return unmask(state, action=decision.keep(drawn >= 0), mode="select")
    return unmask(state, action=action, mode=config.actions if decision.select is None else "select")


def statistics(
    logits: Tensor,
    state: State,
    policy: UnmaskingPolicy,
    config: SamplerConfig,
    positions: Tensor | None = None,
    spreads: bool = False,
) -> Statistics:
    """The fields of an observation that come from ``logits`` (N, S, V) at ``positions`` (N, S).

    With ``spreads`` the positions are those of the active block, and the fields are of the whole buffer.
    """
    ready = prepared(state, policy)
    read, drawing, narrow = ready.read, config.temperature > 0, narrows(config)
    if config.repetition_penalty != 1:
        logits = penalised(logits, state, positions, config.repetition_penalty)
    given: dict[str, Any] = {}
    counter = draw_counter(state, None if spreads else positions) if drawing else None
    if spreads:
        assert ready.sources is not None
        given = {"rows": ready.sources.flatten(), "read": read.flatten()}
        counter = None if counter is None else counter.flatten(0, 1)
    elif not policy.full_context:
        given = {"rows": read if positions is None else read.gather(1, positions)}
    reduce: Callable[..., ops.TopkConfidence] = partial(
        ops.topk_confidence,
        seed=state.seed,
        counter=counter,
        exclude=(state.mask_token_id,),
        **given,
    )
    stats = reduce(
        logits,
        policy.num_confidences,
        temperature=0.0 if narrow else config.temperature,
        logsumexp=narrow,
        entropy="entropy" in policy.needs,
    )
    values = {"confidence": stats.confidence, "candidates": stats.sample, "token_confidence": stats.sample_confidence}
    if narrow:  # the draw alone; the confidences stay those of all tokens
        assert stats.logsumexp is not None
        drawn = reduce(narrowed(logits, config, mask_id(state)), 1, temperature=config.temperature).sample
        chosen, defined = logits.gather(-1, drawn.clamp_min(0)[..., None])[..., 0], stats.sample >= 0
        values["candidates"] = torch.where(defined, drawn, stats.sample)
        values["token_confidence"] = torch.where(
            defined, (chosen.float() - stats.logsumexp).exp(), stats.sample_confidence
        )
    if stats.entropy is not None:
        values["entropy"] = stats.entropy
    if spreads:
        values = {name: value.view(*read.shape, *value.shape[1:]) for name, value in values.items()}
    if "logits" in policy.needs:
        values |= of_block(logits, state, positions)
    return values


def narrows(config: SamplerConfig) -> bool:
    """Whether tokens are drawn from a part of the vocabulary."""
    return config.top_k is not None or config.top_p not in (None, 1)


def mask_id(state: State) -> Tensor:
    """(1,) int64: the mask token's id on the device, by a fill, which does not wait."""
    return torch.full((1,), state.mask_token_id, device=state.tokens.device)


def of_block(logits: Tensor, state: State, positions: Tensor | None) -> Statistics:
    """The logits of each row's active block (N, BL, V), and their buffer positions."""
    if state.block_length >= state.length:
        return {"logits": logits}
    block = state.positions()
    if positions is None or positions.shape != block.shape:  # of more than the block, in order and without gaps
        first = 0 if positions is None else positions[:, :1]
        rows = torch.arange(len(block), device=block.device)[:, None]
        logits = logits[rows, block - first]
    return {"logits": logits, "positions": block}


def prepared(state: State, policy: UnmaskingPolicy) -> ops.Prepared:
    """What the step reads of ``state``, by one call in a step: ``state.ready``, or computed."""
    if state.ready is not None:
        return state.ready
    seed = state.seed if "uniform" in policy.needs else None
    horizon = state.horizon or state.length
    return ops.prepare(state, horizon=horizon, edits=policy.edits, everywhere=policy.everywhere, seed=seed)


def spread(values: Statistics, positions: Tensor | None, length: int) -> Statistics:
    """Statistics of ``positions`` (N, S) scattered into the buffer (N, L, ...), 0 elsewhere; not those of the block."""
    if positions is None:
        return values
    out = {}
    for name, value in values.items():
        if name in OF_BLOCK:
            out[name] = value
            continue
        index = positions.reshape(*positions.shape, *(1,) * (value.ndim - 2)).expand_as(value)
        buffer = value.new_zeros((value.shape[0], length, *value.shape[2:]))
        out[name] = buffer.scatter_(1, index, value)
    return out


def observation(values: Statistics, state: State, policy: UnmaskingPolicy, config: SamplerConfig) -> Observation:
    """The policy's input: ``values`` over the whole buffer, and the state before the step."""
    ready = prepared(state, policy)
    # The state changes in place, so a recording needs copies.
    keep = torch.clone if config.record else torch.Tensor.detach
    return Observation(
        mask=keep(state.mask),
        allowed=keep(state.allowed),
        steps=ready.steps,
        now=ready.time,
        draw_step=state.draw_step,
        length=state.length,
        block_length=state.block_length,
        phase=state.phase if state.grid else None,
        horizon=state.horizon,
        uniform=ready.uniform,
        alpha=state.alpha,
        condition=state.condition,
        shift=state.shift,
        memory=state.memory,
        tokens=keep(state.buffer),
        editable=ready.editable,
        stop_ids=state.end_ids,
        mask_token_id=state.mask_token_id,
        sampled=config.temperature > 0,
        marks_ends=policy.marks_ends,
        **values,
    )


def draw_counter(state: State, positions: Tensor | None) -> Tensor:
    """(N, S, 3) int64: sequence, position and step that key the token draw of every row of logits."""
    if positions is None:
        positions = torch.arange(state.length, device=state.mask.device).expand_as(state.mask)
    step = (state.forwards + state.draw_step)[:, None].expand_as(positions)
    sequence = state.sequence[:, None].expand_as(positions)
    return torch.stack((sequence, positions + state.position[:, None], step), dim=-1)
