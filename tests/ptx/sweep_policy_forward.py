"""Sweep of policy_forward against float64: sizes of networks and batches, lengths, selections, devices."""

from __future__ import annotations

import os

import torch
from on_reference import truth
from policy_cases import inputs, pack, random_network
from sweeping import Case, sweep

from unmask.ops import policy_forward

SIZES = [(128, 2, 512)] * 3 + [(64, 2, 256), (256, 4, 1024), (16, 1, 16), (48, 3, 80), (96, 1, 272), (128, 8, 512)]
SIZES += [(160, 1, 48), (80, 2, 64), (16, 8, 16)]
SHAPES = [(1, 1), (7, 5), (31, 2), (33, 17), (64, 1), (100, 2), (256, 1), (600, 1)]  # length, batch


def one(case: Case) -> None:
    r, g = case.random, case.generator
    size, k = r.choice(SIZES), r.choice([1, 2, 5, 8, 50, 64])
    length, batch = r.choice([*SHAPES, (r.randrange(1, 200), r.randrange(1, 4))])
    case.device["PTX_SMS"] = str(r.choice([24, 16, 7, 3, 1]))
    os.environ.update(case.device)
    seed = r.randrange(2**30)
    weights = pack(random_network(*size, k, seed=seed))
    mask, confidence, time = inputs(batch, length, k, seed=seed)
    selection = r.choice(["all", "masked", "none", "one", "part"])
    part = torch.rand(batch, length, generator=g) < 0.3
    rows = {"all": None, "masked": mask, "part": part}.get(selection, torch.zeros_like(mask))
    if selection == "one":
        rows[:, r.randrange(length)] = True
    cond = torch.randn(batch, size[0], generator=g) if r.random() < 0.3 else None
    case.group = f"D {size[0]} H {size[1]} F {size[2]}"
    case.text = f"size {size}, k {k}, length {length}, batch {batch}, rows {selection}, cond {cond is not None}"
    got = policy_forward(weights, mask, confidence, time, rows, cond)
    case.compare("logits", got, truth(policy_forward, weights, mask, confidence, time, rows, cond), 1e-5)


sweep(one)
