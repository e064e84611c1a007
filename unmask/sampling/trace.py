"""What happened to every position in a recorded generation, as plain data for the page that plays it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.ops.unmask_ import REVISED

if TYPE_CHECKING:
    from unmask.sampling.config import SamplerConfig
    from unmask.sampling.result import GenerationResult
    from unmask.sampling.state import State
    from unmask.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class Origin:
    """What a recorded result came from."""

    policy: str
    tokenizer: Any
    block_length: int
    stop_ids: tuple[int, ...]
    padding: Tensor
    """(B,) int64: left padding of each row of the result's sequences."""

    @classmethod
    def of(cls, sampler: Any, state: State, config: SamplerConfig) -> Origin:
        """The origin of a generation that ``sampler`` ran with ``config`` to the end of ``state``."""
        policy, start = sampler.policy, state.start
        alpha = policy.default_alpha if config.alpha is None else config.alpha
        dial = f"alpha {alpha:g}" if policy.conditioned else ""
        dial = dial if config.target_nfe is None else f"target NFE {config.target_nfe:g}"
        label = ", ".join(filter(None, (policy.spec, dial)))
        padding = torch.zeros_like(state.steps) if state.attention is None else (~state.attention[:, :start]).sum(dim=1)
        return cls(label, sampler.tokenizer, state.block_length, state.end_ids, padding)


@dataclass
class Words:
    """The texts of tokens, each once; a token is known by its place in the list."""

    tokenizer: Any
    texts: list[str] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    def place(self, token: int) -> int:
        """The place of ``token`` in ``texts``."""
        if token not in self.places:
            self.places[token] = len(self.texts)
            self.texts.append(self.text(token))
        return self.places[token]

    def text(self, token: int) -> str:
        """What ``token`` adds to a text. It is decoded behind itself, as tokenizers drop the space that a text begins
        with; a part of a character is shown as the tokenizer names it, control characters as their escapes."""
        if self.tokenizer is None:
            return f"{token} "
        one, two = (self.tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        text = two[len(one) :] if two.startswith(one) else one
        if "\ufffd" in text and hasattr(self.tokenizer, "convert_ids_to_tokens"):
            text = self.tokenizer.convert_ids_to_tokens([token])[0]
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def trace_data(results: Sequence[GenerationResult], rows: Sequence[int]) -> dict[str, Any]:
    """The decodings of ``rows`` in each of ``results``, which are of the same prompts, by different policies perhaps.

    Events of a step name the buffer position, the token's place among the words, and its confidence: "commit" (with the
    order of the draw), "revise", "reject" (it was open to the policy, which did not take it) and "fill" (written
    without a choice of the policy: the rest behind an end of sequence, and the seeds of blocks).

    Raises ValueError for a result without a recording, rows that it does not have, or prompts that differ.
    """
    recordings = [recording(result, rows) for result in results]
    words, prompts = Words(recordings[0][1].tokenizer), []
    for row in rows:
        runs, starts = [], []
        for result, (trajectory, origin) in zip(results, recordings, strict=True):
            padding = int(origin.padding[row])
            ids = result.sequences[row, padding : result.sequences.shape[1] - result.completions.shape[1]].tolist()
            starts.append(ids)
            runs.append(run_data(result, trajectory, origin, row, words))
        if any(ids != starts[0] for ids in starts):
            raise ValueError(f"row {row}: the results are of different prompts, which cannot stand side by side")
        prompts.append({"prompt": [words.place(token) for token in starts[0]], "runs": runs})
    return {"words": words.texts, "prompts": prompts}


def recording(result: GenerationResult, rows: Sequence[int]) -> tuple[Trajectory, Origin]:
    """What was recorded of ``result``; errors as for :func:`trace_data`."""
    count = result.completions.shape[0]
    if result.trajectory is None or result.origin is None:
        raise ValueError(
            "the result was not recorded: decode with record=True, as in sampler.generate(prompts, record=True)"
        )
    if bad := [row for row in rows if not 0 <= row < count]:
        raise ValueError(f"row must be from 0 to {count - 1}, got {bad[0]}")
    return result.trajectory, result.origin


def run_data(result: GenerationResult, t: Trajectory, origin: Origin, row: int, words: Words) -> dict[str, Any]:
    """One policy's decoding of one prompt."""
    infill = result.sequences.shape == result.completions.shape
    skip = int(origin.padding[row]) if infill else 0
    final, took = result.completions[row, skip:].tolist(), t.active[row]
    place = slice(skip, skip + len(final))
    masks, allowed, ranks = (v[row, took, place].tolist() for v in (t.mask, t.allowed, t.rank))
    tokens, confidences = t.candidates[row, took, place].tolist(), t.confidence[row, took, place, 0].tolist()
    done, phase = bool(result.finished[row]), 0 if t.phase is None else int(t.phase[row])
    steps = []
    for s, mask in enumerate(masks):
        events: dict[str, list[list[float]]] = {"commit": [], "revise": [], "reject": [], "fill": []}
        after = masks[s + 1] if s + 1 < len(masks) else [m and not done for m in mask]
        for i, rank in enumerate(ranks[s]):
            seed = s == 0 and not mask[i] and not infill
            if rank == -1 and (seed or (mask[i] and not after[i])):
                events["fill"].append([i, words.place(final[i])])
            elif rank != -1 or allowed[s][i]:
                kind = "revise" if rank == REVISED else "commit" if rank >= 0 else "reject"
                proposal = [i, words.place(tokens[s][i]), round(confidences[s][i], 3)]
                events[kind].append([*proposal, rank] if rank > 0 else proposal)
        steps.append({kind: found for kind, found in events.items() if found})
    nfe, tpf = int(result.steps[row]), float(result.tokens_per_forward[row])
    others = 0 if result.forwards is None else int(result.forwards[row]) - nfe
    counts = f"NFE {nfe}" + (f" and {others} other forwards" if others else "") + f", {tpf:.2f} tokens per forward"
    return {
        "policy": origin.policy,
        "summary": counts + ("" if done else ", unfinished"),
        "length": len(final),
        "stops": [words.place(token) for token in origin.stop_ids],
        "edges": [i for i in range(len(final)) if (i + phase) % origin.block_length == 0 or i == 0],
        "given": [[i, words.place(token)] for i, token in enumerate(final) if infill and not (masks and masks[0][i])],
        "steps": steps,
    }
