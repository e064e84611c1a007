"""Hand-made rules: what a decision with its options costs, and what ``klass`` reads, as one call and in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.calls import Call, library, on_device
from unmask.benchmarking.operations import BLOCK, LENGTH, VOCAB
from unmask.benchmarking.step import EOS, MASK
from unmask.benchmarking.timing import Comparison
from unmask.ops import Choice
from unmask.ops.choose import arguments
from unmask.ops.reference.calm_ import calm_ as calm_in_torch
from unmask.ops.reference.choose import choose as in_torch
from unmask.policies import make_policy
from unmask.policies.base import Observation
from unmask.policies.heuristics import Heuristic
from unmask.policies.options import WithOptions

RULES = (
    "threshold:0.9", "threshold:0.9,hold-eos,window=8,decay=0.05", "threshold:0.9,spacing=3", "factor:1",
    "entropy-bound:0.1", "margin:64", "local-leap:0.9", "edit:0.9,0.5",
)  # fmt: skip


def observed(batch: int, block_length: int, device: torch.device) -> Observation:
    """A step in the middle of a decode: half of the second block is masked, or of the buffer where it is one block."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(batch, LENGTH, generator=generator) < 0.5
    allowed = mask.clone()
    if block_length < LENGTH:
        allowed[:, :BLOCK], allowed[:, 2 * BLOCK :] = False, False
    confidence = torch.rand(batch, LENGTH, 2, generator=generator).sort(-1, descending=True).values
    tokens = torch.randint(0, 1000, (batch, LENGTH), generator=generator)
    tensors: dict[str, Any] = {
        "mask": mask, "allowed": allowed, "confidence": confidence, "token_confidence": confidence[..., 0].contiguous(),
        "entropy": -confidence[..., 0].log(), "candidates": tokens.roll(1, 0), "editable": ~mask,
        "tokens": tokens.masked_fill(mask, MASK), "steps": torch.full((batch,), 3),
    }  # fmt: skip
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Observation(**moved, length=LENGTH, block_length=block_length, stop_ids=(EOS,))


def agree(got: Any, want: Any) -> None:
    """The same decision, bit by bit."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), "the decisions differ"


def decision(spec: str, batch: int, block_length: int, device: torch.device) -> Comparison:
    """One decision of the rule ``spec``."""
    policy, options = make_policy(spec), Choice()
    if isinstance(policy, WithOptions):
        policy, options = policy.inner, policy.choice
    assert isinstance(policy, Heuristic)
    asked = arguments(*policy.asked(observed(batch, block_length, device), options))
    kernel = partial(ops.library.call, "choose", *asked)
    where = "full diffusion" if block_length == LENGTH else f"block of {block_length}"
    eager = on_device(partial(in_torch, *asked), device)
    return Comparison("choose", f"{spec}, batch {batch}, {where}", {**library(kernel, device), "eager": eager}, agree)


def choose(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Decisions of rules for buffers of 256 tokens, half of them masked, in full diffusion and in blocks of 32."""
    for batch in (1,) if quick else (1, 32):
        for block_length in (LENGTH, BLOCK):
            for spec in RULES:
                yield decision(spec, batch, block_length, device)


def calm_(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """What ``klass`` computes of the logits of a block of 32 tokens, in two steps of a decode."""
    vocab = 16_384 if quick else VOCAB
    for batch in (1,) if quick else (1, 8):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(batch)
            first = torch.randn(batch, BLOCK, vocab, generator=generator) * 3
            second = first + torch.randn(first.shape, generator=generator) * 0.1
            logits = [step.to(device, dtype) for step in (first, second)]
            ways = (partial(ops.library.call, "calm_"), calm_in_torch)
            kernel, eager = (two_steps(way, logits) for way in ways)
            yield Comparison(
                "calm_",
                f"two steps of {batch * BLOCK} x {vocab} {str(dtype)[6:]}",
                {**library(kernel, device), "eager": on_device(eager, device)},
                moved_alike,
                bytes_moved=6 * logits[0].nbytes,  # read both, write one
            )


def two_steps(op: Callable[..., Any], logits: list[Tensor]) -> Call:
    """Compare ``logits[0]`` (B, S, V) with ``logits[1]``, and that with ``logits[0]``; the last result."""
    (batch, length), device = logits[0].shape[:2], logits[0].device
    before, calm_for = logits[1].clone(), torch.ones(batch, length, dtype=torch.int32, device=device)
    rest = (before, calm_for, torch.ones(batch, dtype=torch.int64, device=device), None, 0, 0.01, 2)
    return lambda: [op(now, *rest) for now in logits][-1]


def moved_alike(got: Any, want: Any) -> None:
    """Divergences within 1e-4 of each other."""
    error = (got[1] - want[1]).abs().max().item()
    assert error < 1e-4, f"a divergence is off by {error:.2g}"
