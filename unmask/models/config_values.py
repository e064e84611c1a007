"""Reading a checkpoint's config.json: a class for each family says which keys matter and what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from unmask.config import Config, Count

Raw = Mapping[str, Any]
"""A parsed config.json."""

TokenId = Annotated[Count | None, BeforeValidator(lambda value: value[0] if isinstance(value, tuple) else value)]
"""A token id; of several, as for the end of sequence, the first."""


def unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or set(rope) - {"rope_type", "type", "rope_theta"}:
        raise ValueError("unscaled rotary embeddings")
    return rope


class CheckpointConfig(Config, kw_only=True):
    """Keys that families share. A key whose type has one value is a switch that this decoder implements so alone."""

    mask_token_id: Count
    eos_token_id: TokenId = None
    pad_token_id: TokenId = None
    rope_scaling: Annotated[dict[str, Any], AfterValidator(unscaled)] | None = None
    rope_parameters: Annotated[dict[str, Any], AfterValidator(unscaled)] | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0


Kind = TypeVar("Kind", bound=CheckpointConfig)


def read(kind: type[Kind], raw: Raw) -> Kind:
    """The keys of ``raw`` that ``kind`` has; null counts as missing. ValueError names a key with another value."""
    values = {f.name: raw[f.name] for f in fields(kind) if raw.get(f.name) is not None}
    if "mask_token_id" not in values:
        raise ValueError("config.json has no mask_token_id; give it as load_model(..., mask_token_id=...)")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
