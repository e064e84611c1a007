"""Stand-in for ``sglang.srt.dllm.algorithm``: the registry."""

from __future__ import annotations

from typing import Any

algo_name_to_cls: dict[str, Any] = {}


def get_algorithm_cls(name: str) -> Any:
    if name not in algo_name_to_cls:
        raise RuntimeError(f"Unknown diffusion LLM algorithm: {name}")
    return algo_name_to_cls[name]


def get_algorithm(config: Any) -> Any:
    return get_algorithm_cls(config.algorithm)(config)
