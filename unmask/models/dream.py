"""Dream and DiffuCoder (Ye et al., arXiv 2508.15487): Qwen2.5's weight layout, bidirectional.

Adapted from an autoregressive model: raw logits[i] predict token i + 1, so the decoder shifts them by one.
"""

from __future__ import annotations

from typing import Literal

from unmask.config import Positive, PositiveInt
from unmask.models.config_values import CheckpointConfig, Raw, read
from unmask.models.transformer import TransformerConfig

MODEL_TYPE = "Dream"


class DreamConfig(CheckpointConfig, kw_only=True):
    """Keys of Qwen2.5's configuration."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    tie_word_embeddings: bool = False
    layer_types: tuple[Literal["full_attention"], ...] = ()
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    def __post_init__(self) -> None:
        if self.head_dim not in (None, own := self.hidden_size // self.num_attention_heads):
            raise ValueError(f"head_dim must be hidden_size / num_attention_heads = {own}, got {self.head_dim}")


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


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming the key for anything this decoder does not implement."""
    c = read(DreamConfig, raw)
    return TransformerConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size,
        mask_token_id=c.mask_token_id,
        eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta or (c.rope_parameters or {}).get("rope_theta", 10_000.0),
        qkv_bias=True,
        tie_embeddings=c.tie_word_embeddings,
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
