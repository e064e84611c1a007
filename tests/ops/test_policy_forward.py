"""``policy_forward`` against float64, and its promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from policy_cases import inputs, pack, random_network, worst_error
from safetensors.torch import load_file

from unmask.ops import PolicyWeights, build_info, policy_forward
from unmask.ops.policy_forward import packed_count, unsupported_sizes
from unmask.ops.reference.policy_forward import policy_forward as reference
from unmask.policies.checkpoint import load
from unmask.policies.network import PolicyNetwork

GOLDEN = Path(__file__).parent.parent / "golden"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

SIZES = [(64, 1, 256), (128, 2, 512), (256, 4, 1024), (64, 4, 64), (48, 2, 80), (16, 8, 16)]


@pytest.fixture(autouse=True)
def _skip_without_cuda(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("where") if hasattr(request.node, "callspec") else None
    if name == "cuda" and not (torch.cuda.is_available() and build_info()["cuda"]):
        pytest.skip("needs a CUDA device and a build with CUDA")


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("k", [1, 8, 50, 64])
@pytest.mark.parametrize("size", SIZES)
def test_error_against_float64(size: tuple[int, int, int], k: int, where: str) -> None:
    for length, batch in ((1, 3), (2, 1), (31, 2), (48, 3)):
        assert worst_error(size, k, length, batch, where) < 1e-5


@pytest.mark.parametrize("where", DEVICES)
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
def test_error_of_long_buffers(size: tuple[int, int, int], k: int, length: int, batch: int, where: str) -> None:
    assert worst_error(size, k, length, batch, where) < 1e-5


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("name", ["policy-ref", "policy-ref-top8"])
def test_golden_policies(name: str, where: str) -> None:
    """Published-format checkpoints with attention scores above 500, so that float32 itself is at its limits."""
    config, tensors = load(GOLDEN / name)
    network = PolicyNetwork(config)
    network.load_state_dict(tensors)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    arguments = [golden[key].to(where) for key in ("mask", "confidence", "time")]
    weights = pack(network, where)
    logits = policy_forward(weights, *arguments)
    assert (logits - reference(weights, *arguments)).abs().max() < 1e-4
    assert (logits.cpu() - golden["logits"]).abs().max() < 1.2e-4  # upstream's own error is 5e-5


@pytest.mark.parametrize("where", DEVICES)
def test_large_activations_of_the_feed_forward(where: str) -> None:
    """GELU far out on both sides, where its tails must be exactly 0 and x."""
    network = random_network(64, 2, 128, 1)
    with torch.no_grad():
        network.transformer_blocks[0].linear1.weight.mul_(30)
    weights, arguments = pack(network), inputs(2, 40, 1)
    expected = reference(weights, *arguments)
    logits = policy_forward(weights._replace(packed=weights.packed.to(where)), *(t.to(where) for t in arguments))
    assert (logits.cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("isa", [isa for isa in build_info()["cpu_isas"] if isa != build_info()["cpu_isa"]])
def test_other_instruction_sets(isa: str) -> None:
    sizes = ((128, 2, 512), (48, 2, 80), (16, 8, 16))
    program = (
        "import json; from policy_cases import worst_error; from unmask.ops import build_info;"
        f"errors = [worst_error(s, k, n, 2) for s in {sizes} for k in (1, 2, 8, 50) for n in (1, 17, 48, 130)];"
        "print(json.dumps([build_info()['cpu_isa'], max(errors)]))"
    )
    done = run_python(program, path=Path(__file__).parent, UNMASK_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    used, error = json.loads(done.stdout)
    assert used == isa
    assert error < 1e-5


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("k", [1, 8, 50])
def test_selected_rows_get_the_same_logits(k: int, where: str) -> None:
    weights = pack(random_network(128, 2, 512, k), where)
    mask, confidence, time = (t.to(where) for t in inputs(4, 96, k))
    everywhere = policy_forward(weights, mask, confidence, time)
    rows = torch.zeros_like(mask)
    rows[0, 32:64] = mask[0, 32:64]
    rows[1, 95] = True
    rows[3] = True
    some = policy_forward(weights, mask, confidence, time, rows)
    assert (some[~rows] == -math.inf).all()
    assert torch.allclose(some[rows], everywhere[rows], atol=1e-5)


@pytest.mark.parametrize("k", [1, 50])
def test_a_row_does_not_depend_on_its_neighbours(k: int) -> None:
    weights = pack(random_network(128, 2, 512, k))
    mask, confidence, time = inputs(11, 40, k)
    together = policy_forward(weights, mask, confidence, time)
    for b in (0, 3, 8, 10):
        alone = policy_forward(weights, mask[b : b + 1], confidence[b : b + 1], time[b : b + 1])
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("k", [1, 50])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_row(k: int, poison: float, where: str) -> None:
    weights = pack(random_network(128, 2, 512, k), where)
    mask, confidence, time = (t.to(where) for t in inputs(4, 40, k))
    clean = policy_forward(weights, mask, confidence, time)
    confidence[1, 7, 0] = poison
    time[2] = poison
    dirty = policy_forward(weights, mask, confidence, time)
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])
    assert dirty[1].isnan().all()
    assert dirty[2].isnan().all()
    confidence[1, 7, 0], time[2] = 0.5, 0.5
    assert policy_forward(weights, mask, confidence, time).isfinite().all()


def test_memory_is_reused_between_problems_of_different_sizes() -> None:
    problems = [((128, 2, 512), 1, 100), ((16, 1, 16), 3, 5), ((64, 4, 64), 50, 300), ((128, 2, 512), 1, 31)]
    calls = [(pack(random_network(*size, k)), *inputs(2, length, k)) for size, k, length in problems]
    first = [policy_forward(*call) for call in calls]
    for order in ((3, 2, 1, 0), (1, 0, 2, 3)):
        for i in order:
            assert torch.equal(policy_forward(*calls[i]), first[i])


@pytest.mark.parametrize("where", DEVICES)
def test_empty_problems(where: str) -> None:
    weights = pack(random_network(64, 1, 256, 1), where)
    for batch, length in ((0, 5), (3, 0), (0, 0)):
        mask, confidence, time = (t.to(where) for t in inputs(batch, length, 1))
        assert policy_forward(weights, mask, confidence, time).shape == (batch, length)
    mask, confidence, time = (t.to(where) for t in inputs(2, 9, 1))
    nothing = policy_forward(weights, mask, confidence, time, torch.zeros_like(mask))
    assert (nothing == -math.inf).all()


def test_strided_inputs() -> None:
    weights = pack(random_network(64, 1, 256, 2))
    mask, confidence, time = inputs(3, 10, 2)
    expected = policy_forward(weights, mask, confidence, time, mask)
    wide = torch.rand(3, 20, 4)
    wide[:, ::2, :2] = confidence
    pairs = torch.stack((time, time), dim=1)
    columns = mask.T.contiguous().T
    assert torch.equal(policy_forward(weights, columns, wide[:, ::2, :2], pairs[:, 0], columns), expected)


@pytest.mark.parametrize("where", DEVICES)
def test_opcheck(where: str) -> None:
    weights = pack(random_network(64, 1, 256, 2), where)
    mask, confidence, time = (t.to(where) for t in inputs(3, 10, 2))
    for rows, cond in ((None, None), (mask, torch.randn(3, 64, device=where))):
        torch.library.opcheck(
            torch.ops.unmask.policy_forward.default,
            (weights.packed, 64, 1, 256, 2, mask, confidence, time, rows, cond),
        )


@pytest.mark.parametrize("where", DEVICES)
def test_compiles_into_one_graph(where: str) -> None:
    weights = pack(random_network(64, 1, 256, 1), where)
    mask, confidence, time = (t.to(where) for t in inputs(3, 10, 1))

    def step(m: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return policy_forward(weights, m, c * 0.5, t, m) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(mask, confidence, time), step(mask, confidence, time))
    shorter = mask[:2, :7], confidence[:2, :7], time[:2]
    assert torch.equal(compiled(*shorter), step(*shorter))


def test_packed_count_agrees_with_the_module() -> None:
    for size in SIZES:
        for k in (1, 8):
            assert packed_count(size[0], size[2], k) == pack(random_network(*size, k)).packed.numel()


def test_errors_name_the_argument() -> None:
    weights = pack(random_network(64, 1, 256, 2))
    mask, confidence, time = inputs(3, 10, 2)
    cases = [
        (ValueError, "mask: expected shape", (weights, mask[0], confidence, time)),
        (TypeError, "mask: expected torch.bool", (weights, mask.int(), confidence, time)),
        (TypeError, "confidence: expected torch.float32", (weights, mask, confidence.double(), time)),
        (ValueError, r"confidence: expected shape \(3, 10, 2\)", (weights, mask, confidence[..., :1], time)),
        (ValueError, r"time: expected shape \(3,\)", (weights, mask, confidence, time[:2])),
        (ValueError, r"rows: expected shape \(3, 10\)", (weights, mask, confidence, time, mask[:1])),
        (TypeError, "rows: expected torch.bool", (weights, mask, confidence, time, mask.float())),
        (ValueError, r"cond: expected shape \(3, 64\)", (weights, mask, confidence, time, None, time)),
        (
            ValueError,
            r"weights.packed: expected shape",
            (weights._replace(packed=weights.packed[1:]), mask, confidence, time),
        ),
        (ValueError, "hidden: expected a multiple of 16", (weights._replace(hidden=60), mask, confidence, time)),
        (ValueError, "heads: expected", (weights._replace(heads=64), mask, confidence, time)),
        (ValueError, "ffn: expected", (weights._replace(ffn=2048), mask, confidence, time)),
        (ValueError, "confidences: expected 1 to 64", (weights._replace(confidences=65), mask, confidence, time)),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            policy_forward(*arguments)
    assert unsupported_sizes(128, 2, 512, 1) is None


def test_no_gradient_is_promised() -> None:
    weights = pack(random_network(64, 1, 256, 2))
    mask, confidence, time = inputs(3, 10, 2)
    weights = weights._replace(packed=weights.packed.requires_grad_())
    cond = torch.zeros(3, 64, requires_grad=True)
    out = policy_forward(weights, mask, confidence.requires_grad_(), time.requires_grad_(), None, cond)
    assert not out.requires_grad


def test_the_dispatcher_op_checks_by_itself() -> None:
    """Whoever calls the op without the wrapper gets an error, not a read out of bounds."""
    weights = pack(random_network(64, 1, 256, 2))
    mask, confidence, time = inputs(3, 10, 2)
    op = torch.ops.unmask.policy_forward
    for packed, length in ((weights.packed[:-1], 10), (weights.packed, 9)):
        with pytest.raises(RuntimeError, match="expected"):
            op(packed, 64, 1, 256, 2, mask[:, :length], confidence, time, None, None)
    with pytest.raises(RuntimeError, match="hidden"):
        op(weights.packed, 512, 1, 256, 2, mask, confidence, time, None, None)
    assert isinstance(weights, PolicyWeights)
