"""SGLang plug-in: ``--dllm-algorithm Unmask``. Found through the entry point group ``sglang.srt.plugins``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

REGISTRY = "sglang.srt.dllm.algorithm"
"""The package whose modules SGLang searches for algorithms when it is imported."""

FOLDER = str(Path(__file__).parent / "algorithms")
"""A folder of one such module, which has the algorithm."""


def register() -> None:
    """Make SGLang know the algorithm; what the entry point names.

    SGLang calls this in each of its processes, whatever it serves. Importing its registry there would load its model
    runner everywhere. So the registry is only told, once SGLang itself imports it, to search one folder more. An
    algorithm that cannot be imported is named in SGLang's log, and its other algorithms go on working.
    """
    registry = sys.modules.get(REGISTRY)
    if registry is not None:
        registry.__path__.append(FOLDER)
        registry.algo_name_to_cls.update(registry.import_algorithms())
    elif not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())


class RegistryFinder(MetaPathFinder):
    """Finds the registry, once and as usual, but as a package of one folder more."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(FOLDER)
        return spec
