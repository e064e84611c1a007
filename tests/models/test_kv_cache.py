"""Forwards of some positions over cached keys and values, against forwards of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unmask.models import Transformer, load_model
from unmask.models.kv_cache import KVCache
from unmask.models.masked_lm import MaskedLM

Build = Callable[..., Transformer]
GOLDEN = Path(__file__).parents[1] / "golden"
LENGTH = 12
NAMES = ("llada", "dream", "tiny", "random")


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, build: Build) -> Transformer:
    """LLaDA's shape, Dream's (GQA, biases, shifted logits), the packaged model, and large random weights."""
    if request.param == "random":
        return build(logits_shift=1, qkv_bias=True)
    place = "tiny" if request.param == "tiny" else GOLDEN / f"{request.param}-tiny"
    loaded = load_model(place)
    assert isinstance(loaded, Transformer)
    return loaded


def canvas(model: Transformer, padded: bool, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(3, model.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(LENGTH) >= torch.tensor([[0], [4], [1]]) if padded else None


def everything(rows: int = 3) -> Tensor:
    return torch.arange(LENGTH).expand(rows, -1)


def close(a: Tensor, b: Tensor, real: Tensor | None = None) -> bool:
    """Equal to 1e-5 of the largest logit, at real positions."""
    error = (a - b).abs().amax(-1)
    return bool((error if real is None else error[real]).max() < 1e-5 * b.abs().max().clamp_min(1))


@pytest.mark.parametrize("padded", [False, True])
def test_all_positions_equal_the_plain_forward(model: Transformer, padded: bool) -> None:
    ids, real = canvas(model, padded)
    expected = model(ids, real)
    cache = model.new_cache(3, LENGTH)
    assert close(model.forward_cached(ids, real, cache, everything()), expected, real)
    noisy = model.new_cache(3, LENGTH)  # whatever it holds is overwritten before it is read, in any order
    noisy.keys.normal_(), noisy.values.normal_()
    computed = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert close(model.forward_cached(ids, real, noisy, everything(), computed), expected, real)
    for name in ("keys", "values"):
        assert torch.allclose(getattr(cache, name)[:, :, :-1], getattr(noisy, name)[:, :, :-1], atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_windows_of_an_unchanged_canvas_equal_the_plain_forward(model: Transformer, padded: bool) -> None:
    """Windows at other positions in each row, with empty places; with shifted logits they reach one back."""
    ids, real = canvas(model, padded)
    expected = model(ids, real)
    cache = model.new_cache(3, LENGTH)
    model.forward_cached(ids, real, cache, everything())
    before = cache.keys.clone()
    first = torch.tensor([[5], [8], [10]])
    computed = first + torch.arange(-model.lookback, 4)
    computed = torch.where(computed < LENGTH, computed, LENGTH)
    wanted = (first + torch.arange(4)).clamp_max(LENGTH - 1)
    out = model.forward_cached(ids, real, cache, wanted, computed)
    assert out.shape == (3, 4, model.vocab_size)
    assert close(out, expected.gather(1, wanted[..., None].expand_as(out)))
    assert torch.allclose(cache.keys[:, :, :-1], before[:, :, :-1], atol=1e-4)
    some = torch.tensor([2, 0])  # of some of the cache's rows
    out = model.forward_cached(
        ids[some], None if real is None else real[some], cache, wanted[some], computed[some], some
    )
    assert close(out, expected[some].gather(1, wanted[some][..., None].expand_as(out)))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_one_layer_sees_changes_exactly(build: Build, shift: int, padded: bool) -> None:
    """With one layer a position's keys depend on its own token: a window over all changes is a full forward."""
    model = build(num_layers=1, logits_shift=shift, qkv_bias=True)
    ids, real = canvas(model, padded)
    cache = model.new_cache(3, LENGTH)
    model.forward_cached(ids, real, cache, everything())
    changed = ids.clone()
    changed[:, 6:9] = canvas(model, padded, seed=1)[0][:, 6:9]
    expected = model(changed, real)
    assert (expected - model(ids, real)).abs().max() > 0.1
    wanted = torch.arange(6, 9).expand(3, -1)
    out = model.forward_cached(changed, real, cache, wanted, torch.arange(6 - shift, 9).expand(3, -1))
    assert close(out, expected[:, 6:9])
    out = model.forward_cached(changed, real, cache, everything())
    assert close(out, expected, real)


def test_more_layers_see_old_keys_outside_the_window(build: Build) -> None:
    """What is cached stays as it was: recomputing two positions is near the full forward, and is not it."""
    model = build()
    ids, _ = canvas(model, False)
    cache = model.new_cache(3, LENGTH)
    model.forward_cached(ids, None, cache, everything())
    old = cache.keys.clone()
    changed = ids.clone()
    changed[:, 6:8] = 1
    window = torch.arange(6, 8).expand(3, -1)
    out = model.forward_cached(changed, None, cache, window, window)
    assert 1e-3 < (out - model(changed)[:, 6:8]).abs().max() < (model(ids)[:, 6:8] - model(changed)[:, 6:8]).abs().max()
    assert torch.equal(cache.keys[:, :, :6], old[:, :, :6])
    assert torch.equal(cache.keys[:, :, 8:-1], old[:, :, 8:-1])
    assert (cache.keys[:, :, 6:8] != old[:, :, 6:8]).any()


