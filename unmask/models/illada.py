"""iLLaDA (Nie et al., arXiv 2606.25331): LLaDA with grouped queries under Llama's names, bidirectional."""

from __future__ import annotations

from typing import ClassVar

from unmask.models.config_values import Raw, Rope, read
from unmask.models.qwen import QwenConfig, check_head_dim, weight_names
from unmask.models.transformer import TransformerConfig

__all__ = ["MODEL_TYPE", "read_config", "weight_names"]

MODEL_TYPE = "illada"


class ILLaDAConfig(QwenConfig, kw_only=True):
    """Keys of Llama's configuration; published ones do not name the mask token."""

    MASK: ClassVar[int | None] = 5

    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    attention_bias: bool = False
    layer_norm_eps: None = None

    def __post_init__(self) -> None:
        check_head_dim(self)


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    c = read(ILLaDAConfig, raw)
    return c.transformer(qkv_bias=c.attention_bias, o_bias=c.attention_bias)
