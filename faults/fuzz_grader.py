"""Hostile completions through the grader: no hang, none over its limit, nothing executed or left.

    python faults/fuzz_grader.py --count 10000 --seed 0    # about half an hour on one core

Each completion is graded alone, so that its time is its own. What must hold is in `broken_rules`.
"""

import argparse
import collections
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.shared import grading

Rng = random.Random
SLACK = 2.0  # seconds that a loaded machine may add to a grade
ATOMS = (
    r"x y n \pi e i \alpha \theta 0 1 2 7 10 0.5 -3 1/2 \infty \hbar 3.2e5 \text{cm} 50\%"
).split()
GOLDS = (
    "5",
    r"\frac{1}{3}",
    "x^2+1",
    r"\{1,2\}",
    "(1,2]",
    "4.5e33",
    r"1 \pm \sqrt{2}",
    r"\text{A}",
)
BINARY = (
    r"%s+%s|%s-%s|%s\cdot %s|\frac{%s}{%s}|%s^{%s}|%s_{%s}|%s,%s|%s=%s|\binom{%s}{%s}|%s\cup %s|"
    r"\log_{%s}%s|(%s,%s]|[%s,%s)|%s\times %s|%s<%s|\gcd(%s,%s)|%s \pmod{%s}|\int_{%s}^{%s} x dx"
).split("|")
UNARY = (
    (
        r"\sqrt{%s}|(%s)|\left(%s\right)|-%s|%s!|\sin %s|\arctan(%s)|\{%s\}|\mathrm{%s}|"
        r"\lfloor %s "
        r"\rfloor|e^{%s}|\ln %s|\overline{%s}|%s^\circ|\boxed{%s}|\text{%s}|\vec{%s}|"
        r"\sum_{n=1}^{%s} n|"
        r"\begin{pmatrix}%s\\1\end{pmatrix}|\lim_{x\to %s} x"
    )
    .replace("||%s||", "|@|")
    .split("|")
)
JUNK = "\\{}()[]^_,.;:=+-*/!|&%$#~<> \n\t0123456789abcxyzEIe\u00b2\u00bd\u221a\u2264\u03c0"
ODD = [
    "\0",
    "\x1b[2J",
    "\x7f",
    "\u202e",
    "\ud800",
    "\U0001f600",
    "\u200b",
    "\ufeff",
    "\r",
    "\u2028",
]
CALLS = (
    "__import__('os').system('touch {}')",
    'exec(\'open("{}","w")\')',
    "open('{}','w').close()",
    "eval(\"__import__('pathlib').Path('{}').touch()\")",
    "(lambda: open('{}','w'))()",
    "().__class__.__base__.__subclasses__()[0]('{}')",
    "\\write18{{touch {}}}",
    "\\input{{|touch {}}}",
    "$(touch {})",
    "`touch {}`",
    "'; touch {}; '",
    "Symbol('x'); open('{}','w')",
    "np.__loader__.load_module('os').system('touch {}')",
    "{{% import os %}}{{{{os.system('touch {}')}}}}",
)


