"""SDAR (Cheng et al., arXiv 2510.06303) and TraDo: Qwen3, block-causal; logits[i] predict token i."""

from __future__ import annotations

from typing import Any, ClassVar

from unmask.config import PositiveInt
from unmask.models.config_values import Raw, read
from unmask.models.qwen import QwenConfig, weight_names
from unmask.models.transformer import TransformerConfig

__all__ = ["MODEL_TYPE", "read_config", "weight_names"]

MODEL_TYPE = "sdar"


class SDARConfig(QwenConfig, kw_only=True):
    """Keys of Qwen3's configuration. Published ones often lack the mask token and the block size."""

    MASK: ClassVar[int | None] = 151_669
    STOPS: ClassVar[tuple[int, ...]] = (151_643, 151_645)

    head_dim: PositiveInt | None = 128
    attention_bias: bool = False
    block_length: PositiveInt = 4

    def decoder(self, **settings: Any) -> TransformerConfig:
        """The decoder's configuration; ``settings`` add fields."""
        bias = self.attention_bias
        return self.transformer(qkv_bias=bias, o_bias=bias, qk_norm=True, attention="block-causal", **settings)


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    return read(SDARConfig, raw).decoder()
