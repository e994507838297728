"""Pairs made from rules that must be equal, and that must not: how often is the grader right?

    python faults/grader_pairs.py --count 2000 --seed 0

`count` pairs of each kind, the rules in turn. A pair is (answer in the box, gold).
"""

import argparse
import collections
import math
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.shared.grading import grade_completions

Rng = random.Random
Pair = tuple[str, str]
WANTED = 0.995  # of each kind
UNITS = ("cm", "m", "km", "kg", "seconds", "hours", "miles", "inches", "square feet", "mph")
NAMES = ("Alice", "Evelyn", "Navin", "red", "even", "neither", "Tuesday", "isosceles", "ellipse")
LETTERS = "xyzabnkt"


# --------------------------------------------------------------------------------------------------
# One value, written in many ways


def pick(rng: Rng, *shapes: str) -> str:
    return rng.choice(shapes)


def two(rng: Rng, low: int, high: int) -> tuple[int, int]:
    """Two different whole numbers."""
    a, b = rng.sample(range(low, high), 2)
    return a, b


def integer(rng: Rng, n: int) -> str:
    sign = "-" if n < 0 else ""
    k = abs(n)
    shapes = [str(n), f"{n}.0", f"{n}.", f"${n}$", rf"\left({n}\right)", f" {n} ", f"{n}."]
    shapes += [rf"\frac{{{2 * n}}}{{2}}", f"{n - 7}+7", f"{sign}0{k}", f"{n}.00"]
    if n < 0:
        shapes.append(f"\u2212{k}")
    if k >= 1000:
        shapes += [f"{n:,}", f"{n:,}".replace(",", "{,}"), f"{n:,}".replace(",", r"\,")]
        shapes.append(f"{n:,}".replace(",", r",\!"))
    return rng.choice(shapes)


def fraction(rng: Rng, q: Fraction) -> str:
    a, b = q.numerator, q.denominator
    sign = "-" if a < 0 else ""
    k = rng.randrange(2, 9)
    p = abs(a)
    shapes = [
        rf"\frac{{{a}}}{{{b}}}",
        rf"\dfrac{{{a}}}{{{b}}}",
        f"{a}/{b}",
        rf"\tfrac{{{a}}}{{{b}}}",
    ]
    shapes += [
        rf"{sign}\frac{{{p}}}{{{b}}}",
        rf"\frac{{{a * k}}}{{{b * k}}}",
        rf"{{{a} \over {b}}}",
    ]
    shapes += [rf"\left(\frac{{{a}}}{{{b}}}\right)", rf"{a} \div {b}", rf"\frac{{{-a}}}{{{-b}}}"]
    if p < 10 and b < 10:
        shapes.append(rf"{sign}\frac{p}{b}")
    if p > b and p % b:
        shapes.append(rf"{sign}{p // b}\frac{{{p % b}}}{{{b}}}")
    while b % 2 == 0:
        b //= 2
    while b % 5 == 0:
        b //= 5
    if b == 1:
        shapes += [str(float(q)), str(float(q)) + "0"]
    return rng.choice(shapes)


def some_fraction(rng: Rng) -> Fraction:
    b = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 20, 25])
    a = rng.choice([n for n in range(-40, 40) if n % b])
    return Fraction(a, b)


def scientific(rng: Rng, mantissa: int, exponent: int) -> str:
    """mantissa / 10 times ten to the exponent, the mantissa from 11 to 99."""
    m = f"{mantissa // 10}.{mantissa % 10}"
    shapes = [f"{m}e{exponent}", f"{m}E{exponent:+d}", rf"{m} \times 10^{{{exponent}}}"]
    shapes += [rf"{m} \cdot 10^{{{exponent}}}", rf"{m}\times10^{{{exponent}}}"]
    shapes += [rf"{mantissa} \times 10^{{{exponent - 1}}}", f"{m} x 10^{{{exponent}}}"]
    shapes += [rf"{m}0 \times 10^{{{exponent}}}", rf"{m}×10^{{{exponent}}}"]
    return rng.choice(shapes)


def root(rng: Rng, k: int, n: int) -> str:
    """k times the square root of n."""
    shapes = [
        rf"{k}\sqrt{{{n}}}",
        rf"{k} \sqrt{{{n}}}",
        rf"\sqrt{{{k * k * n}}}",
        rf"\sqrt{{{n}}}\cdot {k}",
    ]
    shapes += [
        rf"\frac{{{k * n}}}{{\sqrt{{{n}}}}}",
        rf"{k} \cdot {n}^{{1/2}}",
        rf"{k}\cdot\sqrt{{{n}}}",
    ]
    shapes += [f"{k}*sqrt({n})", rf"{k}{n}^{{\frac12}}".replace(str(k), rf"{k}\times ", 1)]
    return rng.choice(shapes)


