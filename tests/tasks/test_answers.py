r"""Final answers: what is found in a text, and which answers are the same."""

from __future__ import annotations

import sys
import threading
from fractions import Fraction

import pytest

from unmask.tasks.answers import check_grading, equivalent, extract_answer, grade_answer, normalise, number, same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{3} but \boxed{4", "3"),
        (r"\boxed{5} #### 6", "5"),
        (r"\boxed{}", None),
        (r"\boxed{}. The answer is 18", "18"),
        (r"\boxed{18} goes into \boxed{}", "18"),
        ("The answer is: 18\n#### ", "18"),
        ("####\n18", "18"),
        ("The answer is 18, thanks", "18"),
        ("1,2,3", "3"),
        ("2,5000", "5000"),
        ("1,234.5, it is", "1,234.5"),
        ("$1,000.", "$1,000"),
        ("2,000,000", "2,000,000"),
        ("it is .5", ".5"),
        ("reason\n#### 1,234\nmore", "1,234"),
        ("#### 1\n#### 2", "2"),
        ("It costs $1,250.50 in all.", "$1,250.50"),
        ("3 apples and -4", "-4"),
        ("about 1/2", "1/2"),
        ("no number", None),
        ("", None),
        (r"\boxed{unclosed", None),
    ],
)
def test_extraction(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("18", "18.0"),
        ("18", "18."),
        ("18", " $18.00 "),
        ("1234", "1,234"),
        ("1234567.5", "1,234,567.50"),
        ("50", r"50\%"),
        ("5", r"\$5"),
        ("-3", "\u22123"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"-\frac{1}{4}", "-0.25"),
        (r"\frac34", "3/4"),
        ("2/4", "1/2"),
        (r"\text{east}", "east"),
        (r"\left(1,2\right)", "(1, 2)"),
        (r"\(7\)", "7"),
        (".5", "0.5"),
    ],
)
def test_same_answers(first: str, second: str) -> None:
    assert same_answer(first, second)
    assert same_answer(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("18", "19"),
        ("18", "1.8"),
        ("18", "-18"),
        ("18", ""),
        ("", ""),
        ("12", "1,2"),
        ("1/2", "2"),
        ("1/0", "0"),
        ("0.3333", "1/3"),
        ("x", "y"),
        (r"\leftarrow", "arrow"),
        ("10000000000000001", "10000000000000000"),
    ],
)
def test_different_answers(first: str, second: str) -> None:
    assert not same_answer(first, second)
    assert not same_answer(second, first)


def test_numbers_are_exact() -> None:
    assert number(normalise("0.1")) == Fraction(1, 10)
    assert number("9" * 40) == 10**40 - 1
    assert number("1e5") is None
    assert number("1" * 1000) is None


def test_grades() -> None:
    assert grade_answer("18", r"she makes \boxed{\$18.00}", "strict") == 1.0
    assert grade_answer("18", "she makes 9 * 2 = 18", "strict") == 1.0
    assert grade_answer("18", r"\boxed{9} 18", "strict") == 0.0
    assert grade_answer("18", "", "strict") == 0.0
    assert grade_answer("x+1", r"\boxed{1+x}", "strict") == 0.0
    assert grade_answer("18", "#### 18 dollars", "strict") == 1.0


@pytest.mark.parametrize(
    "given",
    [
        "18 dollars",
        r"18\text{ dollars}",
        r"\$18 \text{ dollars}",
        "**18**",
        "x=18",
        r"\text{Total} = 18",
        r"18 \, \text{cm}^2",
        "18.0 miles per hour.",
        "36/2 apples",
    ],
)
def test_numbers_with_names_and_units(given: str) -> None:
    assert same_answer("18", given)
    assert not same_answer("19", given)


@pytest.mark.parametrize(
    "given",
    ["18 or 19", "18x", "18 x", "2x = 18", "18 and a half", "18 million", r"18\text{ million}",
     "18 dollars and 5 cents", r"\sqrt{18}", r"18\pi", "18 pi", "18^2", "18, 19", "x = -18", "18/2 dollars"],
)  # fmt: skip
def test_other_things_with_a_number_in_them_are_not_that_number(given: str) -> None:
    assert not same_answer("18", given)
    assert not same_answer("19", given)
    assert not same_answer("5", given)


def test_thousands_in_latex() -> None:
    assert same_answer("1000", "1{,}000")
    assert same_answer("1000", r"1{,}000\text{ dollars}")
    assert not same_answer("1000", "1,00")


PAIRS = [
    (r"x^2+1", "1+x^2", True),
    ("x^2+y^2", "y^{2}+x^2", True),
    ("3x^2-2x^3", "-2x^3+3x^2", True),
    ("x^2+y^2", "x^2+y^3", False),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    ("(1,2)", r"\left( 1, 2 \right)", True),
    (r"2\pi", r"\pi \cdot 2", True),
    ("18", "18.", True),
    ("x^2+1", "x^2-1", False),
    ("(1,2)", "(2,1)", False),
    ("3", "9^{9^{9^9}}", False),
    ("3", "x^9^9^9", False),
    ("3", "x^{2}^{9^9}+9^{9^{9^{9}}}", False),
    ("3", "100000!", False),
    ("3", "1+" * 500 + "1", False),
    ("3", r"\frac{", False),
]


@pytest.mark.parametrize(("expected", "given", "same"), PAIRS)
def test_equivalent_expressions(expected: str, given: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert equivalent(expected, given) is same


def test_equivalence_works_in_threads() -> None:
    pytest.importorskip("math_verify")
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.extend(equivalent(a, b) for a, b, _ in PAIRS)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([same for *_, same in PAIRS] * 2)


def test_unknown_and_missing_gradings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown grading 'loose'; known are strict, math-verify"):
        check_grading("loose")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'needs the package math-verify: pip install "unmask\[tasks\]"'):
        check_grading("math-verify")
    check_grading("strict")
