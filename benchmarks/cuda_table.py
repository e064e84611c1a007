"""What the compiled CUDA kernels say about their speed without a GPU; writes the tables of docs/performance.md.

    python benchmarks/cuda_table.py      # needs nvcc and nvdisasm; half a minute an architecture

Registers, spills and code sizes come from ptxas, instructions from the machine code, launches from one step of the
library with a stand-in model. The limits are those of the data sheets. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.benchmarking.operations import confident_policy
from unmask.policies import make_policy
from unmask.sampling import Sampler, SamplerConfig
from unmask.sampling.forward import Forward
from unmask.sampling.loop import Step

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- computed by benchmarks/cuda_table.py -->", "<!-- end of what is computed -->"
VOCAB, MASK = 126_464, 50
POLICIES = (
    "threshold:0.9", "threshold:0.9,hold-eos,window=8,decay=0.05", "threshold:0.9,spacing=3", "edit:0.9,0.5",
    "factor:1", "entropy-bound:0.1", "entropy-threshold:0.4", "margin:16", "local-leap:0.9", "block-steps:8",
    "random:16", "klass:0.9",
)  # fmt: skip
FREE = {
    "view", "detach", "slice", "select", "expand", "unsqueeze", "squeeze", "permute", "transpose", "t", "split",
    "alias", "split_with_sizes", "as_strided", "_unsafe_view", "diagonal", "unbind", "empty", "new_empty", "empty_like",
    "lift_fresh",
}  # fmt: skip
"""Calls that launch nothing."""


@dataclass
class Card:
    """Numbers of a data sheet."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float
    """Of memory per second."""


CARDS = (
    Card("A100", "80", 108, 1.41, 2.0),
    Card("H100", "90", 132, 1.98, 3.35),
    Card("H200", "90", 132, 1.98, 4.8),
    Card("B200", "100", 148, 1.97, 8.0),
)


@dataclass
class Kernel:
    name: str
    registers: int
    spilled: int
    kilobytes: float
    """Of machine code."""


def compiled(source: Path, arch: str, folder: Path) -> tuple[Path, list[Kernel]]:
    """The machine code of one file for one architecture, and its kernels."""
    flags = json.loads((ROOT / "csrc" / "build.json").read_text())["nvcc_flags"]
    cubin = folder / f"{source.stem}.{arch}.cubin"
    asked = ("-cubin", "-Xptxas", "-v", "-o", str(cubin), str(source))
    command = ["nvcc", "-std=c++17", *flags, f"-arch=sm_{arch}", *asked]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    sections = subprocess.run(["readelf", "-WS", str(cubin)], capture_output=True, text=True, check=True).stdout
    sizes = {m[1]: int(m[2], 16) for m in re.finditer(r"\.text\.(\S+)\s+PROGBITS\s+\w+\s+\w+\s+(\w+)", sections)}
    kernels = []
    for entry in re.split(r"Compiling entry function '", said)[1:]:
        mangled = entry.split("'")[0]
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", entry))
        used = re.search(r"Used (\d+) registers", entry)
        assert used is not None
        kernels.append(Kernel(short(mangled), int(used[1]), spilled, sizes[mangled] / 1024))
    return cubin, kernels


