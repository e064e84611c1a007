"""The kernels compiled for different instruction sets draw and choose the same tokens."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from fresh_process import run_python

from unmask.ops import build_info

# Prints a JSON list: tokens and samples must agree exactly, the floats to rounding.
_SCRIPT = """
import json, torch
from unmask.ops import build_info, topk_confidence
torch.manual_seed(0)
ids, floats = [], []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab, scale in ((7, 1.0), (300, 6.0), (5003, 0.5), (32000, 3.0)):
        logits = (torch.randn(6, vocab) * scale).to(dtype)
        logits[5, vocab // 2] = float("nan")
        logits[4, ::2] = float("-inf")
        for temperature in (0.0, 0.3, 1.0, 4.0):
            r = topk_confidence(
                logits, 3, temperature=temperature, seed=8, exclude=[1], logsumexp=True, entropy=True
            )
            ids += [r.token.flatten().tolist(), r.sample.tolist()]
            for value in (r.confidence, r.sample_confidence, r.logsumexp, r.entropy):
                floats += value.nan_to_num(-7).flatten().tolist()
print(json.dumps([build_info()["cpu_isa"], ids, floats]))
"""


def run(isa: str, script: str = _SCRIPT) -> subprocess.CompletedProcess[str]:
    return run_python(script, UNMASK_CPU_ISA=isa)


def test_instruction_sets_agree() -> None:
    results = {}
    isas = build_info()["cpu_isas"]
    with ThreadPoolExecutor() as pool:
        processes = dict(zip(isas, pool.map(run, isas), strict=True))
    for isa, process in processes.items():
        assert process.returncode == 0, process.stderr
        used, ids, floats = json.loads(process.stdout.splitlines()[-1])
        assert used == isa
        results[isa] = (ids, floats)
    assert "portable" in results
    ids, floats = results["portable"]
    for isa, (other_ids, other_floats) in results.items():
        assert other_ids == ids, isa
        assert other_floats == pytest.approx(floats, rel=2e-6, abs=2e-6), isa


def test_unknown_instruction_set_is_an_error() -> None:
    process = run("sse9", "import unmask.ops")
    assert process.returncode != 0
    assert "UNMASK_CPU_ISA=sse9: expected portable, avx2 or avx512" in process.stderr
