"""Diffusion language models that this project would decode wrongly. They are refused before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK_CAUSAL = {
    "llada2_moe": "LLaDA2.x",
    "sdar": "SDAR",
    "sdar_moe": "SDAR",
    "fast_dllm_qwen": "Fast-dLLM v2",
    "bd3lm": "BD3-LM",
}
"""Model types, in lower case, whose attention is causal between blocks."""

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Keys of config.json that count the experts of a layer."""


def refuse_unsupported(config: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise ValueError, naming the model type and the reason, for a model that would load and be decoded wrongly.

    Models causal between blocks are refused with ``trust_remote_code`` too, because the sampler shows a model the
    whole canvas at once. Mixtures of experts are refused unless their own code is trusted.
    """
    kind = str(raw.get("model_type"))
    if (family := BLOCK_CAUSAL.get(kind.lower())) is not None:
        raise ValueError(
            f"{config}: model_type {kind!r} ({family}) is not supported: a token of these models attends to its own "
            "block and those before it, and each finished block is cached. The sampler here shows the model the whole "
            "canvas in both directions, which such a model was not trained on: its answers would be silently wrong"
        )
    trusted = trust_remote_code and isinstance(raw.get("auto_map"), Mapping)
    if has_experts(raw) and not trusted:
        said = ", ".join(f"{key}={raw[key]}" for key in EXPERTS if key in raw)
        raise ValueError(
            f"{config}: model_type {kind!r} is a mixture of experts ({said}), which the decoder here does not have; "
            "if the model brings its own code and you trust it, trust_remote_code=True runs that"
        )


def has_experts(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts."""
    return any(isinstance(raw.get(key), int) and raw[key] > 1 for key in EXPERTS)
