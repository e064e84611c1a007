"""topk_confidence: one block a row and several, k = 1 and more, greedy, entropy and sampling, for the race detector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_reference import truth

from unmask.ops import topk_confidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("k", "temperature", "entropy"),
    [(1, 0.0, False), (1, 0.0, True), (1, 0.7, True), (6, 0.0, False), (6, 0.0, True), (6, 0.7, False)],
)
@pytest.mark.parametrize("vocab", [700, 20000, 70000])
def test_topk(
    dtype: torch.dtype, k: int, temperature: float, entropy: bool, vocab: int, device: Callable[..., None]
) -> None:
    device(132, wave=16)  # on cc 80 the blocks of a row meet in global memory
    logits = (4 * torch.randn(2, vocab)).to(dtype)
    arguments = {"temperature": temperature, "entropy": entropy, "logsumexp": True, "exclude": (5, 400), "seed": 3}
    got, want = topk_confidence(logits, k, **arguments), truth(topk_confidence, logits, k, **arguments)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.sample, want.sample)
    assert (got.confidence - want.confidence).abs().max() < 1e-5
