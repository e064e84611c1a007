"""``topk_confidence`` against the chain of eager calls that research code makes."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.timing import Comparison

VOCAB = 126_464


def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax, softmax over the vocabulary, top-k of the probabilities: three passes and a copy."""
    token = logits.argmax(dim=-1)
    confidence = torch.softmax(logits, dim=-1).topk(1, dim=-1).values
    return confidence, token


def eager_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, as upstream generation code has it."""
    return eager(logits.double())


def comparisons(device: torch.device, quick: bool = False) -> list[Comparison]:
    """The rows of the performance goals: 256 and 32 rows of LLaDA's vocabulary, float32 and bfloat16."""
    out = []
    for rows in (64,) if quick else (256, 32):
        for dtype, goal in ((torch.float32, 25.0), (torch.bfloat16, 30.0)):
            logits = (torch.randn(rows, VOCAB, device=device) * 3).to(dtype)

            def check(logits: Tensor = logits) -> None:
                ours = ops.topk_confidence(logits, 1)
                confidence, token = eager_float64(logits)
                assert torch.equal(ours.token[:, 0], token), "tokens differ from argmax"
                error = (ours.confidence - confidence).abs().max().item()
                assert error < 1e-5, f"confidence is off by {error}"

            contenders = {
                "unmask": lambda x=logits: ops.topk_confidence(x, 1),
                "eager": lambda x=logits: eager(x),
                "sum of logits": lambda x=logits: x.sum(),
            }
            if not quick:
                contenders["eager float64"] = lambda x=logits: eager_float64(x)
            name = str(dtype).removeprefix("torch.")
            out.append(
                Comparison(
                    "topk_confidence",
                    f"{rows} x {VOCAB} {name}",
                    contenders,
                    check,
                    goal=goal if device.type == "cpu" and rows == 256 else None,
                    bytes_moved=logits.nbytes,
                )
            )
    return out
