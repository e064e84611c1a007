"""Sweep of unmask_ against plain torch, bit for bit: whole trajectories of every mode, lengths, blocks, prompts."""

from __future__ import annotations

from dataclasses import replace

import torch
from on_reference import truth
from sweeping import Case, sweep
from unmask_cases import EOS, MASK, random_state, run

from unmask.ops.unmask_ import MODES


def one(case: Case) -> None:
    r, g = case.random, case.generator
    mode, length = r.choice(MODES), r.choice([1, 7, 32, 64, 200, 256, r.randrange(1, 300)])
    batch, start, extra = r.randrange(1, 6), r.choice([0, 1, 5]), r.choice([0, 2])
    block_length = r.choice([length, 1, 8, 32, r.randrange(1, length + 9)])
    state = random_state(g, batch, start, length, block_length, r.choice([0.1, 0.6, 1.0]), extra)
    state.status[torch.rand(batch, generator=g) < 0.1] = 1
    state = want = replace(
        state, allowed=state.allowed & (torch.rand(batch, length, generator=g) < r.choice([0.5, 2.0]))
    )
    settings = {"max_steps": r.choice([2, None]), "mode": mode, "eos": r.choice([EOS, None, [EOS, 12, 13]])}
    settings |= {"temperature": r.choice([0.3, 1.0]), "scale": r.choice([1.0, 0.8])}
    settings |= {"stop_logit": r.choice([0.0, 0.3]), "seed": r.randrange(2**62)}
    editing = r.random() < 0.5
    if editing:
        state = want = replace(state, editable=state.mask & (torch.rand(batch, length, generator=g) < 0.9))
        settings |= {
            "max_post": r.choice([None, 0, 2, 5]),
            "everywhere": r.random() < 0.5,
            "settled_stop": r.random() < 0.5,
        }
    case.group = f"{mode}, revising" if editing else mode
    case.text = f"batch {batch}, length {length}, start {start}, block {block_length}, {settings}"
    for step in range(r.choice([1, 3, 8, 20])):
        tokens = torch.randint(10, MASK, (batch, length), generator=g)
        tokens[torch.rand(batch, length, generator=g) < 0.05] = EOS
        tokens[torch.rand(batch, length, generator=g) < 0.002] = -1
        action = torch.randn(batch, length, generator=g) * 2 - 1
        action = action > 0 if mode == "select" and r.random() < 0.5 else action
        if editing:
            settings["revise"] = torch.rand(batch, length, generator=g) < r.choice([0.0, 0.1, 0.5])
        state, rank = run(state, tokens, action, **settings)
        want, want_rank = truth(run, want, tokens, action, **settings)
        for name, value in want.tensors():
            case.equal(f"{name} of step {step}", getattr(state, name), value)
        case.equal(f"rank of step {step}", rank, want_rank)


sweep(one)
