"""Stand-in for SGLang's registry of algorithms.

``stub`` is for machines that cannot install SGLang: names, signatures and return values of what the plugin touches,
written from the behaviour of the wheel sglang 0.5.23. The tests run against both, so that the two cannot drift apart.
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
