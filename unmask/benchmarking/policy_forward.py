"""``policy_forward`` against the same network as a torch module: eager, compiled, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.calls import Call, Contender, Flushed, compiled, on_device
from unmask.benchmarking.timing import Comparison
from unmask.policies.learned import Policy
from unmask.policies.network import PolicyConfig

LENGTH, BLOCK = 256, 32
CENTRE, SLOPE = 0.8, 12.0
"""The policy's logit is 0 near this confidence and rises about this fast with it."""


def confident_policy(device: torch.device) -> Policy:
    """A policy of the reference size that unmasks confident positions, with random weights in every layer.

    The confidence c enters along one direction u and a constant along another, v, so that the normalised
    ``c u + v`` has the component c / sqrt(c^2 + 1) along u, from which the output layer makes its logit. What the
    block adds, from all layers at full cost, is kept small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(PolicyConfig())
        with torch.no_grad():
            for p in policy.parameters():
                p.normal_(std=0.05)
            block = policy.transformer_blocks[0]
            for norm in (block.norm1, block.norm2, policy.final_norm):
                norm.weight.fill_(1.0)  # type: ignore[operator, union-attr]
                norm.bias.zero_()  # type: ignore[operator, union-attr]
            u = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(policy.config.hidden_size // 4)
            v = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(policy.config.hidden_size // 4)
            policy.confidence_proj.weight.copy_(u[:, None])
            policy.confidence_proj.bias.copy_(v)
            for layer in (block.out_proj, block.linear2):
                layer.weight.mul_(0.2)  # type: ignore[operator, union-attr]
            rise = SLOPE * (CENTRE**2 + 1) ** 1.5  # slope of c / sqrt(c^2 + 1) is (c^2 + 1) ** -1.5
            policy.output_proj.weight.copy_(u[None] * rise / u.numel())
            policy.output_proj.bias.fill_(-rise * CENTRE / (CENTRE**2 + 1) ** 0.5)
    return policy.to(device).eval()


def comparison(policy: Policy, batch: int, active: int, device: torch.device, flushed: bool = False) -> Comparison:
    """Logits of the last ``active`` positions of a buffer whose first block is filled.

    ``flushed``: nothing of inputs and weights is in the GPU's cache. Else all is, from the call before.
    """
    mask = torch.ones(batch, LENGTH, dtype=torch.bool, device=device)
    mask[:, :BLOCK] = False
    confidence, time = torch.rand(batch, LENGTH, 1, device=device), torch.full((batch,), 0.1, device=device)
    rows = torch.zeros_like(mask)
    rows[:, -active:] = True

    def without_gradients(network: Callable[..., Tensor]) -> Call:
        return torch.no_grad()(lambda: network(mask, confidence, time))

    def agree(got: Tensor, want: Tensor) -> None:
        error = (got - want)[rows].abs().max().item()
        assert error < 1e-4, f"logits are off by {error:.2g}"

    ours = without_gradients(lambda *seen: ops.policy_forward(policy.packed_weights(), *seen, rows=rows))
    eager, goals = without_gradients(policy), {"ratio": 4.0 if active == BLOCK else 2.0}
    contenders = {"unmask": Contender(ours), "eager": Contender(eager)}
    if device.type == "cuda":
        graphs = {"module in a graph": eager, "compiled, in a graph": without_gradients(compiled(policy))}
        wrap = Flushed if flushed else on_device
        called = {} if flushed else {"unmask, from Python": contenders["unmask"], "eager": contenders["eager"]}
        contenders = {n: Contender(wrap(call, device)) for n, call in {"unmask": ours, **graphs}.items()} | called
        goals = {"seconds": 12e-6} if batch == 1 else {}
    return Comparison(
        "policy_forward",
        f"batch {batch}, L = {LENGTH}, {active} active{', cache flushed' if flushed else ''}",
        contenders,
        agree,
        baseline=list(contenders)[1],
        reference=list(contenders)[1],
        goals=goals,
        calls=1,
        # Feed-forward and scores of the active rows: what no algebra removes.
        flops=batch * active * (2 * 2 * 128 * 512 + 2 * 128 * LENGTH),
    )


def comparisons(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Batch 1 and 16; logits needed in one block of 32, or everywhere; on CUDA also with a flushed cache."""
    policy = confident_policy(device)
    for batch in (1,) if quick else (1, 16):
        for active in (BLOCK, LENGTH):
            for flushed in (False, True) if device.type == "cuda" else (False,):
                yield comparison(policy, batch, active, device, flushed)
