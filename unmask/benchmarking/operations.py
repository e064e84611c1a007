"""Single operations: ``topk_confidence``, ``policy_forward``, and the LM head on the rows that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask import ops
from unmask.benchmarking.calls import Call, Flushed, compiled, copies, library, on_device
from unmask.benchmarking.timing import Comparison
from unmask.policies.config import PolicyConfig
from unmask.policies.learned import Policy

VOCAB = 126_464  # LLaDA's
LENGTH, BLOCK = 256, 32

Found = tuple[Tensor, Tensor]  # the largest probability of each row of logits, and its token


def fused(logits: Tensor, rows: Tensor | None = None) -> Found:
    found = ops.topk_confidence(logits, 1, rows=rows)
    return found.confidence[..., 0], found.token[..., 0]


def eager(logits: Tensor) -> Found:
    """argmax, softmax over the vocabulary, top-k of the probabilities: three passes and a copy."""
    token = logits.argmax(dim=-1)
    return torch.softmax(logits, dim=-1).topk(1, dim=-1).values[..., 0], token


def in_float64(chain: Callable[[Tensor], Found]) -> Callable[[Tensor], Found]:
    """``chain`` in float64, as upstream generation code has it."""
    return lambda logits: chain(logits.double())


def agree(got: Found, want: Found, tolerance: float = 1e-5, tokens: float = 1.0) -> None:
    """Confidences within ``tolerance``, or 4 units of a coarser dtype, and a share ``tokens`` of equal tokens."""
    error = (got[0] - want[0]).abs().max().item()
    assert error < max(tolerance, 4 * torch.finfo(got[0].dtype).eps), f"a confidence is off by {error:.2g}"
    equal = (got[1] == want[1]).float().mean().item()
    assert equal >= tokens, f"only {equal:.1%} of the tokens are the same"


def statistics(logits: Tensor, goals: dict[str, float]) -> Comparison:
    """The pass over logits (rows, V) against the chain of calls of research code; all compared with float64."""
    device, exact, turns = logits.device, in_float64(eager)(logits), copies(logits)

    def on_logits(function: Callable[[Tensor], object]) -> Call:
        return lambda: function(next(turns))

    ways = {"eager": eager, "eager, float64": in_float64(eager), "eager, compiled": compiled(eager)}
    contenders = library(on_logits(fused), device) | {name: on_logits(way) for name, way in ways.items()}
    contenders["sum of logits"] = on_device(on_logits(torch.sum), device)
    return Comparison(
        "topk_confidence",
        f"{logits.shape[0]} x {VOCAB} {str(logits.dtype)[6:]}",
        contenders,
        lambda got, _: agree(got, exact),
        parts=("sum of logits",),
        goals=goals,
        bytes_moved=logits.nbytes,
    )


def topk_confidence(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
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
            yield statistics(logits, goals.get((device.type, rows, dtype), {}))


def lm_head(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Logits of 32 or 128 rows out of 256 against those of all; products of another shape round differently."""
    size, vocab = (512, 16_384) if quick else (4096, VOCAB)  # LLaDA's
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        torch.manual_seed(0)
        hidden = torch.randn(LENGTH, size, device=device).to(dtype)
        weight = torch.empty(vocab, size, device=device, dtype=dtype).normal_(std=3 / size**0.5)
        masked = torch.randperm(LENGTH, device=device)[: LENGTH // 2].sort().values
        for name, rows in (("active block", masked.new_tensor(range(BLOCK, 2 * BLOCK))), ("masked positions", masked)):
            yield Comparison(
                "lm_head",
                f"{name}: {len(rows)} of {LENGTH} rows, {size} x {vocab} {str(dtype)[6:]}",
                {
                    "unmask": partial(lambda h, w, r: fused(F.linear(h[r], w)), hidden, weight, rows),
                    "eager": partial(lambda h, w, r: fused(F.linear(h, w), r), hidden, weight, rows),
                },
                partial(agree, tolerance=tolerance, tokens=0.9),
                bytes_moved=weight.nbytes,
                flops=2 * len(rows) * size * vocab,
                dtype=dtype,
            )


@torch.no_grad()
def confident_policy(device: torch.device) -> Policy:
    """The reference configuration, random weights in every layer, and a logit that is 0 near a confidence of 0.8.

    The confidence c enters along one direction and a constant along another, so that the normalised sum has the
    component c / sqrt(c^2 + 1) along the first. From this the output layer makes the logit.
    """
    torch.manual_seed(0)
    policy = Policy(PolicyConfig()).eval()
    for name, p in policy.named_parameters():
        p.normal_(float("norm" in name and "weight" in name), 0.02)
    direction = torch.tensor([1.0, -1.0]).repeat(64)
    policy.confidence_proj.weight.copy_(direction[:, None])
    policy.confidence_proj.bias.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(32))
    policy.output_proj.weight.copy_(direction[None] * 25 / 128)
    policy.output_proj.bias.fill_(-25 * 0.8 / (0.8**2 + 1) ** 0.5)
    return policy.to(device)


def network(policy: Policy, batch: int, active: int, device: torch.device, flushed: bool) -> Comparison:
    """Logits of the last ``active`` positions; ``flushed``: inputs and weights have left the GPU's cache."""
    position = torch.arange(LENGTH, device=device).expand(batch, LENGTH)
    mask, rows = position >= BLOCK, position >= LENGTH - active
    confidence, time = torch.rand(batch, LENGTH, 1, device=device), torch.full((batch,), 0.1, device=device)

    def on_inputs(forward: Callable[..., Tensor]) -> Call:
        return torch.no_grad()(partial(forward, mask, confidence, time))

    def same(got: Tensor, want: Tensor) -> None:
        error = (got - want)[rows].abs().max().item()
        assert error < 1e-4, f"logits are off by {error:.2g}"

    ours = on_inputs(lambda m, c, t: ops.policy_forward(policy.packed_weights(), m, c, t, rows))
    module, goals = on_inputs(policy), {"ratio": 4.0 if active == BLOCK else 2.0}
    contenders: dict[str, Call] = {"unmask": ours, "eager": module}
    if device.type == "cuda":
        ways = {"unmask": ours, "module in a graph": module, "compiled, in a graph": on_inputs(compiled(policy))}
        contenders = {name: (Flushed if flushed else on_device)(call, device) for name, call in ways.items()}
        contenders |= {} if flushed else {"unmask, from Python": ours, "eager": module}
        goals = {"seconds": 12e-6} if batch == 1 else {}
    return Comparison(
        "policy_forward",
        f"batch {batch}, L = {LENGTH}, {active} active{', cache flushed' if flushed else ''}",
        contenders,
        same,
        baseline=list(contenders)[1],
        goals=goals,
        # Feed-forward and scores of the active rows: what no algebra removes.
        flops=batch * active * (2 * 2 * 128 * 512 + 2 * 128 * LENGTH),
    )


def policy_forward(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Batch 1 and 16; logits needed in one block of 32, or everywhere; on CUDA also with a flushed cache."""
    policy = confident_policy(device)
    for batch in (1,) if quick else (1, 16):
        for active in (BLOCK, LENGTH):
            for flushed in (False, True)[: 1 + (device.type == "cuda")]:
                yield network(policy, batch, active, device, flushed)
