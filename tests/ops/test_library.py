"""How the compiled part is found, what stands in for it, and that kernels of all instruction sets agree."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fresh_process import run_python
from on_reference import needs_kernels

import unmask
from unmask.ops import build_info

# Prints a JSON list: the instruction set in use, ids that must agree exactly, floats to rounding.
_RESULTS = """
import json, torch
from policy_cases import inputs, pack, random_network
from set_cases import Problem
from unmask_cases import random_state, run
from unmask.ops import build_info, calm_, policy_forward, topk_confidence
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
before, ones = torch.randn(6, 5, 4097) * 3, torch.ones(6, 5, dtype=torch.int32)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for change in (0.0, 0.02, 1.0):
        now, kept = ((before + x).to(dtype) for x in (4 + change * torch.randn(before.shape), 0.0))  # far apart
        calm, divergence = calm_(now, kept, ones.clone(), ones[:, 0].long(), excluded=9, bound=0.01, needed=1)
        ids.append(calm.tolist())
        floats += divergence.flatten().tolist()
for size in ((128, 2, 512), (48, 2, 80), (16, 8, 16)):
    for k in (1, 2, 8, 50):
        for length in (1, 17, 48, 130):
            floats += policy_forward(pack(random_network(*size, k)), *inputs(2, length, k)).flatten().tolist()
for size, layers in (((64, 2, 256), 2), ((48, 2, 80), 1), ((16, 8, 16), 3)):
    for length in (1, 17, 70):
        select, score = Problem.random(size, layers, 5, length, 4, seed=length).run()
        ids.append(select.tolist())
        floats += score.flatten().tolist()
state = random_state(torch.Generator().manual_seed(0), 5, 2, 40, 16, 0.7)
for mode in ("select", "bernoulli", "dpls"):
    state, rank = run(state, torch.full((5, 40), 3), torch.randn(5, 40), mode=mode, seed=4)
    ids += [rank.tolist(), state.tokens.tolist(), state.rows.tolist()]
print(json.dumps([build_info()["cpu_isa"], ids, floats]))
"""


def results(isa: str) -> tuple[list[object], list[float], str]:
    environment = {"UNMASK_NO_EXT": "1"} if isa == "torch" else {"UNMASK_CPU_ISA": isa}
    process = run_python(_RESULTS, path=Path(__file__).parent, **environment)
    assert process.returncode == 0, process.stderr
    used, ids, floats = json.loads(process.stdout.splitlines()[-1])
    assert used == isa
    return ids, floats, process.stderr


@needs_kernels
def test_instruction_sets_and_plain_torch_agree() -> None:
    isas = [*build_info()["cpu_isas"], "torch"]
    assert isas[0] == "portable"
    with ThreadPoolExecutor() as pool:
        (ids, floats, _), *others = pool.map(results, isas)
    for isa, (other_ids, other_floats, warnings) in zip(isas[1:], others, strict=True):
        assert other_ids == ids, isa
        assert other_floats == pytest.approx(floats, rel=1e-5, abs=1e-5), isa
        assert warnings.count("many times slower: UNMASK_NO_EXT is set") == (isa == "torch")


@needs_kernels
def test_unknown_instruction_set_is_an_error() -> None:
    process = run_python("import unmask.ops", UNMASK_CPU_ISA="sse9")
    assert process.returncode != 0
    assert "UNMASK_CPU_ISA=sse9: expected portable, avx2 or avx512" in process.stderr


_USE = """
import sys
from pathlib import Path
sources, *sites = sys.argv[1:]
others = Path(sources, "others")  # what is installed beside a compiled unmask
others.mkdir(exist_ok=True)
for folder in [p for p in sys.path[1:] if any(Path(p, "unmask").glob("_C.*"))]:
    sys.path.remove(folder)
    for path in Path(folder).iterdir():
        if not path.name.startswith("unmask") and not (others / path.name).exists():
            (others / path.name).symlink_to(path)
sys.path = [sources, *sys.path[1:], str(others), *sites]
import torch
from unmask.ops import build_info, topk_confidence
print([topk_confidence(torch.eye(3)).token.flatten().tolist() for _ in range(2)], build_info()["cpu_isa"])
"""


def test_sources_without_a_compiled_part(tmp_path: Path) -> None:
    sources, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("_C.*", "__pycache__", "*.safetensors")
    shutil.copytree(Path(unmask.__file__).parent, sources / "unmask", ignore=ignored)
    (site / "unmask").mkdir(parents=True)
    (site / "unmask" / "_C.so").touch()
    alone = run_python(_USE, str(sources), UNMASK_NO_EXT="0")
    hiding = run_python(_USE, str(sources), str(site), UNMASK_NO_EXT="0")
    for process in (alone, hiding):  # both compute in plain torch, and say why, once
        assert process.stdout == "[[0, 1, 2], [0, 1, 2]] torch\n", process.stderr
        assert process.stderr.count("RuntimeWarning") == 1
    assert "has no compiled part (unmask._C); build it with `pip install .`" in alone.stderr
    assert f"hides the installed package {site / 'unmask'}" in hiding.stderr
    assert "`pip install -e .`" in hiding.stderr
    (sources / "unmask" / "_C.so").write_text("no library")
    broken = run_python(_USE, str(sources), UNMASK_NO_EXT="0")
    assert broken.returncode != 0
    assert "(unmask._C) is there but cannot be loaded" in broken.stderr
    assert "UNMASK_NO_EXT=1" in broken.stderr
