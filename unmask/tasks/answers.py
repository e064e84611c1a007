"""The final answer of a worked solution: finding it and comparing it."""

from __future__ import annotations

import re
from fractions import Fraction

from unmask.tasks.equivalence import Worker

GRADINGS = ("strict", "math-verify")
"""How answers are compared: "strict" as normalised strings and exact numbers, the other as expressions too."""

LONGEST = 300
"""Answers with more characters are only compared as strings."""

NUMBER = re.compile(r"[-\u2212]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")
NOT_UNITS = (
    "or|and|plus|minus|negative|times|over|point|mod|modulo|choose|squared|cubed|factorial|roots?|pi|half|halves|dozens?|"
    "gross|score|myriads?|googols?|grand|mil|mn|bn|tn|lakhs?|crores?|[a-z]*(?:hundred|thousand|illion)(?:s|ths?)?|"
    "(?:quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|[a-z]+teenth|[a-z]+tieth)s?"
)
NAMES_OF_UNITS = rf"(?!(?:{NOT_UNITS})\b)[a-zA-Z]{{2,}}"
QUANTITY = re.compile(
    rf"(?:[a-zA-Z]+ *= *|[A-Z]{{3}} +|Rs\.? *)?({NUMBER.pattern})"
    rf"(?:(?: +{NAMES_OF_UNITS}){{1,3}}(?:\^\{{?\d\}}?)?)?"
)
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}|(-?)\\[dt]?frac(\d)(\d)")
CURRENCY = r"\\?[$€¢-¥₠-⃀]|\\(?:pounds|euro)(?![a-zA-Z])"
MIXED = re.compile(r"([-+]?)(\d+)\\frac(\{\d+\}\{\d+\}|\d\d)")
LABEL = re.compile(r"(?:the )?(?:final )?answer\b(?: is)?[\s:=]*", re.IGNORECASE)
WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
BASE = re.compile(
    r"\(?\b(\d+|\d[\dA-F]*(?=\)?_\{?1[1-6]))\)?(?:_\{*|\(?(?:in)?base_?\{?)+"
    rf"(\d\d?|{'|'.join(WORDS)})(?![\da-z])[}})]*"
)
"""Of a normalised answer: a numeral and its base."""
WORKER = Worker()


def extract_answer(text: str) -> str | None:
    r"""The last ``\boxed{...}``, else the first line after the last ``####`` (one with a number if there
    is one), else the last number, else None. A box that is empty or does not close is skipped."""
    if boxed := last_boxed(text):
        return boxed
    marked = text.rpartition("####")[2].strip().splitlines() if "####" in text else []
    lines = [answer for line in marked if (answer := LABEL.sub("", line.strip().strip("*: "), count=1))]
    if lines:
        return next(filter(NUMBER.search, lines), lines[0])
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` that is closed and not empty."""
    for match in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 2  # an escaped brace is a character
                continue
            depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        if depth == 0 and (inside := text[match.end() : at - 1].strip()):
            return inside
    return None


def normalise(answer: str) -> str:
    """An answer without spaces, thousands separators, currencies, %, degrees, sizes of brackets, brackets around all of
    it, stars and a final period."""
    text = answer.strip().strip("*").replace("\u2212", "-").replace("{,}", ",").replace("{.}", ".")
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end):
            text = text[2:-2]
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)  # a mixed number
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|\\?[%°~]|\^\{?\\circ\}?", "", text)
    text = re.sub(CURRENCY, "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"^\(([^(),\[\]]+)\)$|^\{([^{}]+)\}$", r"\1\2", text)
    text = BASE.sub(lambda found: f"{found[1]}_{base_of(found)}", text)
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text


def base_of(found: re.Match[str]) -> int:
    """The base in a match of ``BASE``."""
    return WORDS.index(found[2]) + 2 if found[2] in WORDS else int(found[2])


def number(normalised: str) -> Fraction | None:
    r"""The exact value of an integer, a decimal, ``a/b``, ``\frac{a}{b}`` or ``c\frac{a}{b}``; None for all else."""
    if mixed := MIXED.fullmatch(normalised):
        part = number(rf"\frac{mixed[3]}")
        return None if part is None else Fraction(f"{mixed[1]}1") * (int(mixed[2]) + part)
    if match := FRACTION.fullmatch(normalised):
        sign, top, bottom = match[1] or match[4] or "", match[2] or match[5], match[3] or match[6]
        normalised = f"{sign}{top}/{bottom}".replace("--", "")
    if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)|[-+]?\d+/\d+", normalised, re.ASCII) or len(normalised) > LONGEST:
        return None
    try:
        return Fraction(normalised)
    except ZeroDivisionError:
        return None


def same_answer(expected: str, given: str) -> bool:
    """Whether two answers are the same string when normalised, or the same exact number.

    Where a number is expected, the given one may have a name or a unit: ``x = 18``, ``18 dollars``.
    """
    first, second = normalise(expected), normalise(given)
    if first == second:
        return bool(first)
    value = number(first)
    return value is not None and value in (number(second), quantity(given))


def quantity(given: str) -> Fraction | None:
    """The number of an answer that consists of a number, perhaps with a name before it or a unit after it."""
    text = re.sub(rf"\\[!,;: ]|{CURRENCY}|[*~]", " ", TEXT.sub(r" \1", given).replace("{,}", ","))
    match = QUANTITY.fullmatch(text.strip().rstrip("."))
    return number(normalise(match[1])) if match else None


def equivalent(expected: str, given: str) -> bool:
    """Whether two answers are the same, or equal as expressions by math-verify.

    Two exact numbers are compared exactly, numerals of different bases are different, and answers longer than
    ``LONGEST`` are only compared as strings.
    """
    if same_answer(expected, given):
        return True
    texts = [normalise(text) for text in (expected, given)]
    bases = [sorted(base for found in BASE.finditer(text) if (base := base_of(found)) != 10) for text in texts]
    if len(given) > LONGEST or bases[0] != bases[1] or all(number(t) is not None for t in texts):
        return False
    return WORKER.equal(*(text.strip().rstrip(".") for text in (expected, given)))


def check_grading(grading: str) -> None:
    """ValueError for an unknown way of grading, ImportError for one whose package is not installed."""
    if grading not in GRADINGS:
        raise ValueError(f"unknown grading {grading!r}; known are {', '.join(GRADINGS)}")
    if grading == "math-verify":
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'grading="math-verify" needs the package math-verify: pip install "unmask[tasks]", or use '
                'grading="strict"'
            ) from error


def grade_answer(expected: str, completion: str, grading: str) -> float:
    """1.0 if the final answer of ``completion`` is ``expected`` in the given way of grading, else 0.0."""
    given = extract_answer(completion)
    if given is None:
        return 0.0
    return float(same_answer(expected, given) if grading == "strict" else equivalent(expected, given))
