"""Rollouts: groups of completions of the same prompt, by the policy and, if there are any, by experts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.config import effective_blocks
from unmask.models.loading import load_tokenizer
from unmask.policies.base import UnmaskingPolicy, Wrapper
from unmask.sampling.forward import model_attention
from unmask.sampling.infill import by_value, complete
from unmask.sampling.prompts import text_ids, with_chat_template
from unmask.sampling.result import GenerationResult
from unmask.sampling.sampler import Sampler
from unmask.tasks.base import Holes
from unmask.training.config import TrainerConfig


@dataclass
class Rollouts:
    """N = groups x (G + E) rollouts; each group's G by the policy come first, then its E by the experts."""

    steps: Tensor
    """(N,) int64: forwards taken (NFE)."""
    finished: Tensor
    """(N,) bool: no mask left."""
    texts: list[str]
    """Empty without a tokenizer."""
    completions: Tensor
    """(N, L) int64; of an infill the whole texts, left-padded."""
    alpha: Tensor
    """(N,) float32: the alpha of the rollout's reward."""
    expert: Tensor
    """(N,) bool: by an expert."""
    samples: Samples
    group_size: int
    """G + E."""
    block_length: int
    """Tokens per block, at most L."""


@dataclass
class Samples:
    """The M active steps of some rollouts, concatenated: what the policy saw and did."""

    mask: Tensor
    """(M, L) bool: masked before the step."""
    allowed: Tensor
    """(M, L) bool: what could have been unmasked."""
    confidence: Tensor
    """(M, L, k) float32."""
    rank: Tensor
    """(M, L) int32: -1 where nothing was unmasked, else the order."""
    time: Tensor
    """(M,) float32: steps taken before, divided by L."""
    rollout: Tensor
    """(M,) int64: the rollout of each step."""
    phase: Tensor | None = None
    """(M,) int64: where in a block the buffer begins; None: at its start."""
    missing: Tensor | None = None
    """(M,) int64: positions on the left that a step does not have, being of a shorter text with holes; None: it has
    all."""

    def take(self, index: Tensor) -> Samples:
        """The steps at ``index`` (K,) int64, or where it is True (M,) bool."""
        taken: dict[str, Any] = {n: None if v is None else v[index] for n, v in vars(self).items()}
        return Samples(**taken)

    def alike(self) -> list[Tensor]:
        """The numbers of the steps, by how many positions they have."""
        if self.missing is None:
            return [torch.arange(self.rollout.shape[0], device=self.rollout.device)]
        return [places for _, places in by_value(self.missing)]

    def cut(self) -> Samples:
        """Without the missing positions, of steps that have equally many."""
        if self.missing is None or not len(self.missing):
            return self
        pad, of_positions = int(self.missing[0]), ("mask", "allowed", "confidence", "rank")
        return replace(self, missing=None, **{name: getattr(self, name)[:, pad:] for name in of_positions})

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """Several sets of steps as one."""
        known = [name for name, value in vars(parts[0]).items() if value is not None]
        return Samples(**{name: torch.cat([vars(part)[name] for part in parts]) for name in known})


class WideView(Wrapper):
    """An expert whose recorded observations hold everything that the learned policy reads."""

    def __init__(self, expert: UnmaskingPolicy, policy: UnmaskingPolicy) -> None:
        super().__init__(expert)
        own, known = expert.num_confidences, policy.num_confidences
        if own > known:
            raise ValueError(f"the expert {expert.spec} reads {own} confidences, the policy {known}")
        if expert.edits:
            raise ValueError(f"the expert {expert.spec} revises tokens, which a policy cannot imitate: leave edit out")
        self.num_confidences, self.marks_ends = known, policy.marks_ends
        self.full_context = expert.full_context or policy.full_context


