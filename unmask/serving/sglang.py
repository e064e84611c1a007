"""SGLang plugin: ``--dllm-algorithm Unmask``. Found through the entry point group ``sglang.srt.plugins``."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)

REGISTRY = "sglang.srt.dllm.algorithm"
"""The package whose ``algo_name_to_cls`` maps the names that ``--dllm-algorithm`` takes to classes."""


def register() -> None:
    """Make SGLang know the algorithm; what the entry point names.

    SGLang calls this in each of its processes, whatever it serves. Importing its registry there would load its model
    runner everywhere, so the algorithm is added when SGLang itself first imports the registry.
    """
    module = sys.modules.get(REGISTRY)
    if module is not None:
        add_algorithm(module)
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


def add_algorithm(registry: ModuleType) -> None:
    """Enter the algorithm in SGLang's registry; a failure is logged, and other algorithms go on working."""
    try:
        from unmask.serving.sglang_algorithm import Unmask

        registry.algo_name_to_cls[Unmask.__name__] = Unmask
    except Exception:
        logger.exception("unmask: the algorithm could not be added to %s", REGISTRY)


class AfterImport(MetaPathFinder):
    """Finds the registry as usual, but so that the algorithm is added once the registry has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenAdd(spec.loader)
        return spec


class ThenAdd(Loader):
    """Has the registry loaded by its own loader, which it leaves in place, and adds the algorithm."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        add_algorithm(module)
