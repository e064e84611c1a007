"""``unmask info``: what was built and what this machine has."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="what was built and what this machine has", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")
    parser.set_defaults(run=run)


def collect() -> dict[str, Any]:
    """Versions, build and devices, by printable name."""
    import torch

    from unmask import __version__
    from unmask.models.loading import packaged_models
    from unmask.ops import build_info

    build = build_info()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "unmask": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build["compiler"],
        "CPU instruction set": build["cpu_isa"],
        "CPU threads": torch.get_num_threads(),
        "CUDA code": ", ".join(build["cuda_archs"]) or "not compiled",
        "CUDA devices": ", ".join(devices) or "none found",
        "packaged models": ", ".join(packaged_models()),
    }


def run(args: argparse.Namespace) -> int:
    info = collect()
    if args.json:
        print(json.dumps(info, indent=1))
        return 0
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name:<{width}}  {value}")
    return 0
