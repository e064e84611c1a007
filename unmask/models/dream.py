"""Dream and DiffuCoder (Ye et al., arXiv 2508.15487): Qwen2.5's weight layout, bidirectional.

Adapted from an autoregressive model: raw logits[i] predict token i + 1, so the decoder shifts them by one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unmask.config import Positive, PositiveInt
from unmask.models.config_values import CheckpointConfig, Raw, read
from unmask.models.transformer import TransformerConfig

MODEL_TYPE = "Dream"


class DreamConfig(CheckpointConfig, kw_only=True):
    """Keys of Qwen2.5's configuration."""

    hidden_size: PositiveInt
    num_layers: PositiveInt = Field(alias="num_hidden_layers")
    num_heads: PositiveInt = Field(alias="num_attention_heads")
    num_kv_heads: PositiveInt | None = Field(None, alias="num_key_value_heads")
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: Positive = 1e-6
    tie_embeddings: bool = Field(False, alias="tie_word_embeddings")
    head_dim: PositiveInt | None = None
    layer_types: tuple[Literal["full_attention"], ...] = ()
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    def __post_init__(self) -> None:
        if self.head_dim not in (None, own := self.hidden_size // self.num_heads):
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
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    return read(DreamConfig, raw).transformer(qkv_bias=True, logits_shift=1)


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
