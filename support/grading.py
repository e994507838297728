"""
Grading: take the last boxed answer out of a completion and compare it with the gold answer, whatever the model wrote.

It imports nothing of ours, so that a grading process starts without torch. The comparison is math-verify's, wrapped: by
itself it accepts answers without a box and misreads some right ones, and its time limits are alarms, which stop no long
C call. So we extract and normalise ourselves, and grade in processes that may be killed.
"""
import atexit
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]


class Grade(NamedTuple):
    correct: bool
    answer: str | None  # what stood in the box
    status: str  # ok, no_box, unfinished, timeout or error


# What math-verify misreads in the golds (mostly Minerva's) and in what models write for them; in this order.
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # 10{,}080, 10,\!080
    (r"\\?\$|\s|~|(?<!\\)\\(?:[,;:> ]|(?:boldsymbol|bm|underline|bf|large)(?![a-z]))", " "),
    (r"[\s.,;\\]+$|^\s*\\approx", ""), (r"−", "-"), (r"°", r"^\\circ "),
    (r"(?<=[\d}])\s*(?:\\mu\s*\\(?:text|mathrm)|\\[dt]?frac\{\s*\\(?:text|mathrm))\{.*", ""),  # 5 \frac{\text{m}}{...}
    (r"^\s*([-+]?[\d.,]+) +(?!perc)[A-Za-z]{4,}$", r"\1"),  # 18 dollars
    (r"np\.log\b", r"\\ln"), (r"(?:np\.|\\)sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(?:np\.)?((?:arc)?(?:sin|cos|tan)|exp|ln|pi)(?![A-Za-z])", r"\\\1"),  # np.arcsin(10/13)
    (rf"(?<![\w./])({_NUMBER})[eE]\+?(-?)0*(\d+)(?![\w.])", r"\1 \\times 10^{\2\3}"),  # 4.5e33
    (r"×|(?<=\d) ?x ?(?=10\^)", r" \\times "), (r"\*\*", "^"), (r"\^\s*([-+]?\d+)", r"^{\1}"),  # 10^33 is no 10^3 3
    (r"(?<=\d)\.(?!\d|\\over)", ""),  # -1./3
    (r"\\gamma(?![A-Za-z])", r"\\Upsilon "),  # \gamma^2-1 would be the gamma function at -1, squared
    (r"(?<![A-Za-z\\])[Ee]_", r"\\varepsilon_"), (r"_\\odot\b|_\{\\odot\}", "_{sun}"),  # E_1 and M_\odot are not read
    (r"_\{\\(?:text|mathrm)\s*\{\s*(\w+)\s*\}\}", r"_{\1}"),  # \lambda_{\text{red}} is \lambda_{red}
    (r"(?<!\w)([A-Za-z])(?:'|\^\{?\\prime\b\}?)(?!')", r"\\dot{\1}"),  # y' would be y, and dx/dt a derivative
    (r"\\[dt]?frac\s*\{d ?(\\?[A-Za-z]+)\}\s*\{d ?t\}", r"\\dot{\1}"),  # that sympy works out to 0
    (r"^(?:\\\w+\{)?([A-Z]{2,})\}? *= *(?:\\\w+\{)?([A-Z]{2,})\}?$", r"\\text{\1}=\\text{\2}"))]  # MR=SRMC: two names


def extract_answer(text: str) -> str | None:
    """Content of the last \\boxed{...} after the final </think>, None where there is no answer; O(len(text))."""
    thought = text.rfind("</think>")
    if text.rfind("<think>") > thought:  # a thought that never closes has no answer after it
        return None
    boxes = [box.end() for box in re.compile(r"\\boxed\s*(?:\{|\Z)").finditer(text, max(thought, 0))]  # \Z: cut there
    content, depth = text[boxes[-1]:][:1001] if boxes else "", 1  # 1,000 characters and the brace that closes them
    for brace in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # \\. passes over \{ and \}
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return content[:brace.start()].strip() or None
    return None


def normalise_answer(answer: str) -> str:
    """The same answer as math-verify reads it: 4.5e33 -> 4.5 \\times 10^{33}, np.pi -> \\pi, a \\pm b -> a+b, a-b."""
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.strip()
    if not re.search(r"\\(?:sum|prod)", answer):  # elsewhere i is no index; math-verify's imaginary unit is I
        answer = re.sub(r"(?<![\\A-Za-z_])(?<!_\{)i(?=t?(?![A-Za-z_]))", "I ", answer).strip()
    # math-verify drops a last letter that may be a unit, the t of \frac{1}{m} t too: only after a plain number
    quantity = rf"(?:.*=)?\s*[-+]?\s*{_NUMBER}(?:\s*\\(?:times|cdot)\s*10\^\{{-?\d+\}})?\s*[A-Za-z]"
    if re.search(r"[\d}\s][cdghlmost]$", answer) and not re.fullmatch(quantity, answer):
        answer = f"{answer[:-1]}{{{answer[-1]}}}"
    if "," not in answer and re.search(r"\\(?:pm|mp)(?![a-z])", answer):
        signs = {"p": "+", "m": "-"}, {"p": "-", "m": "+"}
        answer = ", ".join(re.sub(r"\\(p|m)[pm](?![a-z])", lambda pm: sign[pm[1]], answer) for sign in signs)
    return answer


