"""Makes ``sglang`` importable for tests: the stand-in in ``stub/``, or the released package without its GPU parts.

The released package is taken from the path in the environment variable ``UNMASK_TEST_SGLANG``: a wheel (``pip download
sglang==0.5.23 --no-deps``) or the folder it was unpacked to. Of it run ``sglang.srt.dllm`` (base class, registry,
configuration, its own LowConfidence) and ``sglang.srt.plugins``; what those import of the model runner and the server's
arguments are empty shells, since it needs a GPU's libraries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

VARIABLE = "UNMASK_TEST_SGLANG"
OURS = "unmask.serving.sglang_algorithm"
STUB = Path(__file__).parent / "stub"


class ModelConfig:
    """Names the architecture that ``DllmConfig`` looks up; the rest of SGLang's is of no interest here."""

    vocab_size = 157184
    hf_config = SimpleNamespace(architectures=["LLaDA2MoeModelLM"])

    @classmethod
    def from_server_args(cls, server_args: Any, **_: Any) -> ModelConfig:
        return cls()


SHELLS: dict[str, dict[str, Any]] = {
    "sglang.srt.layers.logits_processor": {"LogitsProcessorOutput": SimpleNamespace},
    "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": SimpleNamespace},
    "sglang.srt.model_executor.model_runner": {"ModelRunner": SimpleNamespace},
    "sglang.srt.server_args": {"ServerArgs": SimpleNamespace},
    "sglang.srt.configs.model_config": {"ModelConfig": ModelConfig},
    "sglang.srt.arg_groups.overrides": {"resolving_view": lambda server_args: server_args},
    "sglang.srt.utils": {"is_npu": lambda: False},
}


def shell(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def forget_sglang() -> dict[str, ModuleType]:
    """Take every module of sglang, and ours that is built on it, out of ``sys.modules``."""
    gone = [name for name in sys.modules if name.split(".")[0] == "sglang" or name == OURS]
    return {name: sys.modules.pop(name) for name in gone}


@contextmanager
def importable_sglang(kind: str) -> Iterator[None]:
    """Within, ``import sglang.srt.dllm...`` finds the "stub" or the "released" package; afterwards all is as before."""
    before, path, finders = forget_sglang(), list(sys.path), list(sys.meta_path)
    try:
        if kind == "stub":
            sys.path.insert(0, str(STUB))
        else:
            root = os.environ[VARIABLE]
            for name in ("sglang", "sglang.srt", "sglang.srt.dllm"):  # their own __init__ would import everything
                sys.modules[name] = shell(name, __path__=[os.path.join(root, *name.split("."))])
            sys.modules.update({name: shell(name, **contents) for name, contents in SHELLS.items()})
        yield
    finally:
        forget_sglang()
        sys.modules.update(before)
        sys.path[:], sys.meta_path[:] = path, finders


def released_is_here() -> bool:
    return VARIABLE in os.environ