class Collector:
    """Decodes groups of rollouts with one Sampler per behaviour: the policy, and each expert."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: UnmaskingPolicy,
        config: TrainerConfig,
        experts: Sequence[UnmaskingPolicy] = (),
    ) -> None:
        self.config = config
        own, steered = config.block_length, config.expert_config().block_length
        if experts and own != steered and model_attention(model) != "bidirectional":
            raise ValueError(
                f"expert_block_length={steered} must be block_length={own}: the model is {model_attention(model)}"
            )
        self.sampler = Sampler(model, tokenizer, policy, replace(config.sampler_config(), record=True))
        wide = [WideView(expert, policy) for expert in experts]
        led = replace(config.expert_config(), record=True)
        self.experts = [Sampler(model, tokenizer, expert, led) for expert in wide]

    def collect(
        self, prompts: Sequence[str | Holes], alpha: Tensor, seed: int, first_group: int = 0, expert_only: bool = False
    ) -> Rollouts:
        """One group per prompt, or with ``expert_only`` just the experts' part of it.

        ``alpha`` (groups,) float32 is for a conditioned policy. ``seed`` keys the draws, together with the rollout's
        number, which counts from ``first_group`` groups on.
        """
        ids, c = self.encode(prompts), self.sampler.config
        parts = []
        if not expert_only:
            parts.append((False, self._decode(self.sampler, ids, alpha, seed, first_group)))
        for expert in self.experts:
            parts.append((True, self._decode(expert, ids, alpha, seed, first_group)))
        whole = not effective_blocks(c.block_length, c.max_new_tokens)
        blocks = c.block_length or c.max_new_tokens
        return join_groups(parts, alpha, blocks, expert_everywhere=whole)

    @property
    def setting(self) -> str:
        """What may differ between rounds: "L64_full_T0.5"."""
        c = self.sampler.config
        return f"L{c.max_new_tokens}_{c.block_length or 'full'}_T{c.temperature:g}"

    def evaluating(self) -> Sampler:
        """A Sampler that decodes as evaluations do."""
        known = self.sampler
        return Sampler(known.model, known.tokenizer, known.policy, self.config.eval_config())

    def encode(self, prompts: Sequence[str | Holes]) -> list[Any]:
        """The prompts' tokens, cut to the last ``max_prompt_length`` of each; ids with holes as they are."""
        return encode(self.sampler.tokenizer, prompts, self.config.max_prompt_length)

    def _decode(self, sampler: Sampler, ids: list[Any], alpha: Tensor, seed: int, first_group: int) -> GenerationResult:
        copies = self.config.num_generations if sampler is self.sampler else self.config.num_experts
        config = replace(sampler.config, seed=seed)
        each = [row for row in ids for _ in range(copies)]
        device = torch.device(sampler.model.device)
        sequence = torch.arange(len(each), device=device) + first_group * copies
        asked = alpha.to(device).repeat_interleave(copies)
        return complete(sampler, each, config, sequence, asked, share=copies > 1)


def join_groups(
    parts: Sequence[tuple[bool, GenerationResult]], alpha: Tensor, block_length: int, expert_everywhere: bool = True
) -> Rollouts:
    """Merge results, each with whether it is an expert's and with copies of every prompt, group by group.

    ``expert_everywhere``: score the expert's actions over all masked positions, not only its block, so that a
    policy for full diffusion learns them without blocks (arXiv 2512.09106).
    """
    groups = alpha.shape[0]
    results = [part for _, part in parts]
    sizes = [part.steps.shape[0] // groups for part in results]
    size = sum(sizes)
    device = results[0].steps.device
    order, samples, offset = [], [], 0
    for (is_expert, part), copies in zip(parts, sizes, strict=True):
        # Rollout i of this part is rollout `places[i]` of all.
        row = torch.arange(groups * copies, device=device)
        places = row // copies * size + offset + row % copies
        order.append(places)
        samples.append(active_samples(part, places, everywhere=expert_everywhere and is_expert))
        offset += copies
    back = torch.cat(order).argsort()
    expert = torch.cat(
        [part.steps.new_full(part.steps.shape, is_expert, dtype=torch.bool) for is_expert, part in parts]
    )
    texts = [text for part in results for text in part.texts or []]
    return Rollouts(
        steps=torch.cat([p.steps for p in results])[back],
        finished=torch.cat([p.finished for p in results])[back],
        texts=[texts[i] for i in back.tolist()] if texts else [],
        completions=torch.cat([p.completions for p in results])[back],
        alpha=alpha.to(device).repeat_interleave(size),
        expert=expert[back],
        samples=Samples.join(samples),
        group_size=size,
        block_length=block_length,
    )


def active_samples(result: GenerationResult, rollout: Tensor, everywhere: bool = False) -> Samples:
    """The steps of a recorded generation in which something was allowed.

    ``rollout`` (N,) int64 is the number of each row's rollout. ``everywhere`` allows all masked positions, not only
    those of the active block.
    """
    trajectory = result.trajectory
    assert trajectory is not None, "the sampler must record"
    allowed = trajectory.mask & trajectory.active[..., None] if everywhere else trajectory.allowed
    row, step = (trajectory.active & allowed.any(-1)).nonzero(as_tuple=True)
    missing = None if trajectory.missing is None else trajectory.missing[row]
    time = trajectory.time[step]
    if missing is not None:
        time = (step.float() / (trajectory.mask.shape[2] - missing)).clamp_max(1.0)
    return Samples(
        mask=trajectory.mask[row, step],
        allowed=allowed[row, step],
        confidence=trajectory.confidence[row, step],
        rank=trajectory.rank[row, step],
        time=time,
        rollout=rollout[row],
        phase=None if trajectory.phase is None else trajectory.phase[row],
        missing=missing,
    )


def encode(tokenizer: Any, prompts: Sequence[str | Holes], longest: int | None) -> list[Any]:
    """The tokens of ``prompts``, cut to the last ``longest`` of each; None: whole. Ids with holes stay as they are."""
    return [p if isinstance(p, Holes) else text_ids(tokenizer, p)[-(longest or 0) :] for p in prompts]


def tokenizer_for(config: Any, tokenizer: Any, instructions: bool, given: str | Holes) -> Any:
    """``tokenizer``, or that of the config's model, with the chat template that the config asks for.

    FileNotFoundError if there is none; None if none is needed, as what is ``given`` to the model is ids.
    """
    with suppress(*[FileNotFoundError] * isinstance(given, Holes)):
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.model)
    return with_chat_template(tokenizer, config.chat_template, config.system_prompt, instructions)
