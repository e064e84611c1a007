"""The final answer of a worked solution: finding it and comparing it."""

from __future__ import annotations

import re
from fractions import Fraction
from unicodedata import normalize

from unmask.tasks.equivalence import Worker

GRADINGS = ("strict", "math-verify")
"""How answers are compared: "strict" as normalised strings and exact numbers, the other as expressions too."""

LONGEST = 300
"""Answers with more characters are only compared as strings."""

ARGUMENT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([^\s\\{}]))"
FRACTION = re.compile(rf"\\[dtc]?frac(?![a-zA-Z]){ARGUMENT}{ARGUMENT}")
OVER = re.compile(r"\{\s*([-+]?\d+)\s*\\over\s*(\d+)\s*\}|^\s*([-+]?\d+)\s*\\over\s*(\d+)\s*$")
PLAIN = r"[-\u2212]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"
FOUND = re.compile(rf"[-\u2212]?(?:\d+\s*)?{FRACTION.pattern}|-?\d*[¼½¾⅐-⅞]|-?\d+ \d+/\d+|{PLAIN}")
"""A number in a text, a fraction as one."""
NUMBER = re.compile(rf"[-+\u2212]?\d*\\frac\{{[-+]?\d+\}}\{{[-+]?\d+\}}|\+?{PLAIN}")
NOT_UNITS = (
    "or|and|plus|minus|negative|times|over|point|mod|modulo|choose|squared|cubed|factorial|roots?|pi|half|halves|dozens?|"
    "gross|score|myriads?|googols?|grand|mil|mn|bn|tn|lakhs?|crores?|less|than|to|"
    "[a-z]*(?:hundred|thousand|illion)(?:s|ths?)?|"
    "(?:quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|[a-z]+teenth|[a-z]+tieth)s?"
)
UNIT = r"(?:[cmk]m|[km]g|m[lL]|mph|lbs?|oz|ft|hrs?|mins?|secs?)(?![a-zA-Z])(?:\^\{?\d\}?|[²³])?"
NAMES_OF_UNITS = rf"(?!(?:{NOT_UNITS})\b)(?:[msghLJNWV](?![a-zA-Z])|[a-zA-Z]{{2,}})(?:\^\{{?\d\}}?|[²³])?"
FUNCTIONS = "sqrt|frac|log|ln|exp|sin|cos|tan|cot|sec|csc|not|no|minus|negative|half|twice|double|square|cube"
NAME = rf"(?![^=]*\b(?:{FUNCTIONS})\b)(?:[a-zA-Z\\][a-zA-Z\\ ]*(?:_\{{?\w+\}}?)?(?:\([\w, ]+\))?|\|[A-Z]\|)"
QUANTITY = re.compile(
    rf"(?:{NAME} *(?:[=:≈]|\\approx|\b(?:is|equals)\b) *|[A-Z]{{3}} +|Rs\.? *)?({NUMBER.pattern})"
    rf"(?: ?(?:st|nd|rd|th)\b)?(?:{UNIT})?(?:(?: +| */ *| *\(){NAMES_OF_UNITS}\)?){{0,5}}"
)
STYLE = re.compile(
    r"\\(?:text|mathrm|textbf|mathbf|boldsymbol|textit|mathit|textrm|mbox|underline|operatorname|boxed|fbox|"
    r"(?:text)?color\s*\{\w+\})\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
SWITCHES = re.compile(r"\\(?:left|right|displaystyle|textstyle|[lL]arge|bf|rm|it)(?![a-zA-Z])")
CURRENCY = r"(?:\b(?:US|AU|CA|HK|NZ|[ACS]))?\\?[$€¢-¥₠-⃀]|\\(?:pounds|euro)(?![a-zA-Z])"
MIXED = re.compile(r"([-+]?)(\d+)(\\frac\{\d+\}\{\d+\})")
LABEL = re.compile(r"(?:the )?(?:final )?answer\b(?: is)?[\s:=]*", re.IGNORECASE)
LEAD = re.compile(
    rf"(?:{LABEL.pattern}|\s|=>?|->|[≈~∼≃→⇒∴]|\\(?:approx|sim|simeq|doteq|therefore|implies|Rightarrow|to)(?![a-zA-Z])|"
    r"\b(?:about|approximately|approx\.|roughly|around|circa|exactly|only)\s|"
    r"(?:\( *[A-J] *\)|[A-J][.:)])(?=(?:\s|\\[ ,;!])*[-+\\$€£.\d]))+",
    re.IGNORECASE,
)
"""What may stand before an answer: that it is one, that it is rounded, its letter among several."""
POWER = re.compile(
    r"([-+]?\d+(?:\.\d+)?)(?:(?:\\times|\\cdot|[×*·])10\^(?:\{([-+]?\d{1,3})\}|(\d))|[eE]([-+]?\d{1,3}))"
)
"""Of a normalised answer: a number in scientific notation."""
WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
BASE = re.compile(
    r"\(?\b(\d+|\d[\dA-F]*(?=\)?_\{?1[1-6]))\)?(?:_\{*|\(?(?:in)?base_?\{?)+"
    rf"(\d\d?|{'|'.join(WORDS)})(?![\da-z])[}})]*"
)
"""Of a normalised answer: a numeral and its base."""
UNSOLVED = re.compile(
    r"[<>≤≥≠±]|\\(?:[gl](?:eq?|eqslant|t)|neq?|pm|mp)(?![a-zA-Z])|"
    r"(?:(?:-\s*\d*|\d+)\s*[a-z]|\\frac\{[a-z]\}\{\d+\})\s*="
)
"""An answer that says less than a number: an inequality, an equation such as ``2x = 18``."""
WORKER = Worker()


def extract_answer(text: str) -> str | None:
    r"""The last ``\boxed{...}``, else the first line after the last ``####`` (one with a number if there
    is one), else the last number, else None. A box that is empty or does not close is skipped."""
    if boxed := last_boxed(text):
        return boxed
    marked = text.rpartition("####")[2].strip().splitlines() if "####" in text else []
    lines = [answer for line in marked if (answer := LABEL.sub("", line.strip().strip("*: "), count=1))]
    if lines:
        return next(filter(FOUND.search, lines), lines[0])
    numbers = [found[0] for found in FOUND.finditer(text)]
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


def fraction(above: str, below: str) -> str:
    """A fraction in LaTeX."""
    return rf"\frac{{{above.strip()}}}{{{below.strip()}}}"


def bare(answer: str) -> str:
    r"""An answer without typefaces, quotes, what leads up to it and a final stop; fractions as ``\frac{a}{b}``."""
    text = answer.strip().strip("*").replace("\u2212", "-")
    text = re.sub(r"(?<=\d)\{([.,])\}(?=\d)", r"\1", re.sub(r"^([`'\"“‘])(.*)[`'\"”’]$", r"\2", text))
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end):
            text = text[2:-2]
    while (plain := STYLE.sub(r" \1", text)) != text:
        text = plain
    text = re.sub("[¼½¾⅐-⅞]", lambda found: fraction(*normalize("NFKC", found[0]).split("⁄")), text)
    for kind in (FRACTION, OVER):
        text = kind.sub(lambda found: fraction(*filter(None, found.groups())), text)
    text = SWITCHES.sub("", text).strip()
    if led := LEAD.match(text):
        text = text[led.end() :] or text
    return re.sub(r"(?<=[\d}%])\s+\( *[A-J] *\)$", "", re.sub(r"(?:[\s.,;:]|\\\\)+$", "", text))


