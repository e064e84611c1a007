"""What setup.py settles before it compiles with CUDA, with a toolkit that only says its version."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_process import run_python

_SETTLE = """
import runpy, sys, unittest.mock as mock
import setuptools, torch
from torch.utils import cpp_extension
torch.version.cuda, home, script = sys.argv[1:]
sys.argv = ["setup.py", "build_ext"]
with mock.patch.object(setuptools, "setup") as setup:
    runpy.run_path(script, run_name="__main__")
(module,) = setup.call_args.kwargs["ext_modules"]
assert any(source.endswith(".cu") for source in module.sources)
assert f"-L{home}/lib64" in module.extra_link_args
cpp_extension._check_cuda_version("g++", torch.torch_version.TorchVersion("12.2"))  # a build asks this first
"""


@pytest.mark.parametrize(("of_torch", "warns"), [("12.8", True), ("13.2", False), ("14.0", False)])
def test_a_toolkit_of_another_major_version_is_no_error(tmp_path: Path, of_torch: str, warns: bool) -> None:
    for path in ("bin/nvcc", "lib64/libcudart_static.a"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.88"\ntrue\n')
    (tmp_path / "bin/nvcc").chmod(0o755)
    settings = {"UNMASK_CUDA": "1", "UNMASK_NO_EXT": "0", "CUDA_HOME": str(tmp_path), "UNMASK_CUDA_ARCHS": "90"}
    process = run_python(_SETTLE, of_torch, str(tmp_path), str(Path(__file__).parents[1] / "setup.py"), **settings)
    assert process.returncode == 0, process.stderr
    assert ("CUDA 13.0 compiles the kernels, but torch was made for CUDA 12.8" in process.stderr) == warns
