"""Dream and DiffuCoder (Ye et al., arXiv 2508.15487): Qwen2.5's weight layout, bidirectional.

Adapted from an autoregressive model: raw logits[i] predict token i + 1, so the decoder shifts them by one.
"""

from __future__ import annotations

from unmask.models import config_values as read
from unmask.models.transformer import TransformerConfig

MODEL_TYPE = "Dream"

SUPPORTED = {
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}


def read_config(raw: read.Raw) -> TransformerConfig:
    """Raises ValueError naming the key for anything this decoder does not implement."""
    read.only(raw, "Dream", SUPPORTED)
    read.plain_rope(raw, "Dream")
    layers, heads, width = (
        read.integer(raw, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    read.only(raw, "Dream", {"layer_types": (None, ["full_attention"] * layers), "head_dim": (None, width // heads)})
    rope = raw.get("rope_parameters") or {}
    return TransformerConfig(
        vocab_size=read.integer(raw, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read.integer(raw, "num_key_value_heads", heads),
        intermediate_size=read.integer(raw, "intermediate_size"),
        mask_token_id=read.required_token_id(raw, "mask_token_id"),
        eos_token_id=read.token_id(raw, "eos_token_id"),
        pad_token_id=read.token_id(raw, "pad_token_id"),
        max_position_embeddings=read.integer(raw, "max_position_embeddings"),
        rms_norm_eps=read.number(raw, "rms_norm_eps", 1e-6),
        rope_theta=read.number(raw, "rope_theta", read.number(rope, "rope_theta", 10_000.0)),
        qkv_bias=True,
        tie_embeddings=read.boolean(raw, "tie_word_embeddings"),
        logits_shift=1,
    )


def weight_names(config: TransformerConfig) -> dict[str, str]:
    """Names in the checkpoint -> names of :class:`unmask.models.Transformer`'s parameters."""
    names = {
        "model.embed_tokens.weight": "embed.weight",
        "model.norm.weight": "final_norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for i in range(config.num_layers):
        for theirs, ours in LAYER.items():
            names[f"model.layers.{i}.{theirs}.weight"] = f"layers.{i}.{ours}.weight"
        for name in ("q_proj", "k_proj", "v_proj"):
            names[f"model.layers.{i}.self_attn.{name}.bias"] = f"layers.{i}.{name}.bias"
    return names
