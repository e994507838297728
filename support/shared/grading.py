"""
Grading: take the last boxed answer out of a completion and compare it with the gold answer.

Whatever the model wrote. It imports nothing of ours, so that a grading process starts without
torch. The comparison is math-verify's, wrapped: by itself it accepts answers without a box and
misreads some right ones, and its time limits are alarms, which stop no long C call. So we extract
and normalise ourselves, and grade in processes that may be killed.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]  # the repository


class Grade(NamedTuple):
    correct: bool
    answer: str | None  # what stood in the box
    status: str  # ok, no_box, unfinished, timeout or error


# What math-verify misreads in the golds (mostly Minerva's) and in what models write for them, and
# what it reads; in this order.
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_LESS = {">": "<", "≥": "≤", r"\geq": r"\leq ", r"\ge": r"\le "}
_MORE = r">|≥|\\geq?(?![A-Za-z])"
_WORDS = {
    "dozen": "12",
    "hundred": "100",
    "thousand": "10^3",
    "million": "10^6",
    "billion": "10^9",
    "trillion": "10^{12}",
}
_WORD = "|".join(_WORDS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SPACES = r"(?:\\[,;:! ]|~|\s)*"
# Words behind a number that say more than what is counted.
_NO_UNIT = r"hal[fv]|third|quarter|squared|cubed|(?i:[ap]m\b|north|south|east|west)"
_NO_UNIT += r"|\w*(?:four|fif|six|seven|eigh|nin|ten|lef|elf|teen|tie|red|sand|lion)ths?\b"
# Spellings that are mended before anything else looks at the answer, at its unit too.
_TIDYING = (
    (r"^\s*=", ""),
    (r"(?i)^\s*\\text(?:bf)?\s*\{\s*(?:final )?answer(?: is|:)*\s*\}(?=\s*\S)", ""),
    (r"(?<!\d)–|－", "-"),  # 3–5 is a range
    (r"^\s*([-+]?)\s*€\s*([\d.,]+)\s*$", r"\1\2 \\text{ euros}"),
    (r"^\s*([-+]?)\s*£\s*([\d.,]+)\s*$", r"\1\2 \\text{ pounds}"),
    # 90^o
    (rf"(?<=\d)\s*\^\s*(?:\{{{_SPACES}(?:\\circ|o){_SPACES}\}}|o(?![A-Za-z]))", r"^{\\circ}"),
    # \text{12 hours}, and not \text{2 thirds}, \text{3 pm}
    (
        rf"^\s*\\text\s*\{{\s*([-+]?[\d.,]*\d)\s+(?!{_NO_UNIT})"
        r"([A-Za-z]+(?:(?: per | */ *)[A-Za-z]+)?)\s*\}\s*$",
        r"\1 \\text{ \2}",
    ),
)
_PERCENTS = (
    (r"^\s*\\text\s*\{([^{}]*(?:%|percent)\s*)\}\s*$", r"\1"),  # \text{60%}
    (r"\\text\s*\{\s*(?:\\?%|percent)\s*\}", r"\\%"),
)
_REWRITES = (
    *_PERCENTS,
    # the room between two rows of a matrix
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|ex|em|mm|cm)\s*\]", r"\\\\"),
    (r"\\(?:big|Big)g?[lrm]?(?![A-Za-z])", ""),
    (
        r"(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}(?!\d*\\dot)",
        lambda found: repeating_decimal(*found.groups()),
    ),
    # 10{,}080, 10,\!080
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
    (r"\\?\$|\s|~|(?<!\\)\\(?:[,;:> ]|(?:boldsymbol|bm|underline|bf|large)(?![a-z]))", " "),
    (r"[\s.,;\\]+$|^\s*\\approx", ""),
    # 10 000
    (r"^ *[-+]?\d{1,3}(?: \d{3})+$", lambda found: found[0].replace(" ", "")),
    # 1 1/2 would be 1
    (r"^( *-?\d+) +(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"−", "-"),
    (r"∞", r"\\infty "),
    (r"∪", r"\\cup "),
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}"),
    (r"√\s*(\d+|\{[^{}]*\}|\([^()]*\)|[A-Za-z])", r"\\sqrt{\1}"),
    (r"½", r"\\frac{1}{2}"),
    (r"⅓", r"\\frac{1}{3}"),
    (r"⅔", r"\\frac{2}{3}"),
    (r"¼", r"\\frac{1}{4}"),
    (r"¾", r"\\frac{3}{4}"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"°|\^?\s*\\degree(?![A-Za-z])", r"^\\circ "),
    # 5 > x > 2 is 2 < x < 5
    (
        rf"^([^<>=]+?)\s*({_MORE})\s*([A-Za-z])\s*({_MORE})\s*([^<>=]+)$",
        lambda found: f"{found[5]}{_LESS[found[4]]}{found[3]}{_LESS[found[2]]}{found[1]}",
    ),
    # \sin 30^\circ would be that of 30 radians
    (
        r"(\\(?:sin|cos|tan|cot)\s*)((?:\\left)?\(|\{)?\s*(\d+\.?\d*)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)",
        r"\1\2(\3\\pi/180)",
    ),
    # 5 \frac{\text{m}}{...}
    (r"(?<=[\d}])\s*(?:\\mu\s*\\(?:text|mathrm)|\\[dt]?frac\{\s*\\(?:text|mathrm))\{.*", ""),
    # 3 million, 3 \text{ million dollars}
    (
        rf"(?i)^( *[-+]?[\d.,]+) *(?:\\text *\{{ *)?({_WORD})s?(?: +(?!{_WORD})[a-z]+)? *\}}?$",
        lambda found: rf"{found[1]} \times {_WORDS[found[2].lower()]}",
    ),
    # June 20 would be a product
    (r"^ *([A-Z][a-z]{2,} \d+)$", r"\\text{\1}"),
    # 18 dollars
    (rf"^\s*([-+]?[\d.,]+) +(?!perc|{_WORD})[A-Za-z]{{4,}}(?: per [A-Za-z]+)?$", r"\1"),
    # 15 cm^2
    (r"^ *([-+]?[\d.,]+) *(?:[cmk]m|in|inches|ft|feet|yd|mi|miles)\^\{?[23]\}?$", r"\1"),
    (r"np\.log\b", r"\\ln"),
    (r"(?:np\.|\\)sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
    # np.arcsin(10/13)
    (r"(?<![\\A-Za-z])(?:np\.)?((?:arc)?(?:sin|cos|tan)|exp|ln|pi)(?![A-Za-z])", r"\\\1"),
    # 4.5e33
    (rf"(?<![\w./])({_NUMBER})[eE]\+?(-?)0*(\d+)(?![\w.])", r"\1 \\times 10^{\2\3}"),
    (r"×|(?<=\d) ?x ?(?=10\^)", r" \\times "),
    (r"\*\*", "^"),
    # 10^33 is no 10^3 3
    (r"\^\s*([-+]?\d+)", r"^{\1}"),
    # -1./3
    (r"(?<=\d)\.(?!\d|\\over)", ""),
    # \gamma^2-1 would be the gamma function at -1, squared
    (r"\\gamma(?![A-Za-z])", r"\\Upsilon "),
    # E_1 and M_\odot are not read
    (r"(?<![A-Za-z\\])[Ee]_", r"\\varepsilon_"),
    (r"_\\odot\b|_\{\\odot\}", "_{sun}"),
    # \lambda_{\text{red}} is \lambda_{red}
    (r"_\{\\(?:text|mathrm)\s*\{\s*(\w+)\s*\}\}", r"_{\1}"),
    # x_{i} would be complex, and x_i not
    (r"_\{\s*i\s*\}", "_i "),
    # \dot\omega, \dot x
    (
        r"\\(d?dot)(\s+[A-Za-z]|\s*\\[A-Za-z]+)(?![A-Za-z])",
        lambda found: rf"\{found[1]}{{{found[2].strip()}}}",
    ),
    # y' would be y, and dx/dt a derivative that sympy works out to 0
    (r"(?<!\w)([A-Za-z])(?:'|\^\{?\\prime\b\}?)(?!')", r"\\dot{\1}"),
    (r"\\[dt]?frac\s*\{d ?(\\?[A-Za-z]+)\}\s*\{d ?t\}", r"\\dot{\1}"),
    # MR=SRMC: two names
    (r"^(?:\\\w+\{)?([A-Z]{2,})\}? *= *(?:\\\w+\{)?([A-Z]{2,})\}?$", r"\\text{\1}=\\text{\2}"),
)
_BOX = re.compile(r"\\boxed\s*(?:\{|\Z)")  # \Z: the text was cut there
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \\. passes over \{ and \}
LONGEST_ANSWER = 1_000  # characters


def extract_answer(text: str) -> str | None:
    """Content of the last \\boxed{...} after the final </think>, None where there is none.

    O(len(text)).
    """
    thought = text.rfind("</think>")
    if text.rfind("<think>") > thought:  # a thought that never closes has no answer after it
        return None
    start = None
    for box in _BOX.finditer(text, max(thought, 0)):
        start = box.end()
    if start is None:
        return None
    content = text[start:][: LONGEST_ANSWER + 1]  # and the brace that closes it
    depth = 1
    for brace in _BRACE.finditer(content):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return content[: brace.start()].strip() or None
    return None


def normalise_answer(answer: str) -> str:
    """The same answer as math-verify reads it.

    4.5e33 -> 4.5 \\times 10^{33}, np.pi -> \\pi, a \\pm b -> a+b, a-b.
    """
    for pattern, replacement in _REWRITES:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.strip()
    # Where i is no index it is the imaginary unit, which is I to math-verify.
    if not re.search(r"\\(?:sum|prod)", answer):
        answer = re.sub(r"(?<![\\A-Za-z_])(?<!_\{)i(?=t?(?![A-Za-z_]))", "I ", answer).strip()
    # math-verify drops a last letter that may be a unit, the t of \frac{1}{m} t too. Only after a
    # plain number is it one.
    power = r"(?:\s*\\(?:times|cdot)\s*10\^\{-?\d+\})?"
    quantity = rf"(?:.*=)?\s*[-+]?\s*{_NUMBER}{power}\s*[A-Za-z]"
    if re.search(r"[\d}\s][cdghlmost]$", answer) and not re.fullmatch(quantity, answer):
        answer = f"{answer[:-1]}{{{answer[-1]}}}"
    if "," not in answer and re.search(r"\\(?:pm|mp)(?![a-z])", answer):
        answer = f"{choose_sign(answer, upper=True)}, {choose_sign(answer, upper=False)}"
    return answer


def repeating_decimal(whole: str, fixed: str, cycle: str) -> str:
    """0.1\\overline{6}, which math-verify reads as 0.16, is \\frac{15}{90}."""
    above = int(whole + fixed + cycle) - int(whole + fixed or 0)
    return rf"\frac{{{above}}}{{{'9' * len(cycle)}{'0' * len(fixed)}}}"


def choose_sign(answer: str, upper: bool) -> str:
    """Each \\pm and \\mp replaced by its upper or lower sign."""
    plus, minus = ("+", "-") if upper else ("-", "+")
    answer = re.sub(r"\\pm(?![a-z])", plus, answer)
    return re.sub(r"\\mp(?![a-z])", minus, answer)


_NAMES = re.compile(  # words, in which a capital is no symbol
    r"\\(?:text|mathrm|mbox|operatorname)[a-z]*\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Z][a-z]{2,}"
)


def in_both_cases(answer: str) -> frozenset[str]:
    """Capitals whose small letter stands there too, as in R - r; I and e are numbers."""
    letters = set(_NAMES.sub(" ", normalise_answer(answer)))
    return frozenset(c for c in letters - {"I", "E"} if c.isupper() and c.lower() in letters)


def lower_others(answer: str, kept: frozenset[str]) -> str:
    """With small letters for capitals that are not `kept`, outside of names; I and E stay."""

    def lower(found: re.Match) -> str:
        letter = found["letter"]
        return letter.lower() if letter and letter not in kept else found[0]

    return re.sub(rf"{_NAMES.pattern}|(?P<letter>[A-DF-HJ-Z])", lower, answer)


@contextlib.contextmanager
def letters_kept(kept: frozenset[str]) -> Iterator[None]:
    """Where any are `kept`, math-verify reads R and r as two symbols; else all capitals as small.

    Not always: Minerva's golds have a c where models write C.
    """
    if not kept:
        yield
        return
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import parser

    plain = parser.latex2sympy
    config = ConversionConfig(lowercase_symbols=False)
    parser.latex2sympy = functools.partial(plain, conversion_config=config)
    parser.parse_latex_cached.cache_clear()
    try:
        yield
    finally:
        parser.latex2sympy = plain
        parser.parse_latex_cached.cache_clear()


def parse_answer(
    answer: str, normalise: bool, seconds: int = 3, kept: frozenset[str] = frozenset()
) -> list:
    """math-verify's readings of an answer: a sympy object if it can be read, and a string.

    `kept`: the capitals that are no small letters.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    mode = "any_match"
    if normalise:
        if kept:
            answer = lower_others(answer, kept)
        answer = normalise_answer(answer)
        # any_match, the default, takes a lone number out of LaTeX that cannot be read: 10 from
        # 3 \times 10^8 \unknown{x}
        mode = "first_match"
    with letters_kept(kept):
        return parse(
            f"\\boxed{{{answer}}}",
            [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
            parsing_timeout=seconds,
            extraction_mode=mode,
            raise_on_error=True,
        )


parse_gold = functools.lru_cache(maxsize=4096)(parse_answer)


def answers_match(prediction: str, gold: str, normalise: bool = True, seconds: int = 3) -> bool:
    """Whether math-verify finds the two equal; False for what it cannot read.

    TimeoutError where one step takes longer than `seconds`.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "answers_match sets SIGALRM, which needs the main thread: grade in a process of its own"
        )
    if not normalise:
        return readings_match(prediction, gold, normalise, seconds)
    prediction = tidy_answer(prediction)
    gold = tidy_answer(gold)
    chosen = _CHOICE.fullmatch(gold)
    if chosen and _CHOICE.match(prediction):  # \textbf{(C) }12, but not two choices
        return set(re.findall(r"(?<![A-Za-z])\(([A-F])\)", prediction)) == {chosen[1]}
    if units_differ(prediction, gold) or bases_differ(prediction, gold):
        return False
    if readings_match(prediction, gold, normalise, seconds):
        return True
    both = unit_of(gold) is not None and unit_of(prediction) == unit_of(gold)
    worded = [unit_as_text(prediction, both), unit_as_text(gold, both)]
    if worded != [prediction, gold] and readings_match(*worded, normalise, seconds):
        return True
    bare = [without_sign(prediction), without_sign(gold)]
    if (bare[0] is None) == (bare[1] is None):  # neither has a sign, or both: 50\% is no 5000\%
        return False
    return readings_match(bare[0] or prediction, bare[1] or gold, normalise, seconds)


def readings_match(prediction: str, gold: str, normalise: bool, seconds: int) -> bool:
    """answers_match on the two as they stand."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        kept = frozenset()
        if normalise:
            kept = in_both_cases(gold) | in_both_cases(prediction)
        readings = [
            parse_gold(gold, normalise, seconds, kept),
            parse_answer(prediction, normalise, seconds, kept),
        ]
        equal = verify(
            *readings,
            float_rounding=6,
            strict=True,
            allow_set_relation_comp=normalise,  # x > 3 is (3, \infty), whichever is the gold
            timeout_seconds=seconds,
            raise_on_error=True,
        )
    except TimeoutException as late:
        raise TimeoutError(f"math-verify took more than {seconds} s") from late
    except (MemoryError, RecursionError):  # no verdict: the worker says "error"
        raise
    except Exception:  # sympy raises all kinds on what it cannot read or compare: no match
        return False
    if normalise:
        return numbers_match(*readings, equal, seconds)
    return equal


_PERCENT_SIGN = re.compile(r"(?:\s|~|\\[,;:! ])*(?:\\?%|(?<![a-z])percent)[\s.$]*$")
_MODULUS = re.compile(r"^(?:.*\\equiv)?\s*(-?\d+)\s*\\pmod\s*(?:\{\d+\}|\d+)[\s.$]*$")


def without_sign(answer: str) -> str | None:
    """60 for 60\\% and 60 percent, 7 for 7 \\pmod{12}; None where there is no such sign.

    A gold often leaves it to the question.
    """
    for pattern, replacement in _PERCENTS:
        answer = re.sub(pattern, replacement, answer)
    found = _MODULUS.match(answer)
    if found:
        return found[1]
    bare = _PERCENT_SIGN.sub("", answer)
    if bare == answer or re.search("%|percent", bare):  # none, or a list of them
        return None
    return bare


def numbers_match(gold: list, prediction: list, equal: bool, seconds: int) -> bool:
    """math-verify's verdict on two readings, mended where both are numbers.

    It finds 1e-8 and 3e-9 equal, to six decimals, and 9.28 \\times 10^{2}, which is 927.99...,
    not 928. It subtracts, and drops what is small beside the terms: \\frac{62!}{4! 58!} would be
    \\frac{61!}{4! 57!}.
    """
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
    from sympy import Expr, Float

    values = []
    for readings in (gold, prediction):
        if readings and isinstance(readings[0], Expr):
            values.append(readings[0])
    if len(values) < 2 or values[0] == values[1]:
        return equal
    if not all(value.is_number for value in values):
        return equal
    rounded = any(value.has(Float) for value in values)
    if not (equal or rounded):
        return equal
    try:
        x, y = timeout(seconds)(figures_of)(values)
    except TimeoutException as late:
        raise TimeoutError(f"sympy took more than {seconds} s") from late
    if x.is_Rational and y.is_Rational:
        return x == y
    if not (x - y).is_finite:  # an infinite one, or what has no value
        return equal
    size = max(abs(x), abs(y))
    near = (1e-12 if size > 1e-3 else 1e-6) * size
    return bool(abs(x - y) <= near) or bool(equal and rounded and size > 1e-3)


def figures_of(values: list) -> list:
    """Both values to 15 digits, or exact where both are whole numbers or fractions.

    1 - 2^{-100} and 1 - 2^{-99} have the same 15 digits.
    """
    from sympy import N

    exact = [value.doit() for value in values]
    if all(value.is_Rational for value in exact):
        return exact
    return [N(value) for value in exact]


# One unit a line of words. math-verify leaves units out: 5 cm would be 5 km.
_UNITS = (
    "nm nanometer nanometers nanometre nanometres",
    "mm millimeter millimeters millimetre millimetres",
    "cm centimeter centimeters centimetre centimetres",
    "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres",
    "in inch inches",
    "ft foot feet",
    "yd yard yards",
    "mi mile miles",
    "s sec second seconds",
    "min minute minutes",
    "h hr hrs hour hours",
    "day days",
    "week weeks",
    "year years",
    "g gram grams",
    "kg kilogram kilograms",
    "lb lbs pound pounds",
    "cent cents",
    "dollar dollars USD",
    "euro euros EUR",
    "degree degrees",
    "radian radians rad",
    "percent",
    "J joule joules",
    "kJ kilojoule kilojoules",
    "N newton newtons",
    "W watt watts",
    "V volt volts",
    "Hz hertz",
    "Pa pascal pascals",
)
_UNIT_OF = {name: line for line in _UNITS for name in line.split()}
_SHORT = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
_PLAIN = r"\s*[-+]?\s*(?:\d[\d.,]*|\.\d+)"  # a number
_POWER = r"(?:\^\{?([23])\}?)?[\s.]*\Z"
_UNIT = r"((?:square |cubic )?[A-Za-z]+(?:(?:\s*/\s*|\s+per\s+)[A-Za-z]+)?)"
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*\{(?:\s|~)*")
_ENDS_IN_UNIT = re.compile(
    r"[\d}]\s*(?:\\[ ,;!]|~)?\s*"
    rf"{_TEXT.pattern}{_UNIT}\s*\}}{_POWER}"
)
_PLAIN_WITH_UNIT = re.compile(rf"({_PLAIN})\s*{_UNIT}{_POWER}")
_UNIT_SLASH = re.compile(rf"\}}\s*/\s*{_TEXT.pattern}")
_DEGREES = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|°)[\s.]*\Z")
_DOLLARS = re.compile(rf"\s*[-+]?\s*\\?\${_PLAIN}\s*\Z")
_NUMERAL = re.compile(r"(\d+)_\{?(\d+)\}?")
_CHOICE = re.compile(r"\s*\\text(?:bf|rm)?\s*\{\s*\(([A-F])\)\s*\}")


def tidy_answer(answer: str) -> str:
    """Without what stands around the answer, and a unit behind its number."""
    for pattern, replacement in _TIDYING:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip()


def known_unit(words: str, power: str | None) -> tuple[str, ...] | None:
    """The lines of the unit's parts and the power of the last; None where we do not know one."""
    lines = []
    for part in re.split(r"\s*/\s*|\s+per\s+", _SHORT.get(words, words)):
        *kind, name = part.split()
        if name not in _UNIT_OF:
            return None
        if kind:
            power = {"square": "2", "cubic": "3"}[kind[0]]
        lines.append(_UNIT_OF[name])
    return *lines, power or "1"


_EQUAL_UNITS = (
    {known_unit("W", None), known_unit("J/s", None)},
    {known_unit("N", None), known_unit("J/m", None)},
    {known_unit("Pa", None), known_unit("N/m", "2")},
)


def unit_of(answer: str) -> tuple[str, ...] | None:
    """The unit that we know of those it ends in, or dollars before it, and the unit's power.

    Outside \\text a letter is a unit only after a plain number.
    """
    if _DOLLARS.match(answer):
        return known_unit("dollar", None)
    if _PERCENT_SIGN.search(answer):
        return known_unit("percent", None)
    if _DEGREES.search(answer):
        return known_unit("degree", None)
    answer = _UNIT_SLASH.sub("/", answer)  # \text{m}/\text{s}
    if len(_TEXT.findall(answer)) > 1:  # a product: kg m/s^2 is N
        return None
    found = _ENDS_IN_UNIT.search(answer)
    if found:
        return known_unit(found[1], found[2])
    found = _PLAIN_WITH_UNIT.match(answer)
    return known_unit(found[2], found[3]) if found else None


def unit_as_text(answer: str, both: bool) -> str:
    """12 \\text{ m/s} for 12 m/s, which math-verify reads as a quotient, and 12 USD.

    Letters stay, but for those of m/s and where `both` answers end in this unit: 12 N may be a
    product, and 2h/g a quotient.
    """
    found = _PLAIN_WITH_UNIT.match(answer)
    if not found or not known_unit(found[2], found[3]):
        return answer
    letters = re.split(r"\s*/\s*", found[2])
    if not both and letters != ["m", "s"] and max(map(len, letters)) == 1:
        return answer
    return rf"{found[1]} \text{{ {found[2]}}}"


def units_differ(prediction: str, gold: str) -> bool:
    """Does each end in a unit that we know, and in another one?"""
    units = [unit_of(prediction), unit_of(gold)]
    return None not in units and units[0] != units[1] and {*units} not in _EQUAL_UNITS


def bases_differ(prediction: str, gold: str) -> bool:
    """Numerals of two bases and of two values; math-verify leaves the base out."""
    values = []
    for answer in (prediction, gold):
        found = _NUMERAL.fullmatch("".join(answer.split()))
        if not found or not 2 <= int(found[2]) <= 36:
            return False
        try:
            values.append((found[2], int(found[1], int(found[2]))))
        except ValueError:  # no numeral of that base
            values.append((found[2], found[0]))
    (base, value), (other_base, other_value) = values
    return base != other_base and value != other_value


# --------------------------------------------------------------------------------------------------
# Grading processes

START_SECONDS = 120  # for a worker to load sympy and math-verify
ALARM_SECONDS = 3  # of computing, for one step of a grade: parsing, comparing
GRADE_SECONDS = 7.0  # then it is killed: the alarms inside it cannot stop a single long C call
MOST_MEMORY = 4 << 30  # bytes of a worker: model text may ask for any amount
MOST_WORKERS = 8


def grader_worker() -> None:
    """A grading process: JSON questions on stdin, JSON verdicts on stdout.

    Until stdin closes or the parent dies.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # some schedulers send them to all processes
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the parent, if killed too
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    import resource

    count_processor_time()
    answers_match("1", "1")  # load sympy and math-verify before the clock of the first grade starts
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no verdict
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        try:
            verdict = [answers_match(*json.loads(line)), "ok"]
        except TimeoutError:
            verdict = [False, "timeout"]
        except Exception:  # MemoryError, RecursionError and whatever sympy raises on hostile text
            verdict = [False, "error"]
        print(json.dumps(verdict), file=verdicts, flush=True)


def count_processor_time() -> None:
    """Make this process's alarms count what it computes, not what others do meanwhile.

    By the clock, on a machine with five times more processes than cores, 4 of 2,000 plain answers
    took 3 s. The outer limit, 7 s, is still by the clock.
    """

    def alarm(seconds: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)

    signal.signal(signal.SIGPROF, lambda *_: signal.raise_signal(signal.SIGALRM))
    signal.alarm = alarm  # math-verify's limits call it


_workers: dict[subprocess.Popen, bool] = {}  # -> is it ready? The pool outlives the call


@atexit.register
def stop_workers() -> None:
    while _workers:
        _stop(next(iter(_workers)))


def _stop(worker: subprocess.Popen) -> None:
    """Kill it, and wait: a dead child that nobody waits for stays in the table of processes."""
    del _workers[worker]
    worker.kill()
    worker.communicate()


def _start_worker() -> subprocess.Popen:
    path = str(ROOT)
    if os.environ.get("PYTHONPATH"):
        path += os.pathsep + os.environ["PYTHONPATH"]
    program = "from support.shared.grading import grader_worker; grader_worker()"
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", program],  # -P: whatever the working directory holds
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        process_group=0,  # Ctrl-C and SIGTERM are the trainer's business
    )
    _workers[worker] = False
    return worker


def grade_completions(texts: list[str], golds: list[str], normalise: bool = True) -> list[Grade]:
    """A Grade for each completion text against its gold answer; each takes 7 s at most.

    Whatever the model wrote. Answers equal up to white space, but for that between digits, are
    right at once; the others go to a pool of processes. A time-out counts as wrong.
    `normalise=False` leaves out the rewriting of answers that math-verify cannot read, as
    published graders do.
    """
    grades = []
    todo = []
    for text, gold in zip(texts, golds, strict=True):
        grade = grade_at_sight(text, gold)
        if grade is None:
            todo.append(len(grades))
            grade = Grade(False, extract_answer(text), "ok")
        grades.append(grade)
    if todo:
        questions = {i: [grades[i].answer, golds[i], normalise, ALARM_SECONDS] for i in todo}
        for i, (correct, status) in ask_workers(questions).items():
            grades[i] = Grade(correct, grades[i].answer, status)
    return grades


def grade_at_sight(text: str, gold: str) -> Grade | None:
    """The grade of what needs no mathematics, None for the rest."""
    answer = extract_answer(text)
    if answer is None:
        unfinished = text.rfind("<think>") > text.rfind("</think>")
        return Grade(False, None, "unfinished" if unfinished else "no_box")
    if without_space(answer) == without_space(gold):
        return Grade(True, answer, "ok")
    whole = answer.isascii() and answer.isdecimal() and gold.isascii() and gold.isdecimal()
    if whole and answer.lstrip("0") != gold.lstrip("0"):
        return Grade(False, answer, "ok")
    return None


def without_space(answer: str) -> str:
    """White space stays between digits: 1 1/2 is not 11/2."""
    answer = " ".join(answer.split())
    return re.sub(r"(?<!\d) | (?!\d)", "", answer)


def workers_wanted(questions: int) -> int:
    """One for eight questions, as many as this rank's share of the cores allows."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Slurm may have given fewer
        cores = len(os.sched_getaffinity(0))
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST_WORKERS, share, math.ceil(questions / 8)))


