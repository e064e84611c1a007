"""Reading a checkpoint's config.json: every refusal names the key, its value and what would have been accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Raw = Mapping[str, Any]
"""A parsed config.json."""


def integer(raw: Raw, key: str, default: int | None = None) -> int:
    """The integer at ``key``, or ``default`` where the key is missing or null. Raises ValueError."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"config.json has no {key!r}")
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {key!r} must be an integer, got {value!r}")
    return value


def number(raw: Raw, key: str, default: float) -> float:
    """The number at ``key``, or ``default`` where the key is missing or null. Raises ValueError."""
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {key!r} must be a number, got {value!r}")
    return float(value)


def boolean(raw: Raw, key: str, default: bool = False) -> bool:
    """The flag at ``key``, or ``default`` where the key is missing or null. Raises ValueError."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key!r} must be true or false, got {value!r}")
    return value


def token_id(raw: Raw, key: str) -> int | None:
    """The token id at ``key``, the first if it lists several, None where it is missing or null. Raises ValueError."""
    value = raw.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {key!r} must be a token id, got {raw[key]!r}")
    return value


def required_token_id(raw: Raw, key: str) -> int:
    """As :func:`token_id`, but the id must be there."""
    value = token_id(raw, key)
    if value is None:
        raise ValueError(f"config.json has no {key!r}; give it as load_model(..., {key}=...)")
    return value


def only(raw: Raw, family: str, accepted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that change the architecture in a way this project does not implement.

    ``accepted`` maps a key to the values it may have; a missing key is fine. Raises ValueError.
    """
    for key, values in accepted.items():
        if key in raw and raw[key] not in values:
            known = ", ".join(repr(v) for v in values)
            raise ValueError(f"config.json: {key}={raw[key]!r} is not supported for {family}; supported: {known}")


def plain_rope(raw: Raw, family: str) -> None:
    """Refuse rotary embeddings that are scaled or partial, under any of the keys in use. Raises ValueError."""
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json: {key!r} must be an object or null, got {value!r}")
        kind = value.get("rope_type", value.get("type", "default"))
        extra = set(value) - {"rope_type", "type", "rope_theta"}
        if kind != "default" or extra:
            raise ValueError(
                f"config.json: {key}={dict(value)!r} is not supported for {family}; only unscaled rotary embeddings are"
            )
    only(raw, family, {"partial_rotary_factor": (None, 1, 1.0)})