def test_a_row_alone_without_its_padding(model: Transformer) -> None:
    ids, real = canvas(model, True)
    assert real is not None
    expected = model(ids, real)
    cache = model.new_cache(3, LENGTH)
    one = cache.alone(1, 4)
    assert (one.length, one.rows) == (8, 1)
    out = model.forward_cached(ids[1:2, 4:], None, one, torch.arange(8)[None])
    assert close(out[0], expected[1, 4:])
    assert cache.keys[:, 1, 4:-1].abs().min(0).values.max() > 0
    assert not cache.keys[:, 0].any()
    assert not cache.keys[:, 1, :4].any()


def test_rearranged_rows_keep_their_keys(build: Build) -> None:
    model = build()
    ids, _ = canvas(model, False)
    cache = model.new_cache(3, LENGTH)
    model.forward_cached(ids, None, cache, everything())
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    old = cache.keys.clone(), cache.values.clone()
    cache.rearrange(torch.tensor([2, 0]), 0)
    assert cache.rows == 2
    for was, now in zip(old, (cache.keys, cache.values), strict=True):
        assert torch.equal(now[:, :2], was[:, [2, 0]])
    wanted = torch.arange(3, 6).expand(2, -1)
    assert close(model.forward_cached(ids[[2, 0]], None, cache, wanted, wanted), model(ids[[2, 0]])[:, 3:6])
    cache.rearrange(torch.tensor([1]), 2)
    assert cache.rows == 3
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places
    with pytest.raises(ValueError, match=r"3 \+ 1 rows do not fit a cache of 3"):
        cache.rearrange(torch.arange(3), 1)


def test_size_and_dtype(build: Build) -> None:
    cache = build().to(torch.bfloat16).new_cache(5, 9)
    assert isinstance(cache, KVCache)
    assert cache.keys.shape == cache.values.shape == (3, 5, 10, 2, 4)
    assert cache.keys.dtype == torch.bfloat16
    assert (cache.length, cache.rows) == (9, 5)
    assert Transformer.supports_cache
    assert not MaskedLM.supports_cache


def test_bfloat16_is_close(build: Build) -> None:
    """Windows round as the plain forward does: both are about as far from float32."""
    model = build(logits_shift=1, qkv_bias=True)
    ids, real = canvas(model, True)
    exact = model(ids, real)[:, 6:9]
    model.to(torch.bfloat16)
    cache = model.new_cache(3, LENGTH)
    wanted = torch.arange(6, 9).expand(3, -1)
    model.forward_cached(ids, real, cache, wanted)
    out = model.forward_cached(ids, real, cache, wanted, torch.arange(5, 9).expand(3, -1))
    assert out.dtype == torch.bfloat16
    error, plain = ((x.float() - exact).abs().mean() for x in (out, model(ids, real)[:, 6:9]))
    assert error < 1.5 * plain


@pytest.mark.parametrize("shift", [0, 1])
def test_no_values_are_read(build: Build, shift: int) -> None:
    """On the meta device any read of a value raises."""
    model = build(logits_shift=shift).to("meta")
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    window = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    cache = model.new_cache(2, 9)
    for real in (None, torch.ones_like(ids)):
        assert model.forward_cached(ids, real, cache, window, window).shape == (2, 4, 37)
        assert model.forward_cached(ids, real, cache, window).shape == (2, 4, 37)
        assert model.forward_cached(ids[:1], None, cache, window[:1], window[:1], window[0, :1]).shape == (1, 4, 37)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wanted": torch.zeros(2, 3)}, TypeError, "wanted must be torch.int64, got torch.float32"),
        ({"wanted": torch.zeros(3, dtype=torch.int64)}, ValueError, r"wanted must have shape \(2, any\), got \(3,\)"),
        (
            {"computed": torch.zeros(3, 3, dtype=torch.int64)},
            ValueError,
            r"must have shape \(2, any\), got \(3, 3\)",
        ),
        ({"rows": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"rows must have shape \(2\), got \(2, 1\)"),
        ({"length": 8}, ValueError, "input_ids have 9 tokens, but the cache is for 8"),
        ({"cached": 3}, ValueError, "input_ids have 2 rows, but the cache has 3 in use"),
        ({"ids": torch.zeros(2, 65, dtype=torch.int64)}, ValueError, "65 tokens, more than the model's context of 64"),
    ],
)
def test_bad_inputs_are_named(build: Build, changes: dict, error: type[Exception], message: str) -> None:
    model = build()
    ids = changes.get("ids", torch.zeros(2, 9, dtype=torch.int64))
    cache = model.new_cache(changes.get("cached", 2), changes.get("length", 9))
    wanted = changes.get("wanted", torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(error, match=message):
        model.forward_cached(ids, None, cache, wanted, changes.get("computed"), changes.get("rows"))
