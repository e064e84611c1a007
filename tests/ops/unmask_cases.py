"""States, single steps and comparisons shared by the tests of ``unmask_``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.ops import unmask_
from unmask.ops.reference import unmask_ as reference

MASK, EOS = 99, 7
MODES = ("select", "bernoulli", "bernoulli-argmax", "greedy", "dpls")
STATE = ("mask", "allowed", "steps", "remaining", "block", "done", "status")


def make_state(
    canvas: Tensor, start: int, length: int, block_length: int, done: Tensor | None = None
) -> dict[str, Any]:
    """Canvas and consistent state of its rows, on the CPU; what is masked is what holds the mask id."""
    batch = canvas.shape[0]
    mask = canvas[:, start : start + length] == MASK
    done = torch.zeros(batch, dtype=torch.bool) if done is None else done.clone()
    block = torch.full((batch,), -(-length // block_length))
    allowed = torch.zeros_like(mask)
    for b in range(batch):
        for i in mask[b].nonzero().flatten().tolist():
            block[b] = min(int(block[b]), i // block_length)
            allowed[b, i] = i // block_length == block[b] and not done[b]
    return {
        "tokens": canvas.clone(),
        "mask": mask.clone(),
        "allowed": allowed,
        "steps": torch.zeros(batch, dtype=torch.int64),
        "remaining": mask.sum(dim=1),
        "block": block,
        "done": done,
        "status": torch.zeros(batch, dtype=torch.int32),
    }


def run(state: dict[str, Any], token: Tensor, score: Tensor, device: torch.device, **settings: Any) -> dict[str, Any]:
    """State after one step (a new dict, on the CPU), with the rank under "rank"."""
    there = {name: value.to(device, copy=True) for name, value in state.items() if name != "rank"}
    if settings.get("sequence") is not None:
        settings["sequence"] = settings["sequence"].to(device)
    tokens = there.pop("tokens")
    rank = unmask_(tokens, token.to(device), score.to(device), **there, **settings)
    return {name: value.cpu() for name, value in {"tokens": tokens, **there, "rank": rank}.items()}


def run_reference(state: dict[str, Any], token: Tensor, score: Tensor, **settings: Any) -> dict[str, Any]:
    after = {name: value.clone() for name, value in state.items() if name != "rank"}
    rank = reference.unmask_(after["tokens"], token, score, **{name: after[name] for name in STATE}, **settings)
    return {**after, "rank": rank}


def assert_same(got: dict[str, Any], want: dict[str, Any], names: tuple[str, ...] = ("tokens", *STATE, "rank")) -> None:
    for name in names:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name], want[name]), f"{name}: {got[name].tolist()} != {want[name].tolist()}"


def random_canvas(generator: torch.Generator, batch: int, width: int, start: int, length: int, share: float) -> Tensor:
    canvas = torch.randint(10, 90, (batch, width), generator=generator)
    masked = torch.rand(batch, length, generator=generator) < share
    canvas[:, start : start + length][masked] = MASK
    return canvas


def one_row(buffer: list[int], block_length: int = 0) -> dict[str, Any]:
    """A batch of one, without a prompt."""
    return make_state(torch.tensor([buffer]), 0, len(buffer), block_length or len(buffer))


def step(
    state: dict[str, Any], score: list[float], device: torch.device, token: list[int] | None = None, **settings: Any
) -> dict[str, Any]:
    """One step of a batch of one; candidates are 10, 11, ... unless given."""
    length = state["mask"].shape[1]
    settings = {"start": 0, "block_length": length, "max_steps": 100, **settings}
    candidates = torch.tensor([token or list(range(10, 10 + length))])
    return run(state, candidates, torch.tensor([score]), device, **settings)


def many_rows(length: int, batch: int) -> dict[str, Any]:
    """Fully masked rows of one block."""
    row = make_state(torch.full((1, length), MASK), 0, length, length)
    return {name: value.repeat(batch, *(1,) * (value.ndim - 1)) for name, value in row.items()}
