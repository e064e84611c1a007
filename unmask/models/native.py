"""This project's own checkpoint format: ``TransformerConfig``'s fields and the decoder's own parameter names."""

from __future__ import annotations

from typing import Any

import torch

from unmask.models.config_values import Raw
from unmask.models.transformer import Transformer, TransformerConfig

MODEL_TYPE = "unmask"
NOT_FIELDS = ("model_type", "generation_defaults")


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming the key for unknown, missing or impossible fields."""
    try:
        return TransformerConfig.from_dict({key: value for key, value in raw.items() if key not in NOT_FIELDS})
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def write_config(model: Transformer) -> dict[str, Any]:
    """The config.json that :func:`read_config` reads."""
    config: dict[str, Any] = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    if model.generation_defaults:
        config["generation_defaults"] = dict(model.generation_defaults)
    return config


def weight_names(config: TransformerConfig) -> dict[str, str]:
    """Every parameter under its own name."""
    with torch.device("meta"):
        return {name: name for name in Transformer(config).state_dict()}
