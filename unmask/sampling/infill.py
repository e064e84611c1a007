"""Infilling: texts with holes are grouped by their length and decoded without padding.

So blocks, positions and times count from a text's first token in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.sampling.config import SamplerConfig
from unmask.sampling.loop import StepRecord
from unmask.sampling.prompts import check_ids, check_tensor_prompts, encode_prompts
from unmask.sampling.result import GenerationResult
from unmask.sampling.state import State
from unmask.sampling.trajectory import join
from unmask.tasks.base import Holes

if TYPE_CHECKING:
    from unmask.sampling.sampler import Sampler


@dataclass
class Part:
    """Rows of a generation that are decoded together."""

    rows: Tensor
    """(n,) int64: their numbers."""
    missing: int
    """How much shorter their texts with holes are than the longest; 0 for prompts."""
    state: State


def complete(
    sampler: Sampler,
    prompts: Sequence[Any],
    config: SamplerConfig,
    sequence: Tensor | None = None,
    alpha: Tensor | None = None,
    share: bool = False,
    on_finished: Callable[[int], None] = lambda finished: None,
) -> GenerationResult:
    """Complete ``prompts``, or fill them if they are :class:`unmask.tasks.Holes`.

    ``share`` as for :meth:`Sampler.steps`, the rest as for :func:`parts_of`. ``on_finished`` is told how many rows are.
    """
    results, before = [], 0

    def counted(records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        for record in records:
            on_finished(before + record.finished)
            yield record

    for part in parts_of(sampler, prompts, config, sequence, alpha):
        result = sampler.result(part.state, config, counted(sampler.steps(part.state, config, share)))
        results.append((part, result))
        before += len(part.rows)
        on_finished(before)
    width = max(part.missing + part.state.tokens.shape[1] for part, _ in results)
    return assemble(results[0][0].state.tokens.new_full((before, width), sampler.padding_id), results)


def parts_of(
    sampler: Sampler,
    prompts: Sequence[Any],
    config: SamplerConfig,
    sequence: Tensor | None = None,
    alpha: Tensor | None = None,
) -> list[Part]:
    """The states that ``prompts`` are decoded in, with arguments as for :meth:`Sampler.prepare`.

    It is one state of all prompts, or if they are :class:`unmask.tasks.Holes` one of each length.
    """
    if not any(isinstance(prompt, Holes) for prompt in prompts):
        state = sampler.prepare(prompts, None, config, sequence, alpha)
        return [Part(torch.arange(len(state.rows), device=state.rows.device), 0, state)]
    sampler.check_config(config)
    ids, attention = given_problems(sampler, prompts, config)
    return split(sampler, ids, attention, config, sequence, alpha)


def given_texts(
    sampler: Sampler, input_ids: Any, attention_mask: Tensor | None, name: str, config: SamplerConfig
) -> tuple[Tensor, Tensor | None]:
    """Copies of checked ``input_ids`` (B, T) on the model's device, and attention (B, T), None if nothing is padded.

    Each comes ``num_return_sequences`` times. Errors call the ids ``name``.
    """
    model = sampler.model
    if getattr(model, "seeded", False) or sampler.on_canvases:
        raise ValueError(f"infill is not possible: each block of {type(model).__name__} follows from the last")
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"{name} must be an int64 tensor of shape (B, T), got {type(input_ids).__name__}")
    ids, attention = check_tensor_prompts(input_ids, attention_mask, sampler.padding_id, name)
    check_ids(name, ids, attention, model.vocab_size, None)
    if ids.shape[1] == 0:
        raise ValueError(f"{name} must have at least one token, got shape {tuple(ids.shape)}")
    sampler.check_context(ids.shape[1], f"{name} of {ids.shape[1]} tokens")
    count = config.num_return_sequences
    attention = None if attention is None else attention.repeat_interleave(count, 0)
    return ids.repeat_interleave(count, 0).to(model.device, copy=True), attention


def given_problems(sampler: Sampler, prompts: Sequence[Any], config: SamplerConfig) -> tuple[Tensor, Tensor | None]:
    """The same of ``prompts``, which must all be :class:`Holes`, have a hole and fit into ``max_new_tokens``."""
    mask, most = sampler.model.mask_token_id, config.max_new_tokens
    for i, ids in enumerate(prompts):
        if not isinstance(ids, Holes):
            raise ValueError(f"problem {i} has a prompt, others have ids with holes: they are not decoded together")
        if mask not in ids:
            raise ValueError(
                f"problem {i} has no hole: none of its {len(ids)} ids is the model's mask token, {mask}; they begin "
                f"with {list(ids[:8])}"
            )
        if len(ids) > most:
            raise ValueError(
                f"problem {i} has {len(ids)} ids, which is more than max_new_tokens={most} (max_completion_length in "
                "training): ask for as many as the longest problem has"
            )
    ids, attention = encode_prompts([list(row) for row in prompts], None, None, sampler.padding_id)
    return given_texts(sampler, ids, attention, "the problems' ids", config)


def split(
    sampler: Sampler,
    ids: Tensor,
    attention: Tensor | None,
    config: SamplerConfig,
    sequence: Tensor | None = None,
    alpha: Tensor | None = None,
) -> list[Part]:
    """``ids`` (B, T) by their left padding, without it; rows of padding alone are in no part.

    ``sequence`` and ``alpha`` (B,) as for :meth:`Sampler.prepare`.
    """
    pads = torch.zeros_like(ids[:, 0]) if attention is None else (~attention).sum(dim=1).to(ids.device)
    parts = []
    for pad, own in by_value(pads):
        if pad == ids.shape[1]:
            continue
        keys, alphas = own if sequence is None else sequence[own], None if alpha is None else alpha[own]
        state = sampler.new_state(ids[own, pad:], None, 0, config, keys, alphas)
        state.infill, state.stop_ids = True, ()
        parts.append(Part(own, pad, state))
    return parts


def by_value(values: Tensor) -> list[tuple[int, Tensor]]:
    """Every value of ``values`` (N,) int64 in ascending order, and the places (n,) int64 that have it."""
    return [(value, (values == value).nonzero().flatten()) for value in values.unique().tolist()]


def assemble(ids: Tensor, parts: Sequence[tuple[Part, GenerationResult]]) -> GenerationResult:
    """Merge the results of ``parts`` into one; ``ids`` (B, T), left-padded, is overwritten."""
    count, width = ids.shape
    if len(parts) == 1 and len(parts[0][0].rows) == count and not parts[0][0].missing:
        return parts[0][1]
    zeros = torch.zeros(count, dtype=torch.int64, device=ids.device)
    out = GenerationResult(
        sequences=ids,
        completions=ids,
        steps=zeros,
        finished=torch.ones(count, dtype=torch.bool, device=ids.device),
        filled=zeros.clone(),
        forwards=zeros.clone(),
    )
    texts, pads, trajectories = [""] * count, torch.full_like(zeros, width), []
    for part, result in parts:
        rows, pad = part.rows, part.missing
        ids[rows, pad:], pads[rows] = result.sequences, pad
        for name in ("steps", "finished", "filled", "forwards"):
            getattr(out, name)[rows] = getattr(result, name)
        if result.texts is not None:
            out.texts = texts
            for row, text in zip(rows.tolist(), result.texts, strict=True):
                texts[row] = text
        if result.trajectory is not None:
            trajectories.append((rows, pad, result.trajectory))
    origin = parts[0][1].origin if parts else None
    return replace(
        out,
        trajectory=join(trajectories, count, width) if trajectories else None,
        origin=replace(origin, padding=pads) if origin else None,
    )