def parse_answer(answer: str, normalise: bool) -> list:
    """math-verify's readings of an answer: a sympy object if it can be read, and the cleaned string."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    # any_match, the default, takes a lone number out of LaTeX that cannot be read: 10 from 3 \times 10^8 \unknown{x}
    return parse(f"\\boxed{{{normalise_answer(answer) if normalise else answer}}}",
                 [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=3,
                 extraction_mode="first_match" if normalise else "any_match", raise_on_error=True)


parse_gold = functools.lru_cache(maxsize=4096)(parse_answer)


def answers_match(prediction: str, gold: str, normalise: bool = True) -> bool:
    """Whether math-verify finds the two equal; False for what it cannot read, TimeoutError after 3 s in one step."""
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
    from sympy import Expr, Float, N
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers_match sets SIGALRM, which needs the main thread: grade in a process of its own")
    try:
        pair = parse_gold(gold, normalise), parse_answer(prediction, normalise)
        equal = verify(*pair, float_rounding=6, strict=True, timeout_seconds=3, raise_on_error=True)
        values = [readings[0] for readings in pair if readings and isinstance(readings[0], Expr)]
        if (normalise and len(values) == 2 and values[0] != values[1] and all(value.is_number for value in values)
                and (equal or any(value.has(Float) for value in values))):
            # verify finds 1e-8 and 3e-9 equal, to six decimals, and 9.28 \times 10^{2}, which is 927.99..., not 928
            x, y = timeout(3)(lambda: [N(value.doit()) for value in values])()
            size = max(abs(x), abs(y))
            equal = bool(abs(x - y) <= (1e-12 if size > 1e-3 else 1e-6) * size) or bool(equal and size > 1e-3)
        return equal
    except TimeoutException as late:
        raise TimeoutError("math-verify took more than 3 s") from late
    except Exception:  # sympy raises all kinds on what it cannot read or compare: no match
        return False


def grader_worker() -> None:
    """A grading process: JSON questions on stdin, JSON verdicts on stdout, until stdin closes or the parent dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # some schedulers send them to all processes
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the parent, also when it is killed
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    import resource
    answers_match("1", "1")  # load sympy and math-verify before the clock of the first grade starts
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))  # model text may ask for any amount of memory
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no verdict
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        try:
            correct, status = answers_match(*json.loads(line)), "ok"
        except TimeoutError:
            correct, status = False, "timeout"
        except Exception:  # MemoryError, RecursionError and whatever sympy raises on hostile text
            correct, status = False, "error"
        print(json.dumps([correct, status]), file=verdicts, flush=True)


GRADE_SECONDS = 7.0  # a worker that takes longer is killed: the alarms inside it cannot stop a single long C call
_workers: dict[subprocess.Popen, bool] = {}  # -> is it ready? The pool outlives the call, and never this process
atexit.register(lambda: [worker.kill() for worker in _workers])


def _start_worker() -> subprocess.Popen:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = "from support.grading import grader_worker; grader_worker()"
    # -P: whatever the working directory holds; a process group: Ctrl-C and SIGTERM are the trainer's business
    worker = subprocess.Popen([sys.executable, "-P", "-c", program], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env={**os.environ, "PYTHONPATH": path}, process_group=0)
    _workers[worker] = False
    return worker


def _whole(answer: str) -> bool:
    return answer.isascii() and answer.isdecimal()


def grade_completions(texts: list[str], golds: list[str], normalise: bool = True) -> list[Grade]:
    """A Grade for each completion text against its gold answer; each takes 7 s at most, whatever the model wrote.

    Answers equal up to white space are right at once; the others go to a pool of processes. A time-out counts as wrong.
    `normalise=False` leaves out the rewriting of answers that math-verify cannot read, as published graders do.
    """
    grades = []
    for text, gold in zip(texts, golds, strict=True):
        answer = extract_answer(text)
        none = "unfinished" if text.rfind("<think>") > text.rfind("</think>") else "no_box"
        grades.append(Grade(False, None, none) if answer is None else
                      Grade("".join(answer.split()) == "".join(gold.split()), answer, "ok"))
    todo = [i for i, (grade, gold) in enumerate(zip(grades, golds)) if grade.answer is not None and not grade.correct
            and not (_whole(grade.answer) and _whole(gold) and grade.answer.lstrip("0") != gold.lstrip("0"))]
    for worker in [worker for worker in _workers if worker.poll() is not None]:
        del _workers[worker]
    wanted = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), -(-len(todo) // 8))
    while todo and len(_workers) < max(1, wanted):
        _start_worker()
    now = time.monotonic()
    idle = [worker for worker, ready in _workers.items() if ready]
    # worker -> (index of its grade, deadline); the index is None while a worker starts
    busy = {worker: (None, now + 120) for worker, ready in _workers.items() if not ready}
    while todo or any(i is not None for i, _ in busy.values()):
        while todo and idle:
            worker, i = idle.pop(), todo.pop()
            print(json.dumps([grades[i].answer, golds[i], normalise]), file=worker.stdin, flush=True)
            busy[worker] = (i, time.monotonic() + GRADE_SECONDS)
        soonest = min(deadline for _, deadline in busy.values())
        spoke = connection.wait([worker.stdout for worker in busy], max(0.0, soonest - time.monotonic()))
        for worker, (i, deadline) in list(busy.items()):
            if worker.stdout not in spoke and time.monotonic() < deadline:
                continue
            del busy[worker]
            line = worker.stdout.readline() if worker.stdout in spoke else None
            if line:
                _workers[worker] = True
                idle.append(worker)
            else:  # too slow (None), or dead ("")
                worker.kill()
                del _workers[worker]
                if i is None:
                    raise SystemExit("a grading process does not start; is math-verify installed?")
                busy[_start_worker()] = (None, time.monotonic() + 120)
            if i is not None:
                correct, status = json.loads(line) if line else (False, "timeout" if line is None else "error")
                grades[i] = Grade(correct, grades[i].answer, status)
    return grades
