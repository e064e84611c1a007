"""``topk_confidence`` against the chain of eager calls that research code makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.baselines import Statistics, compiled, one_block_per_row
from unmask.benchmarking.timing import Call, Comparison, Extra

VOCAB = 126_464


def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax, softmax over the vocabulary, top-k of the probabilities: three passes and a copy."""
    token = logits.argmax(dim=-1)
    confidence = torch.softmax(logits, dim=-1).topk(1, dim=-1).values
    return confidence, token


def eager_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, as upstream generation code has it."""
    return eager(logits.double())


def extra(logits: Tensor, make: Callable[[], Statistics], expected: tuple[Tensor, Tensor], tolerance: float) -> Extra:
    """A baseline on ``logits`` that has to reproduce the ``expected`` confidence and token."""

    def prepare() -> Call:
        return partial(make(), logits)

    return Extra(prepare, lambda call: same(call(), expected, tolerance))


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Equal tokens, and confidences within ``tolerance``."""
    assert torch.equal(got[1], expected[1]), "tokens differ from argmax"
    error = (got[0] - expected[0]).abs().max().item()
    assert error < tolerance, f"confidence is off by {error:.2g}"


def comparison(logits: Tensor, goal: float | None) -> Comparison:
    """All contenders on logits (rows, V)."""
    exact = eager_float64(logits)

    def ours() -> tuple[Tensor, Tensor]:
        found = ops.topk_confidence(logits, 1)
        return found.confidence, found.token[..., 0]

    # A softmax in bfloat16 rounds its result to 8 bits.
    rounding = 1e-5 if logits.dtype == torch.float32 else 4 * torch.finfo(logits.dtype).eps
    extras = {"eager, compiled": extra(logits, lambda: compiled(eager, logits), exact, rounding)}
    if logits.device.type == "cuda":
        extras["one block per row"] = extra(logits, lambda: one_block_per_row(logits.device), exact, 1e-5)

    def check() -> None:
        same(ours(), exact, 1e-5)
        same(eager(logits), exact, rounding)

    name = str(logits.dtype).removeprefix("torch.")
    return Comparison(
        "topk_confidence",
        f"{logits.shape[0]} x {logits.shape[1]} {name}",
        {
            "unmask": lambda: ops.topk_confidence(logits, 1),
            "eager": lambda: eager(logits),
            "eager, float64": lambda: eager_float64(logits),
            "sum of logits": lambda: logits.sum(),
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
