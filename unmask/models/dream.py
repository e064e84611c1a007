"""Dream and DiffuCoder (Ye et al., arXiv 2508.15487): Qwen2.5's weight layout, bidirectional.

Adapted from an autoregressive model: raw logits[i] predict token i + 1, so the decoder shifts them by one.
"""

from __future__ import annotations

from unmask.models.config_values import Raw, read
from unmask.models.qwen import Qwen2Config, weight_names
from unmask.models.transformer import TransformerConfig

__all__ = ["MODEL_TYPE", "read_config", "weight_names"]

MODEL_TYPE = "Dream"


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    return read(Qwen2Config, raw).transformer(qkv_bias=True, logits_shift=1)
