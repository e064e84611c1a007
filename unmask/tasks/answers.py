"""The final answer of a worked solution: finding it and comparing it."""

from __future__ import annotations

import re
import threading
from fractions import Fraction

GRADINGS = ("strict", "math-verify")
"""How answers are compared: "strict" as normalised strings and exact numbers, the other as expressions too."""

LONGEST = 300
"""Answers with more characters are only compared as strings."""

NUMBER = re.compile(r"[-\u2212]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")
NAMES_OF_UNITS = r"(?!(?:or|and|half|dozen|hundred|thousand|million|billion|trillion|pi)\b)[a-zA-Z]{2,}"
QUANTITY = re.compile(rf"(?:[a-zA-Z]+ *= *)?({NUMBER.pattern})(?:(?: +{NAMES_OF_UNITS}){{1,3}}(?:\^\{{?\d\}}?)?)?")
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}|(-?)\\[dt]?frac(\d)(\d)")
LIGHT = re.compile(r"(?<=[a-zA-Z])\^(?:\d(?!\d)|\{\d{1,2}\})(?!\s*\^)")
"""A small power of a letter, which is removed before the search for ``HEAVY``."""

HEAVY = re.compile(r"\^.*\^|\^\{?\(?-?\d{5}|\*\*|\d{4}\)?!|!!")
"""Towers of powers and the like, which a computer algebra system may never finish."""


def extract_answer(text: str) -> str | None:
    r"""The last ``\boxed{...}`` (braces may nest), else the line after the last ``####``, else the last number, else
    None. A box that is empty or does not close is skipped."""
    if boxed := last_boxed(text):
        return boxed
    if marked := text.rpartition("####")[2].strip() if "####" in text else "":
        return marked.partition("\n")[0].strip()
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
    """An answer without spaces, thousands separators, $, %, sizes of brackets, stars and a final period."""
    text = answer.strip().strip("*").replace("\u2212", "-").replace("{,}", ",")
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end):
            text = text[2:-2]
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|\\?[$%]|~", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text


def number(normalised: str) -> Fraction | None:
    r"""The exact value of an integer, a decimal, ``a/b`` or ``\frac{a}{b}``; None for anything else."""
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
    text = re.sub(r"\\[!,;: ]|\\?\$|[*~]", " ", TEXT.sub(r" \1", given).replace("{,}", ","))
    match = QUANTITY.fullmatch(text.strip().rstrip("."))
    return number(normalise(match[1])) if match else None


def equivalent(expected: str, given: str) -> bool:
    """Whether two answers are the same, or equal as expressions by math-verify.

    Its time limits work only in the main thread. So an answer that may take for ever (longer than ``LONGEST``, or with
    towers of powers) is only compared as a string.
    """
    if same_answer(expected, given):
        return True
    library = math_verify()
    if len(given) > LONGEST or HEAVY.search(LIGHT.sub("", given)):
        return False
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    read = [
        library.parse(rf"\boxed{{{text.strip().rstrip('.')}}}", parsing_timeout=limit, raise_on_error=False)
        for text in (expected, given)
    ]
    return bool(all(read) and library.verify(*read, timeout_seconds=limit, raise_on_error=False))


def math_verify():  # type: ignore[no-untyped-def]
    """The library, quietened; ImportError says how to install it."""
    import logging

    try:
        import math_verify as library
    except ImportError as error:
        raise ImportError(
            'grading="math-verify" needs the package math-verify: pip install "unmask[tasks]", or use grading="strict"'
        ) from error
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return library


def check_grading(grading: str) -> None:
    """ValueError for an unknown way of grading, ImportError for one whose package is not installed."""
    if grading not in GRADINGS:
        raise ValueError(f"unknown grading {grading!r}; known are {', '.join(GRADINGS)}")
    if grading == "math-verify":
        math_verify()


def grade_answer(expected: str, completion: str, grading: str) -> float:
    """1.0 if the final answer of ``completion`` is ``expected`` in the given way of grading, else 0.0."""
    given = extract_answer(completion)
    if given is None:
        return 0.0
    return float(same_answer(expected, given) if grading == "strict" else equivalent(expected, given))
