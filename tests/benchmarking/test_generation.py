"""What a generation is made of."""

from __future__ import annotations

import pytest
import torch

from unmask import Sampler
from unmask.benchmarking.generation import Products, Setting, comparisons

CPU = torch.device("cpu")


def test_products_are_counted_and_repeated() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with Products() as products:
        for _ in range(3):
            a @ b
        a.T @ a
        (a + 1).softmax(-1)
    assert sorted(products.times.values()) == [1, 3]
    with Products() as again:
        products.repeat()
    assert again.times == products.times


def test_the_products_are_those_of_the_model() -> None:
    s = Setting(Sampler.from_pretrained("tiny"), 2)
    s.check()
    layers = s.sampler.model.config.num_layers
    assert sum(s.products.times.values()) == len(s.forwards) * (layers * (7 + 1) + 1), "7 products and an attention"
    assert s.counts["unmask"]["forwards"] == len(s.forwards)
    s.expected = s.expected + 1
    with pytest.raises(AssertionError, match="differ"):
        s.check()


def test_the_quick_mode_leaves_the_largest_batch_out() -> None:
    found = comparisons(CPU, quick=True)
    assert [c.setting for c in found] == [f"batch {b}, full diffusion, L = 24" for b in (1, 16)]
    assert all(c.floor in c.contenders for c in found)
