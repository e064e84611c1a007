"""Sweep of topk_confidence against plain torch in float64: awkward rows, layouts, dtypes and selections."""

from __future__ import annotations

import torch
from on_reference import truth
from sweeping import Case, sweep

from unmask.ops import topk_confidence

NAN, INF = float("nan"), float("inf")


def rows_of_logits(case: Case, vocab: int) -> torch.Tensor:
    """(6, V): one row each with a NaN, an infinity, nothing but -inf, mostly -inf; ties and large steps at times."""
    r, g = case.random, case.generator
    base = r.choice([0.01, 4.0, 4.0, 120.0]) * torch.randn(6, vocab, generator=g)
    if r.random() < 0.3:
        base = base.round()
    if vocab > 2:
        base[1, r.randrange(vocab)] = NAN
        base[2, r.randrange(vocab)] = INF
        base[3] = -INF
        base[4, torch.rand(vocab, generator=g) < 0.9] = -INF
        base[4, r.randrange(vocab)] = 0.5
    return base


def laid_out(case: Case, base: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous or as a view with odd offsets and gaps of NaN."""
    r, vocab, dtype = case.random, base.shape[1], base.dtype
    layout = r.choice(["plain", "odd", "outer"])
    if layout == "odd":
        offset, gap = r.randrange(9), r.randrange(9)
        store = torch.full((offset + 6 * (vocab + gap) + 1,), NAN, dtype=dtype)
        view = store.as_strided((6, vocab), (vocab + gap, 1), offset)
        view.copy_(base)
        return view
    if layout == "outer":
        view = torch.full((2, 4, vocab + 3), NAN, dtype=dtype)[:, :3, 1 : vocab + 1]
        view.copy_(base.view(2, 3, vocab))
        return view
    return base


def run(case: Case) -> None:
    r, g = case.random, case.generator
    vocab = r.choice([1, 7, 111, 1024, 4099, 32000, 126464, r.randrange(1, 3000)])
    dtype = r.choice([torch.float32, torch.bfloat16, torch.float16])
    k = min(r.choice([1, 1, 2, 5, 50, 64]), vocab)
    logits = laid_out(case, rows_of_logits(case, vocab).to(dtype))
    exclude = tuple(sorted(r.sample(range(vocab), min(r.choice([0, 0, 2, 16]), vocab - k))))
    shape, rows = logits.shape[:-1], None
    pick = r.random()
    if pick < 0.3:
        rows = torch.rand(shape, generator=g) < 0.6
    elif pick < 0.5:
        rows = torch.tensor([5, 0, 0, 4, 1])
        shape = rows.shape
    arguments = {"rows": rows, "exclude": exclude, "logsumexp": r.random() < 0.7, "entropy": r.random() < 0.5}
    if temperature := r.choice([0.0, 0.0, 0.05, 0.7, 3.0]):
        counter = torch.randint(0, 2**31, (*shape, 3), generator=g)
        arguments.update(temperature=temperature, seed=r.randrange(2**62), counter=counter)
    kind = "sampled" if temperature else "entropy" if arguments["entropy"] else "plain"
    case.group = f"{str(dtype)[6:]}, k {'= 1' if k == 1 else '> 1'}, {kind}"
    case.text = f"V {vocab}, {dtype}, k {k}, T {temperature}, strides {logits.stride()}, "
    case.text += f"{len(exclude)} excluded, rows {rows is not None}"
    got, want = topk_confidence(logits, k, **arguments), truth(topk_confidence, logits, k, **arguments)
    case.equal("tokens", got.token, want.token)
    case.equal("samples", got.sample, want.sample)
    case.compare("confidence", got.confidence, want.confidence, 1e-5)
    if torch.equal(got.sample, want.sample):
        case.compare("sample confidence", got.sample_confidence, want.sample_confidence, 1e-5)
    case.compare("logsumexp", got.logsumexp, want.logsumexp, 1e-5)
    case.compare("entropy", got.entropy, want.entropy, 2e-5)


sweep(run)
