"""The decoder against its formulas in float64, and the interface every model has."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unmask.models import Transformer, TransformerConfig
from unmask.models import rotary as module
from unmask.models.base import ModelBase

Build = Callable[..., Transformer]


def reference(model: Transformer, row: Tensor) -> Tensor:
    """Raw logits (T, V) of one unpadded row in float64, head by head and position by position."""
    c = model.config
    w = {name: value.double() for name, value in model.state_dict().items()}
    length, d = len(row), c.head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:  # (T, d): channel j pairs with j + d/2
        out = x.clone()
        for t in range(length):
            for j in range(d // 2):
                angle = t * c.rope_theta ** (-2 * j / d)
                a, b = x[t, j], x[t, j + d // 2]
                out[t, j] = a * math.cos(angle) - b * math.sin(angle)
                out[t, j + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["embed.weight"][row]
    for i in range(c.num_layers):
        p = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}
        h = norm(x, p["attn_norm.weight"])
        q, k, v = (h @ p[f"{n}_proj.weight"].T + p.get(f"{n}_proj.bias", torch.zeros(1)) for n in "qkv")
        heads = []
        for head in range(c.num_heads):
            mine = slice(head * d, head * d + d)
            group = head // (c.num_heads // c.kv_heads)
            theirs = slice(group * d, group * d + d)
            scores = rotate(q[:, mine]) @ rotate(k[:, theirs]).T / math.sqrt(d)
            heads.append(scores.softmax(-1) @ v[:, theirs])
        x = x + torch.cat(heads, dim=-1) @ p["o_proj.weight"].T
        h = norm(x, p["mlp_norm.weight"])
        gate = h @ p["gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ p["up_proj.weight"].T)) @ p["down_proj.weight"].T
    return norm(x, w["final_norm.weight"]) @ w["lm_head.weight"].T


def aligned(model: Transformer, row: Tensor) -> Tensor:
    raw = reference(model, row)
    return torch.cat((raw[:1], raw[:-1])) if model.config.logits_shift else raw


BLOCKS = {"attention": "block-causal", "block_length": 4}
CASES = [
    {"num_layers": 1, "num_heads": 1, "num_kv_heads": None, "hidden_size": 6, "intermediate_size": 5},
    {"qkv_bias": True},
    {"qkv_bias": True, "logits_shift": 1, "num_kv_heads": 3},
    {"tie_embeddings": True, "num_kv_heads": 6, "rope_theta": 10_000.0, "rms_norm_eps": 1e-2},
    {"num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "vocab_size": 5, "mask_token_id": 4},
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_matches_float64_reference(build: Build, changes: dict, length: int) -> None:
    model = build(**changes)
    ids = torch.randint(0, model.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))
    expected = torch.stack([aligned(model, row) for row in ids])
    assert expected.std() > 0.1
    out = model(ids)
    assert out.shape == (3, length, model.vocab_size)
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
    # In float64 only the float32 rotary tables separate the two.
    assert (model.double()(ids) - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("changes", CASES)
def test_padding_changes_nothing_for_real_tokens(build: Build, changes: dict) -> None:
    """Left padding, right padding, holes and a row of nothing but padding, all in one batch."""
    model = build(**changes)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, model.vocab_size, (5, 11), generator=generator)
    keep = torch.ones(5, 11, dtype=torch.bool)
    keep[1, :4] = False
    keep[2, 7:] = False
    keep[3, [0, 3, 4, 8]] = False
    keep[4] = False
    out = model(ids, keep)
    assert out.isfinite().all()
    for row in range(4):
        alone = model(ids[row][keep[row]][None])[0]
        expected = aligned(model, ids[row][keep[row]])
        assert (out[row][keep[row]] - alone).abs().max() < 1e-5 * expected.abs().max()
        assert (out[row][keep[row]] - expected).abs().max() < 1e-4 * expected.abs().max()
    other = ids.masked_fill(~keep, 2)
    assert torch.equal(model(other, keep)[:4][keep[:4]], out[:4][keep[:4]])  # what fills the padding is never seen


@pytest.mark.parametrize("changes", [BLOCKS, {**BLOCKS, "logits_shift": 1}, {"attention": "causal-prefix"}])
def test_padding_moves_no_block(build: Build, changes: dict) -> None:
    """Blocks count real tokens, also behind holes, and later blocks change nothing."""
    model = build(**changes)
    ids = torch.randint(0, model.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
    keep = torch.ones(3, 11, dtype=torch.bool)
    keep[0, :5], keep[1, [0, 3, 4, 8]] = False, False
    out = model(ids, keep)
    for row in range(3):
        alone = model(ids[row][keep[row]][None])[0]
        assert torch.allclose(out[row][keep[row]], alone, atol=1e-5 * float(alone.abs().max()))
    other = ids.clone()
    other[2, 8:] = (other[2, 8:] + 1) % model.vocab_size
    assert torch.allclose(model(other, keep)[2, :8], out[2, :8])
    assert not torch.allclose(model(other, keep)[2, 9:], out[2, 9:], atol=1e-2)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_positions_are_rows_of_the_full_logits(build: Build, shift: int, padded: bool) -> None:
    model = build(logits_shift=shift, qkv_bias=True)
    ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(1))
    keep = (torch.arange(9) >= torch.tensor([[0], [3], [8], [1]])) if padded else None
    full = model(ids, keep)
    slices = (slice(None), slice(4, None), slice(0, 1), slice(-3, None), slice(1, 8, 3), slice(5, 5))
    for where in slices:
        assert torch.allclose(model(ids, keep, positions=where), full[:, where], atol=2e-5)
    for flat in ([0], [35, 0, 9, 9, 17, 8], list(range(36)), []):
        index = torch.tensor(flat, dtype=torch.int64)
        out = model(ids, keep, positions=index)
        assert out.shape == (len(flat), 37)
        assert torch.allclose(out, full.flatten(0, 1)[index], atol=2e-5)


def test_only_chosen_rows_reach_the_head_and_the_last_mlp(build: Build) -> None:
    model = build()
    ids = torch.zeros(3, 10, dtype=torch.int64)
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
            rows[name] = inputs[0].numel() // inputs[0].shape[-1]

        return hook

    model.lm_head.register_forward_hook(count("head"))
    model.layers[-1].gate_proj.register_forward_hook(count("mlp"))
    model.layers[0].gate_proj.register_forward_hook(count("first mlp"))
    for positions, expected in ((None, 30), (slice(6, None), 12), (torch.tensor([0, 29]), 2), (slice(0, 0), 0)):
        for mask in (None, torch.ones_like(ids)):
            model(ids, mask, positions=positions)
            assert rows == {"head": expected, "mlp": expected, "first mlp": 30}


def test_empty_batch(build: Build) -> None:
    for shift in (0, 1):
        model = build(logits_shift=shift)
        ids = torch.zeros(0, 7, dtype=torch.int64)
        assert model(ids).shape == (0, 7, 37)
        assert model(ids, torch.ones_like(ids)).shape == (0, 7, 37)
        assert model(ids, positions=slice(3, None)).shape == (0, 4, 37)


def test_rotary_tables_are_made_once_and_stay_float32(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    expected = model.rotary.cos.clone()
    assert model.to(torch.bfloat16).rotary.cos.dtype == torch.float32
    assert torch.equal(model.rotary.cos, expected)
    assert torch.equal(copy.deepcopy(model).float().rotary.cos, expected)
    assert not any("rotary" in name for name in model.state_dict())
    calls = []
    monkeypatch.setattr(module, "rotary_tables", lambda *a: calls.append(a))
    ids = torch.zeros(2, 64, dtype=torch.int64)
    model(ids), model(ids, torch.ones_like(ids))
    assert calls == []


def test_canvas_beyond_the_cached_angles(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    long = build()
    monkeypatch.setattr(module, "CACHED_ANGLES", 8)
    short = build()
    assert (long.rotary.length, short.rotary.length) == (64, 8)
    ids = torch.randint(0, 37, (2, 20), generator=torch.Generator().manual_seed(3))
    keep = torch.arange(20) >= torch.tensor([[0], [15]])
    assert torch.allclose(short(ids), long(ids), atol=1e-6)
    assert torch.allclose(short(ids, keep)[keep], long(ids, keep)[keep], atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"logits_shift": 1}, {**BLOCKS, "qk_norm": True, "head_dim": 6}])
def test_compiles_into_one_graph_without_host_reads(build: Build, changes: dict) -> None:
    model = build(**changes, num_layers=2)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(2))
    keep = torch.arange(9) >= torch.tensor([[0], [4]])
    flat = torch.tensor([3, 10])
    for arguments in ((ids, None, slice(2, None)), (ids, keep, flat)):
        graphs.clear()
        assert torch.allclose(compiled(*arguments), model(*arguments), atol=1e-6)
        compiled(*arguments)
        assert len(graphs) == 1  # one graph, and no recompilation
        calls = {str(node.target) for node in graphs[0].graph.nodes}
        assert not calls & {"item", "tolist", "nonzero", "masked_select"}
    torch.compiler.reset()


@pytest.mark.parametrize("changes", [{"logits_shift": 1}, BLOCKS])
def test_no_values_are_read_in_a_forward(build: Build, changes: dict) -> None:
    """On the meta device any read of a value raises."""
    model = build(**changes).to("meta")
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    keep, flat = torch.ones_like(ids), torch.zeros(5, dtype=torch.int64, device="meta")
    assert model(ids, keep, positions=flat).shape == (5, 37)
    assert model(ids, keep).shape == (2, 9, 37)


def test_gradients_reach_every_parameter(build: Build) -> None:
    model = build(qkv_bias=True, logits_shift=1).requires_grad_(True)
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(2))
    model(ids, positions=slice(3, None)).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if "k_proj.bias" not in name:  # a common bias of all keys cancels, but for the rotation
            assert p.grad.abs().max() > 0, name


def ids(*shape: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1, 2]],), TypeError, "input_ids must be a torch.int64 tensor, got list"),
        ((torch.zeros(2, 3),), TypeError, "input_ids must be torch.int64, got torch.float32"),
        ((ids(2, 3, dtype=torch.int32),), TypeError, "got torch.int32"),
        ((ids(3),), ValueError, r"input_ids must have shape \(any, any\), got \(3,\)"),
        ((ids(2, 0),), ValueError, r"shape \(B, T\) with T >= 1, got \(2, 0\)"),
        ((ids(1, 65),), ValueError, "65 tokens, more than the model's context of 64"),
        ((ids(1, 3, device="meta"),), ValueError, "input_ids must be on cpu, got meta"),
        ((ids(2, 3), torch.ones(2, 3)), TypeError, "attention_mask must be bool or integer, got torch.float32"),
        ((ids(2, 3), [[1] * 3] * 2), TypeError, "attention_mask .*got list"),
        ((ids(2, 3), ids(2, 4)), ValueError, r"attention_mask must have shape \(2, 3\), got \(2, 4\)"),
        ((ids(2, 3), None, None, torch.ones(2, 3)), TypeError, "horizon .* torch.float32"),
        ((ids(2, 3), None, None, ids(2, 4)), ValueError, r"horizon must have shape \(2, 3\), got \(2, 4\)"),
        ((ids(2, 3), None, 3), TypeError, "positions must be .*got int"),
        ((ids(2, 3), None, torch.zeros(2)), TypeError, "positions must be torch.int64, got torch.float32"),
        ((ids(2, 3), None, ids(2, 1)), ValueError, r"positions must have shape \(any\), got \(2, 1\)"),
    ],
)
def test_bad_inputs_are_named(build: Build, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": 3.0}, "vocab_size must be an integer, got 3.0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads=4, got 6"),
        ({"hidden_size": 18}, "hidden_size must be num_heads=6 times an even number, got 18"),
        ({"mask_token_id": 37}, "mask_token_id must be below vocab_size=37, got 37"),
        ({"mask_token_id": None}, "mask_token_id .*got None"),
        ({"eos_token_id": -1}, "eos_token_id .*got -1"),
        ({"rope_theta": 0}, "rope_theta must be greater than 0, got 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
        ({"attention": "block-causal"}, "block-causal attention needs a block_length"),
        ({"block_length": 4}, "block_length is for attention by blocks, got 4 and bidirectional"),
        ({**BLOCKS, "sub_block_length": 3}, "block_length must be a multiple of sub_block_length=3, got 4"),
        ({"stop_ids": (1, 37)}, "stop_ids must be below vocab_size=37, got 37"),
        ({"attention": "causal"}, "attention must be 'bidirectional', 'block-causal', .*, got 'causal'"),
        ({"yarn": {"factor": 4.0}}, "original_max_position_embeddings is missing"),
        ({"logits_shift": 2}, "logits_shift must be 0 or 1, got 2"),
    ],
)
def test_impossible_configs_are_named(build: Build, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_interface() -> None:
    config = TransformerConfig(
        vocab_size=9, hidden_size=4, num_layers=1, num_heads=2, intermediate_size=4, mask_token_id=8, eos_token_id=None
    )
    model = Transformer(config)
    assert isinstance(model, ModelBase)
    assert (model.mask_token_id, model.eos_token_id, model.pad_token_id) == (8, None, None)
    assert (model.vocab_size, model.max_length, model.dtype) == (9, 4096, torch.float32)
    with pytest.raises(NotImplementedError, match="ModelBase does not implement forward"):
        ModelBase()(torch.zeros(1, 1, dtype=torch.int64))
