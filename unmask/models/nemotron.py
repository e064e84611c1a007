"""Nemotron-Labs-Diffusion: Ministral 3's layers under YaRN; what is committed is causal, the active block is not.

Logits are not shifted, but the first token of a block is what the last causal row predicts.
"""

from __future__ import annotations

from typing import Literal

from unmask.config import Positive, PositiveInt
from unmask.models.qwen import QwenConfig
from unmask.models.transformer import TransformerConfig


class NemotronConfig(QwenConfig, kw_only=True):
    """Keys of Ministral 3's configuration and ``block_size``."""

    MODEL_TYPE = "nemotron_labs_diffusion"
    MASK, STOPS = 100, (11,)
    BASE, HEAD = "encoder", "diffusion_head"

    rms_norm_eps: Positive = 1e-5
    head_dim: PositiveInt | None = 128
    block_length: PositiveInt = 32
    causal_context: bool = True
    """False: what is committed sees itself in both directions, and blocks have no seed."""
    attention_bias: Literal[False] = False
    sliding_window: None = None

    def decoder(self) -> TransformerConfig:
        attention = "causal-prefix" if self.causal_context else "bidirectional-prefix"
        return self.transformer(attention=attention, seeded=self.causal_context)
