"""Makes ``sglang`` importable for tests: the stand-in in ``stub``, or the released package without its GPU parts.

The released package is taken from the path in the environment variable ``UNMASK_TEST_SGLANG``: a wheel (``pip download
sglang==0.5.23 --no-deps``) or the folder it was unpacked to. Of it run ``sglang.srt.dllm`` (base class, registry,
configuration, its own LowConfidence) and ``sglang.srt.plugins``. What those import of the model runner and the server's
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
MODEL = SimpleNamespace(vocab_size=157184, hf_config=SimpleNamespace(architectures=["LLaDA2MoeModelLM"]))
SHELLS: dict[str, dict[str, Any]] = {
    "layers.logits_processor": {"LogitsProcessorOutput": SimpleNamespace},
    "model_executor.forward_batch_info": {"ForwardBatch": SimpleNamespace},
    "model_executor.model_runner": {"ModelRunner": SimpleNamespace},
    "server_args": {"ServerArgs": SimpleNamespace},
    "configs.model_config": {"ModelConfig": SimpleNamespace(from_server_args=lambda *_, **__: MODEL)},
    "arg_groups.overrides": {
        "resolving_view": lambda server_args: server_args,
        "declare_resolution": lambda server_args, source, **fields: vars(server_args).update(fields),
    },
    "utils": {"is_npu": lambda: False},
}


@contextmanager
def importable_sglang(kind: str) -> Iterator[None]:
    """Within, ``import sglang.srt.dllm...`` finds the "stub" or the "released" package; afterwards all is as before."""
    before, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    try:
        contents = {f"sglang.srt.{name}": shell for name, shell in SHELLS.items()}
        if kind == "stub":
            sys.path.insert(0, str(Path(__file__).parent / "stub"))
        else:
            parents = ("sglang", "sglang.srt", "sglang.srt.dllm")  # their own __init__ would import everything
            folders = {name: os.path.join(os.environ[VARIABLE], *name.split(".")) for name in parents}
            contents |= {name: {"__path__": [folder]} for name, folder in folders.items()}
        for name, content in contents.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(content)
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.startswith(("sglang", "unmask.integrations.sglang.")):
                del sys.modules[name]
        sys.path[:], sys.meta_path[:] = path, finders