def short(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|unmask::(cuda::)?|^void ", "", name).split("(")[0]
    flags = re.fullmatch(r"(\w+)<(\w+), (\w+), (\w+)>", name)
    if flags is None:
        return name
    parts = [p for p, on in zip(("draws", "entropy"), flags.groups()[2:], strict=True) if on == "true"]
    return f"{flags[1]}, {flags[2]}" + "".join(f", {p}" for p in parts)


def instructions(cubin: Path) -> dict[str, float]:
    """Instructions per element in the loop of the pass over bfloat16 and float32 logits, k = 1, nothing drawn.

    They are counted between the loads of consecutive vectors, with those of paths that are seldom taken.
    """
    code = subprocess.run(["nvdisasm", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:]:
        for dtype, width in (("8BFloat16", 8), ("7Float32", 4)):
            if "topk_kernel" not in part.split(":")[0] or f"{dtype}ELb0ELb0E" not in part.split(":")[0]:
                continue
            loads = re.finditer(r"/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?LDG\.E\.\S*128\S* .*\+0x([4-7])000\]", part)
            places = [(int(m[1], 16), int(m[2])) for m in loads]
            runs = [
                (places[i + 3][0] - places[i][0]) / 3 / 16
                for i in range(len(places) - 3)
                if [p[1] for p in places[i : i + 4]] == [4, 5, 6, 7]
            ]
            found[dtype[1:]] = min(runs) / width
    return found


class Given:
    """In place of a model: any logits."""

    mask_token_id, eos_token_id, vocab_size, pad_token_id = MASK, 49, 60, 0
    device, dtype, max_length = torch.device("cpu"), torch.float32, 1000

    def __init__(self, rows: int, length: int) -> None:
        self.logits = torch.randn(rows, length, 60, generator=torch.Generator().manual_seed(0))

    def __call__(self, ids: Tensor, mask: Tensor | None = None, positions: Any = None) -> Tensor:
        flat = self.logits.reshape(-1, 60)
        return self.logits[:, positions] if isinstance(positions, slice) else flat[: positions.numel()]


class Launches(TorchDispatchMode):
    """Counts the kernels that calls launch on a GPU; one of torch's counts as one (a sort takes more)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = call.__name__.split(".")[0]
        self.count += name not in FREE
        return call(*args, **(kwargs or {}))


def launches(policy: Any, block_length: int | None) -> int:
    """Of a whole step but the model, in a buffer of 64."""
    config, model = SamplerConfig(64, block_length), Given(2, 64)
    sampler = Sampler(model, None, policy, config)
    state = sampler.new_state(torch.full((2, 64), MASK), None, 0, config)
    step = Step(Forward(model, sampler.policy, config), sampler.policy, config)
    with torch.no_grad():
        step(state)
        with Launches() as counted:
            step(state)
    return counted.count


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield from ("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    yield ""


def kernel_table(by_arch: dict[str, list[Kernel]]) -> Iterator[str]:
    archs = list(by_arch)
    head = ["kernel", *(f"sm_{a}: registers" for a in archs), "spilled bytes", f"sm_{archs[0]}: KB of code"]
    rows = []
    for n, first in enumerate(by_arch[archs[0]]):
        same = [by_arch[a][n] for a in archs]
        spilled = ", ".join(f"{k.spilled} on sm_{a}" for a, k in zip(archs, same, strict=True) if k.spilled) or "none"
        rows.append([first.name, *(str(k.registers) for k in same), spilled, f"{first.kilobytes:.0f}"])
    yield from table(head, rows)


def limit_table(counts: dict[str, dict[str, float]]) -> Iterator[str]:
    rows = []
    for card in CARDS:
        for dtype, size in (("BFloat16", 2), ("Float32", 4)):
            per = counts[card.arch][dtype]
            for number in (256, 32):
                elements = number * VOCAB
                memory = elements * size / card.terabytes / 1e6
                issue = elements * per / (128 * card.multiprocessors * card.gigahertz * 1e3)
                exponentials = elements / (16 * card.multiprocessors * card.gigahertz * 1e3)
                bound = {"memory": memory, "instructions": issue, "exponentials": exponentials}
                times = [f"{t:.1f}" for t in bound.values()]
                rows.append([card.name, f"{number} x {VOCAB} {dtype.lower()}", f"{size}", f"{per:.1f}", *times])
                rows[-1].append(max(bound, key=lambda name: bound[name]))
    head = ["card", "logits", "bytes", "instructions", "memory, µs", "instructions, µs", "exponentials, µs", "binds"]
    yield from table(head, rows)


def launch_table() -> Iterator[str]:
    policies = [(name, make_policy(name)) for name in POLICIES] + [("learned", confident_policy(torch.device("cpu")))]
    rows = [[f"`{name}`", str(launches(policy, None)), str(launches(policy, 32))] for name, policy in policies]
    yield from table(["policy", "launches, full diffusion", "in blocks"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["80", "90", "100"], help="those of the cards: 80 90 100")
    archs = parser.parse_args().archs
    for tool in ("nvcc", "nvdisasm", "readelf", "c++filt"):
        if shutil.which(tool) is None:
            raise SystemExit(f"cuda_table.py needs {tool} on PATH")
    by_arch: dict[str, list[Kernel]] = {}
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            by_arch[arch] = []
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                cubin, kernels = compiled(source, arch, Path(folder))
                by_arch[arch] += sorted(kernels, key=lambda k: k.name)
                if source.stem == "topk_confidence":
                    counts[arch] = instructions(cubin)
    version = re.findall(r"V[\d.]+", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)[-1]
    lines = [BEGIN, "", f"Compiled by nvcc {version}:", "", *kernel_table(by_arch)]
    lines += ["The pass over the logits, k = 1; per element its bytes and instructions, and the least time:", ""]
    said = "Launches of one step beside the model's:"
    lines += [*limit_table(counts), said, "", *launch_table(), END]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + "\n".join(lines) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
