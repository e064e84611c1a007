"""Baselines that have to be made first, and what happens where they cannot be."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch

from unmask.benchmarking import baselines
from unmask.benchmarking.baselines import build, compiled, find_nvcc, one_block_per_row
from unmask.benchmarking.step import Setting, compiled_score, kinds
from unmask.benchmarking.timing import Comparison, Extra, Machine, Timing, Unavailable, limit, run
from unmask.benchmarking.topk_confidence import comparison, eager, eager_float64, same

CPU = torch.device("cpu")
MACHINE = Machine(bandwidth=1e9, rate=1e9, overhead=1e-6)


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_the_cuda_kernel_compiles_and_exports_its_function(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(build("90", tmp_path / "kernel.so")))
    assert library.one_block_per_row
    # Refused before anything is launched, so this needs no device.
    assert library.one_block_per_row(None, 0, ctypes.c_int64(0), ctypes.c_int64(5), None, None, None) == 1


def test_without_a_device_or_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="a CUDA kernel"):
        one_block_per_row(CPU)
    monkeypatch.setattr(baselines, "find_nvcc", lambda: None)
    with pytest.raises(Unavailable, match="no nvcc"):
        build("90", tmp_path / "kernel.so")
    monkeypatch.setattr(baselines, "find_nvcc", lambda: "/bin/false")
    with pytest.raises(Unavailable, match="nvcc failed: no message"):
        build("90", tmp_path / "kernel.so")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 5, 1024, 5003])
def test_the_cuda_kernel_agrees_with_float64(dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(3, 2, vocab, device="cuda") * 3).to(dtype)
    same(one_block_per_row(logits.device)(logits), eager_float64(logits), 1e-5)


def test_a_failing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no working C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(Unavailable, match="torch.compile failed: no working C\\+\\+ compiler$"):
        compiled(eager, torch.zeros(1, 2))


def timings(extras: dict[str, Extra]) -> dict[str, Timing]:
    contenders = {"unmask": int, "eager": partial(sum, range(100)), "part": int}
    c = Comparison("a", "b", contenders, lambda: None, extras=extras, yardsticks=frozenset({"part"}))
    return {t.contender: t for t in run(c, CPU, MACHINE, 0.01)}


def test_no_ratio_without_equal_outputs() -> None:
    def missing() -> partial[int]:
        raise Unavailable("no such thing")

    def differ(call: object) -> None:
        raise AssertionError("off by 2")

    fine = Extra(lambda: partial(sum, range(1000)), lambda call: None)
    found = timings({"fine": fine, "absent": Extra(missing, lambda call: None), "wrong": Extra(lambda: int, differ)})
    assert list(found) == ["unmask", "eager", "fine", "absent", "wrong", "part"]
    fine_row = found["fine"]
    assert fine_row.seconds is not None
    assert fine_row.ratio is not None
    assert fine_row.ratio < 1
    assert fine_row.setup_seconds is not None
    for name, note in (("absent", "unavailable: no such thing"), ("wrong", "outputs differ: off by 2")):
        assert (found[name].seconds, found[name].ratio, found[name].note) == (None, None, note)
    assert found["part"].ratio is None
    assert found["part"].seconds is not None


def test_the_larger_limit_binds() -> None:
    def binding(**needs: object) -> tuple[str, float]:
        return limit(Comparison("a", "b", {}, lambda: None, **needs), MACHINE, {"part": 7.0})  # type: ignore[arg-type]

    assert binding(bytes_moved=10**9, flops=10**8, calls=3) == ("memory", 1.0)
    assert binding(bytes_moved=10**9, flops=2 * 10**9) == ("arithmetic", 2.0)
    assert binding(bytes_moved=100, calls=3) == ("call overhead", pytest.approx(3e-6))
    assert binding(counts={"unmask": {"rows": 4.0}}, flops_counted=("rows", 1e9)) == ("arithmetic", 4.0)
    assert binding(floor="part") == ("products", 7.0)
    assert binding()[1] == 0


def test_every_chain_of_topk_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 500)
    c = comparison(logits, None)
    c.check()
    extra = c.extras["eager, compiled"]
    extra.check(partial(eager, logits))
    with pytest.raises(AssertionError, match="tokens differ"):
        extra.check(partial(eager, logits.flip(-1)))
    with pytest.raises(AssertionError, match="confidence is off"):
        extra.check(partial(eager, logits * 2))


def test_steps_of_every_kind_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.benchmarking.step.VOCAB", 200)
    monkeypatch.setattr("unmask.benchmarking.step.MASK", 150)
    monkeypatch.setattr("unmask.benchmarking.step.EOS", 151)
    monkeypatch.setattr("unmask.benchmarking.step.compiled", lambda function, *_: function)
    s = Setting(2, CPU)
    s.logits[0][..., 150] = -9.0
    for kind in kinds(s):
        for chain in kind.chains:
            score = partial(kind.score, chain)
            kind.check(score)
            kind.extra(lambda score=score: compiled_score(s, score)).check(partial(kind.step, score=score))
        wrong = partial(kind.score, lambda logits: eager(logits.flip(-1)))
        with pytest.raises(AssertionError, match="canvases differ"):
            kind.check(wrong)
