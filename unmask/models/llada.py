"""LLaDA and LLaDA 1.5 (Nie et al., arXiv 2502.09992): Llama-style blocks; logits[i] predict token i."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unmask.config import Positive, PositiveInt
from unmask.models.config_values import CheckpointConfig, Raw, read
from unmask.models.transformer import TransformerConfig

MODEL_TYPE = "llada"


class LLaDAConfig(CheckpointConfig, kw_only=True):
    """The switches at the end have the only values found in published checkpoints."""

    hidden_size: PositiveInt = Field(alias="d_model")
    num_layers: PositiveInt = Field(alias="n_layers")
    num_heads: PositiveInt = Field(alias="n_heads")
    num_kv_heads: PositiveInt | None = Field(None, alias="n_kv_heads")
    multi_query_attention: bool = False
    intermediate_size: PositiveInt | None = Field(None, alias="mlp_hidden_size")
    mlp_ratio: Positive = 4.0
    embedding_size: PositiveInt | None = None
    max_position_embeddings: PositiveInt = Field(alias="max_sequence_length")
    qkv_bias: bool = Field(False, alias="include_qkv_bias")
    tie_embeddings: bool = Field(False, alias="weight_tying")
    block_type: Literal["llama"] = "llama"
    block_group_size: Literal[1] = 1
    activation_type: Literal["silu"] = "silu"
    layer_norm_type: Literal["rms"] = "rms"
    layer_norm_with_affine: Literal[True] = True
    rope: Literal[True] = True
    alibi: Literal[False] = False
    attention_layer_norm: Literal[False] = False
    input_emb_norm: Literal[False] = False
    include_bias: Literal[False] = False
    bias_for_layer_norm: Literal[False] = False
    scale_logits: Literal[False] = False
    sliding_window: Literal[False] = False
    clip_qkv: None = None


BLOCK = {
    "attn_norm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_out": "o_proj",
    "ff_norm": "mlp_norm",
    "ff_proj": "gate_proj",
    "up_proj": "up_proj",
    "ff_out": "down_proj",
}


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    c = read(LLaDAConfig, raw)
    return c.transformer(
        # The embedding may be padded beyond the vocabulary; the logits are as wide as the embedding.
        vocab_size=c.embedding_size or c.vocab_size,
        num_kv_heads=c.num_kv_heads or (1 if c.multi_query_attention else c.num_heads),
        intermediate_size=c.intermediate_size or int(c.mlp_ratio * c.hidden_size),
    )


def weight_names(config: TransformerConfig) -> dict[str, str]:
    """Names in the checkpoint -> names of :class:`unmask.models.Transformer`'s parameters."""
    names = {
        "model.transformer.wte.weight": "embed.weight",
        "model.transformer.ln_f.weight": "final_norm.weight",
        "model.transformer.ff_out.weight": "lm_head.weight",
    }
    for i in range(config.num_layers):
        for theirs, ours in BLOCK.items():
            names[f"model.transformer.blocks.{i}.{theirs}.weight"] = f"layers.{i}.{ours}.weight"
        for name in ("q_proj", "k_proj", "v_proj") if config.qkv_bias else ():
            names[f"model.transformer.blocks.{i}.{name}.bias"] = f"layers.{i}.{name}.bias"
    return names
