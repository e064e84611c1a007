"""``policy_forward`` against float64, and its promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from on_reference import needs_kernels, truth
from policy_cases import inputs, pack, random_network, worst_error
from safetensors.torch import load_file
from torch import Tensor

from unmask.ops import PolicyWeights, policy_forward
from unmask.ops.policy_forward import unsupported_sizes
from unmask.policies.files import load
from unmask.policies.network import PolicyNetwork

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = [(64, 1, 256), (128, 2, 512), (256, 4, 1024), (64, 4, 64), (48, 2, 80), (16, 8, 16)]


@pytest.mark.parametrize("k", [1, 8, 50, 64])
@pytest.mark.parametrize("size", SIZES)
def test_error_against_float64(size: tuple[int, int, int], k: int, device: torch.device) -> None:
    for length, batch in ((1, 3), (2, 1), (31, 2), (48, 3)):
        assert worst_error(size, k, length, batch, device) < 1e-5


@pytest.mark.parametrize(
    ("size", "k", "length", "batch"),
    [
        ((128, 2, 512), 1, 256, 16),
        ((128, 2, 512), 2, 256, 3),
        ((128, 2, 512), 8, 256, 1),
        ((128, 2, 512), 50, 256, 1),
        ((256, 4, 1024), 1, 256, 1),
        ((128, 2, 512), 1, 1000, 1),
        ((64, 2, 256), 50, 1000, 1),
        ((16, 1, 16), 1, 3, 1100),
    ],
)
def test_error_of_long_buffers(
    size: tuple[int, int, int], k: int, length: int, batch: int, kernels: torch.device
) -> None:
    assert worst_error(size, k, length, batch, kernels) < 1e-5


@pytest.mark.parametrize("name", ["policy-ref", "policy-ref-top8"])
def test_golden_policies(name: str, device: torch.device) -> None:
    """Published-format checkpoints with attention scores above 500, so that float32 itself is at its limits."""
    config, tensors = load(GOLDEN / name)
    network = PolicyNetwork(config)
    network.load_state_dict(tensors)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    arguments = [golden[key] for key in ("mask", "confidence", "time")]
    logits = policy_forward(pack(network, device), *(t.to(device) for t in arguments)).cpu()
    assert (logits - truth(policy_forward, pack(network), *arguments)).abs().max() < 1e-4
    assert (logits - golden["logits"]).abs().max() < 1.2e-4  # upstream's own error is 5e-5


def test_large_activations_of_the_feed_forward(device: torch.device) -> None:
    """GELU far out on both sides, where its tails must be exactly 0 and x."""
    network = random_network(64, 2, 128, 1)
    with torch.no_grad():
        network.transformer_blocks[0].linear1.weight.mul_(30)
    arguments = inputs(2, 40, 1)
    logits = policy_forward(pack(network, device), *(t.to(device) for t in arguments))
    want = truth(policy_forward, pack(network), *arguments)
    assert (logits.cpu() - want).abs().max() < 6 * shaken(pack(network), arguments, want)


def shaken(weights: PolicyWeights, arguments: tuple[Tensor, ...], logits: Tensor) -> float:
    """How far float64 moves if weights move by 4 roundings of float32: as much as any float32 evaluation may err."""
    g, most = torch.Generator().manual_seed(1), 0.0
    for _ in range(4):
        factor = 1 + (torch.rand(weights.packed.shape, generator=g) * 2 - 1) * 2.0**-22
        moved = truth(policy_forward, weights._replace(packed=weights.packed * factor), *arguments)
        most = max(most, (moved - logits).abs().max().item())
    return most


@pytest.mark.parametrize("k", [1, 8, 50])
def test_selected_rows_get_the_same_logits(k: int, device: torch.device) -> None:
    weights = pack(random_network(128, 2, 512, k), device)
    mask, confidence, time = (t.to(device) for t in inputs(4, 96, k))
    everywhere = policy_forward(weights, mask, confidence, time)
    rows = torch.zeros_like(mask)
    rows[0, 32:64] = mask[0, 32:64]
    rows[1, 95] = True
    rows[3] = True
    some = policy_forward(weights, mask, confidence, time, rows)
    assert (some[~rows] == -math.inf).all()
    assert torch.allclose(some[rows], everywhere[rows], atol=1e-5)


@needs_kernels  # matrix products of torch round differently in other batches
@pytest.mark.parametrize("k", [1, 50])
def test_a_row_does_not_depend_on_its_neighbours(k: int) -> None:
    weights = pack(random_network(128, 2, 512, k))
    mask, confidence, time = inputs(11, 40, k)
    together = policy_forward(weights, mask, confidence, time)
    for b in (0, 3, 8, 10):
        alone = policy_forward(weights, mask[b : b + 1], confidence[b : b + 1], time[b : b + 1])
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("k", [1, 50])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_row(k: int, poison: float, device: torch.device) -> None:
    weights = pack(random_network(128, 2, 512, k), device)
    mask, confidence, time = (t.to(device) for t in inputs(4, 40, k))
    clean = policy_forward(weights, mask, confidence, time)
    confidence[1, 7, 0] = poison
    time[2] = poison
    dirty = policy_forward(weights, mask, confidence, time)
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])
    assert dirty[[1, 2]].isnan().all()
    confidence[1, 7, 0], time[2] = 0.5, 0.5
    assert policy_forward(weights, mask, confidence, time).isfinite().all()


def test_memory_is_reused_between_problems_of_different_sizes() -> None:
    problems = [((128, 2, 512), 1, 100), ((16, 1, 16), 3, 5), ((64, 4, 64), 50, 300), ((128, 2, 512), 1, 31)]
    calls = [(pack(random_network(*size, k)), *inputs(2, length, k)) for size, k, length in problems]
    first = [policy_forward(*call) for call in calls]
    for i in (3, 2, 1, 0, 1, 0, 2, 3):
        assert torch.equal(policy_forward(*calls[i]), first[i])


def test_empty_problems(device: torch.device) -> None:
    weights = pack(random_network(64, 1, 256, 1), device)
    for batch, length in ((0, 5), (3, 0), (0, 0)):
        mask, confidence, time = (t.to(device) for t in inputs(batch, length, 1))
        assert policy_forward(weights, mask, confidence, time).shape == (batch, length)
    mask, confidence, time = (t.to(device) for t in inputs(2, 9, 1))
    assert (policy_forward(weights, mask, confidence, time, torch.zeros_like(mask)) == -math.inf).all()


def test_strided_inputs_and_no_gradient(device: torch.device) -> None:
    weights = pack(random_network(64, 1, 256, 2), device)
    mask, confidence, time = (t.to(device) for t in inputs(3, 10, 2))
    expected = policy_forward(weights, mask, confidence, time, mask)
    wide = torch.rand(3, 20, 4, device=device)
    wide[:, ::2, :2] = confidence
    pairs = torch.stack((time, time), dim=1)
    columns = mask.T.contiguous().T
    strided = wide.requires_grad_()[:, ::2, :2], pairs.requires_grad_()[:, 0]
    weights = weights._replace(packed=weights.packed.requires_grad_())
    cond = torch.zeros(3, 64, requires_grad=True, device=device)
    logits = policy_forward(weights, columns, *strided, columns, cond)
    assert torch.equal(logits, expected)
    assert not logits.requires_grad


def test_opcheck(kernels: torch.device) -> None:
    weights = pack(random_network(64, 1, 256, 2), kernels)
    mask, confidence, time = (t.to(kernels) for t in inputs(3, 10, 2))
    for rows, cond in ((None, None), (mask, torch.randn(3, 64, device=kernels))):
        arguments = (*weights, mask, confidence, time, rows, cond)
        torch.library.opcheck(torch.ops.unmask.policy_forward.default, arguments)


def test_compiles_into_one_graph(kernels: torch.device) -> None:
    weights = pack(random_network(64, 1, 256, 1), kernels)
    mask, confidence, time = (t.to(kernels) for t in inputs(3, 10, 1))

    def step(m: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return policy_forward(weights, m, c * 0.5, t, m) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for arguments in ((mask, confidence, time), (mask[:2, :7], confidence[:2, :7], time[:2])):
        assert torch.equal(compiled(*arguments), step(*arguments))


WEIGHTS, (MASK, CONFIDENCE, TIME) = pack(random_network(64, 1, 256, 2)), inputs(3, 10, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": MASK[0]}, ValueError, r"mask: expected shape \(B, L\), got \(10,\)"),
        ({"mask": MASK.int()}, TypeError, "mask: expected bool, got int32"),
        ({"confidence": CONFIDENCE.double()}, TypeError, "confidence: expected float32, got float64"),
        ({"confidence": CONFIDENCE[..., :1]}, ValueError, r"confidence: expected shape \(3, 10, 2\), got \(3, 10, 1\)"),
        ({"time": TIME[:2]}, ValueError, r"time: expected shape \(3,\)"),
        ({"rows": MASK[:1]}, ValueError, r"rows: expected shape \(3, 10\)"),
        ({"rows": MASK.float()}, TypeError, "rows: expected bool"),
        ({"cond": TIME}, ValueError, r"cond: expected shape \(3, 64\)"),
        ({"packed": WEIGHTS.packed[1:]}, ValueError, r"packed: expected shape"),
        ({"hidden": 60}, ValueError, "hidden: expected a multiple of 16"),
        ({"hidden": 272}, ValueError, "hidden: expected a multiple of 16 up to 256, got 272"),
        ({"heads": 64}, ValueError, "heads: expected"),
        ({"ffn": 2048}, ValueError, "ffn: expected a multiple of 16 up to 1024, got 2048"),
        ({"confidences": 65}, ValueError, "confidences: expected 1 to 64"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    sizes = {name: change.pop(name) for name in WEIGHTS._fields if name in change}
    arguments = {"mask": MASK, "confidence": CONFIDENCE, "time": TIME, **change}
    with pytest.raises(error, match=message):
        policy_forward(WEIGHTS._replace(**sizes), **arguments)
    change.update(sizes)
    assert unsupported_sizes(128, 2, 512, 1) is None
