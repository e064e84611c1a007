"""Upstream's block models: their checkpoints, their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.models import load_model, save_model
from unmask.models.experts import Router

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4


def horizon(ids: Tensor, length: int) -> Tensor:
    """Position i sees block i // length and those before it."""
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    return columns // length * length + length - 1


BLOCKS = {"sdar-tiny": (4, 8), "sdar-moe-tiny": (4, 8), "llada2-tiny": (8, 32), "llada21-tiny": (8, 32)}
CASES = [
    (name, inputs, length)
    for name, lengths in BLOCKS.items()
    for inputs, length in (("", lengths[0]), ("", lengths[1]), ("_masked", lengths[0]))
]


@pytest.mark.parametrize(("name", "inputs", "length"), CASES)
def test_logits_match_upstream(tmp_path: Path, name: str, inputs: str, length: int) -> None:
    """By horizon, by the model's own blocks, with left padding, and after a round trip through the native format."""
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model, ids, logits = load_model(GOLDEN / name), golden[f"input_ids{inputs}"], golden[f"logits{inputs}_bl{length}"]
    assert logits.abs().max() > 1  # the comparison is against something
    assert (model(ids, horizon=horizon(ids, length)) - logits).abs().max() < TOLERANCE
    own: Any = load_model(GOLDEN / name, block_length=length)
    assert (own(ids) - logits).abs().max() < TOLERANCE
    flat = torch.tensor([0, ids.shape[1] - 1, ids.shape[1], 5, 5])
    assert (own(ids, positions=flat) - logits.flatten(0, 1)[flat]).abs().max() < TOLERANCE
    assert (own(ids, positions=slice(5, None, 3)) - logits[:, 5::3]).abs().max() < TOLERANCE
    padded = torch.cat((torch.full((2, 7), 5), ids), dim=1)
    keep = torch.arange(padded.shape[1]).expand_as(padded) >= 7
    assert (own(padded, keep)[:, 7:] - logits).abs().max() < TOLERANCE
    save_model(own, tmp_path)
    saved = load_model(tmp_path)
    assert torch.equal(saved(ids), own(ids))
    assert (saved.block_length, saved.generation_defaults) == (length, own.generation_defaults)


@pytest.mark.parametrize("name", ["sdar-moe-tiny", "llada2-tiny", "llada21-tiny"])
def test_routers_match_upstream(name: str) -> None:
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model, ids, seen = load_model(GOLDEN / name), golden["input_ids_masked"], {}
    for i, router in enumerate(m for m in model.modules() if isinstance(m, Router)):
        router.register_forward_hook(lambda m, x, out, i=i: seen.update({i + 1: (m.logits(x[0]), *out)}))
    model(ids, horizon=horizon(ids, BLOCKS[name][0]))
    assert set(seen) == {1, 2}
    for i, (logits, experts, weights) in seen.items():
        expected = golden[f"router_experts_masked.{i}"].flatten(0, 1)
        assert torch.equal(experts.sort().values, expected.sort().values)
        assert (logits - golden[f"router_logits_masked.{i}"].flatten(0, 1)).abs().max() < TOLERANCE
        if name == "sdar-moe-tiny":  # normalised, unscaled
            assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))
            continue
        weighed = golden[f"router_weights_masked.{i}"].flatten(0, 1).gather(1, expected.argsort())
        assert (weights.gather(1, experts.argsort()) - weighed).abs().max() < 1e-5


def test_shifted_logits_match_upstream() -> None:
    """Fast-dLLM v2: aligned row i + 1 is upstream's raw row i. A block more is predicted by the row before it."""
    golden = load_file(GOLDEN / "fastdllm2-tiny" / "golden.safetensors")
    for inputs, length in (("", 16), ("", 32), ("_masked", 32)):
        raw, ids = golden[f"raw_logits{inputs}_bl{length}"], golden[f"input_ids{inputs}"]
        assert raw.abs().max() > 1
        longer = torch.cat((ids, ids[:, :1]), dim=1)
        model = load_model(GOLDEN / "fastdllm2-tiny", block_length=length)
        for logits in (model(longer), model(longer, horizon=horizon(longer, length))):
            assert (logits[:, 1:] - raw).abs().max() < TOLERANCE
            assert torch.equal(logits[:, 0], logits[:, 1])


def test_causal_prefix_matches_upstream() -> None:
    """Nemotron: causal, bidirectional, and a bidirectional block behind a causal prefix, all by their horizons."""
    golden = load_file(GOLDEN / "nemotron-tiny" / "golden.safetensors")
    model, ids = load_model(GOLDEN / "nemotron-tiny"), golden["input_ids"]
    assert golden["causal_logits"].abs().max() > 1
    assert (model(ids) - golden["causal_logits"]).abs().max() < TOLERANCE
    assert (model(ids)[:, 32:] - golden["rewrite_logits"]).abs().max() < TOLERANCE
    both = model(ids[:, :32], horizon=torch.full((2, 32), 31))
    assert (both - golden["bidirectional_logits"]).abs().max() < TOLERANCE
    block = torch.cat((ids[:, :32], golden["block_ids"]), dim=1)
    sees = torch.arange(40).repeat(2, 1)
    sees[:, 32:] = 39
    assert (model(block, horizon=sees)[:, 32:] - golden["block_logits"]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "attention", "blocks", "ids", "seeded", "policy"),
    [
        ("sdar-tiny", "block-causal", (4, None), (339, 343), False, "threshold:0.85"),
        ("sdar-moe-tiny", "block-causal", (4, None), (339, 343), False, "threshold:0.85"),
        ("llada2-tiny", "block-causal", (32, None), (347, 344), False, "threshold:0.95"),
        ("fastdllm2-tiny", "block-causal", (32, 8), (346, 343), True, "threshold:0.9"),
        ("nemotron-tiny", "causal-prefix", (32, None), (100, 11), True, "threshold:0.9"),
    ],
)
def test_attributes(name: str, attention: str, blocks: Any, ids: Any, seeded: bool, policy: str) -> None:
    model = load_model(GOLDEN / name)
    assert (model.attention, model.block_length, model.sub_block_length) == (attention, *blocks)
    assert (model.mask_token_id, model.eos_token_id, model.stop_ids, model.seeded) == (*ids, ids[1:], seeded)
    wanted = {"block_length": blocks[0], "sub_block_length": blocks[1], "policy": policy, "temperature": 0.0}
    assert model.generation_defaults.items() >= wanted.items()