def pi_times(rng: Rng, a: int, b: int) -> str:
    shapes = [
        rf"\frac{{{a}\pi}}{{{b}}}",
        rf"\frac{{{a}}}{{{b}}}\pi",
        rf"{a}\pi/{b}",
        rf"{a} \pi / {b}",
    ]
    shapes += [
        rf"\pi \cdot \frac{{{a}}}{{{b}}}",
        rf"\frac{{{2 * a}\pi}}{{{2 * b}}}",
        f"{a}*np.pi/{b}",
    ]
    shapes.append(rf"\dfrac{{{a} \pi}}{{{b}}}")
    return rng.choice(shapes)


def quadratic(rng: Rng, a: int, p: int, q: int, x: str) -> str:
    """a (x - p)(x - q), factored or multiplied out."""
    terms = [f"{a}{x}^2", f"{-a * (p + q):+d}{x}", f"{a * p * q:+d}"]
    signed = ["+" + terms[0], *terms[1:]]
    shapes = ["".join(terms), " ".join(terms), "".join(rng.sample(signed, 3)).removeprefix("+")]
    shapes += [
        f"{a}({x}{-p:+d})({x}{-q:+d})",
        rf"{a} \left({x}{-q:+d}\right)\left({x}{-p:+d}\right)",
    ]
    shapes.append(f"{a}*({x}{-q:+d})*({x}{-p:+d})")
    return rng.choice(shapes)


def numbers_set(rng: Rng, values: list[int]) -> str:
    order = rng.sample(values, len(values))
    inside = pick(rng, ", ", ",").join(map(str, order))
    return pick(
        rng, inside, rf"\{{{inside}\}}", rf"\left\{{{inside}\right\}}", rf"\{{ {inside} \}}"
    )


