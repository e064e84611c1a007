"""``topk_confidence`` against the chain of eager calls that research code makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.baselines import compiled, one_block_per_row
from unmask.benchmarking.captured import CALLS, Call, copies, in_turn, library, on_device
from unmask.benchmarking.timing import Comparison, Extra

VOCAB = 126_464


def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax, softmax over the vocabulary, top-k of the probabilities: three passes and a copy."""
    token = logits.argmax(dim=-1)
    confidence = torch.softmax(logits, dim=-1).topk(1, dim=-1).values
    return confidence, token


def eager_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, as upstream generation code has it."""
    return eager(logits.double())


def extra(make: Callable[[], Call], expected: tuple[Tensor, Tensor], tolerance: float) -> Extra:
    """A baseline that has to reproduce the ``expected`` confidence and token."""
    return Extra(make, lambda call: same(call(), expected, tolerance))


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Equal tokens, and confidences within ``tolerance``."""
    assert torch.equal(got[1], expected[1]), "tokens differ from argmax"
    error = (got[0] - expected[0]).abs().max().item()
    assert error < tolerance, f"confidence is off by {error:.2g}"


def comparison(logits: Tensor, goal: float | None) -> Comparison:
    """All contenders on logits (rows, V)."""
    exact, device, inputs = eager_float64(logits), logits.device, copies(logits)
    calls = max(CALLS, len(inputs))
    ours = library(in_turn(lambda logits: ops.topk_confidence(logits, 1), inputs), device, calls)
    # A softmax in bfloat16 rounds its result to 8 bits.
    rounding = 1e-5 if logits.dtype == torch.float32 else 4 * torch.finfo(logits.dtype).eps
    extras = {"eager, compiled": extra(lambda: in_turn(compiled(eager, logits), inputs), exact, rounding)}
    if device.type == "cuda":
        extras["one block per row"] = extra(
            lambda: on_device(in_turn(one_block_per_row(device), inputs), device, calls), exact, 1e-5
        )

    def check() -> None:
        for call in ours.values():
            found = call()
            same((found.confidence, found.token[..., 0]), exact, 1e-5)
        same(eager(logits), exact, rounding)

    name = str(logits.dtype).removeprefix("torch.")
    return Comparison(
        "topk_confidence",
        f"{logits.shape[0]} x {logits.shape[1]} {name}",
        {
            **ours,
            "eager": in_turn(eager, inputs),
            "eager, float64": in_turn(eager_float64, inputs),
            "sum of logits": on_device(in_turn(torch.sum, inputs), device, calls),
        },
        check,
        goal=goal,
        bytes_moved=logits.nbytes,
        calls=1,
        extras=extras,
        yardsticks=frozenset({"sum of logits"}),
    )


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """The rows of the performance goals: 256 and 32 rows of LLaDA's vocabulary, float32 and bfloat16."""
    out = []
    for rows in (64,) if quick else (256, 32):
        for dtype, goal in ((torch.float32, 25.0), (torch.bfloat16, 30.0)):
            torch.manual_seed(rows)
            logits = (torch.randn(rows, VOCAB, device=device) * 3).to(dtype)
            out.append(comparison(logits, goal if device.type == "cpu" and rows == 256 else None))
    return out
