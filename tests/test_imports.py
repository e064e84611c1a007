"""Imports point one way, and ``import unmask`` stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh_process import run_python

PACKAGE = Path(__file__).parents[1] / "unmask"

BASE = {"ops", "models", "tasks", "config", "commit", "files", "text"}
DECODING = BASE | {"policies", "sampling"}
JUDGING = DECODING | {"evaluation"}
ALLOWED = {
    "config": set(),
    "commit": set(),
    "ops": {"_C"},
    "files": set(),
    "text": set(),
    "models": {"config", "files", "text"},
    "tasks": {"config"},
    "policies": BASE,
    "sampling": BASE | {"policies", "plots"},
    "evaluation": DECODING,
    "training": JUDGING | {"pretraining"},
    "integrations": JUDGING,
    "pretraining": {"files", "models", "tasks", "commit"},
    "benchmarking": DECODING | {"commit"},
    "testing": set(),
    "plots": {"text"},
    "cli": JUDGING | {"training", "integrations", "plots", "pretraining", "benchmarking"},
    "__main__": {"cli"},
}
"""Which parts of the package a part may import, besides itself."""

ALLOWED_FOR_TYPES = {"plots": {"evaluation"}}
"""What it may import under ``if TYPE_CHECKING:`` only: plots name the type of the result rows they read."""

TORCH_FREE = {"tasks", "plots"}
HEAVY = ("transformers", "matplotlib", "rich", "huggingface_hub", "datasets", "accelerate", "lm_eval", "sglang")


def part_of(path: Path) -> str:
    """The first folder or module below the package that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


class WithoutTypes(ast.NodeTransformer):
    """Drop the bodies of ``if TYPE_CHECKING:``."""

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return ast.If(test=node.test, body=[ast.Pass()], orelse=node.orelse)
        return node


def imported_modules(source: ast.AST, package: str) -> Iterator[str]:
    """Every absolute module name that ``source``, a module of ``package``, imports anywhere."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # "from unmask import ops" imports the part unmask.ops.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "unmask" else (base,)


def violations(part: str, source: str, package: str) -> list[str]:
    """Imports of ``source`` that its part may not have."""
    everything = ast.parse(source)
    found = refused(part, imported_modules(everything, package), ALLOWED[part] | ALLOWED_FOR_TYPES.get(part, set()))
    return found or refused(part, imported_modules(WithoutTypes().visit(everything), package), ALLOWED[part])


def refused(part: str, names: Iterator[str], allowed: set[str]) -> list[str]:
    """The modules among ``names`` that are torch in a part without it, or a part of this package not ``allowed``."""
    found = []
    for name in names:
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "unmask" and target and target != part and not target.startswith("__"):
            if target not in allowed:
                found.append(f"unmask.{target}")
        elif top == "torch" and part in TORCH_FREE:
            found.append(name)
    return found


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_part_has_a_rule() -> None:
    assert len(SOURCES) > 20
    assert {part_of(path) for path in SOURCES} <= set(ALLOWED)
    assert all(target == "_C" or target in ALLOWED for targets in ALLOWED.values() for target in targets)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    for path in (p for p in SOURCES if part_of(p) == part):
        package = ".".join(("unmask", *path.relative_to(PACKAGE).parts[:-1]))
        found = violations(part, path.read_text(encoding="utf-8"), package)
        assert not found, f"{path.relative_to(PACKAGE.parent)} may not import {', '.join(found)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside of functions count. Those for types alone do not."""
    names = {
        ".".join(("unmask", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in SOURCES
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        if path.name == "__init__.py":
            continue  # it names what is in its folder
        package = ".".join(("unmask", *path.relative_to(PACKAGE).parts[:-1]))
        tree = WithoutTypes().visit(ast.parse(path.read_text(encoding="utf-8")))
        graph[name] = {found for found in imported_modules(tree, package) if found in names and found != name}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                walk(other, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize(
    ("part", "source", "expected"),
    [
        ("tasks", "import torch.nn", ["torch.nn"]),
        ("tasks", "def f():\n    from torch import nn", ["torch"]),
        ("models", "from unmask.tasks import Task", ["unmask.tasks"]),
        ("models", "from unmask import ops, models", ["unmask.ops"]),
        ("models", "from ..policies.base import Policy", ["unmask.policies"]),
        ("models", "from .base import ModelBase\nfrom unmask import __version__", []),
        ("sampling", "import unmask.training.grpo as g", ["unmask.training"]),
        ("plots", "import unmask.evaluation.results", ["unmask.evaluation"]),
        ("plots", "if TYPE_CHECKING:\n    from unmask.evaluation import Evaluation", []),
        ("plots", "if TYPE_CHECKING:\n    from unmask.policies import Policy", ["unmask.policies"]),
        ("tasks", "if TYPE_CHECKING:\n    from unmask.models import Model", ["unmask.models"]),
        ("cli", "from unmask.training import Trainer", []),
    ],
)
def test_the_rule_sees_every_form_of_import(part: str, source: str, expected: list[str]) -> None:
    assert violations(part, source, f"unmask.{part}") == expected


@pytest.mark.parametrize(("module", "absent"), [("unmask", ("torch", *HEAVY)), ("unmask.models", HEAVY)])
def test_importing_is_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import {module}, sys\nprint(*(m for m in {absent!r} if m in sys.modules))"
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_help_does_not_import_torch() -> None:
    code = (
        "import contextlib, sys\n"
        "from unmask.cli import COMMANDS, main\n"
        "main(['--help'])\n"
        "light = not {'torch', 'pydantic', 'tyro'} & set(sys.modules)\n"
        "for command in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([command, '--help'])\n"
        "print(light, 'torch' in sys.modules)"
    )
    run = run_python(code)
    assert run.stdout.splitlines()[-1] == "True False", run.stderr


def test_pure_formulas_are_reached_by_their_dotted_path() -> None:
    code = (
        "import unmask\n"
        "print(unmask.training.rewards.multiplicative.__name__, unmask.training.grpo.group_advantages.__name__,"
        " unmask.policies.distributions.Bernoulli.__name__)"
    )
    run = run_python(code)
    assert run.stdout.split() == ["multiplicative", "group_advantages", "Bernoulli"], run.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
