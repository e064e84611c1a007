"""SDAR (Cheng et al., arXiv 2510.06303) and TraDo: Qwen3, block-causal; logits[i] predict token i."""

from __future__ import annotations

from typing import Any

from unmask.config import PositiveInt
from unmask.models.qwen import QwenConfig
from unmask.models.transformer import TransformerConfig


class SDARConfig(QwenConfig, kw_only=True):
    """Keys of Qwen3's configuration. Published ones often lack the mask token and the block size."""

    MODEL_TYPE = "sdar"
    MASK, STOPS = 151_669, (151_643, 151_645)

    head_dim: PositiveInt | None = 128
    attention_bias: bool = False
    block_length: PositiveInt = 4

    def decoder(self, **settings: Any) -> TransformerConfig:
        bias = self.attention_bias
        return self.transformer(qkv_bias=bias, o_bias=bias, qk_norm=True, attention="block-causal", **settings)