def ask_workers(questions: dict[int, list]) -> dict[int, tuple[bool, str]]:
    """question number -> (correct, status), from the pool; who is too slow or dies is replaced."""
    for worker in list(_workers):
        if worker.poll() is not None:
            del _workers[worker]
    while len(_workers) < workers_wanted(len(questions)):
        _start_worker()

    todo = list(questions)
    verdicts = {}
    idle = []
    busy = {}  # worker -> (question number, or None while it starts; deadline)
    for worker, ready in _workers.items():
        if ready:
            idle.append(worker)
        else:
            busy[worker] = (None, time.monotonic() + START_SECONDS)
    while len(verdicts) < len(questions):
        while todo and idle:
            worker = idle.pop()
            i = todo.pop()
            print(json.dumps(questions[i]), file=worker.stdin, flush=True)
            busy[worker] = (i, time.monotonic() + GRADE_SECONDS)
        for worker, line in next_answers(busy):
            i, _ = busy.pop(worker)
            if line:
                _workers[worker] = True
                idle.append(worker)
            else:  # too slow (None), or dead ("")
                _stop(worker)
                if i is None:
                    raise SystemExit("a grading process does not start; is math-verify installed?")
                busy[_start_worker()] = (None, time.monotonic() + START_SECONDS)
            if i is not None:
                verdicts[i] = read_verdict(line)
    return verdicts


def next_answers(
    busy: dict[subprocess.Popen, tuple[int | None, float]],
) -> list[tuple[subprocess.Popen, str | None]]:
    """Wait for the first answer or deadline. -> (worker, its line, or None if its time is up)"""
    soonest = min(deadline for _, deadline in busy.values())
    outputs = [worker.stdout for worker in busy]
    spoke = connection.wait(outputs, max(0.0, soonest - time.monotonic()))
    answers = []
    for worker, (_, deadline) in busy.items():
        if worker.stdout in spoke:
            answers.append((worker, worker.stdout.readline()))
        elif time.monotonic() >= deadline:
            answers.append((worker, None))
    return answers


def read_verdict(line: str | None) -> tuple[bool, str]:
    if line is None:
        return False, "timeout"
    if not line:
        return False, "error"
    correct, status = json.loads(line)
    return correct, status
