"""``topk_confidence`` against the chain of eager calls that research code makes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.calls import Contender, compiled, copies, in_turn, library, on_device
from unmask.benchmarking.timing import Comparison

VOCAB = 126_464
"""Of LLaDA."""

Found = tuple[Tensor, Tensor]
"""The largest probability (..., 1) of each row of logits (..., V), and its token (...)."""


def fused(logits: Tensor) -> Found:
    found = ops.topk_confidence(logits, 1)
    return found.confidence, found.token[..., 0]


def eager(logits: Tensor) -> Found:
    """argmax, softmax over the vocabulary, top-k of the probabilities: three passes and a copy."""
    token = logits.argmax(dim=-1)
    return torch.softmax(logits, dim=-1).topk(1, dim=-1).values, token


def eager_float64(logits: Tensor) -> Found:
    """The same in float64, as upstream generation code has it."""
    return eager(logits.double())


def agree(got: Found, want: Found) -> None:
    """Equal tokens, and confidences within 1e-5. A softmax in bfloat16 rounds its result to 8 bits."""
    assert torch.equal(got[1], want[1]), "tokens differ from argmax"
    tolerance = max(1e-5, 4 * torch.finfo(got[0].dtype).eps)
    error = (got[0] - want[0]).abs().max().item()
    assert error < tolerance, f"confidence is off by {error:.2g}"


def comparison(logits: Tensor, goals: dict[str, float]) -> Comparison:
    """All contenders on logits (rows, V)."""
    device, inputs = logits.device, copies(logits)
    return Comparison(
        "topk_confidence",
        f"{logits.shape[0]} x {logits.shape[1]} {str(logits.dtype).removeprefix('torch.')}",
        {
            **library(in_turn(fused, inputs), device),
            "eager": Contender(in_turn(eager, inputs)),
            "eager, float64": Contender(in_turn(eager_float64, inputs)),
            "eager, compiled": Contender(in_turn(compiled(eager), inputs)),
            "sum of logits": Contender(on_device(in_turn(torch.sum, inputs), device), part=True),
        },
        agree,
        reference="eager, float64",
        goals=goals,
        bytes_moved=logits.nbytes,
        calls=1,
    )


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """256 and 32 rows of LLaDA's vocabulary, float32 and bfloat16."""
    goals: dict[object, dict[str, float]] = {
        ("cpu", 256, torch.float32): {"ratio": 25, "limit_share": 1 / 1.3},
        ("cpu", 256, torch.bfloat16): {"ratio": 30},
        ("cuda", 256, torch.bfloat16): {"limit_share": 0.85},
        ("cuda", 32, torch.bfloat16): {"seconds": 6e-6},
    }
    for rows in (64,) if quick else (256, 32):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(rows)
            logits = (torch.randn(rows, VOCAB, device=device) * 3).to(dtype)
            yield comparison(logits, goals.get((device.type, rows, dtype), {}))
