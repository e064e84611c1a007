r"""Final answers: what is found in a text, and which answers are the same."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
        ("#### Final Answer\n29", "29"),
        ("#### Result\n\n**-29**\n", "-29"),
        ("#### Answer: 29", "29"),
        ("#### The final answer is $29.", "$29."),
        ("#### Paris", "Paris"),
        ("It costs $1,250.50 in all.", "$1,250.50"),
        ("3 apples and -4", "-4"),
        ("about 1/2", "1/2"),
        ("no number", None),
        ("", None),
        (r"\boxed{unclosed", None),
        (r"that is \frac{1}{2}.", r"\frac{1}{2}"),
        (r"5 - 1 = 3\frac12", r"3\frac12"),
        ("1.5 + 2 = 3 1/2", "3 1/2"),
        ("so 2½ cups", "2½"),
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
        ("29", "€29"),
        ("29", "29 £"),
        ("29", r"29\text{ (A)}"),
        ("29", r"29^\circ"),
        ("-5", "(-5)"),
        ("5", r"\left(5\right)"),
        ("3.5", r"3\frac{1}{2}"),
        ("7/2", r"3\frac12"),
        ("-7/2", r"-3 \frac{1}{2}"),
        ("3.5", "3 1/2"),
        ("1/2", r"\frac{1}2"),
        ("1/20", r"\cfrac1{20}"),
        ("-1/2", r"\frac{1}{-2}"),
        ("1/2", r"\tfrac 1 2"),
        ("1/2", r"{1 \over 2}"),
        ("1/2", r"\displaystyle \frac{\text{1}}2"),
        ("3.5", "3½"),
        ("1000", "1 000"),
        ("1200", r"1.2 \times 10^{3}"),
        ("0.012", r"1.2\cdot10^{-2}"),
        ("-1200", "-1.2e3"),
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
        ("1200", r"1.2\times10^4"),
        ("12", "1.2e3"),
        ("x", "y"),
        (r"\leftarrow", "arrow"),
        ("10000000000000001", "10000000000000000"),
        ("31/2", "3 1/2"),
        ("2", r"\frac12 3"),
        ("(1, 2)", "1, 2"),
        ("2516_8", "2516_7"),
        ("29", "2 9"),
        ("1/3", r"\approx 0.33"),
        ("2", r"\frac{1}2"),
        ("12", r"\frac12"),
    ],
)
def test_different_answers(first: str, second: str) -> None:
    assert not same_answer(first, second)
    assert not same_answer(second, first)


def test_numbers_are_exact() -> None:
    assert number(normalise("0.1")) == Fraction(1, 10)
    assert number("9" * 40) == 10**40 - 1
    assert number("1e5") == 10**5
    assert number("1e1000") is None
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
        "CHF 18",
        "Rs. 18",
        r"\pounds 18",
        "₩18{.}00",
        "{18}",
        r"\approx 18",
        r"x \approx 18",
        r"\sim 18\%",
        r"\text{about }18",
        "Approximately 18 days.",
        "circa 18",
        "(A) 18",
        r"\textbf{(C)}\ 18",
        "B. 18",
        "Option D: 18",
        "Answer: 18",
        "the final answer is (e) 18",
        "= 18",
        r"\therefore 18",
        r"\boldsymbol{18}",
        r"\textcolor{red}{18}",
        "`18`",
        r"18^\circ\text{C}",
        "18cm",
        "18 m/s",
        "18 km per hour per person",
        "18 (dollars)",
        "18th",
        "US$18",
        r"x = \frac{36}2",
        r"f(3) = 18",
        r"m\angle ABC = 18^\circ",
        "x is 18",
        r"18 \\",
    ],
)
def test_numbers_with_names_and_units(given: str) -> None:
    assert same_answer("18", given)
    assert not same_answer("19", given)


@pytest.mark.parametrize(
    "given",
    ["18 or 19", "18x", "18 x", "2x = 18", "18 and a half", "18 million", r"18\text{ million}",
     "18 thousands", "18 squared", "18 cm cubed", "18 dozens", "18 halves", "18 hundredths", "18 plus", "18 bn",
     "18 gross", "18 quadrillion", "18 choose", "18 roots", "18 twentieths", "18 quarters", "18 mod",
     "18 dollars and 5 cents", "18m", "£18m", "18 K", "-x = 18", "x+y", "> 18", r"\geq 18", "about -18", "(A)",
     "(A) 18 (B) 19", "log x = 18", "half = 18", "18!", "18 less than x", "18 (million)", "(18) 19", r"\pm 18", "18½",
     r"\sqrt{18}", r"18\pi", "18 pi", "18^2", "18, 19", "x = -18", "18/2 dollars"],
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
    ("2516_8", "2516_{8}", True),
    ("2516_8", r"2516_{\text{eight}}", True),
    ("2516_8", r"2516 \text{ (base 8)}", True),
    ("2516_8", "x = 2516_8", True),
    ("2516", "2516_{10}", True),
    ("2516_8", "2516", False),
    ("2516", "x = 2516_8", False),
    ("1A3_{16}", "1A3", False),
    ("10", "{}^5C_2", False),
    ("2516_8", "2516_" + "8" * 5000, False),
    ("2516_8", "2516_7", False),
    ("10^{-20}", r"\frac{1}{10^{20}}", True),
    ("10^{-20}", "10^{-21}", False),
    ("0.1", "0.10000001", False),
    (r"\sqrt{2}", "1.41421356", True),
    (r"\sqrt{2}", "1.4142", False),
    (r"\frac{\sqrt{2}}{2}", r"(B)\ \frac{\sqrt2}2", True),
    (r"\sqrt{2}", r"\text{about } \sqrt{2}", True),
    (r"\sqrt{2}", r"x = \sqrt 2", True),
    ("29", r"\geq 29", False),
    ("29", "2x = 29", False),
    ("29", r"\frac{x}{2} = 29", False),
    ("29", "-x=29", False),
    ("3", "1+" * 500 + "1", False),
    ("3", r"\frac{", False),
]


@pytest.mark.parametrize(("expected", "given", "same"), PAIRS)
def test_equivalent_expressions(expected: str, given: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert equivalent(expected, given) is same


def test_equivalence_works_in_threads_and_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that take for ever are not the same; those after them are graded as ever."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr("unmask.tasks.equivalence.LIMIT", 2.0)
    pairs = [("x", "(x+y+z)^{300}", False), *PAIRS[:2], ("3", "9^{9^{9^9}}", False), PAIRS[3]]
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: equivalent(*pair[:2]), pairs))
    assert found == [same for *_, same in pairs]
    assert time.monotonic() - began < 90


def test_unknown_and_missing_gradings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown grading 'loose'; known are strict, math-verify"):
        check_grading("loose")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'needs the package math-verify: pip install "unmask\[tasks\]"'):
        check_grading("math-verify")
    check_grading("strict")
