"""Builds ``unmask._C``. Everything declarative is in pyproject.toml; sources and flags are in csrc/build.json.

Environment variables:
  UNMASK_CUDA=0        leave the CUDA kernels out although nvcc is there
  UNMASK_CUDA_ARCHS    compute capabilities to compile for, e.g. "80;90" or "90" (PTX of the last one is added)
  MAX_JOBS             compilers to run at once
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import torch  # noqa: F401  (must be importable before anything below, see tools/unmask_backend.py)
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
BUILD = json.loads((ROOT / "csrc" / "build.json").read_text())


def sources(*kinds: str) -> list[str]:
    """Files of the given kinds, relative to the repository; two that would share an object file are an error."""
    found = [
        path.relative_to(ROOT).as_posix() for kind in kinds for pattern in BUILD[kind] for path in ROOT.glob(pattern)
    ]
    stems = Counter(str(Path(path).with_suffix("")) for path in found)
    clashes = [stem for stem, count in stems.items() if count > 1]
    if clashes:
        raise RuntimeError(f"these sources would compile to the same object file: {clashes}")
    return sorted(found)


def cuda_home() -> Path | None:
    """The toolkit to compile with: that of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH, else /usr/local/cuda."""
    if os.environ.get("UNMASK_CUDA", "1") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    compilers = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in compilers:
        if nvcc and Path(nvcc).exists():
            # What is on PATH may be a wrapper, so the compiler is asked where it lives.
            steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
            top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
            return Path(top.group(1).strip() if top else Path(nvcc).parent.parent).resolve()
    return None


def cuda_library_dir(home: Path) -> Path:
    """Where the static CUDA runtime is."""
    machine = {"AMD64": "x86_64", "aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    for name in ("lib64", "lib", f"targets/{machine}-linux/lib"):
        if (home / name / "libcudart_static.a").exists():
            return home / name
    raise RuntimeError(f"no libcudart_static.a in the CUDA toolkit {home}; UNMASK_CUDA=0 builds without CUDA")


def cuda_archs() -> list[str]:
    """Compute capabilities without the dot, ascending."""
    listed = os.environ.get("UNMASK_CUDA_ARCHS", ";".join(BUILD["cuda_archs"]))
    archs = [arch.strip().replace(".", "").removesuffix("+PTX") for arch in listed.replace(",", ";").split(";")]
    archs = [arch for arch in archs if arch]
    if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
        raise ValueError(f"UNMASK_CUDA_ARCHS={listed!r}: expected compute capabilities such as '80;90'")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def gencode(archs: list[str]) -> list[str]:
    """Machine code for every capability, and PTX of the newest for devices after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def extension() -> object:
    standard = f"-std=c++{BUILD['cxx_standard']}"
    # -g0: CPython may have been built with -g, which would make the module ten times as large.
    cxx = [standard, "-g0", *BUILD["cxx_flags"], f"-DTORCH_TARGET_VERSION={BUILD['torch_target_version']}"]
    # libtorch.so pulls libtorch_cuda.so in on a CUDA build of torch; without this the linker drops it, and the weak
    # stream function stays null.
    link = ["-Wl,--no-as-needed,-ltorch,--as-needed"]
    files = sources("glue_sources", "cpu_sources")
    compile_args: dict[str, list[str]] = {"cxx": cxx}
    home = cuda_home()
    cuda_files = sources("cuda_sources") if home else []
    if home and cuda_files:
        # torch leaves this None when it was itself built without CUDA.
        cpp_extension.CUDA_HOME = str(home)
        archs = cuda_archs()
        cxx.append("-DUNMASK_WITH_CUDA")
        cxx.append(f'-DUNMASK_CUDA_ARCHS="{" ".join(archs)}"')
        compile_args["nvcc"] = [standard, *BUILD["nvcc_flags"], "-Xcompiler=-fPIC", *gencode(archs)]
        files += cuda_files
        link += [f"-L{cuda_library_dir(home)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    # CppExtension even with .cu files: CUDAExtension refuses a CPU-only torch and links libraries that one lacks.
    return cpp_extension.CppExtension(
        "unmask._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=compile_args,
        extra_link_args=link,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
)
