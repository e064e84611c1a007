"""Defines the ops ``torch.ops.unmask.*`` and loads their kernels; where there are none, plain torch computes them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # must be loaded before the extension: it provides the libraries that the extension links to
from torch import Tensor

# logsumexp and entropy are empty, shape (0,), unless asked for. torch.compile cannot call an op that has an argument
# named mode, hence action_mode: the number of an ActionMode (csrc/ops/unmask.h).
_SCHEMAS = (
    "topk_confidence(Tensor logits, int k, Tensor? rows, Tensor? select, float temperature, Tensor? seed, "
    "Tensor? counter, int[] exclude, bool logsumexp, bool entropy) -> (Tensor confidence, Tensor token, "
    "Tensor sample, Tensor sample_confidence, Tensor logsumexp, Tensor entropy)",
    "policy_forward(Tensor packed, int hidden, int heads, int ffn, int confidences, Tensor mask, Tensor confidence, "
    "Tensor time, Tensor? rows, Tensor? cond) -> Tensor",
    "select_set(Tensor packed, int hidden, int heads, int ffn, int layers, Tensor table, Tensor tokens, "
    "Tensor candidates, Tensor mask, Tensor region, Tensor confidence, Tensor probability, Tensor? bias, "
    "Tensor allowed, Tensor risk, float sure, int runs) -> (Tensor select, Tensor score)",
    "choose(Tensor region, Tensor? allowed, Tensor probability, Tensor candidates, Tensor? values, Tensor? picked, "
    "Tensor? tokens, Tensor? editable, Tensor? steps, Tensor? phase, Tensor(a!)? memory, int rule, int score, "
    "float[] numbers, int block_length, int horizon, int[] stops, int window, float decay, int spacing, "
    "bool hold_eos, float edit) -> (Tensor select, Tensor score, Tensor revise)",
    "calm_(Tensor logits, Tensor(a!) previous, Tensor(b!) calm_for, Tensor steps, Tensor? positions, int excluded, "
    "float bound, int needed) -> (Tensor calm, Tensor divergence)",
    "prepare(Tensor rows, Tensor mask, Tensor allowed, Tensor? editable, Tensor? seed, int start, int canvas_width, "
    "int block_length, int horizon, bool everywhere) -> (Tensor steps, Tensor time, Tensor positions, Tensor places, "
    "Tensor sources, Tensor revisable, Tensor read, Tensor uniform)",
    "unmask_(Tensor(a!) tokens, Tensor(b!) mask, Tensor(c!) allowed, Tensor(d!) rows, Tensor candidates, "
    "Tensor action, int start, int block_length, int max_steps, int action_mode, int[] eos, float temperature, "
    "float scale, float stop_logit, Tensor? seed, Tensor? revise, Tensor? editable, int? max_post, bool everywhere, "
    "bool settled_stop) -> Tensor",
)
_library = torch.library.Library("unmask", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema)


def _why_missing() -> str:
    """Why there is no unmask._C to import."""
    here = Path(__file__).resolve().parents[1]
    for entry in sys.path:
        other = Path(entry).resolve() / "unmask"
        if other != here and any(other.glob("_C.*")):
            return (
                f"the source folder {here} hides the installed package {other}, which has a compiled part; start "
                "Python elsewhere, or build in the source folder with `pip install -e .`"
            )
    return (
        f"{here} has no compiled part (unmask._C); build it with `pip install .`, in a source tree `pip install -e .`"
    )


def _load() -> tuple[ModuleType | None, str]:
    """The extension, which registers its kernels when imported; else None and why there is none."""
    if os.environ.get("UNMASK_NO_EXT", "").lower() not in ("", "0", "false", "off", "no"):
        return None, "UNMASK_NO_EXT is set"
    if importlib.util.find_spec("unmask._C") is None:
        return None, _why_missing()
    try:
        return importlib.import_module("unmask._C"), ""
    except ImportError as error:
        raise ImportError(
            f"the compiled part of unmask (unmask._C) is there but cannot be loaded: {error}. It needs torch >= 2.11 "
            f"(this is torch {torch.__version__}); build it again with `pip install .`, or set UNMASK_NO_EXT=1."
        ) from error


_C, _MISSING = _load()


def build_info() -> dict[str, Any]:
    """What the extension was built with and runs on.

    Keys: ``cuda`` (bool: has CUDA kernels), ``cuda_archs`` (list of str, e.g. ["80", "90"]), ``compiler``,
    ``built_with_torch``, ``cpu_isa`` (instruction set in use: "avx512", "avx2" or "portable"; the environment variable
    UNMASK_CPU_ISA forces one; "torch" without the extension) and ``cpu_isas`` (those this processor supports).
    """
    if _C is None:
        none: dict[str, Any] = {"cuda": False, "cuda_archs": [], "compiler": "", "built_with_torch": ""}
        return {**none, "cpu_isa": "torch", "cpu_isas": []}
    return dict(_C.build_info())


@cache
def _warn(why: str) -> None:
    warnings.warn(f"plain torch computes the ops of unmask, many times slower: {why}", RuntimeWarning, stacklevel=3)


def fallback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the op of the function's name on every device for which the extension has no kernel."""

    @wraps(function)
    def warned(first: Tensor, *args: Any) -> Any:
        _warn(_MISSING or f"the compiled part has no kernels for {first.device.type} (see unmask.ops.build_info)")
        with torch.no_grad():
            return function(first, *args)

    _library.impl(function.__name__, warned, "CompositeExplicitAutograd")
    return function


def call(name: str, *args: Any) -> Any:
    """``torch.ops.unmask.<name>(*args)``; what is wrong with an argument raises TypeError or ValueError.

    Kernels, as the dispatcher, can raise nothing but RuntimeError; theirs begins with the type that is meant.
    """
    try:
        return getattr(torch.ops.unmask, name)(*args)
    except RuntimeError as error:
        raise _translated(error) from None


def _translated(error: RuntimeError) -> Exception:
    text = str(error)
    if meant := re.search(r"unmask: (TypeError|ValueError): (.*)", text):
        return {"TypeError": TypeError, "ValueError": ValueError}[meant[1]](meant[2])
    if wrong := re.search(r"Expected a value of type '(.*)' for argument '(.*)' but .*\n.*\nValue: (.*)", text):
        return TypeError(f"{wrong[2]}: expected {wrong[1]}, got {wrong[3]}")
    return error
