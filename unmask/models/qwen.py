"""Qwen's configuration keys and weight layout, which several families took over."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field

from unmask.config import Positive, PositiveInt
from unmask.models.config_values import CheckpointConfig, Scaled
from unmask.models.pieces import Names, Piece, feed_forward_names
from unmask.models.transformer_config import TransformerConfig


class QwenConfig(CheckpointConfig, kw_only=True):
    """Keys that Qwen2.5, Qwen3 and those after them share."""

    BASE: ClassVar[str] = "model"
    HEAD: ClassVar[str] = "lm_head"
    """Where the tensors' names begin, and the output layer's."""

    hidden_size: PositiveInt
    num_layers: PositiveInt = Field(alias="num_hidden_layers")
    num_heads: PositiveInt = Field(alias="num_attention_heads")
    num_kv_heads: PositiveInt | None = Field(None, alias="num_key_value_heads")
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: Positive = 1e-6
    tie_embeddings: bool = Field(False, alias="tie_word_embeddings")
    head_dim: PositiveInt | None = None
    rope_scaling: Scaled | None = None
    rope_parameters: Scaled | None = None
    layer_types: tuple[Literal["full_attention"], ...] = ()
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] = False
    mlp_bias: Literal[False] = False

    @classmethod
    def weight_names(cls, config: TransformerConfig, stored: Collection[str] = ()) -> Names:
        base = cls.BASE
        layer = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "mlp_norm.weight"}
        layer |= {f"self_attn.{x}_proj.weight": f"{x}_proj.weight" for x in "qkvo"}
        layer |= {f"self_attn.{x}_proj.bias": f"{x}_proj.bias" for x in "qkv" if config.qkv_bias}
        layer |= {"self_attn.o_proj.bias": "o_proj.bias"} if config.o_bias else {}
        layer |= {f"self_attn.{x}_norm.weight": f"{x}_norm.weight" for x in "qk" if config.qk_norm}
        names: dict[str, str | tuple[Piece, ...]] = {f"{base}.embed_tokens.weight": "embed.weight"}
        names |= {f"{base}.norm.weight": "final_norm.weight", f"{cls.HEAD}.weight": "lm_head.weight"}
        for i in range(config.num_layers):
            names |= {f"{base}.layers.{i}.{theirs}": f"layers.{i}.{ours}" for theirs, ours in layer.items()}
            names |= feed_forward_names(config, f"{base}.layers.{i}.mlp", i, stored)
        return names


class Qwen2Config(QwenConfig, kw_only=True):
    """Qwen2.5: heads of hidden_size / num_attention_heads channels, biases on queries, keys and values alone."""

    attention_bias: Literal[False] = False

    def __post_init__(self) -> None:
        check_head_dim(self)


def check_head_dim(config: QwenConfig) -> None:
    """Raise ValueError for heads of another width than hidden_size / num_attention_heads."""
    if config.head_dim not in (None, own := config.hidden_size // config.num_heads):
        raise ValueError(f"head_dim must be hidden_size / num_attention_heads = {own}, got {config.head_dim}")
