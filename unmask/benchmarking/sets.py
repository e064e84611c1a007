"""Set policies: the selection of a step, and its share of a whole step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.benchmarking.calls import Call, compiled, library, on_device
from unmask.benchmarking.decoding import random_llada
from unmask.benchmarking.step import advancing, states
from unmask.benchmarking.timing import Comparison
from unmask.models import load_model
from unmask.ops.reference.select_set import selected
from unmask.policies.config import SetPolicyConfig
from unmask.policies.set_policy import SetPolicy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.forward import Forward
from unmask.sampling.loop import Step
from unmask.sampling.state import State
from unmask.sampling.step import observation

RISK, VOCAB = 0.3, 1024

Set = tuple[Tensor, Tensor]


class Plain(SetPolicy):
    """A set policy whose selection is plain torch."""

    def _kernel_takes(self) -> bool:
        return False


@torch.no_grad()
def random_policy(vocab: int, device: torch.device, kind: type[SetPolicy] = SetPolicy) -> SetPolicy:
    """The network of the quick start with random weights, which takes eight runs for most sets."""
    torch.manual_seed(0)
    policy = kind(SetPolicyConfig(vocab_size=vocab, default_risk=RISK))
    policy.output.weight.normal_(std=0.2)
    return policy.to(device).eval()


def agree(got: Set, want: Set) -> None:
    """Equal sets but for 2 %, where a probability may lie near what decides; the same probabilities.

    Plain torch says in place of a set which run picked what.
    """
    error = (got[1] - want[1]).abs().max().item()
    assert error < 1e-4, f"a probability is off by {error:.2g}"
    different = int(((got[0] > 0) != (want[0] > 0)).any(dim=1).sum())
    assert different <= 0.02 * len(want[0]), f"{different} of {len(want[0])} sets differ"


@torch.no_grad()
def selection(length: int, batch: int, device: torch.device, rival: bool) -> Comparison:
    """The sets of a batch in the middle of a decode; with ``rival`` also by the plain loop under torch.compile."""
    policy = random_policy(VOCAB, device)
    torch.manual_seed(1)
    mask = torch.rand(batch, length, device=device) < 0.6
    confidence = torch.rand(batch, length, 5, device=device).sort(-1, descending=True).values
    tokens, candidates = (torch.randint(0, VOCAB, mask.shape, device=device) for _ in range(2))
    first = confidence[..., 0].contiguous()
    proposals = ops.Proposals(tokens, candidates, mask, mask, confidence, first)
    weights, table = [t.detach() for t in policy.weights], policy.tokens.weight.detach()
    rest = (table, proposals, mask, first.new_full((batch,), RISK), policy.config.sure, policy.config.max_runs)
    plain = partial(selected, weights, policy.frequencies)
    ways: dict[str, Call] = {"eager": partial(plain, *rest)}
    if rival:
        ways["compiled"] = partial(compiled(plain, dynamic=device.type == "cpu"), *rest)
    contenders = library(partial(ops.select_set, policy.packed_weights(), *rest), device)
    return Comparison(
        "select_set",
        f"batch {batch}, L = {length}",
        contenders | {name: on_device(way, device) for name, way in ways.items()},
        agree,
        goals={"ratio": 4.0} if device.type == "cpu" else {},
    )


@torch.no_grad()
def whole_step(name: str, model: Any, length: int, batch: int) -> Comparison:
    """A step of full diffusion with half of the tokens masked, by the op and by plain torch; beside it its parts."""
    device, config = model.device, SamplerConfig(length, None)
    torch.manual_seed(2)
    tokens = torch.randint(0, model.vocab_size, (batch, 8 + length), device=device)
    tokens[:, 8::2] = model.mask_token_id

    def state_of(policy: SetPolicy) -> State:
        return Sampler(model, None, policy, config).new_state(tokens, None, 8, config)

    def step_of(policy: SetPolicy) -> Call:
        return advancing(Step(Forward(model, policy, config), policy, config), states(state_of(policy), 1))

    policy = random_policy(model.vocab_size, device)
    state = state_of(policy)
    seen = observation(Forward(model, policy, config)(state), state, policy, config)
    return Comparison(
        "select_set, step",
        f"{name}, batch {batch}, L = {length}",
        {
            "unmask": step_of(policy),
            "eager": step_of(random_policy(model.vocab_size, device, Plain)),
            "model alone": torch.no_grad()(partial(model, tokens)),
            "selection alone": partial(policy.decide, seen),
        },
        torch.testing.assert_close,
        parts=("model alone", "selection alone"),
    )


def select_set(device: torch.device, quick: bool = False) -> Iterator[Comparison]:
    """Sets of 1 to 64 buffers of 24 to 128 tokens; steps on the packaged model and on one of two million parameters."""
    for length in (24, 64) if quick else (24, 64, 128):
        for batch in (1, 8) if quick else (1, 8, 64):
            yield selection(length, batch, device, rival=not quick and batch < 64)
    larger = random_llada(8, 128, VOCAB, device, torch.float32)
    for name, model, length in (("tiny", load_model("tiny", device=device), 24), ("2M parameters", larger, 64)):
        for batch in (1,) if quick else (1, 8, 64):
            yield whole_step(name, model, length, batch)
