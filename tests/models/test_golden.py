"""Upstream LLaDA and Dream: their checkpoints, their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.models import Transformer, load_model
from unmask.models.dream import DreamConfig
from unmask.models.llada import LLaDAConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4


def aligned(name: str, logits: Tensor) -> Tensor:
    """Upstream's raw logits (B, T, V) with row i predicting token i."""
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if name == "dream-tiny" else logits


@pytest.fixture(scope="module", params=["llada-tiny", "dream-tiny"])
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Tensor, Tensor]:
    golden = load_file(GOLDEN / request.param / "golden.safetensors")
    model = load_model(GOLDEN / request.param)
    return request.param, model, golden["input_ids"], aligned(request.param, golden["logits"])


def test_logits_match_upstream(case: tuple[str, Any, Tensor, Tensor]) -> None:
    _, model, ids, expected = case
    assert isinstance(model, Transformer)
    assert expected.abs().max() > 1  # the comparison is against something
    assert (model(ids) - expected).abs().max() < TOLERANCE
    assert (model(ids, torch.ones_like(ids)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_left_padded_rows_match_upstream(case: tuple[str, Any, Tensor, Tensor], dtype: torch.dtype) -> None:
    """Rows of one batch with 0 and 7 tokens of padding: both as upstream has them alone, the first real row too."""
    _, model, ids, expected = case
    length, pad = ids.shape[1], 7
    padded = torch.full((2, length + pad), 17)
    attention = torch.zeros(2, length + pad, dtype=dtype)
    padded[0, pad:], attention[0, pad:] = ids[0], 1
    longer = torch.cat((ids[1], ids[0, :pad]))
    padded[1], attention[1] = longer, 1
    out = model(padded, attention)
    assert (out[0, pad:] - expected[0]).abs().max() < TOLERANCE
    assert (out[1] - model(longer[None])[0]).abs().max() < TOLERANCE


def test_positions_match_upstream(case: tuple[str, Any, Tensor, Tensor]) -> None:
    _, model, ids, expected = case
    width = ids.shape[1]
    flat = torch.tensor([0, width - 1, width, 2 * width - 1, 5, 5, width + 3])
    for mask in (None, torch.ones_like(ids)):
        assert (model(ids, mask, positions=slice(5, None)) - expected[:, 5:]).abs().max() < TOLERANCE
        assert (model(ids, mask, positions=slice(0, 9, 2)) - expected[:, 0:9:2]).abs().max() < TOLERANCE
        out = model(ids, mask, positions=flat)
        assert out.shape == (7, model.vocab_size)
        assert (out - expected.flatten(0, 1)[flat]).abs().max() < TOLERANCE


def test_attributes() -> None:
    for name in ("llada-tiny", "dream-tiny"):
        model = load_model(GOLDEN / name)
        assert (model.mask_token_id, model.eos_token_id, model.pad_token_id) == (255, 254, 254)
        assert (model.vocab_size, model.max_length) == (256, 128)
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert load_model(GOLDEN / "dream-tiny", dtype="bfloat16").dtype == torch.bfloat16
    changed = load_model(GOLDEN / "llada-tiny", mask_token_id=3, eos_token_id=4)
    assert (changed.mask_token_id, changed.eos_token_id) == (3, 4)


def test_bfloat16_is_close() -> None:
    """Rounding of weights and activations is all that separates the two: about 0.013 of logits of 1.0."""
    golden = load_file(GOLDEN / "llada-tiny" / "golden.safetensors")
    out = load_model(GOLDEN / "llada-tiny", dtype=torch.bfloat16)(golden["input_ids"])
    assert out.dtype == torch.bfloat16
    assert (out.float() - golden["logits"]).abs().mean() < 0.02


LLADA_8B = """{
"activation_type": "silu", "alibi": false, "block_type": "llama", "d_model": 4096, "embedding_size": 126464,
"eos_token_id": 126081, "include_bias": false, "include_qkv_bias": false, "layer_norm_type": "rms",
"layer_norm_with_affine": true, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
"mlp_ratio": 4, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "rms_norm_eps": 1e-05,
"rope": true, "rope_theta": 500000.0, "vocab_size": 126464, "weight_tying": false}"""

DREAM_7B = """{
"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
"mask_token_id": 151666, "max_position_embeddings": 131072, "num_attention_heads": 28, "num_hidden_layers": 28,
"num_key_value_heads": 4, "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": null,
"rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false, "use_sliding_window": false,
"vocab_size": 152064}"""

REFUSED = {
    LLaDAConfig: [
        ("alibi", True), ("rope", False), ("block_type", "sequential"), ("block_group_size", 4),
        ("activation_type", "gelu"), ("layer_norm_type", "default"), ("layer_norm_with_affine", False),
        ("attention_layer_norm", True), ("input_emb_norm", True), ("include_bias", True),
        ("bias_for_layer_norm", True), ("scale_logits", True), ("clip_qkv", 8.0), ("sliding_window", 128),
        ("rope_scaling", {"type": "linear", "factor": 2.0}), ("n_layers", "3"), ("weight_tying", "yes"),
        ("rope_theta", "big"), ("mask_token_id", 1.5),
    ],
    DreamConfig: [
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("attention_bias", True),
        ("rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "factor": 4.0}),
        ("layer_types", ["sliding_attention"] * 3),
        ("head_dim", 16),
        ("partial_rotary_factor", 0.5),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key", "value"), [(f, key, value) for f, pairs in REFUSED.items() for key, value in pairs]
)
def test_unsupported_config_values_are_refused_by_name(family: Any, key: str, value: Any) -> None:
    raw = json.loads((GOLDEN / f"{family.MODEL_TYPE.lower()}-tiny" / "config.json").read_text())
    family.read_config(raw)
    with pytest.raises(ValueError, match=f"{key}.*") as caught:
        family.read_config({**raw, key: value})
    shown = str(value) if isinstance(value, dict) else repr(value[0] if isinstance(value, list) else value)
    assert shown in str(caught.value)


@pytest.mark.parametrize("key", ["d_model", "n_heads", "n_layers", "vocab_size", "mask_token_id"])
def test_missing_config_values_are_named(key: str) -> None:
    raw = json.loads((GOLDEN / "llada-tiny" / "config.json").read_text())
    del raw[key]
    with pytest.raises(ValueError, match=f"{key}"):
        LLaDAConfig.read_config(raw)


def test_published_configs() -> None:
    """The sizes of LLaDA-8B-Instruct and Dream-7B, with the keys their config.json has."""
    config = LLaDAConfig.read_config(json.loads(LLADA_8B))
    assert parameters(config) == 8_015_581_184
    assert len(LLaDAConfig.weight_names(config)) == 32 * 9 + 3
    config = DreamConfig.read_config(json.loads(DREAM_7B))
    assert parameters(config) == 7_615_616_512  # Qwen2.5-7B's
    assert len(DreamConfig.weight_names(config)) == 28 * 12 + 3


def parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())
