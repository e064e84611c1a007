"""``unmask_``: draw every row's action, write and revise its tokens, and advance the row's state, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.ops import library
from unmask.ops.random import seed_tensor
from unmask.ops.state import State

MODES = ("select", "bernoulli", "bernoulli-argmax", "greedy", "dpls")
"""In the order of ActionMode in csrc/ops/unmask.h."""
REVISED = -2
"""The rank of a token that was overwritten with another."""


def unmask_(
    state: State,
    candidates: Tensor,
    action: Tensor,
    *,
    mode: str = "select",
    max_steps: int | None = None,
    eos: int | Sequence[int] | None = (),
    temperature: float = 1.0,
    scale: float = 1.0,
    stop_logit: float = 0.0,
    seed: int | Tensor = 0,
    revise: Tensor | None = None,
    max_post: int | None = None,
    everywhere: bool = False,
    settled_stop: bool = False,
) -> Tensor:
    """Unmask and revise positions of the active blocks and bring ``state`` up to date, in place.

    A row that is done is left exactly as it is. A running row gets ``forwards`` + 1, and ``steps`` + 1 if its active
    block had a mask, as it always has without ``max_post``. Only allowed positions can be unmasked: ``state.allowed``
    may be narrower on entry than the masks of the active block, not wider. csrc/ops/unmask.h has the whole contract.
    Raises TypeError or ValueError naming an argument of the wrong type, dtype, shape, device, layout or value.

    Args:
        state: the rows; everything but the keys of the draws (sequence, draw_step, position) and the phase is written.
        candidates: (B, L) int64, the token each position would get. A negative one says that its logits were
            undefined; choosing or revising it ends the row as POISONED, unwritten.
        action: (B, L) float32 logits of the policy; for ``mode="select"`` the decision itself, bool or > 0.
        mode: how the action comes out of ``action``: "select" (decided already), "bernoulli" (each allowed position by
            itself with probability min(1, scale * sigmoid(action / temperature))), "bernoulli-argmax" (the same, but
            the highest logit if nothing was drawn), "greedy" (logit > 0, else the highest) or "dpls" (dynamic
            Plackett-Luce: in order, without replacement, until STOP is drawn; at least one).
        max_steps: a row with masks left after that many steps ends as EXHAUSTED; None = L.
        eos: at most 16 stop ids. With one of them before all its masks a row is complete; its masks become that id.
        temperature: > 0; logits are divided by it ("bernoulli", "bernoulli-argmax", "dpls").
        scale: >= 0; factor on the Bernoulli probabilities.
        stop_logit: utility of STOP in "dpls".
        seed: key of the draws, with a row's sequence, forwards + draw_step, and i + position at buffer position i: an
            int, or an int64 tensor of one element on the device of the tokens.
        revise: (B, L) bool, tokens to overwrite with their candidates. It counts where ``state.editable`` is True,
            nothing is masked and the block is active; ``state.editable`` must be given then.
        max_post: None: a block ends with its last mask. Else it goes on until a step that began without a mask in it
            changes nothing, at most for this number of such steps (>= 0).
        everywhere: whether the blocks before the active one are revised as well.
        settled_stop: whether an id of ``eos`` counts only in blocks that have ended; it always does with ``max_post``.

    Returns:
        rank (B, L) int32: 0 where a token was unmasked (for "dpls" the order of the draw, 0, 1, 2, ...), REVISED where
        one was overwritten with another, else -1.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    tensors = (state.tokens, state.mask, state.allowed, state.rows, candidates, action)
    most = state.length if max_steps is None else max_steps
    stops = () if eos is None else (eos,) if isinstance(eos, int) else eos
    numbers = (state.start, state.block_length, most, MODES.index(mode), stops, temperature, scale, stop_logit)
    key = None if mode in ("select", "greedy") else seed_tensor(seed, state.tokens.device)
    edits = (revise, None if revise is None else state.editable, max_post, everywhere, settled_stop)
    return library.call("unmask_", *tensors, *numbers, key, *edits)


@torch.library.register_fake("unmask::unmask_")
def _fake(tokens: Tensor, mask: Tensor, *_: object) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.int32)
