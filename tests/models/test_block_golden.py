"""Upstream's block models: their checkpoints, their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.models import load_model, save_model

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4


def horizon(ids: Tensor, length: int) -> Tensor:
    """Position i sees block i // length and those before it."""
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    return columns // length * length + length - 1


CASES = [
    ("sdar-tiny", "input_ids", "logits_bl4", 4),
    ("sdar-tiny", "input_ids", "logits_bl8", 8),
    ("sdar-tiny", "input_ids_masked", "logits_masked_bl4", 4),
]


@pytest.mark.parametrize(("name", "ids", "expected", "length"), CASES)
def test_logits_match_upstream(tmp_path: Path, name: str, ids: str, expected: str, length: int) -> None:
    """By horizon, by the model's own blocks, with left padding, and after a round trip through the native format."""
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model, x, logits = load_model(GOLDEN / name), golden[ids], golden[expected]
    assert logits.abs().max() > 1  # the comparison is against something
    assert (model(x, horizon=horizon(x, length)) - logits).abs().max() < TOLERANCE
    own: Any = load_model(GOLDEN / name, block_length=length)
    assert (own(x) - logits).abs().max() < TOLERANCE
    padded = torch.cat((torch.full((2, 7), 5), x), dim=1)
    keep = torch.arange(padded.shape[1]).expand_as(padded) >= 7
    assert (own(padded, keep)[:, 7:] - logits).abs().max() < TOLERANCE
    save_model(own, tmp_path)
    saved = load_model(tmp_path)
    assert torch.equal(saved(x), own(x))
    assert (saved.block_length, saved.generation_defaults) == (length, own.generation_defaults)


def test_attributes() -> None:
    model = load_model(GOLDEN / "sdar-tiny")
    assert (model.attention, model.block_length, model.sub_block_length, model.seeded) == (
        "block-causal",
        4,
        None,
        False,
    )
    assert (model.mask_token_id, model.eos_token_id, model.stop_ids) == (339, 343, (343,))
    assert model.generation_defaults == {"block_length": 4, "policy": "threshold:0.85"}
