"""``topk_confidence`` against plain torch in float64, hand-worked cases and the promises of its documentation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from on_reference import on_kernels, truth
from torch import Tensor

from unmask.ops import TopkConfidence, topk_confidence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def check(result: TopkConfidence, want: TopkConfidence, tolerance: float = 1e-6) -> None:
    """Ids equal, floats within ``tolerance`` (NaN where the truth is NaN), dtypes as documented."""
    for name, got, expected in zip(TopkConfidence._fields, result, want, strict=True):
        if expected is None:
            assert got is None, name
            continue
        ids = name in ("token", "sample")
        assert got.dtype == (torch.int64 if ids else torch.float32)
        assert ids or not name.endswith("confidence") or not (got > 1).any()
        within = {"atol": 0.0 if ids else tolerance, "rtol": tolerance if name in ("logsumexp", "entropy") else 0.0}
        torch.testing.assert_close(
            got.cpu().to(expected.dtype), expected, equal_nan=True, msg=lambda m, n=name: n + m, **within
        )


def compare(logits: Tensor, device: torch.device, k: int = 1, **arguments: Any) -> TopkConfidence:
    """The result on ``device``, after a comparison with the truth."""
    arguments = {"logsumexp": True, "entropy": True, **arguments}
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    result = topk_confidence(logits.to(device), k, **moved)
    check(result, truth(topk_confidence, logits, k, **arguments), 1e-6 if on_kernels() else 5e-6)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 111, 4096, 32000, 126464])
def test_matches_float64(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = random_logits(2 if vocab > 10000 else 5, vocab, dtype=dtype)
    compare(logits / 400, device)  # a sum of terms of one size, where float32 sums drift
    for k in (1, 2, 8, 50, 64):
        if k <= vocab:
            compare(logits, device, k)
    compare(logits, device, logsumexp=False, entropy=False)
    for temperature in (0.05, 0.7, 1.0, 30.0):
        counter = torch.randint(0, 2**31, (*logits.shape[:1], 3))
        compare(logits, device, temperature=temperature, seed=77, counter=counter)


def test_golden_samples(device: torch.device) -> None:
    """The draws of a seed are part of the interface: they never change."""
    logits = torch.tensor([[((r * 50 + v) * 37 % 101) / 20 for v in range(50)] for r in range(12)])
    counter = torch.tensor([[i * 7, 2**31 + i, i % 3] for i in range(12)]).to(device)
    for temperature, want in {
        0.5: [32, 10, 31, 41, 23, 12, 49, 10, 34, 3, 2, 45],
        1.0: [32, 10, 28, 41, 23, 3, 49, 10, 34, 3, 10, 45],
        3.0: [32, 9, 0, 16, 23, 3, 49, 45, 34, 17, 10, 45],
    }.items():
        result = topk_confidence(logits.to(device), temperature=temperature, seed=2**40 + 17, counter=counter)
        assert result.sample.tolist() == want


def test_awkward_values(device: torch.device) -> None:
    for offset in (1e3, -1e3, 3e4, 1e7, -1e7, 3e37, -3e37):  # the softmax does not depend on it
        compare(random_logits(3, 999) + offset, device, 4)
    one_hot = torch.eye(133) * 200  # the maximum at every place
    compare(one_hot, device, 2)
    compare(one_hot.roll(1, 0)[:, :130] - 100, device, 2, temperature=0.1)
    rising = torch.linspace(-40, 40, 5000)
    compare(torch.stack([rising, rising.flip(0), rising * 50, -rising.abs(), rising.abs()]), device, 8)
    logits = random_logits(4, 20000, scale=0.1)
    logits[2:, 123] += torch.tensor([12.0, 40.0])
    logits[3] *= 1000
    compare(logits, device, temperature=1.0, seed=2**40 + 5)
    # x / T overflows: all scores equal, so the lowest id is drawn.
    huge = torch.tensor([[1e30, 3e30, 2e30], [-1e30, -3e30, -2e30]], device=device)
    assert topk_confidence(huge, temperature=1e-20, seed=1).sample.tolist() == [0, 0]
    assert topk_confidence(huge, temperature=1e-20, seed=1, exclude=[0]).sample.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_id(dtype: torch.dtype, device: torch.device) -> None:
    compare(torch.randint(0, 3, (4, 3001)).to(dtype), device, 64)
    compare(torch.zeros(2, 2049, dtype=dtype), device, 5)
    signed_zeros = torch.tensor([[-0.0, 0.0, -1.0, 0.0]], dtype=dtype).to(device)
    assert topk_confidence(signed_zeros, 3).token.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
def test_poisoned_rows(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    for place in (0, 17, 1023, 1024, 2998):
        logits = random_logits(4, 2999, dtype=dtype)
        logits[[1, 3], place] = bad
        logits[3, :place] = -INF
        for temperature in (0.0, 0.7):
            result = compare(logits, device, 3, temperature=temperature)
            assert result.token[1].tolist() == [-1, -1, -1]
            assert result.sample.tolist()[1::2] == [-1, -1]
            assert all(value[1].isnan().all() for value in (result.confidence, result.sample_confidence))
    payloads = random_logits(5, 300)
    bits = torch.tensor([0x7F800001, 0x7FC001FF, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    payloads[range(5), range(100, 105)] = bits.view(torch.float32)
    assert (topk_confidence(payloads.to(device), 2).token == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_and_excluded_ids(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.full((4, 2500), -INF, dtype=dtype)
    logits[1, 2400] = 1.0
    logits[2, [3, 1500]] = torch.tensor([2.0, 5.0], dtype=dtype)
    logits[3, ::3] = random_logits(834, dtype=dtype)
    best = int(logits[3].argmax())
    for temperature in (0.0, 1.3):
        result = compare(logits, device, 5, temperature=temperature, seed=3)
        assert result.token[:3].tolist() == [[-1] * 5, [2400, 0, 1, 2, 3], [1500, 3, 0, 1, 2]]
        assert result.confidence[1].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-6)
        # Excluded ids stay in the denominator; in row 1 nothing else has any probability.
        result = compare(logits, device, 6, exclude=[2400, 0, 1, best, 2499, 2400], temperature=temperature, seed=9)
        assert result.token[1].tolist() == [2, 3, 4, 5, 6, 7]
        assert result.confidence[1].tolist() == [0.0] * 6
        assert best not in result.token[3].tolist()
    few = random_logits(2, 4)
    assert topk_confidence(few.to(device), 1, exclude=[0, 1, 3]).token.tolist() == [[2], [2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_logits(dtype: torch.dtype, device: torch.device) -> None:
    base = random_logits(4, 6, 5, 71, dtype=dtype).to(device)
    for view in (
        base[:, 1:4], base[::2, :, 1::2], base.transpose(0, 1), base[..., 3:60], base[..., ::2], base.transpose(2, 3),
        base[:, :, 0], base[1, 2, 3].expand(4, 71), base.permute(2, 0, 1, 3)[1:3], base[1:, ..., 1:], base[..., 5:70],
    ):  # fmt: skip
        check(topk_confidence(view, 3), truth(topk_confidence, view.cpu().contiguous(), 3))
    for shape in ((0,), (0, 3), (3, 0), (2, 3), ()):
        compare(random_logits(*shape, 40, dtype=dtype), device, 3)


def test_rows_by_index_and_by_flag(device: torch.device) -> None:
    logits, flags = random_logits(3, 5, 333), torch.rand(3, 5) < 0.5
    indices = [torch.tensor(rows, dtype=torch.int64) for rows in ([], [14], [3, 3, 0, 14, 7, 3])]
    for rows in (*indices, flags, torch.zeros_like(flags)):
        for temperature in (0.0, 0.8):
            compare(logits, device, 4, rows=rows, temperature=temperature, seed=1)
    compare(logits.transpose(0, 1), device, 4, rows=torch.tensor([1, 8, 2]))
    for bad in (-1, 15):
        rows = torch.tensor([2, bad], device=device)
        if device.type == "cpu":
            with pytest.raises(ValueError, match=rf"rows: expected indices in \[0, 15\), got {bad} at 1"):
                topk_confidence(logits, rows=rows)
        else:
            assert topk_confidence(logits.to(device), rows=rows).sample.tolist()[1] == -1
    logits[~flags] = NAN  # rows that are not selected are not read
    assert not topk_confidence(logits.to(device), rows=flags.to(device)).confidence.isnan().any()


def test_sample_distribution(device: torch.device) -> None:
    """Chi-square of 40000 draws of 12 tokens at T = 0.6; 11 degrees of freedom, p < 1e-4 above 37.4."""
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.3, 0.9, -0.4, 1.2, -2.0, 0.1, 0.8, -0.7])
    sample = topk_confidence(logits.to(device).expand(40000, 12), temperature=0.6, seed=11).sample.cpu()
    expected = torch.softmax(logits.double() / 0.6, dim=0) * 40000
    chi_square = ((torch.bincount(sample, minlength=12) - expected) ** 2 / expected).sum()
    assert 1.5 < chi_square < 37.4


def test_sample_and_its_confidence_agree(device: torch.device) -> None:
    logits = random_logits(50, 64).to(device).requires_grad_()
    result = topk_confidence(logits, 64, temperature=2.0, seed=4)
    assert not result.confidence.requires_grad
    assert (result.sample != result.token[:, 0]).any()
    place = (result.token == result.sample[:, None]).int().argmax(dim=1, keepdim=True)
    assert torch.equal(result.sample_confidence, result.confidence.gather(1, place)[:, 0])
    greedy = topk_confidence(logits, 64)
    assert torch.equal(greedy.confidence, result.confidence)
    assert torch.equal(greedy.sample, greedy.token[:, 0])
    assert torch.equal(greedy.sample_confidence, greedy.confidence[:, 0])


def test_draws_belong_to_the_keys_not_to_the_batch(device: torch.device) -> None:
    logits = random_logits(64, 500).to(device)
    counter = torch.stack([torch.arange(64) % 4, torch.arange(64) // 4, torch.full((64,), 9)], dim=1).to(device)

    def draw(logits: Tensor, seed: Any = 6, **arguments: Any) -> TopkConfidence:
        return topk_confidence(logits, 2, temperature=1.0, seed=seed, **arguments)

    everything, order = draw(logits, counter=counter), torch.randperm(64, device=device)
    for result in (draw(logits[order], counter=counter[order]), draw(logits, rows=order, counter=counter[order])):
        assert torch.equal(result.sample, everything.sample[order])
        assert torch.equal(result.confidence, everything.confidence[order])
    alone = [draw(logits[i], counter=counter[i]).sample.item() for i in range(9)]
    assert everything.sample[:9].tolist() == alone
    # A seed may be a tensor, and 64 bits of it count.
    for same in (torch.tensor(6, device=device), torch.tensor([6], device=device)):
        assert torch.equal(draw(logits, same).sample, draw(logits).sample)
    assert torch.equal(draw(logits, -1).sample, draw(logits, 2**64 - 1).sample)
    # Every part of the key matters, in its low 32 bits.
    flat = torch.zeros(1, 1000, device=device)

    def one(seed: int, *key: int) -> int:
        return int(draw(flat, seed, counter=torch.tensor([key], device=device)).sample)

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (2**33, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({one(*key) for key in keys}) == len(keys)
    assert one(0, 2**32 + 5, 6, -1) == one(0, 5, 2**32 + 6, 2**32 - 1)


def test_threads_do_not_change_a_bit() -> None:
    logits = random_logits(37, 5000, dtype=torch.bfloat16)

    def run(threads: int) -> TopkConfidence:
        torch.set_num_threads(threads)
        return topk_confidence(logits, 3, temperature=0.9, seed=2, logsumexp=True, entropy=True)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_opcheck(kernels: torch.device) -> None:
    logits = random_logits(2, 3, 50).to(kernels)
    seed = torch.tensor([3], device=kernels)
    counter = torch.zeros(2, 3, 3, dtype=torch.int64, device=kernels)
    rows, flags = torch.tensor([4, 0], device=kernels), torch.ones(2, 3, dtype=torch.bool, device=kernels)
    for arguments in (
        (logits, 1, None, None, 0.0, None, None, [], False, False),
        (logits.bfloat16(), 4, rows, None, 0.0, None, None, [1, 2], True, True),
        (logits.half(), 2, None, flags, 0.5, seed, counter, [], True, False),
    ):
        torch.library.opcheck(torch.ops.unmask.topk_confidence.default, arguments)


def test_compiles_into_one_graph(kernels: torch.device) -> None:
    def step(logits: Tensor, flags: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        result = topk_confidence(logits * 2, 2, rows=flags, temperature=0.9, seed=seed, entropy=True, exclude=[3])
        return result.confidence + 1, result.sample, result.entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        logits, flags = random_logits(batch, 3, 70).to(kernels), (torch.rand(batch, 3) < 0.6).to(kernels)
        seed = torch.tensor([batch], device=kernels)
        for got, want in zip(compiled(logits, flags, seed), step(logits, flags, seed), strict=True):
            assert torch.equal(got, want)


LONG = torch.int64
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(2, 9, dtype=torch.float64)}, TypeError, "logits: .*bfloat16 or float16, got float64"),
    ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: expected shape \(..., V\) with V >= 1, got \(2, 0\)"),
    ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected shape \(..., V\)"),
    ({"logits": torch.zeros(2, 100), "k": 65}, ValueError, "k: expected 1 to 64 .*got 65"),
    ({"logits": torch.zeros(2, 100), "exclude": range(17)}, ValueError, "exclude: expected at most 16 ids, got 17"),
    ({"k": 0}, ValueError, "k: expected 1 to 9 .*got 0"),
    ({"k": 10}, ValueError, "k: expected 1 to 9"),
    ({"k": 8, "exclude": [0, 1]}, ValueError, "k: expected 1 to 7 .*7 candidates.*got 8"),
    ({"exclude": [9]}, ValueError, r"exclude: expected ids in \[0, 9\), got 9"),
    ({"exclude": [-1]}, ValueError, "exclude: .*got -1"),
    ({"temperature": -0.1}, ValueError, "temperature: expected 0 or 1e-30 to 1e30, got -0.1"),
    ({"temperature": NAN}, ValueError, "temperature: .*got nan"),
    ({"temperature": INF}, ValueError, "temperature: .*got inf"),
    ({"temperature": 1e-40}, ValueError, "temperature: .*got 1e-40"),
    ({"temperature": 1e31}, ValueError, "temperature: .*got 1e\\+31"),
    ({"seed": 1.9, "temperature": 1.0}, TypeError, "seed: expected an int or an int64 tensor, got 1.9"),
    ({"seed": True, "temperature": 1.0}, TypeError, "seed: expected an int"),
    ({"seed": 2**64, "temperature": 1.0}, ValueError, "seed: expected 64 bits"),
    ({"seed": torch.zeros(1), "temperature": 1.0}, TypeError, "seed: expected int64, got float32"),
    ({"seed": torch.zeros(2, dtype=LONG), "temperature": 1.0}, ValueError, r"seed: expected shape \(1,\), got \(2,\)"),
    ({"rows": torch.zeros(2, 3)}, TypeError, "rows: expected int64, got float32"),
    ({"rows": torch.zeros(3, 2, dtype=torch.bool)}, ValueError, r"rows: expected shape \(2, 3\), got \(3, 2\)"),
    ({"rows": torch.zeros(1, 1, dtype=LONG)}, ValueError, r"rows: expected shape \(R,\), got \(1, 1\)"),
    ({"counter": torch.zeros(2, 3, 3)}, TypeError, "counter: expected int64"),
    ({"counter": torch.zeros(2, 3, dtype=LONG)}, ValueError, r"counter: expected shape \(2, 3, 3\)"),
    ({"counter": torch.zeros(2, 3, 3, dtype=LONG), "rows": torch.tensor([0])}, ValueError, r"counter: .*\(1, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str, device: torch.device) -> None:
    with pytest.raises(error, match=message):
        topk_confidence(**{"logits": torch.zeros(2, 3, 9), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": [[1.0]]}, "logits: expected Tensor, got"),
        ({"k": 1.0}, "k: expected int, got 1.0"),
        ({"temperature": "1"}, "temperature: expected float, got '1'"),
        ({"exclude": None}, r"exclude: expected List\[int\], got None"),
        ({"exclude": (1.9,)}, r"exclude: expected List\[int\], got \[1.9\]"),
    ],
)
def test_wrong_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        topk_confidence(**{"logits": torch.zeros(2, 3, 9), **arguments})
