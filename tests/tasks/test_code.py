"""Programs in completions: which part of a text is the code."""

from __future__ import annotations

import pytest

from unmask.tasks.code import extract_code


def test_code_is_taken_from_blocks() -> None:
    assert extract_code("x = 1\n", "f") == "x = 1\n"
    assert extract_code("Here:\n```python\ndef f(): pass\n```\nUse:\n```\nf()\n```\n", "f") == "def f(): pass\n"
    assert extract_code("```py\na\n```\n```\nb\n```", "f") == "b\n"
    assert extract_code("```python\ndef f():\n    return 1", "f") == "def f():\n    return 1"


F = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (f"```python\n{F}```\n```\n\n```\n", F),
        ("    return 1\n```\n", "    return 1\n"),
        ("    return 1\n```\nIt returns one.\n", "    return 1\n"),
        ("    return g()\n\ndef g():\n    return 1\n", "    return g()\n\ndef g():\n    return 1\n"),
        (f"{F}```\nIt returns one.\n", F),
        ("1. So:\n\n   ```python\n   def f():\n       return 1\n   ```\n2. Done.", F),
        (f'```python title="a.py"\n{F}```\n', F),
        (f"```Python3 \n{F}```\n", F),
        (f"```{{.python}}\n{F}```\n", F),
        (f"```bash\npip install x\n```\nThen:\n```python\n{F}```\n", F),
        (f"```python\n{F}```\n```text\n1\n```\n", F),
        (f"Here it is, from me:\n\nimport math\n{F}", f"import math\n{F}"),
        (f"x = 1\n{F}", f"x = 1\n{F}"),
        ("I cannot.", "I cannot."),
        (f"~~~python\n{F}~~~\nSo.", F),
        (f"````python\n{F}# ```\n```\n````\n", f"{F}# ```\n```\n"),
        (f'{F}    """\n```\nb\n```\n"""\n', f'{F}    """\n```\nb\n```\n"""\n'),
    ],
)
def test_code_is_found_however_it_is_framed(completion: str, code: str) -> None:
    assert extract_code(completion, "f") == code


USING = "def f(x):\n    return twice(x) + ONE\n"
TWICE = "def twice(x):\n    return mul(2, x)\n"


@pytest.mark.parametrize(
    ("blocks", "code"),
    [
        ([USING, TWICE, "from operator import mul\nONE = 1\n"], f"from operator import mul\n{TWICE}ONE = 1\n{USING}"),
        ([f"{TWICE}print(f(1))\n", "ONE = 2\n", "ONE = 1\nx = f(2)\n", USING], f"{TWICE}ONE = 1\n{USING}"),
        (["def f(x): return 0\n", USING, "x = f(3)\nassert x == 7\n"], USING),
        ([TWICE, f"{USING}    a = (\n"], f"{USING}    a = (\n"),
        ([f"{TWICE}(", USING], USING),
    ],
)
def test_blocks_are_joined_where_one_needs_another(blocks: list[str], code: str) -> None:
    completion = "So:\n" + "and\n".join(f"```python\n{block}```\n" for block in blocks)
    assert extract_code(completion, "f") == code


@pytest.mark.parametrize(
    "around",
    ["{}\nThis adds one.\n", "Sure:\n{}\n\nIt's done. x = 2 + is not code", "[BEGIN]\n{}[DONE]\n", "<code>\n{}</code>"],
)
def test_programs_without_fences(around: str) -> None:
    code = "def f(x):\n    return x + 1\n"
    assert extract_code(around.format(code), "f").strip() == code.strip()
