"""Dream and DiffuCoder (Ye et al., arXiv 2508.15487): Qwen2.5's weight layout, bidirectional.

Adapted from an autoregressive model: raw logits[i] predict token i + 1, so the decoder shifts them by one.
"""

from __future__ import annotations

from unmask.models.qwen import Qwen2Config
from unmask.models.transformer import TransformerConfig


class DreamConfig(Qwen2Config, kw_only=True):
    """Keys of Qwen2.5's configuration."""

    MODEL_TYPE = "Dream"

    def decoder(self) -> TransformerConfig:
        return self.transformer(qkv_bias=True, logits_shift=1)