def normalise(answer: str) -> str:
    """An answer :func:`bare`, and without spaces, thousands separators, currencies, %, degrees and brackets around all
    of it."""
    text = re.sub(r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", bare(answer))  # a mixed number
    text = re.sub(r"\\[!,;: ]|\\?[%°~]|\^\{?\\circ\}?", "", text)
    text = re.sub(CURRENCY, "", text)
    text = re.sub(r"(?<=\d)\s+(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # two numbers stay two
    text = re.sub(r"^\(([^(),\[\]]+)\)$|^\{([^{}]+)\}$", r"\1\2", text)
    text = BASE.sub(lambda found: f"{found[1]}_{base_of(found)}", text)
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text


def base_of(found: re.Match[str]) -> int:
    """The base in a match of ``BASE``."""
    return WORDS.index(found[2]) + 2 if found[2] in WORDS else int(found[2])


def number(normalised: str) -> Fraction | None:
    r"""The exact value of an integer, a decimal, ``a/b``, ``\frac{a}{b}``, ``c\frac{a}{b}`` or ``a\times10^n``, else
    None."""
    if power := POWER.fullmatch(normalised):
        return Fraction(power[1]) * Fraction(10) ** int(power[2] or power[3] or power[4])
    if mixed := MIXED.fullmatch(normalised):
        part = number(mixed[3])
        return None if part is None else Fraction(f"{mixed[1]}1") * (int(mixed[2]) + part)
    if match := re.fullmatch(r"([-+]?)\\frac\{([-+]?)(\d+)\}\{([-+]?)(\d+)\}", normalised):
        minus = "-" * ((match[1] + match[2] + match[4]).count("-") % 2)
        normalised = f"{minus}{match[3]}/{match[5]}"
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
    text = re.sub(rf"\\[!,;: ]|{CURRENCY}|(?:\^\{{?\\circ\}}?|°) *[CF]?(?![a-zA-Z])|[*~]", " ", bare(given))
    match = QUANTITY.fullmatch(text.strip())
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
    if UNSOLVED.match(bare(given)) and not UNSOLVED.match(bare(expected)):
        return False
    return WORKER.equal(bare(expected), bare(given))


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