def point(rng: Rng, values: list[int], b: int) -> str:
    """A tuple of which the last number is divided by b."""
    inside = [*map(str, values[:-1]), fraction(rng, Fraction(values[-1], b))]
    if Fraction(values[-1], b).denominator == 1:
        inside[-1] = str(values[-1] // b)
    text = pick(rng, ", ", ",", " , ").join(inside)
    return pick(
        rng, f"({text})", rf"\left({text}\right)", rf"\left( {text} \right)", rf"\big({text}\big)"
    )


def interval(rng: Rng, left: str, a: str, b: str, right: str) -> str:
    inside = pick(rng, f"{a},{b}", f"{a}, {b}")
    shapes = [
        left + inside + right,
        rf"\left{left}{inside}\right{right}",
        rf"x \in {left}{inside}{right}",
    ]
    shapes.append(rf"x\in\left{left} {inside} \right{right}")
    return rng.choice(shapes)


def half_line(rng: Rng, sign: str, a: int) -> str:
    """x > a and its kin, as an interval or as it stands."""
    written = {
        ">": [f"({a},\\infty)", f"x > {a}", f"x>{a}", rf"({a}, +\infty)", rf"x \in ({a}, \infty)"],
        ">=": [f"[{a},\\infty)", rf"x \geq {a}", rf"x \ge {a}", rf"[{a}, +\infty)", f"x ≥ {a}"],
        "<": [f"(-\\infty,{a})", f"x < {a}", f"x<{a}", rf"\left(-\infty, {a}\right)", f"{a} > x"],
        "<=": [f"(-\\infty,{a}]", rf"x \leq {a}", rf"x \le {a}", rf"(-\infty, {a}]", f"x ≤ {a}"],
    }
    return rng.choice(written[sign])


def matrix(rng: Rng, rows: list[list[int]]) -> str:
    kind = pick(rng, "pmatrix", "bmatrix", "pmatrix")
    lines = []
    for row in rows:
        lines.append(pick(rng, " & ", "&").join(map(str, row)))
    text = pick(rng, r" \\ ", r"\\").join(lines)
    return pick(
        rng, rf"\begin{{{kind}}}{text}\end{{{kind}}}", rf"\begin{{{kind}}} {text} \end{{{kind}}}"
    )


def with_unit(rng: Rng, n: str, unit: str, bare: bool = True) -> str:
    shapes = [rf"{n}\text{{ {unit}}}", rf"{n} \text{{ {unit}}}", rf"{n}\ \mathrm{{{unit}}}"]
    shapes.append(rf"{n}~\text{{{unit}}}")
    if " " not in unit:
        shapes.append(f"{n} {unit}")
    if bare:
        shapes.append(n)
    return rng.choice(shapes)


def line_equation(rng: Rng, m: int, c: int) -> str:
    """y = m x + c."""
    k = rng.randrange(2, 6)
    shapes = [f"y = {m}x{c:+d}", f"y={m}x {c:+d}", f"y {-c:+d} = {m}x", f"{m}x - y {c:+d} = 0"]
    shapes += [
        f"{k}y = {k * m}x{k * c:+d}",
        f"{-m}x + y = {c}",
        f"y - {m}x = {c}" if m > 0 else f"y = {c}{m:+d}x",
    ]
    return rng.choice(shapes)


def complex_number(rng: Rng, a: int, b: int) -> str:
    return pick(
        rng, f"{a}{b:+d}i", f"{b}i{a:+d}", f"{a} {b:+d} i", rf"{a}{b:+d}\cdot i", f"{a}+({b})i"
    )


def plus_minus(rng: Rng, a: int, n: int) -> str:
    plus, minus = rf"{a}+\sqrt{{{n}}}", rf"{a}-\sqrt{{{n}}}"
    shapes = [
        rf"{a} \pm \sqrt{{{n}}}",
        rf"{a}\pm\sqrt{{{n}}}",
        f"{plus}, {minus}",
        f"{minus},{plus}",
    ]
    shapes += [
        rf"\{{{plus}, {minus}\}}",
        rf"x = {a} \pm \sqrt{{{n}}}",
        rf"{plus} \text{{ and }} {minus}",
    ]
    return rng.choice(shapes)


def choice(rng: Rng, letter: str) -> str:
    return pick(
        rng,
        letter,
        f"({letter})",
        rf"\text{{{letter}}}",
        rf"\text{{({letter})}}",
        rf"\textbf{{({letter})}}",
        rf"\mathrm{{{letter}}}",
    )


def word(rng: Rng, name: str) -> str:
    return pick(
        rng,
        rf"\text{{{name}}}",
        name,
        rf"\text{{{name.lower()}}}",
        rf"\mathrm{{{name}}}",
        rf"\text{{ {name} }}",
    )


def power(rng: Rng, base: int, exponent: int) -> str:
    shapes = [
        f"{base}^{{{exponent}}}",
        str(base**exponent),
        rf"{base} \cdot {base}^{{{exponent - 1}}}",
    ]
    shapes += [f"{base}**{exponent}", rf"{{{base}}}^{{{exponent}}}", f"{base**exponent:,}"]
    return rng.choice(shapes)


def binomial(rng: Rng, n: int, k: int) -> str:
    return pick(
        rng,
        rf"\binom{{{n}}}{{{k}}}",
        str(math.comb(n, k)),
        rf"\frac{{{n}!}}{{{k}! {n - k}!}}",
        rf"\dbinom{{{n}}}{{{k}}}",
        rf"\binom{{{n}}}{{{n - k}}}",
    )


def logarithm(rng: Rng, k: int, n: int) -> str:
    return pick(
        rng,
        rf"{k}\ln {n}",
        rf"\ln({n**k})",
        rf"{k} \ln({n})",
        rf"\ln {n**k}",
        rf"\ln\left({n}\right) \cdot {k}",
        rf"{k}*np.log({n})",
    )


def exponential(rng: Rng, a: int, x: str) -> str:
    return pick(
        rng,
        f"e^{{-{a}{x}}}",
        rf"\frac{{1}}{{e^{{{a}{x}}}}}",
        rf"\exp(-{a}{x})",
        rf"(e^{{{x}}})^{{-{a}}}",
        f"np.exp(-{a}*{x})",
    )


def percent(rng: Rng, n: int) -> str:
    return pick(rng, rf"{n}\%", rf"{n} \%", f"{n}%", rf"\frac{{{n}}}{{100}}", f"{n / 100:.2f}")


def sign_left_out(rng: Rng, n: int) -> str:
    """A percentage, asked for as one."""
    return pick(
        rng, rf"{n}\%", rf"{n}\,\%", f"{n}%", str(n), rf"\text{{{n}%}}", f"{n} percent", f"{n}.0"
    )


def millions(rng: Rng, n: int) -> str:
    shapes = [f"{n} million", rf"{n}\text{{ million}}", rf"{n} \text{{ million dollars}}"]
    shapes += [f"{n}000000", f"{n},000,000", rf"{n} \times 10^6", f"{n}e6", f"{n} 000 000"]
    return rng.choice(shapes)


def mixed(rng: Rng, whole: int, above: int, below: int) -> str:
    shapes = [f"{whole} {above}/{below}", rf"{whole}\frac{{{above}}}{{{below}}}"]
    shapes.append(rf"\frac{{{whole * below + above}}}{{{below}}}")
    return rng.choice(shapes)


def degrees(rng: Rng, n: int) -> str:
    return pick(
        rng,
        rf"{n}^\circ",
        rf"{n}^{{\circ}}",
        f"{n}°",
        str(n),
        rf"{n}\text{{ degrees}}",
        rf"{n}\degree",
    )


def dollars(rng: Rng, n: int) -> str:
    return pick(
        rng, rf"\${n}", str(n), f"${n}$", rf"\${n}.00", rf"{n} \text{{ dollars}}", f"{n} dollars"
    )


def repeating(rng: Rng, digit: int) -> str:
    return pick(
        rng,
        rf"0.\overline{{{digit}}}",
        rf"\frac{{{digit}}}{{9}}",
        rf"0.{digit}\overline{{{digit}}}",
    )


def cube_root(rng: Rng, n: int) -> str:
    return pick(
        rng,
        rf"\sqrt[3]{{{n}}}",
        f"{n}^{{1/3}}",
        rf"{n}^{{\frac{{1}}{{3}}}}",
        rf"\sqrt[3]{{{8 * n}}}/2",
    )


def numeral(rng: Rng, digits: int, base: int) -> str:
    return pick(rng, f"{digits}_{base}", f"{digits}_{{{base}}}", rf"{digits}_{{{base}}} ")


def named(rng: Rng, x: str, n: int) -> str:
    return pick(rng, f"{x} = {n}", f"{x}={n}", str(n), rf"{x} = \boxed{{{n}}}", f"${x} = {n}$")


def union(rng: Rng, a: int, b: int) -> str:
    left, right = (
        pick(rng, rf"(-\infty,{a})", rf"(-\infty, {a})"),
        pick(rng, rf"({b},\infty)", rf"({b}, +\infty)"),
    )
    return pick(rng, rf"{left}\cup{right}", rf"{right} \cup {left}", rf"x \in {left} \cup {right}")


def chain(rng: Rng, a: int, b: int) -> str:
    shapes = [f"{a}<x<{b}", f"{a} < x < {b}", f"({a},{b})", f"{b} > x > {a}", rf"x \in ({a}, {b})"]
    return rng.choice(shapes)


def other_alphabet(rng: Rng, n: int) -> str:
    """n pi sqrt(2), with Unicode's signs."""
    return pick(rng, rf"{n}\pi\sqrt{{2}}", f"{n}π√2", rf"{n}√2\pi", rf"{n}√{{2}}π", f"{n}√(2)π")


def halves(rng: Rng, n: int) -> str:
    return pick(rng, f"{n}½", rf"{n}\frac{{1}}{{2}}", f"{n}.5", rf"\frac{{{2 * n + 1}}}{{2}}")


def angle(rng: Rng, name: str, n: int) -> str:
    """A function of n degrees."""
    shapes = [
        rf"\{name} {n}^\circ",
        rf"\{name}({n}^\circ)",
        rf"\{name}{{{n}^{{\circ}}}}",
        rf"\{name}({n}°)",
    ]
    shapes += [rf"\{name}\left({n}^{{\circ}}\right)", rf"\{name}\frac{{{n}\pi}}{{180}}"]
    return rng.choice(shapes)


def rounded(rng: Rng, digits: int, n: int) -> str:
    """n / 7 with that many digits; 0 digits are all of them."""
    if digits:
        return f"{n / 7:.{digits}f}"
    return pick(rng, rf"\frac{{{n}}}{{7}}", f"{n}/7")


# --------------------------------------------------------------------------------------------------
# Rules. The first function of each makes a value, the second another that is near and not equal.


def values_of(name: str, rng: Rng) -> tuple[Callable[..., str], tuple, tuple]:
    """-> how it is written, a value, and another"""
    n, m = two(rng, 2, 99)
    big = rng.randrange(1000, 9_999_999)
    sign = rng.choice([1, -1])
    q = some_fraction(rng)
    near = rng.choice([q + 1, -q, 1 / q, q + Fraction(1, q.denominator), q / 10])
    if near == q:
        near = q + 1
    x, y = rng.sample(LETTERS, 2)
    digit, other = two(rng, 1, 9)
    three = rng.sample(range(-20, 20), 3)
    more = rng.randrange(21, 30)
    k, free = rng.randrange(2, 9), rng.choice([2, 3, 5, 6, 7, 10, 11, 13])
    exponent = rng.choice([-31, -19, -8, -5, 6, 8, 11, 24, 33])
    mantissa = rng.choice([i for i in range(11, 99) if i % 10])
    two_rows = [[n, m], [three[0], three[1]]]
    changed_rows = rng.choice(
        [[[n, three[0]], [m, three[1]]], [[n, m + 1], two_rows[1]], [[m, n], two_rows[1]]]
    )
    if changed_rows == two_rows:
        changed_rows = [[n + 1, m], two_rows[1]]
    left, right = rng.choice("(["), rng.choice(")]")
    low, high = sorted(two(rng, -30, 30))
    flipped = rng.choice(
        [("(" if left == "[" else "[", right), (left, ")" if right == "]" else "]")]
    )
    ends = rng.choice(
        [(*flipped, low, high), (left, right, low, high + 1), (left, right, low - 1, high)]
    )
    way = rng.choice([">", ">=", "<", "<="])
    turned = rng.choice([i for i in (">", ">=", "<", "<=") if i != way])
    p1, p2 = two(rng, 1, 12)
    unit, length = rng.sample(UNITS, 2)
    trig = rng.choice(["sin", "cos", "tan"])
    table = {
        "integers": (integer, (sign * n,), (rng.choice([sign * n + 1, -sign * n]),)),
        "large integers": (integer, (big,), (rng.choice([big + 1, big * 10, -big]),)),
        "fractions": (fraction, (q,), (near,)),
        "scientific notation": (
            scientific,
            (mantissa, exponent),
            rng.choice([(mantissa, exponent + 1), (mantissa, -exponent), (mantissa - 1, exponent)]),
        ),
        "square roots": (root, (k, free), rng.choice([(k + 1, free), (k, free + 4)])),
        "cube roots": (cube_root, (free,), (free + 1,)),
        "multiples of pi": (pi_times, (n, k), rng.choice([(n + 1, k), (n, k + 1)])),
        "quadratics": (
            quadratic,
            (k, p1, p2, x),
            rng.choice([(k, p1 + 1, p2, x), (k, -p1, p2, x), (k + 1, p1, p2, x), (k, p1, p2, y)]),
        ),
        "sets": (
            numbers_set,
            (three,),
            rng.choice([(three[:2],), ([*three[:2], more],), ([*three, more],)]),
        ),
        "points": (
            point,
            ([n, m, three[0] or 1], 4),
            rng.choice(
                [
                    ([m, n, three[0] or 1], 4),
                    ([n, m, three[0] or 1], 5),
                    ([n, m + 1, three[0] or 1], 4),
                ]
            ),
        ),
        "intervals": (
            interval,
            (left, str(low), str(high), right),
            (ends[0], str(ends[2]), str(ends[3]), ends[1]),
        ),
        "half-lines": (half_line, (way, n), rng.choice([(turned, n), (way, n + 1), (way, -n)])),
        "matrices": (matrix, (two_rows,), (changed_rows,)),
        "units": (with_unit, (str(n), unit), (str(n + 1), length)),
        "other units": (with_unit, (str(n), unit, False), (str(n), length, False)),
        "lines": (line_equation, (k, n), rng.choice([(k + 1, n), (k, -n), (k, n + 1)])),
        "complex numbers": (complex_number, (n, m), rng.choice([(n, -m), (m, n), (n + 1, m)])),
        "plus or minus": (
            plus_minus,
            (n, free),
            rng.choice([(n + 1, free), (-n, free), (n, free + 1)]),
        ),
        "letters of a choice": (choice, (rng.choice("ABE"),), (rng.choice("CDF"),)),
        "words": (word, (rng.choice(NAMES[:4]),), (rng.choice(NAMES[4:]),)),
        "powers": (power, (digit + 1, k + 2), rng.choice([(digit + 1, k + 3), (digit + 2, k + 2)])),
        "binomials": (binomial, (n + 9, k), (n + 10, k)),
        "logarithms": (logarithm, (k, free), rng.choice([(k + 1, free), (k, free + 1)])),
        "exponentials": (exponential, (k, x), rng.choice([(k + 1, x), (k, y)])),
        "percentages": (percent, (n,), (rng.choice([n + 1, n + 10]),)),
        "percentages without a sign": (sign_left_out, (n,), (rng.choice([n + 1, n * 10]),)),
        "millions": (millions, (n,), (rng.choice([n + 1, n * 10]),)),
        "mixed numbers": (mixed, (n, k, k + 1), rng.choice([(n + 1, k, k + 1), (n, k, k + 2)])),
        "degrees": (degrees, (n,), (n + 1,)),
        "dollars": (dollars, (n,), (n + 1,)),
        "repeating decimals": (repeating, (digit,), (other,)),
        "numerals of a base": (numeral, (n + 10, 8), rng.choice([(n + 11, 8), (n + 10, 9)])),
        "unions": (union, (low, high), rng.choice([(low, high + 1), (low - 1, high)])),
        "chains of inequalities": (
            chain,
            (low, high),
            rng.choice([(low, high + 1), (low - 1, high)]),
        ),
        "Unicode's signs": (other_alphabet, (n,), (n + 1,)),
        "Unicode's halves": (halves, (n,), (rng.choice([n + 1, -n]),)),
        "functions of degrees": (
            angle,
            (trig, n % 80 + 1),
            (trig, n % 80 + 2),
        ),
        "rounded to less": (
            rounded,
            (0, k if k != 7 else 8),
            (rng.choice([2, 3]), k if k != 7 else 8),
        ),
        "named values": (named, (x, n), (x, n + 1)),
    }
    return table[name]


RULES = (
    "integers,large integers,fractions,scientific notation,square roots,cube roots,"
    "multiples of pi,quadratics,sets,points,intervals,half-lines,matrices,units,"
    "other units,lines,complex numbers,plus or minus,letters of a choice,words,"
    "powers,binomials,logarithms,exponentials,percentages,percentages without a sign,"
    "millions,mixed numbers,degrees,dollars,"
    "repeating decimals,numerals of a base,unions,chains of inequalities,"
    "Unicode's signs,Unicode's halves,functions of degrees,rounded to less,"
    "named values"
).split(",")


def make_pairs(count: int, seed: int) -> list[tuple[str, bool, Pair]]:
    """-> (rule, must it be equal?, (answer in the box, gold)), `count` of each kind"""
    pairs = []
    for number in range(2 * count):
        equal = number < count
        name = RULES[number % len(RULES)]
        rng = Rng(f"{seed}/{number}")
        write, value, other = values_of(name, rng)
        gold = write(rng, *value)
        answer = write(rng, *(value if equal else other))
        pairs.append((name, equal, (answer, gold)))
    return pairs


def measure(pairs: list[tuple[str, bool, Pair]]) -> tuple[dict, list[str]]:
    """-> rule -> [equal pairs, right of them, other pairs, right of them]; what was wrong"""
    texts = []
    for _, _, (answer, _) in pairs:
        texts.append(f"So it is \\boxed{{{answer}}}.")
    grades = grade_completions(texts, [gold for _, _, (_, gold) in pairs])
    table = collections.defaultdict(lambda: [0, 0, 0, 0])
    wrong = []
    for (name, equal, (answer, gold)), grade in zip(pairs, grades):
        place = 0 if equal else 2
        table[name][place] += 1
        table[name][place + 1] += grade.correct == equal
        if grade.correct != equal:
            kind = "must be equal" if equal else "must not be equal"
            wrong.append(f"{name}, {kind}: answer {answer!r}, gold {gold!r}, {grade.status}")
    return dict(table), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    table, wrong = measure(make_pairs(given.count, given.seed))
    print("| rule | equal pairs found equal | other pairs found other |\n|---|---|---|")
    sums = [0, 0, 0, 0]
    for name, counts in table.items():
        print(f"| {name} | {counts[1]} of {counts[0]} | {counts[3]} of {counts[2]} |")
        sums = [a + b for a, b in zip(sums, counts)]
    shares = sums[1] / sums[0], sums[3] / sums[2]
    print(
        f"| all | {sums[1]} of {sums[0]} ({shares[0]:.2%}) | "
        f"{sums[3]} of {sums[2]} ({shares[1]:.2%}) |\n"
    )
    print("\n".join(wrong))
    raise SystemExit(min(shares) < WANTED)


if __name__ == "__main__":
    main()
