"""Nemotron-Labs-Diffusion: Ministral 3's layers under YaRN; what is committed is causal, the active block is not.

Logits are not shifted, but the first token of a block is what the last causal row predicts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from unmask.config import Positive, PositiveInt
from unmask.models import qwen
from unmask.models.config_values import Raw, read
from unmask.models.pieces import Names
from unmask.models.transformer import TransformerConfig

MODEL_TYPE = "nemotron_labs_diffusion"


class NemotronConfig(qwen.QwenConfig, kw_only=True):
    """Keys of Ministral 3's configuration and ``block_size``."""

    MASK: ClassVar[int | None] = 100
    STOPS: ClassVar[tuple[int, ...]] = (11,)

    rms_norm_eps: Positive = 1e-5
    head_dim: PositiveInt | None = 128
    block_length: PositiveInt = 32
    causal_context: bool = True
    """False: what is committed sees itself in both directions, and blocks have no seed."""
    attention_bias: Literal[False] = False
    sliding_window: None = None


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    c = read(NemotronConfig, raw)
    attention = "causal-prefix" if c.causal_context else "bidirectional-prefix"
    return c.transformer(attention=attention, seeded=c.causal_context)


def weight_names(config: TransformerConfig, stored: Collection[str] = ()) -> Names:
    """Names in the checkpoint -> what each is of :class:`unmask.models.Transformer`'s parameters."""
    return qwen.weight_names(config, stored, base="encoder", head="diffusion_head")
