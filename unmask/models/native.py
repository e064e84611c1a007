"""This project's own checkpoint format: ``TransformerConfig``'s fields and the decoder's own parameter names."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from unmask.models import config_values as read
from unmask.models.transformer import Transformer, TransformerConfig

MODEL_TYPE = "unmask"
NOT_FIELDS = ("model_type", "generation_defaults")


def read_config(raw: read.Raw) -> TransformerConfig:
    """Raises ValueError naming the key for unknown, missing or impossible fields."""
    values = {key: value for key, value in raw.items() if key not in NOT_FIELDS}
    fields = dataclasses.fields(TransformerConfig)
    known = {f.name for f in fields}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"config.json has unknown keys {unknown}; known: {sorted(known)}")
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"config.json has no {', '.join(map(repr, missing))}")
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def write_config(model: Transformer) -> dict[str, Any]:
    """What :func:`read_config` reads."""
    config: dict[str, Any] = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
    if model.generation_defaults:
        config["generation_defaults"] = dict(model.generation_defaults)
    return config


def weight_names(config: TransformerConfig) -> dict[str, str]:
    """Every parameter under its own name."""
    with torch.device("meta"):
        return {name: name for name in Transformer(config).state_dict()}
