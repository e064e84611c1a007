"""Builds ``unmask._C``. Everything declarative is in pyproject.toml; sources and flags are in csrc/build.json.

Environment variables:
  UNMASK_NO_EXT=1      compile nothing: a pure Python package, whose ops run in plain torch; so it is without a compiler
  UNMASK_CUDA          0 leaves the CUDA kernels out although nvcc is there, 1 insists on them
  UNMASK_CUDA_ARCHS    compute capabilities to compile for, e.g. "80;90" or "90" (PTX of the last one is added),
                       else those of csrc/build.json
  CUDA_HOME, CUDA_PATH the CUDA toolkit, else that of the nvcc on PATH, else /usr/local/cuda
  CXX, CC              the compiler: GCC or clang
  MAX_JOBS             compilers to run at once
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).resolve().parent
BUILD = json.loads((ROOT / "csrc" / "build.json").read_text())
sys.path.insert(0, str(ROOT / "tools"))
from unmask_backend import reason_for_no_extension, switch  # noqa: E402  (it lies in tools)

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"building unmask needs setuptools >= 77, this is {setuptools.__version__}: upgrade it, or let pip fetch one "
        "by leaving out --no-build-isolation"
    )


def say(message: str) -> None:
    """Print to standard error, and to the terminal too where pip captures that (everywhere but in `pip -v`)."""
    print(f"unmask: {message}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError):  # there is no terminal
            Path("/dev/tty").write_text(f"\nunmask: {message}\n")


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
    """The CUDA toolkit to compile with; None to leave CUDA out."""
    wanted = switch("UNMASK_CUDA")
    if wanted is False:
        return None
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = shutil.which(f"{home}/bin/nvcc")
            if nvcc is None:
                raise ValueError(f"{name}={home!r}: has no bin/nvcc; unset it, or UNMASK_CUDA=0 builds without CUDA")
            break
    else:
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        if wanted:
            raise ValueError(
                "UNMASK_CUDA asks for CUDA, but there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
            )
        return None
    # What is on PATH may be a wrapper, so the compiler is asked where it lives.
    steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return Path(top.group(1).strip() if top else Path(nvcc).parent.parent).resolve()


def cuda_library_dir(home: Path) -> Path:
    """Where the static CUDA runtime is."""
    machine = {"AMD64": "x86_64", "aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    for name in ("lib64", "lib", f"targets/{machine}-linux/lib"):
        if (home / name / "libcudart_static.a").exists():
            return home / name
    raise RuntimeError(f"no libcudart_static.a in the CUDA toolkit {home}; UNMASK_CUDA=0 builds without CUDA")


def nvcc_version(home: Path) -> tuple[int, int]:
    """Major and minor version of the toolkit's compiler."""
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise RuntimeError(f"{home}/bin/nvcc --version: expected a line with its release, got {said!r}")
    return int(found[1]), int(found[2])


def warn_of_newer_toolkit(version: tuple[int, int]) -> None:
    """Say so if the kernels will need a newer driver than the torch they are built beside."""
    import torch

    of_torch = torch.version.cuda
    if of_torch and version[0] > int(of_torch.split(".")[0]):
        say(
            f"WARNING: CUDA {version[0]}.{version[1]} compiles the kernels, but torch was made for CUDA {of_torch}. "
            "A driver that is just new enough for torch will refuse the kernels; set CUDA_HOME to a toolkit of torch's "
            "major version, or update the driver."
        )


def cuda_archs(version: tuple[int, int]) -> list[str]:
    """Compute capabilities without the dot, ascending, for a compiler of this version."""
    known = BUILD["cuda_archs"] + (BUILD["cuda_archs_from_12_8"] if version >= (12, 8) else [])
    listed = os.environ.get("UNMASK_CUDA_ARCHS", ";".join(known))
    archs = [arch.strip().replace(".", "").removesuffix("+PTX") for arch in listed.replace(",", ";").split(";")]
    archs = [arch for arch in archs if arch]
    if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
        raise ValueError(f"UNMASK_CUDA_ARCHS={listed!r}: expected compute capabilities such as '80;90'")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def gencode(archs: list[str]) -> list[str]:
    """Machine code for every capability, and PTX of the newest for devices after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def announce(cxx_files: int, cuda_files: int, archs: list[str]) -> None:
    """Say what is compiled, for pip says nothing until it is done, and how many compilers torch runs for it."""
    jobs = os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    if not jobs.isdigit() or int(jobs) == 0:
        raise ValueError(f"MAX_JOBS={jobs!r}: expected how many compilers to run at once")
    # Seconds of a core, on an average server: 3 a C++ file; 8 a CUDA file and architecture.
    minutes = math.ceil((3 * cxx_files + 8 * cuda_files * len(archs)) / min(int(jobs), cxx_files) / 60)
    cuda = f" and {cuda_files} CUDA files for archs {' '.join(archs)}" if cuda_files else " files, without CUDA,"
    say(f"compiling {cxx_files} C++{cuda} with {jobs} jobs; about {minutes} min, less if some are compiled already")


def extension() -> dict[str, Any]:
    """Arguments of setup() for the extension."""
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable build gives a temporary folder, in which nothing compiled before would be found.
            self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

        def run(self) -> None:
            announce(len(files) - len(cuda_files), len(cuda_files), archs)
            super().run()

    standard = f"-std=c++{BUILD['cxx_standard']}"
    # -g0: CPython may have been built with -g, which would make the module ten times as large.
    cxx = [standard, "-g0", *BUILD["cxx_flags"], f"-DTORCH_TARGET_VERSION={BUILD['torch_target_version']}"]
    # libtorch.so pulls libtorch_cuda.so in on a CUDA build of torch; without this the linker drops it, and the weak
    # stream function stays null. macOS has neither CUDA nor these options.
    link = ["-Wl,--no-as-needed,-ltorch,--as-needed"] if sys.platform == "linux" else []
    files = sources("glue_sources", "cpu_sources")
    compile_args: dict[str, list[str]] = {"cxx": cxx}
    home = cuda_home()
    cuda_files, archs = (sources("cuda_sources"), cuda_archs(nvcc_version(home))) if home else ([], [])
    if home:
        warn_of_newer_toolkit(nvcc_version(home))
        # torch leaves this None when it was itself built without CUDA.
        cpp_extension.CUDA_HOME = str(home)
        # torch refuses toolkits of another major version. The kernels bring their own runtime, so the driver decides.
        cpp_extension._check_cuda_version = lambda *_: None
        cxx += ["-DUNMASK_WITH_CUDA", f'-DUNMASK_CUDA_ARCHS="{" ".join(archs)}"']
        threads = f"--threads={len(archs)}"  # architectures at a time
        compile_args["nvcc"] = [standard, *BUILD["nvcc_flags"], threads, "-Xcompiler=-fPIC", *gencode(archs)]
        files += cuda_files
        link += [f"-L{cuda_library_dir(home)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    # CppExtension even with .cu files: CUDAExtension refuses a CPU-only torch and links libraries that one lacks.
    module = cpp_extension.CppExtension(
        "unmask._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=compile_args,
        extra_link_args=link,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


# Sources and metadata are packed without torch.
compiles = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
reason = reason_for_no_extension() if compiles else None
if reason:
    say(f"{reason}: installing unmask WITHOUT ITS COMPILED OPS. They run in plain torch, several times slower.")
setuptools.setup(**(extension() if compiles and not reason else {}))
