"""``topk_confidence`` against its float64 truth, hand-worked cases and the promises of its documentation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.ops import TopkConfidence, topk_confidence
from unmask.ops.reference.topk_confidence import topk_confidence as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 2, 7, 111, 4096, 32000, 126464]
INF, NAN = math.inf, math.nan


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def on_every_place(vocab: int) -> Tensor:
    """(vocab, vocab): row i is one-hot at i, far above the rest."""
    return torch.eye(vocab) * 200


def check(result: TopkConfidence, truth: TopkConfidence, tolerance: float = 1e-6) -> None:
    """Ids equal, floats within ``tolerance`` (NaN where the truth is NaN), shapes and dtypes as documented."""
    for name, got, want in zip(TopkConfidence._fields, result, truth, strict=True):
        if want is None:
            assert got is None, name
            continue
        assert got is not None, name
        assert got.shape == want.shape, name
        if name in ("token", "sample"):
            assert got.dtype == torch.int64
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, msg=name)
        else:
            assert got.dtype == torch.float32
            assert not name.endswith("confidence") or not (got > 1).any()
            relative = tolerance if name in ("logsumexp", "entropy") else 0
            torch.testing.assert_close(
                got.cpu().double(),
                want,
                rtol=relative,
                atol=tolerance,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def compare(logits: Tensor, device: torch.device, k: int = 1, tolerance: float = 1e-6, **arguments: Any) -> None:
    arguments = {"logsumexp": True, "entropy": True, **arguments}
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    check(topk_confidence(logits.to(device), k, **moved), reference(logits, k, **arguments), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "k"), [(vocab, k) for vocab in VOCABS for k in (1, 2, 8, 50, 64) if k <= vocab])
def test_matches_float64(vocab: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    compare(random_logits(2 if vocab > 10000 else 5, vocab, dtype=dtype), device, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_row_keeps_its_accuracy(dtype: torch.dtype, device: torch.device) -> None:
    # The sum is of 126464 terms of one size: where float32 sums drift.
    compare(random_logits(2, 126464, dtype=dtype, scale=0.01), device, tolerance=1e-6)


@pytest.mark.parametrize("offset", [1e3, -1e3, 3e4, 1e7, -1e7, 3e37, -3e37])
def test_softmax_does_not_depend_on_the_offset(offset: float, device: torch.device) -> None:
    compare(random_logits(3, 999) + offset, device, 4)


def test_maximum_at_every_place(device: torch.device) -> None:
    compare(on_every_place(133), device, 2)
    compare(on_every_place(133).roll(1, 0)[:, :130] - 100, device, 2, temperature=0.1)


def test_maximum_that_keeps_growing(device: torch.device) -> None:
    rising = torch.linspace(-40, 40, 5000)
    compare(torch.stack([rising, rising.flip(0), rising * 50, -rising.abs(), rising.abs()]), device, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_id(dtype: torch.dtype, device: torch.device) -> None:
    compare(torch.randint(0, 3, (4, 3001)).to(dtype), device, 64)
    compare(torch.zeros(2, 2049, dtype=dtype), device, 5)
    signed_zeros = torch.tensor([[-0.0, 0.0, -1.0, 0.0]], dtype=dtype).to(device)
    assert topk_confidence(signed_zeros, 3).token.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
@pytest.mark.parametrize("place", [0, 17, 1023, 1024, 2998])
def test_poisoned_rows(place: int, bad: float, dtype: torch.dtype, device: torch.device) -> None:
    logits = random_logits(4, 2999, dtype=dtype)
    logits[1, place] = bad
    logits[3, place] = bad
    logits[3, :place] = -INF
    for temperature in (0.0, 0.7):
        compare(logits, device, 3, temperature=temperature)
    result = topk_confidence(logits.to(device), 3, entropy=True)
    assert result.token[1].tolist() == [-1, -1, -1]
    assert result.sample.tolist()[1::2] == [-1, -1]
    assert result.entropy is not None
    assert result.entropy[1].isnan()


def test_nan_with_any_payload_poisons(device: torch.device) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FC001FF, 0x7FFFFFFF, -1, -0x7FFFFF])  # as int32 bits
    logits = random_logits(len(payloads), 300)
    for row, bits in enumerate(payloads.to(torch.int32)):
        logits[row, 100 + row] = bits.view(torch.float32)
    assert logits.isnan().any(dim=1).all()
    result = topk_confidence(logits.to(device), 2)
    assert (result.token == -1).all()
    assert result.confidence.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.full((4, 2500), -INF, dtype=dtype)
    logits[1, 2400] = 1.0
    logits[2, [3, 1500]] = torch.tensor([2.0, 5.0], dtype=dtype)
    logits[3, ::3] = random_logits(834, dtype=dtype)
    compare(logits, device, 5)
    compare(logits, device, 5, temperature=1.0, seed=3)
    result = topk_confidence(logits.to(device), 5)
    assert result.token[:3].tolist() == [[-1] * 5, [2400, 0, 1, 2, 3], [1500, 3, 0, 1, 2]]
    assert result.confidence[1].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_ids_stay_in_the_denominator(dtype: torch.dtype, device: torch.device) -> None:
    logits = random_logits(3, 1500, dtype=dtype)
    best = logits[0].argmax().item()
    logits[1] = -INF
    logits[1, best] = 4.0  # nothing but an excluded id has any probability
    exclude = [best, 0, 1, 1499, best]
    for temperature in (0.0, 1.3):
        compare(logits, device, 6, exclude=exclude, temperature=temperature, seed=9)
    result = topk_confidence(logits.to(device), 2, exclude=exclude)
    assert best not in result.token.flatten().tolist()
    assert result.token[1].tolist() == [2, 3]
    assert result.confidence[1].tolist() == [0.0, 0.0]
    few = random_logits(2, 4)
    assert topk_confidence(few.to(device), 1, exclude=[0, 1, 3]).token.tolist() == [[2], [2]]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 3), ()])
def test_leading_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    compare(random_logits(*shape, 40), device, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits(dtype: torch.dtype, device: torch.device) -> None:
    base = random_logits(4, 6, 5, 70, dtype=dtype)
    views = [
        base[:, 1:4],
        base[::2, :, 1::2],
        base.transpose(0, 1),
        base[..., 3:60],
        base[..., ::2],
        base.transpose(2, 3),
        base[:, :, 0],
        base[1, 2, 3].expand(4, 70),
        base.permute(2, 0, 1, 3)[1:3],
    ]
    for view in views:
        moved = base.to(device).as_strided(view.size(), view.stride(), view.storage_offset())
        check(topk_confidence(moved, 3), reference(view.contiguous(), 3))


def test_row_selection_by_index(device: torch.device) -> None:
    logits = random_logits(3, 5, 333)
    for rows in ([], [14], [3, 3, 0, 14, 7, 3]):
        index = torch.tensor(rows, dtype=torch.int64)
        compare(logits, device, 4, rows=index)
        compare(logits, device, 4, rows=index, temperature=0.8, seed=1)
    compare(logits.transpose(0, 1), device, 4, rows=torch.tensor([1, 8, 2]))
    for bad in (-1, 15):
        rows = torch.tensor([2, bad], device=device)
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match=rf"rows: {bad} at 1 is outside \[0, 15\)"):
                topk_confidence(logits, rows=rows)
        else:
            assert topk_confidence(logits.to(device), rows=rows).sample.tolist()[1] == -1


def test_row_selection_by_mask(device: torch.device) -> None:
    logits = random_logits(3, 5, 333)
    mask = torch.rand(3, 5) < 0.5
    compare(logits, device, 4, rows=mask)
    compare(logits, device, 4, rows=mask, temperature=0.8, seed=1)
    compare(logits, device, rows=torch.zeros(3, 5, dtype=torch.bool))
    logits[~mask] = NAN  # rows that are not selected are not read
    assert not topk_confidence(logits.to(device), rows=mask.to(device)).confidence.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("vocab", [1, 2, 7, 111, 4096, 126464])
def test_samples_follow_the_definition(
    vocab: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> None:
    rows = 2 if vocab > 10000 else 20
    counter = torch.randint(0, 2**31, (rows, 3))
    compare(random_logits(rows, vocab, dtype=dtype), device, temperature=temperature, seed=77, counter=counter)


def test_samples_of_flat_and_peaked_rows(device: torch.device) -> None:
    logits = random_logits(4, 20000, scale=0.1)
    logits[2:, 123] += torch.tensor([12.0, 40.0])
    logits[3] *= 1000
    compare(logits, device, temperature=1.0, seed=2**40 + 5)


def test_sample_distribution(device: torch.device) -> None:
    """Chi-square of 40000 draws of 12 tokens at T = 0.6; 11 degrees of freedom, p < 1e-4 above 37.4."""
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.3, 0.9, -0.4, 1.2, -2.0, 0.1, 0.8, -0.7])
    draws = 40000
    sample = topk_confidence(logits.to(device).expand(draws, 12), temperature=0.6, seed=11).sample.cpu()
    expected = torch.softmax(logits.double() / 0.6, dim=0) * draws
    chi_square = ((torch.bincount(sample, minlength=12) - expected) ** 2 / expected).sum()
    assert 1.5 < chi_square < 37.4


def test_sample_and_its_confidence_agree(device: torch.device) -> None:
    logits = random_logits(50, 64).to(device)
    result = topk_confidence(logits, 64, temperature=2.0, seed=4)
    assert (result.sample != result.token[:, 0]).any()
    place = (result.token == result.sample[:, None]).int().argmax(dim=1, keepdim=True)
    assert torch.equal(result.sample_confidence, result.confidence.gather(1, place)[:, 0])
    greedy = topk_confidence(logits, 64)
    assert torch.equal(greedy.confidence, result.confidence)
    assert torch.equal(greedy.sample, greedy.token[:, 0])
    assert torch.equal(greedy.sample_confidence, greedy.confidence[:, 0])


def test_draws_do_not_depend_on_the_batch(device: torch.device) -> None:
    logits = random_logits(64, 500).to(device)
    counter = torch.stack([torch.arange(64) % 4, torch.arange(64) // 4, torch.full((64,), 9)], dim=1).to(device)
    everything = topk_confidence(logits, 2, temperature=1.0, seed=6, counter=counter)
    order = torch.randperm(64, device=device)
    shuffled = topk_confidence(logits[order], 2, temperature=1.0, seed=6, counter=counter[order])
    picked = topk_confidence(logits, 2, rows=order, temperature=1.0, seed=6, counter=counter[order])
    alone = [topk_confidence(logits[i], 2, temperature=1.0, seed=6, counter=counter[i]).sample.item() for i in range(9)]
    assert torch.equal(shuffled.sample, everything.sample[order])
    assert torch.equal(shuffled.confidence, everything.confidence[order])
    assert torch.equal(picked.sample, everything.sample[order])
    assert everything.sample[:9].tolist() == alone


def test_every_part_of_the_key_matters(device: torch.device) -> None:
    logits = torch.zeros(1, 1000, device=device)

    def draw(seed: int, *counter: int) -> int:
        return int(
            topk_confidence(logits, temperature=1.0, seed=seed, counter=torch.tensor([counter], device=device)).sample
        )

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (2**33, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, 2**32 + 5, 6, -1) == draw(0, 5, 2**32 + 6, 2**32 - 1)  # the low 32 bits


def test_seeds(device: torch.device) -> None:
    logits = random_logits(40, 300).to(device)

    def sample(seed: Any) -> Tensor:
        return topk_confidence(logits, temperature=1.0, seed=seed).sample

    assert torch.equal(sample(5), sample(torch.tensor(5, device=device)))
    assert torch.equal(sample(5), sample(torch.tensor([5], device=device)))
    assert torch.equal(sample(-1), sample(2**64 - 1))
    assert not torch.equal(sample(5), sample(6))


def test_scores_beyond_float32(device: torch.device) -> None:
    logits = torch.tensor([[1e30, 3e30, 2e30], [-1e30, -3e30, -2e30]], device=device)
    # x / T overflows: all scores equal, so the lowest id is drawn.
    assert topk_confidence(logits, temperature=1e-20, seed=1).sample.tolist() == [0, 0]
    assert topk_confidence(logits, temperature=1e-20, seed=1, exclude=[0]).sample.tolist() == [1, 1]


def test_threads_do_not_change_a_bit() -> None:
    logits = random_logits(37, 5000, dtype=torch.bfloat16)

    def run(threads: int) -> TopkConfidence:
        torch.set_num_threads(threads)
        return topk_confidence(logits, 3, temperature=0.9, seed=2, logsumexp=True, entropy=True)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_gradients_are_not_tracked(device: torch.device) -> None:
    result = topk_confidence(random_logits(2, 30).to(device).requires_grad_())
    assert not result.confidence.requires_grad


def sample_arguments(device: torch.device) -> list[tuple[Any, ...]]:
    logits = random_logits(2, 3, 50).to(device)
    seed = torch.tensor([3], device=device)
    counter = torch.zeros(2, 3, 3, dtype=torch.int64, device=device)
    rows, mask = torch.tensor([4, 0], device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    return [
        (logits, 1, None, None, 0.0, None, None, [], False, False),
        (logits.bfloat16(), 4, rows, None, 0.0, None, None, [1, 2], True, True),
        (logits.half(), 2, None, mask, 0.5, seed, counter, [], True, False),
    ]


def test_opcheck(device: torch.device) -> None:
    for arguments in sample_arguments(device):
        torch.library.opcheck(torch.ops.unmask.topk_confidence.default, arguments)


def test_compiles_into_one_graph(device: torch.device) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(logits: Tensor, mask: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = topk_confidence(logits * 2, 2, rows=mask, temperature=0.9, seed=seed, entropy=True, exclude=[3])
        assert result.entropy is not None
        return result.confidence + 1, result.sample, result.entropy

    for batch in (2, 5):
        logits, mask = random_logits(batch, 3, 70).to(device), (torch.rand(batch, 3) < 0.6).to(device)
        seed = torch.tensor([batch], device=device)
        confidence, sample, entropy = step(logits, mask, seed)
        eager = topk_confidence(logits * 2, 2, rows=mask, temperature=0.9, seed=seed, entropy=True, exclude=[3])
        assert torch.equal(confidence, eager.confidence + 1)
        assert torch.equal(sample, eager.sample)
        assert torch.equal(entropy, eager.entropy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected 1 to 9 .*got 0"),
        ({"k": 10}, ValueError, "k: expected 1 to 9"),
        ({"k": 8, "exclude": [0, 1]}, ValueError, "k: expected 1 to 7 .*7 candidates"),
        ({"k": True}, TypeError, "k: expected an int"),
        ({"k": 1.0}, TypeError, "k: expected an int"),
        ({"exclude": [9]}, ValueError, r"exclude: expected ids in \[0, 9\), got 9"),
        ({"exclude": [-1]}, ValueError, "exclude: .*got -1"),
        ({"temperature": -0.1}, ValueError, "temperature: .*got -0.1"),
        ({"temperature": NAN}, ValueError, "temperature: .*got nan"),
        ({"temperature": INF}, ValueError, "temperature: .*got inf"),
        ({"temperature": 1e-40}, ValueError, "temperature: expected 0 or a number from 1e-30 to 1e30, got 1e-40"),
        ({"temperature": 1e31}, ValueError, "temperature: .*got 1e\\+31"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got '1'"),
        ({"exclude": None}, TypeError, "exclude: expected a sequence of ids, got None"),
        ({"exclude": (1.9,)}, TypeError, "exclude: expected a sequence of ids"),
        ({"seed": 1.9, "temperature": 1.0}, TypeError, "seed: expected an int or an int64 tensor, got 1.9"),
        ({"seed": True, "temperature": 1.0}, TypeError, "seed: expected an int"),
        ({"rows": torch.zeros(2, 3)}, TypeError, "rows: expected bool or int64, got torch.float32"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, TypeError, "rows: .*got torch.int32"),
        ({"rows": torch.zeros(3, 2, dtype=torch.bool)}, ValueError, r"rows: expected shape \(2, 3\)"),
        ({"rows": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, r"rows: .*shape \(R,\)"),
        ({"counter": torch.zeros(2, 3, 3)}, TypeError, "counter: expected int64"),
        ({"counter": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"counter: expected shape \(2, 3, 3\)"),
        (
            {"counter": torch.zeros(2, 3, 3, dtype=torch.int64), "rows": torch.tensor([0])},
            ValueError,
            r"counter: expected shape \(1, 3\)",
        ),
        ({"seed": 2**64, "temperature": 1.0}, ValueError, "seed: expected 64 bits"),
        ({"seed": torch.zeros(1), "temperature": 1.0}, TypeError, "seed: .*int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64), "temperature": 1.0}, ValueError, "seed: expected one element"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk_confidence(torch.zeros(2, 3, 9), **arguments)


def test_wrong_logits() -> None:
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        topk_confidence([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"logits: expected float32, bfloat16 or float16, got torch\.float64"):
        topk_confidence(torch.zeros(2, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"logits: expected shape \(..., V\)"):
        topk_confidence(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"logits: expected shape \(..., V\)"):
        topk_confidence(torch.tensor(1.0))
    with pytest.raises(ValueError, match="k: expected 1 to 64"):
        topk_confidence(torch.zeros(2, 100), 65)
    with pytest.raises(ValueError, match="exclude: expected at most 16 ids, got 17"):
        topk_confidence(torch.zeros(2, 100), exclude=range(17))
