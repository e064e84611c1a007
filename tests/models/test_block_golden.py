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


@pytest.mark.parametrize(
    ("name", "length", "mask", "stop", "policy"),
    [
        ("sdar-tiny", 4, 339, 343, "threshold:0.85"),
        ("sdar-moe-tiny", 4, 339, 343, "threshold:0.85"),
        ("llada2-tiny", 32, 347, 344, "threshold:0.95"),
    ],
)
def test_attributes(name: str, length: int, mask: int, stop: int, policy: str) -> None:
    model = load_model(GOLDEN / name)
    assert (model.attention, model.block_length, model.sub_block_length) == ("block-causal", length, None)
    assert (model.mask_token_id, model.eos_token_id, model.stop_ids, model.seeded) == (mask, stop, (stop,), False)
    assert model.generation_defaults == {"block_length": length, "policy": policy}
