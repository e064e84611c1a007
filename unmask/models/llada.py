"""LLaDA and LLaDA 1.5 (Nie et al., arXiv 2502.09992): Llama-style blocks; logits[i] predict token i."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from unmask.config import Positive, PositiveInt
from unmask.models.config_values import CheckpointConfig
from unmask.models.pieces import Names
from unmask.models.transformer import TransformerConfig

BLOCK = {name: name for name in ("attn_norm", "q_proj", "k_proj", "v_proj", "up_proj")}
BLOCK |= {"attn_out": "o_proj", "ff_norm": "mlp_norm", "ff_proj": "gate_proj", "ff_out": "down_proj"}


class LLaDAConfig(CheckpointConfig, kw_only=True):
    """The switches at the end have the only values found in published checkpoints."""

    MODEL_TYPE = "llada"

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

    def decoder(self) -> TransformerConfig:
        return self.transformer(
            # The embedding may be padded beyond the vocabulary; the logits are as wide as the embedding.
            vocab_size=self.embedding_size or self.vocab_size,
            num_kv_heads=self.num_kv_heads or (1 if self.multi_query_attention else self.num_heads),
            intermediate_size=self.intermediate_size or int(self.mlp_ratio * self.hidden_size),
        )

    @classmethod
    def weight_names(cls, config: TransformerConfig, stored: Collection[str] = ()) -> Names:
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