def formula(rng: Rng, depth: int) -> str:
    """LaTeX of a small grammar."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(ATOMS)
    shape = rng.choice(BINARY + UNARY)
    while "%s" in shape:
        shape = shape.replace("%s", formula(rng, depth - 1), 1)
    return shape


def from_grammar(rng: Rng) -> str:
    return formula(rng, rng.randrange(1, 4))


def mutated(rng: Rng) -> str:
    """A formula with characters struck out, doubled or thrown in."""
    text = list(formula(rng, rng.randrange(1, 4)))
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(text) + 1)
        text[place : place + rng.randrange(3)] = rng.choices(JUNK, k=rng.randrange(3))
    return "".join(text)


def junk(rng: Rng) -> str:
    return "".join(rng.choices(JUNK, k=rng.randrange(1, 200)))


def giant_number(rng: Rng) -> str:
    digits = "".join(rng.choices("0123456789", k=rng.randrange(50, 995)))
    return rng.choice(["", "-", "0.", "1e", "1/", r"10^{5} \cdot "]) + digits


def tower(rng: Rng) -> str:
    """Powers and factorials that nobody can work out."""
    text = str(rng.randrange(2, 99))
    for _ in range(rng.randrange(2, 9)):
        text = f"{rng.randrange(2, 99)}^{{{text}}}"
    return text + rng.choice(["", "!", " - 1", " / 3"])


def endless(rng: Rng) -> str:
    n = 10 ** rng.randrange(5, 12)
    shapes = (
        rf"\sum_{{k=1}}^{{{n}}} \frac{{1}}{{k^2}}|\prod_{{k=1}}^{{{n}}} k|"
        rf"{n}!|\binom{{{n}}}{{{n // 2}}}|"
        rf"\gcd(2^{{{n}}},3)|2^{{{n}}} \pmod{{7}}|\int_0^{{{n}}} \sin(x^x) dx|\sin({n}!)|3^{{{n}}}"
    )
    return rng.choice(shapes.split("|"))


def nested(rng: Rng) -> str:
    shape = rng.choice(
        ["(@)", r"\{@\}", r"\sqrt{@}", r"\frac{1}{@}", "[@]", "-@", "@^2", "|@|", r"\left(@\right)"]
    )
    opening, closing = shape.split("@")
    depth = rng.randrange(5, 900 // len(shape))
    return opening * depth + "1" + closing * depth


def repeated(rng: Rng) -> str:
    """What makes a careless regular expression try every split."""
    unit = rng.choice(
        [
            " ",
            ",",
            "1,",
            "10,",
            "np.sqrt(",
            "a'",
            "\\ ",
            "1 ",
            "=",
            "$",
            "..",
            "\\text{",
            "e1",
            "_{",
            "1e",
        ]
    )
    return (unit * 1000)[: rng.randrange(100, 995)] + rng.choice(["", "x", "}"])


def odd(rng: Rng) -> str:
    return f"{formula(rng, 1)}{rng.choice(ODD)}{formula(rng, 1)}" * rng.randrange(1, 4)


def code(rng: Rng) -> str:
    call = rng.choice(CALLS).format(canary())
    wrap = rng.choice(
        [
            r"%s",
            r"1+%s",
            r"\text{%s}",
            r"\operatorname{%s}",
            "f(%s)",
            r"\frac{%s}{2}",
            "np.sin(%s)",
            "$%s$",
        ]
    )
    return wrap.replace("%s", call)


def canary() -> str:
    """The file that any code which runs would make."""
    return os.path.join(tempfile.gettempdir(), f"egrsd-canary-{os.getpid()}")


def long_text(rng: Rng) -> str:
    """A whole completion of about a megabyte."""
    unit = rng.choice(
        [
            "\\boxed{",
            "\\boxed",
            "\\boxed{1}",
            "<think>",
            "</think>",
            "{",
            "}",
            "x ",
            "\\",
            "\\boxed ",
            " ",
        ]
    )
    text = unit * (1_000_000 // len(unit))
    return text + rng.choice(["", r"\boxed{5}", r"</think>\boxed{\frac{10}{2}}", "}"])


def many_boxes(rng: Rng) -> str:
    boxes = []
    for _ in range(rng.randrange(1, 50)):
        boxes.append(
            rng.choice([r"\boxed{%s}", r"\boxed {%s", "<think>%s</think>", "%s}"]) % formula(rng, 1)
        )
    return " ".join(boxes)


WHOLE = ("a megabyte of text", "many boxes and thoughts")  # the others stand in one box
KINDS: dict[str, tuple[int, Callable[[Rng], str]]] = {  # -> how often of 1,000, and how it is made
    "LaTeX of a grammar": (330, from_grammar),
    "LaTeX with characters struck out or thrown in": (230, mutated),
    "junk": (115, junk),
    "giant numbers": (60, giant_number),
    "towers of powers": (10, tower),
    "sums, products and factorials without end": (10, endless),
    "deep nesting": (25, nested),
    "repetition": (60, repeated),
    "null bytes, escapes, surrogates": (50, odd),
    "code for the expression parser": (60, code),
    WHOLE[0]: (10, long_text),
    WHOLE[1]: (40, many_boxes),
}


SLOW = ("towers of powers", "sums, products and factorials without end")  # 3 s each


def make_case(number: int, seed: int) -> tuple[str, str, str]:
    """-> kind, completion, gold"""
    rng = Rng(f"{seed}/{number}")
    (kind,) = rng.choices([*KINDS], [often for often, _ in KINDS.values()])
    text = KINDS[kind][1](rng)
    if kind not in WHOLE:
        text = f"So it is \\boxed{{{text}}}."
    return kind, text, rng.choice(GOLDS)


def peak_memory(pid: int) -> int:
    """Bytes that a process has held at most; 0 where /proc does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def children() -> list[int]:
    """Processes of ours that live or were not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == os.getpid():
            found.append(int(path.parent.name))
    return found


def warm_up() -> bool:
    """Start what was killed; is the pool still right?"""
    return grading.grade_completions([r"\boxed{\frac{2}{4}}"], ["0.5"])[0].correct


def fuzz(
    count: int, seed: int, slow: bool = True, show: Callable[[str], object] = print
) -> dict[str, object]:
    """Grade them all, or all but the slow kinds.

    -> cases by kind and by status, what was slowest and largest, what broke
    """
    before = set(children())
    kinds = collections.Counter()
    statuses = collections.Counter()
    slowest = (0.0, "")
    memory = 0
    broken = []
    warm_up()
    for number in range(count):
        kind, text, gold = make_case(number, seed)
        if kind in SLOW and not slow:
            continue
        began = time.monotonic()
        (grade,) = grading.grade_completions([text], [gold])
        seconds = time.monotonic() - began
        kinds[kind] += 1
        statuses[grade.status] += 1
        slowest = max(slowest, (seconds, f"case {number}, {kind}"))
        for worker in grading._workers:
            memory = max(memory, peak_memory(worker.pid))
        if seconds > grading.GRADE_SECONDS + SLACK:
            broken.append(f"case {number}, {kind}: {seconds:.1f} s, over the limit")
        if os.path.exists(canary()):
            broken.append(f"case {number}, {kind}: ITS CODE WAS EXECUTED")
            os.unlink(canary())
        if grade.status in ("timeout", "error") and not warm_up():
            broken.append(f"case {number}, {kind}: the pool was wrong after it")
        if number % 500 == 499:
            show(f"{number + 1} of {count}: {dict(statuses)}, slowest {slowest[0]:.1f} s")
    grading.stop_workers()
    left = set(children()) - before
    if left:
        broken.append(f"processes left: {left}")
    memory = max(memory, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
    if memory > grading.MOST_MEMORY + (1 << 30):
        broken.append(f"a grading process held {memory / 2**30:.1f} GiB")
    return {
        "kinds": kinds,
        "statuses": statuses,
        "slowest": slowest,
        "memory": memory,
        "broken": broken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = fuzz(given.count, given.seed)
    print("| kind | completions |\n|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {found['kinds'][kind]} |")
    seconds, case = found["slowest"]
    print(f"\nstatuses {dict(found['statuses'])}; slowest {seconds:.1f} s ({case})")
    print(f"largest grading process {found['memory'] / 2**30:.2f} GiB")
    print("\n".join(found["broken"]) or "nothing broke")
    raise SystemExit(bool(found["broken"]))


if __name__ == "__main__":
    main()
