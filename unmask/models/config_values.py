"""Reading a checkpoint's config.json: a class for each family declares the keys and their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from unmask.config import Config, Count, Positive, PositiveInt
from unmask.models.transformer import TransformerConfig

Raw = Mapping[str, Any]
"""A parsed config.json."""

TokenId = Annotated[Count | None, BeforeValidator(lambda value: value[0] if isinstance(value, tuple) else value)]
"""A token id, the first if a list is given."""


def unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or set(rope) - {"rope_type", "type", "rope_theta"}:
        raise ValueError("unscaled rotary embeddings")
    return rope


Rope = Annotated[dict[str, Any], AfterValidator(unscaled)]


class CheckpointConfig(Config, kw_only=True):
    """What families share. Fields have :class:`TransformerConfig`'s names, with the checkpoint's key as an alias.

    A field whose type has a single value is a switch of which this decoder implements only that setting.
    """

    vocab_size: PositiveInt
    mask_token_id: Count
    eos_token_id: TokenId = None
    pad_token_id: TokenId = None
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0

    def transformer(self, **settings: Any) -> TransformerConfig:
        """The decoder's configuration; ``settings`` replace or add fields."""
        own = {f.name: getattr(self, f.name) for f in fields(TransformerConfig) if hasattr(self, f.name)}
        theta = self.rope_theta or (self.rope_parameters or {}).get("rope_theta", 10_000.0)
        return TransformerConfig(**{**own, "rope_theta": theta, **settings})


Kind = TypeVar("Kind", bound=CheckpointConfig)


def read(kind: type[Kind], raw: Raw) -> Kind:
    """The keys of ``raw`` that ``kind`` has; null counts as missing. ValueError names a key with another value."""
    keys = [f.alias or name for name, f in kind.__pydantic_fields__.items()]
    values = {key: raw[key] for key in keys if raw.get(key) is not None}
    if "mask_token_id" not in values:
        raise ValueError("config.json has no mask_token_id; give it as load_model(..., mask_token_id=...)")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
