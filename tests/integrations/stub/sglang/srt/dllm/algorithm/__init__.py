"""Stand-in for SGLang's registry of algorithms.

``stub`` holds what the plugin touches of SGLang, for machines that cannot install it: names, signatures and return
values of ``sglang.srt.dllm.algorithm``, ``.base`` and ``sglang.srt.dllm.config``, written from the behaviour of the
wheel sglang 0.5.23. The tests run against it and against the wheel, so that the two cannot drift apart unnoticed.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any


def import_algorithms() -> dict[str, Any]:
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.Algorithm.__name__: module.Algorithm for module in modules if hasattr(module, "Algorithm")}


def get_algorithm_cls(name: str) -> Any:
    if name not in algo_name_to_cls:
        raise RuntimeError(f"Unknown diffusion LLM algorithm: {name}")
    return algo_name_to_cls[name]


def get_algorithm(config: Any) -> Any:
    return get_algorithm_cls(config.algorithm)(config)


algo_name_to_cls = import_algorithms()
