"""iLLaDA (Nie et al., arXiv 2606.25331): LLaDA with grouped queries under Llama's names, bidirectional."""

from __future__ import annotations

from unmask.models.config_values import Rope
from unmask.models.qwen import QwenConfig, check_head_dim
from unmask.models.transformer import TransformerConfig


class ILLaDAConfig(QwenConfig, kw_only=True):
    """Keys of Llama's configuration; published ones do not name the mask token."""

    MODEL_TYPE = "illada"
    MASK = 5

    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    attention_bias: bool = False
    layer_norm_eps: None = None

    def __post_init__(self) -> None:
        check_head_dim(self)

    def decoder(self) -> TransformerConfig:
        return self.transformer(qkv_bias=self.attention_bias, o_bias=self.attention_bias)
