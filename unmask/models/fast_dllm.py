"""Fast-dLLM v2 (Wu et al., arXiv 2509.26328): Qwen2.5 made block-causal; raw logits[i] predict token i + 1.

The first token of a block is thus predicted by the row before the block, and blocks are decoded in smaller ones.
"""

from __future__ import annotations

from unmask.config import PositiveInt
from unmask.models.qwen import Qwen2Config
from unmask.models.transformer import TransformerConfig

SUB_BLOCK = 8
"""Upstream's ``small_block_size``, an argument of its generation."""


class FastDLLMConfig(Qwen2Config, kw_only=True):
    """Keys of Qwen2.5's configuration and ``bd_size``, the block size."""

    MODEL_TYPE = "Fast_dLLM_Qwen"
    MASK, STOPS = 151_665, (151_645,)

    block_length: PositiveInt = 32

    def decoder(self) -> TransformerConfig:
        return self.transformer(
            qkv_bias=True,
            logits_shift=1,
            attention="block-causal",
            seeded=True,
            sub_block_length=None if self.block_length % SUB_BLOCK else SUB_BLOCK,
        )
