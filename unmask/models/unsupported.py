"""Diffusion language models that this project would decode wrongly. They are refused before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIXTURES = ("sdar_moe", "llada2_moe")
"""Native model types with experts."""

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Keys of config.json that count the experts of a layer."""


def refuse_unsupported(config: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise ValueError, naming the model type and the reason, for a model that would load and be decoded wrongly.

    BD3-LM is refused with ``trust_remote_code`` too, because the sampler would show its code the whole canvas at once.
    Mixtures of experts that are not native are refused unless their own code is trusted.
    """
    kind = str(raw.get("model_type"))
    if kind.lower() == "bd3lm":
        raise ValueError(
            f"{config}: model_type {kind!r} (BD3-LM) is not supported: its tokens see their own block and those before "
            "it, its layers are not native, and its own code would be shown the whole canvas in both directions, which "
            "it was not trained on: its answers would be silently wrong"
        )
    if raw.get("expert_capacity") is not None:
        raise ValueError(
            f"{config}: expert_capacity={raw['expert_capacity']!r} (LLaDA2.2) is not supported: each block would first "
            "choose its experts, and tokens would be deleted and split while decoding; LLaDA2.0 and 2.1 are"
        )
    trusted = trust_remote_code and isinstance(raw.get("auto_map"), Mapping)
    if has_experts(raw) and not trusted:
        said = ", ".join(f"{key}={raw[key]}" for key in EXPERTS if key in raw)
        raise ValueError(
            f"{config}: model_type {kind!r} is a mixture of experts ({said}), which is native only for "
            f"{', '.join(MIXTURES)}; if the model brings its own code and you trust it, trust_remote_code=True runs it"
        )


def has_experts(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts that is not native."""
    return raw.get("model_type") not in MIXTURES and any(
        isinstance(raw.get(key), int) and raw[key] > 1 for key in EXPERTS
    )
