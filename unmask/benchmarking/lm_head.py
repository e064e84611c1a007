"""The LM head on the rows that count: those of the active block, or those still masked, instead of the whole buffer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask import ops
from unmask.benchmarking.calls import Contender
from unmask.benchmarking.policy_forward import BLOCK, LENGTH
from unmask.benchmarking.timing import Comparison
from unmask.benchmarking.topk_confidence import VOCAB

HIDDEN = 4096
"""Of LLaDA."""

Found = tuple[Tensor, Tensor]
"""Confidence (R,) and token (R,) of the rows that are asked for."""


@torch.no_grad()
def few_rows(hidden: Tensor, weight: Tensor, rows: Tensor) -> Found:
    """Logits of the chosen rows alone, as models give them for ``positions``."""
    found = ops.topk_confidence(F.linear(hidden[rows], weight), 1)
    return found.confidence[:, 0], found.token[:, 0]


@torch.no_grad()
def all_rows(hidden: Tensor, weight: Tensor, rows: Tensor) -> Found:
    """Logits of the whole buffer, of which only the chosen rows are looked at."""
    found = ops.topk_confidence(F.linear(hidden, weight), 1, rows=rows)
    return found.confidence[:, 0], found.token[:, 0]


def agree(tolerance: float, got: Found, want: Found) -> None:
    """Products of another shape round differently, so a token may differ where two are nearly as probable."""
    error = (got[0] - want[0]).abs().max().item()
    assert error < tolerance, f"confidences differ by {error}"
    equal = (got[1] == want[1]).float().mean().item()
    assert equal > 0.9, f"{equal:.0%} of the tokens are the same"
    assert float(want[0].max()) > 0.01, "the confidences are too flat to tell anything"


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """256 hidden states against LLaDA's head: the 32 rows of a block, and the 128 masked half-way through."""
    size, vocab = (512, 16_384) if quick else (HIDDEN, VOCAB)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        torch.manual_seed(0)
        hidden = torch.randn(LENGTH, size, device=device).to(dtype)
        weight = torch.empty(vocab, size, device=device, dtype=dtype).normal_(std=3 / size**0.5)
        block = torch.arange(BLOCK, 2 * BLOCK, device=device)
        masked = torch.randperm(LENGTH, device=device)[: LENGTH // 2].sort().values
        for name, rows in (("active block", block), ("masked positions", masked)):
            kind = str(dtype).removeprefix("torch.")
            yield Comparison(
                "lm_head",
                f"{name}: {len(rows)} of {LENGTH} rows, {size} x {vocab} {kind}",
                {
                    "unmask": Contender(partial(few_rows, hidden, weight, rows)),
                    "eager": Contender(partial(all_rows, hidden, weight, rows)),
                },
                partial(agree, tolerance),
                bytes_moved=weight.nbytes,
                flops=2 * len(rows) * size * vocab,
            )
