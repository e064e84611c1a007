"""``unmask info``: what was built and what this machine has."""

from __future__ import annotations

import json
import platform
from typing import Any

from unmask.cli.parsing import Command, Flag


class Info(Command):
    """What was built and what this machine has."""

    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        info = collect()
        width = max(map(len, info))
        print(json.dumps(info, indent=1) if self.json else "\n".join(f"{k:<{width}}  {v}" for k, v in info.items()))
        return 0


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
