"""``unmask info``, ``unmask models`` and ``unmask policies``: what is here, and what a folder holds."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

from tyro.conf import Positional, arg

from unmask.cli.parsing import Command, Flag
from unmask.text import printable


class Info(Command):
    """What was built and what this machine has."""

    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        show(collect(), self.json)
        return 0


class Models(Command):
    """The packaged models and the families that load natively, with their authors' settings, or Fast-dLLM's
    where the authors decode one token per forward; or what a model's folder holds. Nothing is loaded.

    examples:
      unmask models
      unmask models runs/llada-stand-in
    """

    name: Annotated[str | None, Positional, arg(metavar="[FOLDER]")] = None
    """Local folder, packaged name, or hub id, of which the configuration is fetched."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        from unmask.models.describe import as_options, describe_model
        from unmask.models.loading import packaged_models
        from unmask.models.presets import PRESETS

        if self.name:
            show(describe_model(self.name, self.revision), self.json)
            return 0
        packaged = {name: describe_model(name) for name in packaged_models()}
        families = {preset.models: preset for preset in PRESETS}
        if self.json:
            rows = {name: vars(preset) for name, preset in families.items()}
            print(json.dumps({"packaged": packaged, "families": rows}, indent=1))
            return 0
        wanted = ("parameters", "attention", "recommended")
        section("packaged", {name: "; ".join(about[key] for key in wanted) for name, about in packaged.items()})
        section("families", {name: as_options(p.settings) or p.source for name, p in families.items()})
        print("  Where no block length stands, it is the checkpoint's.")
        section("further", {"transformers": "any AutoModelForMaskedLM, such as a ModernBERT fine-tuned to chat"})
        print("unmask models FOLDER says what a folder holds, and where its recommended settings come from.")
        return 0


class Policies(Command):
    """All rules with their parameters, the options that follow any policy, and the packaged learned policies; or what
    one policy does.

    examples:
      unmask policies
      unmask policies threshold:0.9,hold-eos
      unmask policies runs/quickstart/policy
    """

    name: Annotated[str | None, Positional, arg(metavar="[POLICY]")] = None
    """A rule, with its numbers and options or without, or local folder, packaged name or hub id of a learned policy."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        from unmask.policies.files import packaged_policies
        from unmask.policies.options import ABOUT
        from unmask.policies.registry import EDITING, HEURISTICS

        if self.name:
            show(describe_policy(self.name), self.json)
            return 0
        rules = {rule.usage(): f"{rule.describe()}\n{rule.ranges()}" for rule in HEURISTICS.values()}
        edits = {"edit:M2T,T2T[,POST]": "the same as threshold:M2T,edit=T2T,post=POST (LLaDA2.1)"}
        edits |= {f"edit:{name}": f"the same as edit:{numbers}" for name, numbers in EDITING.items()}
        learned = {name: describe_policy(name)["policy"] for name in packaged_policies()}
        parts = {"rules": rules, "editing": edits, "options, behind any policy": ABOUT, "packaged learned": learned}
        if self.json:
            print(json.dumps(parts, indent=1))
            return 0
        for title, rows in parts.items():
            section(title, rows)
        print("unmask policies POLICY says what a rule with its options does, and what a folder holds.")
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


def describe_policy(spec: str) -> dict[str, Any]:
    """What a policy is by its name, and what its options do."""
    from unmask.policies.heuristics import HEURISTICS, Heuristic
    from unmask.policies.options import ABOUT, split_options
    from unmask.policies.registry import bare_policy, written_out

    base, options = split_options(written_out(spec))
    name, colon, _ = base.partition(":")
    if (rule := HEURISTICS.get(name)) is None:
        about = describe_learned(base)
    else:
        about = {"rule": rule.usage(), "commits": rule.describe()}
        if colon and isinstance(policy := bare_policy(base), Heuristic):
            about |= {p.name: f"{value:g}" for p, value in zip(rule.parameters, policy.values, strict=True)}
        else:
            about |= {"numbers": rule.ranges(), "for instance": rule.example()}
    given = options.text.split(",") if options.text else []
    explained = {entry.partition("=")[0]: text for entry, text in ABOUT.items()}
    return about | {entry: explained.get(entry.partition("=")[0], "see edit") for entry in given}


def describe_learned(name: str) -> dict[str, Any]:
    """Kind, size, configuration and training of a learned policy, by what each is."""
    from unmask.policies.files import resolve
    from unmask.policies.pretrained import Pretrained
    from unmask.policies.registry import bare_policy
    from unmask.training.record import read_training

    policy, folder = bare_policy(name), resolve(name)
    assert isinstance(policy, Pretrained)
    size, length = sum(p.numel() for p in policy.parameters()), policy.config.trained_block_length
    config = policy.config.to_dict() | {"trained_block_length": None}
    config["calibration"] = "\n".join(curve.summary for curve in policy.config.calibration) or None
    blocks = f"blocks of {length}" if length else "blocks of any length" if length is None else "full diffusion"
    kind = f"{policy.model_type}, {size:,} parameters, {blocks}"
    about = {"folder": str(folder), "policy": kind}
    if policy.conditioned:
        about["alpha"] = f"{policy.default_alpha:g} by default"
    record = (read_training(folder) or {}).get("config", {})
    about |= {key: record[key] for key in ("model", "task") if record.get(key)}
    return about | {key.replace("_", " "): value for key, value in config.items() if value is not None}


def show(about: Mapping[str, Any], as_json: bool) -> None:
    """Names and values, aligned or as JSON."""
    if as_json:
        print(json.dumps(about, indent=1))
    else:
        section("", about)


def section(title: str, rows: Mapping[str, Any]) -> None:
    """``rows`` in two columns, under a ``title`` if there is one; in a terminal the second is wrapped."""
    width = max(map(len, rows), default=0)
    indent = "  " * bool(title)
    room = shutil.get_terminal_size().columns - width - len(indent) - 2 if sys.stdout.isatty() else sys.maxsize
    if title:
        print(f"{title}:")
    for name, value in rows.items():
        lines = [part for line in printable(str(value)).split("\n") for part in textwrap.wrap(line, max(24, room))]
        for i, line in enumerate(lines):
            print(f"{indent}{'' if i else printable(name):<{width}}  {line}")
