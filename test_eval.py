"""Tests of eval.py: statistics against numpy and a bootstrap, grading by a table, the whole path on the tiny model."""
import contextlib
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import egrsd
import eval as ev
from egrsd import HERE, PRESETS, Settings, add_adapter, load_base
from support import benchmarks, scores
from support import compare as compare_module
from support.benchmarks import load_benchmark
from support.grading import answers_match, grade_completions
from support.scores import paired_difference

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
TINY = ["--preset", "tiny", "--limit", "8", "--K", "3"]

# --- statistics ------------------------------------------------------------------------------------------------------


def fake_samples(problems: int, K: int, runs: int = 1, seed: int = 0, shift: float = 0.0) -> list[dict]:
    """Problems of different difficulty, so that the samples of one are correlated."""
    rng = random.Random(seed)
    ease = [random.Random(f"ease {n}").random() for n in range(problems)]
    return [{"benchmark": "x", "id": str(n), "gold": "1", "run": run, "sample": k,
             "correct": rng.random() < ease[n] + shift, "tokens": rng.randrange(10, 90) + 50 * n,
             "finish": rng.choice(["stop", "stop", "length"]),
             "extracted": rng.choice([None, "1"]), "status": rng.choice(["ok", "timeout", "no_box"])}
            for n in range(problems) for run in range(runs) for k in range(K)]


def matrix(samples: list[dict], field: str, problems: int) -> np.ndarray:
    return np.array([float(row[field]) for row in samples]).reshape(problems, -1)  # (problems, runs * K)


@pytest.mark.parametrize("problems, K, runs", [(30, 4, 5), (17, 4, 1), (2, 1, 1)])
def test_scores_equal_numpy(problems: int, K: int, runs: int) -> None:
    samples = fake_samples(problems, K, runs)
    right, tokens = matrix(samples, "correct", problems), matrix(samples, "tokens", problems)
    random.Random(1).shuffle(samples)  # the order of the lines must not matter
    b = scores.benchmark_scores(samples)
    assert (b["problems"], b["samples"]) == (problems, problems * K * runs)
    assert b["accuracy"] == pytest.approx(100 * right.mean())
    assert b["se"] == pytest.approx(100 * np.sqrt(right.mean(1).var(ddof=1) / problems))
    assert b["length"] == pytest.approx(tokens.mean())
    assert b["length_se"] == pytest.approx(tokens.mean(1).std(ddof=1) / problems ** 0.5)
    assert b["pass_at_k"] == pytest.approx(100 * right.reshape(problems, runs, K).max(2).mean())
    by_run = 100 * right.reshape(problems, runs, K).mean((0, 2))
    assert b["run_accuracies"] == pytest.approx(by_run.tolist())
    assert b["run_sd"] == (pytest.approx(by_run.std(ddof=1)) if runs > 1 else None)
    assert b["truncated"] == pytest.approx(100 * np.mean([row["finish"] == "length" for row in samples]))
    assert b["unboxed"] == pytest.approx(100 * np.mean([row["extracted"] is None for row in samples]))
    assert b["timeouts"] == sum(row["status"] == "timeout" for row in samples)


def test_standard_error_is_that_of_a_bootstrap_over_problems() -> None:
    samples = fake_samples(40, 4)
    means = matrix(samples, "correct", 40).mean(1)
    draws = np.random.default_rng(0).integers(0, 40, (20_000, 40))
    bootstrap = 100 * means[draws].mean(1).std() * np.sqrt(40 / 39)  # a bootstrap divides by n, the estimate by n - 1
    b = scores.benchmark_scores(samples)
    assert b["se"] == pytest.approx(bootstrap, rel=0.03)
    naive = 100 * np.sqrt(means.mean() * (1 - means.mean()) / 160)  # as if 160 samples were 160 problems
    assert b["se"] > 1.3 * naive


def test_paired_difference_equals_numpy_and_a_bootstrap() -> None:
    a, b = fake_samples(40, 4, seed=1, shift=0.1), fake_samples(40, 4, seed=2)
    d = 100 * (matrix(a, "correct", 40).mean(1) - matrix(b, "correct", 40).mean(1))
    mean, se, n = paired_difference(a, b)
    assert (mean, se, n) == (pytest.approx(d.mean()), pytest.approx(d.std(ddof=1) / 40 ** 0.5), 40)
    draws = np.random.default_rng(0).integers(0, 40, (20_000, 40))
    assert se == pytest.approx(d[draws].mean(1).std() * np.sqrt(40 / 39), rel=0.03)
    separate = math.hypot(scores.benchmark_scores(a)["se"], scores.benchmark_scores(b)["se"])
    assert se < 0.8 * separate  # pairing takes the difficulty of the problems out
    assert paired_difference(a, a)[:2] == (0.0, 0.0)
    assert paired_difference(a, b, lambda row: row["tokens"])[0] == pytest.approx(
        matrix(a, "tokens", 40).mean() - matrix(b, "tokens", 40).mean())


def test_only_common_problems_are_paired() -> None:
    a, b = fake_samples(10, 2), [row for row in fake_samples(12, 2, seed=3) if int(row["id"]) >= 4]
    mean, _, n = paired_difference(a, b)
    inner = ([row for row in rows if 4 <= int(row["id"]) < 10] for rows in (a, b))
    assert n == 6 and mean == pytest.approx(np.subtract(*(matrix(rows, "correct", 6).mean() for rows in inner)) * 100)
    with pytest.raises(SystemExit, match="no problem"):
        paired_difference(a, [{**row, "gold": "2"} for row in b])  # an id alone does not make it the same problem


def test_macro_average_and_efficiency() -> None:
    samples = {name: fake_samples(n, 4, seed=n) for name, n in (("a", 9), ("b", 20), ("c", 30))}
    parts = [scores.benchmark_scores(rows) for rows in samples.values()]
    run = scores.run_scores(samples, samples)
    assert run["accuracy"] == pytest.approx(np.mean([b["accuracy"] for b in parts]))
    assert run["se"] == pytest.approx(np.linalg.norm([b["se"] for b in parts]) / 3)
    assert run["length"] == pytest.approx(np.mean([b["length"] for b in parts]))
    assert run["eff"] == pytest.approx(run["accuracy"] / np.mean([b["length"] for b in parts]) * 1000)
    one = scores.run_scores({"a": fake_samples(1, 4)}, ["a"])
    assert one["se"] is None and scores.show(one["accuracy"], one["se"])  # a single problem: no error bar


def test_pareto_equals_a_slow_search() -> None:
    rng = random.Random(0)
    for _ in range(100):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 9))]
        want = [i for i, (x, y) in enumerate(points)
                if not any((u < x and v >= y) or (u <= x and v > y) for u, v in points)]
        assert scores.pareto(points) == want


def test_published_figures_are_consistent() -> None:
    with open(HERE / "support" / "paper_tables.csv", newline="") as file:
        rows = {}
        for f in csv.DictReader(file):
            assert f["metric"] not in rows.setdefault((f["table"], f["model"], f["method"], f["gamma"], f["W"]), {})
            rows[f["table"], f["model"], f["method"], f["gamma"], f["W"]][f["metric"]] = float(f["value"])
    assert {key[0] for key in rows} == {"2", "3", "4", "5", "6", "7", "A3", "A4", "A5", "A6"}
    assert sum(map(len, rows.values())) == 364
    six = ["aime24", "aime25", "hmmt25", "math500", "minerva", "gsm8k"]
    averaged = [v for v in rows.values() if "avg" in v and set(six) <= set(v)]
    assert len(averaged) == 7 + 7 + 5 + 4 + 6 + 6
    for v in averaged:
        assert v["avg"] == pytest.approx(np.mean([v[name] for name in six]), abs=0.0051)
    for v in rows.values():
        if "eff" in v:
            assert v["eff"] == pytest.approx(v["avg"] / v["length"] * 1000, abs=0.0051)
    assert rows["3", "qwen3-8b", "CL-EGRSD", "1.0", "5"]["hmmt25"] == 52.5
    assert rows["4", "qwen3-8b", "EGRSD", "0.3", "0"]["S4"] == rows["3", "qwen3-8b", "EGRSD", "0.3", "0"]["avg"]
    base = rows["A5", "olmo3-7b", "no-train", "", ""]["avg"]
    for (t, _, method, *_), v in rows.items():
        if "avg minus no-train" in v:
            assert v["avg minus no-train"] == pytest.approx(v["avg"] - base, abs=0.0051), method


# --- grading: every rule of extraction and comparison ----------------------------------------------------------------

RIGHT = [  # (answer in the box, gold)
    ("-5i+6", "6 - 5i"), (r"1+i\sqrt{3}", r"1+\sqrt{3} i"), (r"\frac{37m}{4}", r"\frac{37}{4} m"),
    ("t/m", r"\frac{1}{m} t"), (r"\frac{c}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}c"),
    (r"m_p c^2 (\gamma^2-1)\sin^2\theta", r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta"),
    (r"\hbar\omega\left(v+\frac{1}{2}\right) - \frac{e^2 E_0^2}{2 m \omega^2}",
     r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}"),
    (r"\frac{E_1+2E_2}{3}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"), (r"E_1 \text{ and } E_2", "E_{1},E_{2}"),
    (r"\frac{dM}{dt} = \frac{10^5 L_\odot M^6}{0.007 c^2 M_\odot^6}",
     r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}"),
    (r"\mathrm{SRMC} = \mathrm{MR}", "MR=SRMC"), ("y' + r y = r x(t)", r"y^{\prime}+r y-r x(t)=0"),
    (r"\frac{\lambda_{red}}{\sqrt{2}}", r"\lambda_{\text {red}} / \sqrt{2}"),
    (r"\arcsin\left(\frac{10}{13}\right)", "np.arcsin(10/13)"), (r"\sin^{-1}(10/13)", "np.arcsin(10/13)"),
    (r"-\frac13", "-1./3"), ("-1.5", "-3./2"), (r"4.5 \times 10^{33}", "4.5e33"), ("4.5 x 10^33", "4.5e33"),
    (r"45 \times 10^{32}", "4.5e33"), (r"4.5 \times 10^{33} \mathrm{~erg} / \mathrm{s}", "4.5e33"),
    ("4.5E+33", "4.5e33"), ("4.5e33", r"4.5 \times 10^{33}"), ("10^{-8}", "1e-8"),
    (r"2.88\times 10^{-19} \text{ J}", "2.88e-19"), ("0.000849", "8.49e-4"), ("300,000,000", "3e8"), ("5300", "5.3e3"),
    (r"6.72\times10^{-5}", ".0000672"),
    (r"\frac{-1 \pm \sqrt{17}}{2}", r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}"),
    (r"\left\{\frac{-1+\sqrt{17}}{2},\frac{-1-\sqrt{17}}{2}\right\}", r"\frac{-1 \pm \sqrt{17}}{2}"),
    (r"x=1+\sqrt{19}, x = 1-\sqrt{19}", r"1 \pm \sqrt{19}"), (r"-2, 1\pm\sqrt5", r"\{1\pm\sqrt{5},-2\}"),
    (r"1\mp\sqrt{19}", r"1\pm\sqrt{19}"), ("[-2,7]", r"x \in [-2,7]"), ("10{,}080", "10080"), (r"10\,080", "10080"),
    ("32348", r"\$32,\!348"), (r"\$32,348.00", r"\$32,\!348"), (r"36 \text{ dollars}", r"\$36"),
    (r"864\ \text{in}^2", r"864 \mbox{ inches}^2"), ("5.4", r"5.4 \text{ cents}"),
    (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"), ("90°", r"90^\circ"), ("52_{8}", "52_8"),
    ("(C)", r"\text{(C)}"), (r"\text{evelyn}", r"\text{Evelyn}"), ("x=5", "5"), ("2x-y+3=0", "y = 2x + 3"),
    ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"), (r"\frac{9}{5}", r"1\frac{4}{5}"), ("137.5", r"137 \frac{1}{2}"),
    ("(6, 31, -1)", "(6,31,-1)"), (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"), (r"\{7,5,3\}", "3, 5, 7"),
    (r"1 \text{ and } -2", "1,-2"),
    (r"\begin{bmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{bmatrix}",
     r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}"),
    (r"50\%", "0.5"), (r"\frac{57}{160}", ".35625"), (r"3 \times 10^{-3}", "0.003"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"), (r"2^{26} \cdot 25!\cdot 13", r"2^{25} \cdot 26!"),
    (r"4\sqrt{37}+14", r"14+4\sqrt{37}"), ("ab+2a+5b+10", "(a+5)(b+2)"), (r"\frac{\cos x}{\sin x}", r"\cot x"),
    ("I(0) e^{-t/RC}", "I(0) e^{-\\frac{t}{R C}}\n"), (r"\sin^{-1}(1.3 \sin \theta_w)", r"\arcsin{1.3 \sin{\theta_w}}"),
    (r"-\frac{1}{2\sqrt{X}}", r"-\frac{1}{2} X^{-\frac{1}{2}}"), ("125 - 1.25P", "X_{d}=125-1.25 P"),
    (r"\ln(2)+\frac{i\pi}{3}", r"\ln 2 + i\pi / 3"), (r"\frac{4A e^{it}}{3(1+i)}", r"\frac{4 A}{3+3 i} e^{i t}"),
    (r"m\dot{v}+bv=f", r"m \frac{d v}{d t}+b v=f"), (r"300 \text{ km s}^{-1}", "300"),
    (r"3 \times 10^8 \, \frac{\text{m}}{\text{s}}", "3e8"), (r"10\,\mu\text{m}", "10"), (r"\frac14", r"25\%"),
    (r"\frac{1}{\sqrt{2}}", "np.sqrt(2)/2"), (r"\frac{\pi}{4}", "np.pi/4"), (r"\ln 2", "np.log(2)"), ("-1", "-1."),
    ("0.5", "1/2"), (r"9.28 \times 10^{2}", "928"), ("870000000", "8.7e8"), ("073", "73"), ("73", "073"), ("025", "25"),
    ("73.0", "73"), ("$73$", "73"), (r"\frac{146}{2}", "73"), ("m+n = 50+23 = 73", "73"),
]
WRONG = [
    ("6+5i", "6 - 5i"), (r"\frac{37}{4}", r"\frac{37}{4} m"), (r"\frac{1}{m}", r"\frac{1}{m} t"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}c"),
    (r"m_p c^2 (\gamma^3-1)\sin^2\theta", r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta"),
    ("2/3", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"), ("E_1", "E_{1},E_{2}"), ("MR = LRMC", "MR=SRMC"),
    ("y + r y = r x(t)", r"y^{\prime}+r y-r x(t)=0"), (r"\arcsin(13/10)", "np.arcsin(10/13)"), (r"\frac13", "-1./3"),
    (r"4.5 \times 10^{32}", "4.5e33"), (r"4.5 \times 10^{-33}", "4.5e33"), ("4.5", "4.5e33"),
    (r"2 \times 10^{-8}", "1e-8"), ("0", "1e-8"), (r"2.88\times 10^{-18}", "2.88e-19"),
    (r"\frac{-1-\sqrt{17}}{2}", r"\frac{-1 \pm \sqrt{17}}{2}"),
    (r"\frac{1 \pm \sqrt{17}}{2}", r"\frac{-1 \pm \sqrt{17}}{2}"), (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"1\pm\sqrt5", r"\{1\pm\sqrt{5},-2\}"), ("(-2,7)", r"x \in [-2,7]"), ("10,081", "10080"),
    (r"\frac{\pi}{2}", r"90^\circ"), ("53_8", "52_8"), ("B", r"\text{(C)}"), (r"\text{Navin}", r"\text{Evelyn}"),
    ("y=5", "x=5"), ("y=2x-3", "y = 2x + 3"), ("5x-7y+11z-4=0", "5x - 7y + 11z + 4 = 0"),
    (r"\frac{137}{2}", r"137 \frac{1}{2}"), ("[3,4]", "(3,4]"),
    (r"(-\infty,2]\cup[3,\infty)", r"(-\infty, 2) \cup (3, \infty)"), ("(31,6,-1)", "(6,31,-1)"),
    (r"(\frac{\pi}{2},3)", r"\left( 3, \frac{\pi}{2} \right)"), ("3,5", "3, 5, 7"), (r"1.5\%", "0.15"),
    ("0.33", r"\frac{1}{3}"), (r"\frac34", r"\frac43"), (r"14-4\sqrt{37}", r"14+4\sqrt{37}"),
    ("ab+2a+5b", "(a+5)(b+2)"), (r"\frac{e^{at}+e^{-at}}{2a}", r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})"),
    ("I(0) e^{t/(RC)}", "I(0) e^{-\\frac{t}{R C}}\n"), ("I_0", "I(0)"), (r"\ln 2 - i\pi/3", r"\ln 2 + i\pi / 3"),
    (r"t + \frac{1}{2}\sin 2t", r"(t + \frac{1}{2} \sin{2t}) u(t)"),
    (r"\frac{dx}{dt} = a - kx", r"\frac{d x}{d t}=k x-a"), (r"x_{\odot} = 2 + \foo{3}, 2", "2"),
    (r"x = 3 \text{ or } 4", "3"), (r"3 \times 10^{8}\ \frac{\text{m}}{\text{s}}", "10"), ("0.999999", "1"),
    ("3.14", r"\pi"), (r"2\sqrt{3\pi}", "2*np.pi*np.sqrt(3)"), ("2", "2, 3"), (r"\{1,2,4\}", r"\{1,2,3\}"),
    ("(2,1)", "(1,2)"), ("[1,2)", "[1,2]"), ("984", "-984"), ("3e-9", "1e-8"), ("703", "073"), ("-73", "73"),
]
EXTRACTED = [  # (whole completion, gold, right, status)
    ("The answer is 42.", "42", False, "no_box"), ("", "42", False, "no_box"),
    (r"<think>\boxed{42}", "42", False, "unfinished"),
    (r"<think>so</think>\boxed{41}<think>wait, \boxed{42}", "42", False, "unfinished"),
    (r"<think>so</think>\boxed{42}<think>wait", "42", False, "unfinished"),
    (r"<think>\boxed{42}</think>The answer is 42.", "42", False, "no_box"),
    (r"<think>\boxed{41}</think>\boxed{42}", "42", True, "ok"),
    (r"<think>\boxed{42}</think>\boxed{41}", "42", False, "ok"),
    (r"reasoning \boxed{41}</think>\boxed{42}", "42", True, "ok"),
    (r"reasoning \boxed{42}</think>so 42", "42", False, "no_box"),
    (r"<think>a</think>\boxed{41}<think>b</think>\boxed{42}", "42", True, "ok"),
    (r"<think>a</think>\boxed{42}<think>b</think>done", "42", False, "no_box"),
    (r"\boxed{41} no, \boxed{42}", "42", True, "ok"), (r"\boxed{42} and then \boxed{}", "42", False, "no_box"),
    ("\\boxed{42} and then \\boxed{  \n }", "42", False, "no_box"), (r"\boxed{}", "42", False, "no_box"),
    (r"\boxed{} so \boxed{42}", "42", True, "ok"), (r"\boxed{42} and so \boxed{42", "42", False, "no_box"),
    (r"\boxed{42} and so \boxed{\frac{84}{2}", "42", False, "no_box"),
    (r"\boxed{42} and so \boxed", "42", False, "no_box"), (r"\boxed{42} and so \boxed{", "42", False, "no_box"),
    (r"\boxed {42}", "42", True, "ok"), ("\\boxed\n  {42}", "42", True, "ok"),
    (r"\boxed{\boxed{42}}", "42", True, "ok"), (r"\boxed{\text{Answer: }\boxed{42}}", "42", True, "ok"),
    (r"\boxed{\frac{84}{2}}", "42", True, "ok"),
    (r"\boxed{\frac{\frac{84}{1}}{\sqrt{4}}} and text } after", "42", True, "ok"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", True, "ok"), (r"\boxed{\left\{1,2\right\}} done {", r"\{1,2\}", True, "ok"),
    (r"\boxed{\{1,2}", r"\{1,2\}", False, "ok"), (r"\boxed{42\} x}", "42", False, "ok"),
    (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, "ok"),
    (r"\fbox{42}", "42", False, "no_box"), ("boxed{42}", "42", False, "no_box"),
    (r"\boxed{42} I put it into \boxed brackets.", "42", True, "ok"),
    (r"<think></think>\boxed{42}<|im_end|>", "42", True, "ok"), (r"\boxed{???}", "42", False, "ok"),
    (r"\boxed{\frac{1}{}}", "42", False, "ok"), (r"\boxed{\text{I do not know}}", "42", False, "ok"),
    (r"\boxed{42 \text{ or } 43}", "42", False, "ok"), (r"\boxed{41, 42, 43}", "42", False, "ok"),
]

LONG = [  # at and over 1,000 characters
    (r"\boxed{" + "+".join(["1"] * 500) + "}", "500", True, "ok"), (r"\boxed{" + " " * 998 + "42}", "42", True, "ok"),
    (r"\boxed{" + " " * 999 + "42}", "42", False, "no_box"),
    (r"\boxed{42} then \boxed{" + "x" * 1001 + "}", "42", False, "no_box"),
    (r"\boxed{" + "+".join(["1"] * 100_000) + "}", "5", False, "no_box"),
    (r"\boxed{" + "(" * 3000 + "2" + ")" * 3000 + "}", "5", False, "no_box"),
    (r"\boxed{" * 20_000, "5", False, "no_box"),
]
HOSTILE = [r"9^{9^{9^9}}", "(10^8)!", "(" * 400 + "2" + ")" * 400, r"\gcd(2^{4000000000},3)",
           r"\sum_{n=1}^{10^9} \frac{1}{n^2}"]


@pytest.fixture(scope="module", autouse=True)
def one_grader_pool():
    """The pool needs a second to start; it lives as long as this process."""
    yield grade_completions([r"\boxed{1/2}"], ["0.5"])


def test_grading_table() -> None:
    cases = [(rf"so \boxed{{{a}}}.", gold, rows is RIGHT, "ok") for rows in (RIGHT, WRONG) for a, gold in rows]
    cases += EXTRACTED + LONG
    assert len(cases) > 180
    grades = grade_completions([text for text, *_ in cases], [gold for _, gold, *_ in cases])
    wrong = [(case[0][:80], case[1:], grade) for case, grade in zip(cases, grades)
             if (grade.correct, grade.status) != case[2:]]
    assert not wrong


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:12])
def test_hostile_answers_time_out(answer: str) -> None:
    began = time.monotonic()
    grade, after = grade_completions([rf"\boxed{{{answer}}}", r"\boxed{\frac{4}{2}}"], ["5", "2"])
    assert (grade.correct, grade.status) == (False, "timeout") and after.correct
    assert time.monotonic() - began < 8 + 5  # the hard limit, and the start of another worker


def gold_against_gold(row: tuple[str, str]) -> tuple[str, bool]:
    try:
        return row[0], answers_match(row[1], row[1])
    except TimeoutError:
        return row[0], False


def test_gold_against_gold_through_the_parser() -> None:
    """Every row of the six benchmarks: what math-verify makes of a gold answer equals itself, not just as a string."""
    folder = Path(os.environ.get("EGRSD_DATA", HERE.parent / "shared" / "data"))
    if not (folder / "minerva.jsonl").exists():
        pytest.skip(f"no benchmark files in {folder}; set EGRSD_DATA")
    e = ev.EvalSettings(data_dir=str(folder))
    rows = [(f"{name} {p['id']}", p["answer"]) for name in e.benchmarks.split(",") for p in load_benchmark(name, e)]
    assert len(rows) == 30 + 30 + 30 + 500 + 272 + 1319
    with multiprocessing.get_context("spawn").Pool(2) as pool:  # spawned: math-verify's alarms need a main thread each
        wrong = [name for name, right in pool.map(gold_against_gold, rows, chunksize=16) if not right]
    assert not wrong


def test_paper_grader_fails_where_ours_does_not(tmp_path: Path) -> None:
    rows = [{"benchmark": "minerva", "text": rf"\boxed{{{answer}}}", "gold": "4.5e33", "finish": finish}
            for answer, finish in ((r"4.5 \times 10^{33}", "stop"), ("4.5e33", "stop"), ("4.5e33", "length"))]
    benchmarks.grade(rows, "ours")
    assert [row["graders"] for row in rows] == [{"ours": True, "paper": False}, {"ours": True, "paper": True},
                                                {"ours": False, "paper": False}]  # cut is wrong, whatever it says
    assert [row["correct"] for row in rows] == [True, True, False]
    benchmarks.grade(rows, "paper")
    assert [row["correct"] for row in rows] == [False, True, False]


# --- data and bad input ----------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_hub_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    asked = []
    tables = {"openai/gsm8k": [{"question": "q?", "answer": "3 * 400 = <<1>>1,200\n#### 1,200"}],
              "MathArena/hmmt_feb_2025": [{"problem_idx": 1, "problem": "p", "answer": "\\frac{1}{2}", "type": []}],
              "HuggingFaceH4/aime_2024": [{"id": 60, "problem": "p", "solution": "s", "answer": 204, "year": "2024"}],
              "math-ai/minervamath": [{"question": "q", "answer": "4.5e33"}, {"question": "r", "answer": 0}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *of, split: asked.append((*of, split)) or tables[of[0]])
    load = lambda name: load_benchmark(name, ev.EvalSettings())  # noqa: E731
    assert load("gsm8k")[0] == {"id": "0", "problem": "q?", "solution": "3 * 400 = <<1>>1,200\n", "answer": "1200"}
    assert load("hmmt25")[0] == {"id": "1", "problem": "p", "solution": "", "answer": "\\frac{1}{2}"}
    assert load("aime24")[0] == {"id": "60", "problem": "p", "solution": "s", "answer": "204"}
    assert [p["answer"] for p in load("minerva")] == ["4.5e33", "0"]
    assert asked[0] == ("openai/gsm8k", "main", "test")


def test_work_list_has_a_distinct_seed_for_each_sample() -> None:
    tokenizer = egrsd.load_tokenizer(Settings(**PRESETS["tiny"]))
    problems = [{"id": str(n), "problem": "Compute 1 #1 +1 .", "answer": "2", "solution": ""} for n in range(30)]
    e = ev.EvalSettings(student_prompt="{problem}")
    work = benchmarks.work_list({"aime24": problems, "aime25": problems}, tokenizer, e)
    assert len(work) == 30 * 4 * 5 + 30 * 4 and len({item["seed"] for item in work}) == len(work)
    assert len({benchmarks.sample_key(item) for item in work}) == len(work)
    fewer = benchmarks.work_list({"aime25": problems[7:9]}, tokenizer, dataclasses.replace(e, K=2))
    seeds = {benchmarks.sample_key(item): item["seed"] for item in work}
    assert all(seeds[benchmarks.sample_key(item)] == item["seed"] for item in fewer)  # whatever else is evaluated


def test_prompt_that_opens_think_counts() -> None:
    tokenizer = egrsd.load_tokenizer(Settings(**PRESETS["tiny"]))
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    item = {"benchmark": "x", "id": "1", "run": 0, "sample": 0, "seed": 0, "gold": "4"}
    texts = (r"\boxed{ 4 } <|im_end|>", r"</think> \boxed{ 4 } <|im_end|>", r"\boxed{ 4 }")
    ends = encode("<|im_end|>")
    rows = [benchmarks.finish_sample({**item, "prompt_ids": encode(prompt)}, encode(text), tokenizer, ends, False)
            for prompt in ("assistant", "assistant <think>") for text in texts]
    benchmarks.grade(rows, "ours")
    assert [(row["correct"], row["status"], row["tokens"], row["finish"]) for row in rows] == [
        (True, "ok", 4, "stop"), (True, "ok", 5, "stop"), (False, "ok", 3, "length"),
        (False, "unfinished", 4, "stop"), (True, "ok", 5, "stop"), (False, "unfinished", 3, "length")]


@pytest.mark.parametrize("argv, sentence", [
    (["--benchmarks", "aime24,aime23"], "no 'aime23' among aime24, aime25, hmmt25, math500, minerva, gsm8k, tiny"),
    (["--benchmarks", "tiny,tiny"], "names one twice"),
    (["--data_dir", "no/such/folder"], "no .jsonl file"),
    (["--K", "0"], "--K, --aime24_runs, --max_new, --tp and --batch must be at least 1"),
    (["--max_new", "0"], "must be at least 1"),
    (["--top_p", "0"], "--top_p and --gpu_memory in"),
    (["--temperature", "0"], "goes with --K 1"),
    (["--engine", "llamacpp"], "invalid choice"),
    (["--grader", "mine"], "invalid choice"),
    (["--preset", "qwen9"], "invalid choice"),
    (["--student_prompt", "Solve it"], "must hold {problem}"),
    (["--paper", "qwen3-8b"], "--paper goes with --compare"),
    (["--regrade", "--out", "no/such/folder"], "holds no evaluation"),
    (["--ad", "x"], "unrecognized arguments"),
])
def test_bad_options(argv: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        ev.main(argv)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def evaluate_file(folder: Path, name: str, *argv: str) -> str:
    """Evaluate folder/NAME.jsonl into folder/out. -> its table"""
    ev.main(["--preset", "tiny", "--data_dir", str(folder), "--benchmarks", name, "--out", str(folder / "out"), *argv])
    return (folder / "out" / "table.md").read_text()


@pytest.mark.parametrize("rows, sentence", [
    ([{"problem": "p"}], "1 rows, 1 of them without problem or answer"),
    ([{"problem": "p", "answer": "1"}, {"id": "b", "problem": "p", "answer": None}], r"1 of them .* \(b\)"),
    ([{"id": "a", "problem": "p", "answer": "1"}, {"id": "a", "problem": "q", "answer": "2"}], "no id twice"),
    ([], "0 rows"), (["{not json"], "cannot be read .JSONDecodeError"), (["[1, 2]"], "cannot be read .AttributeError"),
])
def test_bad_data(rows: list, sentence: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "mine.jsonl", rows)
    with pytest.raises(SystemExit, match=sentence):
        evaluate_file(tmp_path, "mine")
    assert not (tmp_path / "out").exists()


def test_context_too_short(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--max_new 4000 are \d+ tokens; .* a context of 512. --max_new \d+ fits"):
        ev.main([*TINY, "--max_new", "4000", "--out", str(tmp_path / "out")])


# --- the whole path on the tiny model --------------------------------------------------------------------------------


def make_adapter(folder: Path, scale: float, gamma: float = 1.0, W: int = 5, seed: int = 0) -> Path:
    """A random adapter, saved as a training run saves it. A small one leaves the model able to answer."""
    s = dataclasses.replace(Settings(), **PRESETS["tiny"], seed=seed)
    model = add_adapter(load_base(s, torch.device("cpu")), s)
    noise = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=noise) * scale
    model.save_pretrained(folder)
    (folder.parent / "settings.json").write_text(json.dumps({"gamma": gamma, "W": W}))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("runs") / "a" / "step_25", 0.03)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evals") / "base"
    ev.main([*TINY, "--out", str(out), "--save_ids"])
    return out


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Path:
    out = tmp_path_factory.mktemp("evals") / "a-step_25"
    ev.main([*TINY, "--out", str(out), "--adapter", str(adapter)])
    return out


def rows_of(out: Path) -> dict[tuple, dict]:
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len({benchmarks.sample_key(row) for row in rows}) == len(rows)
    return {benchmarks.sample_key(row): row for row in rows}


def test_base_run(base_run: Path) -> None:
    rows, summary = rows_of(base_run), json.loads((base_run / "summary.json").read_text())
    assert len(rows) == 8 * 3
    row = next(iter(rows.values()))
    assert set(row) == {"benchmark", "id", "run", "sample", "seed", "text", "tokens", "finish", "extracted", "gold",
                        "correct", "status", "problem", "solution", "prompt_ids", "completion_ids"}
    assert all(len(row["completion_ids"]) == row["tokens"] <= 96 for row in rows.values())
    right = np.array([row["correct"] for row in rows.values()]).reshape(8, 3)
    assert 0 < right.mean() < 1
    b = summary["benchmarks"]["tiny"]
    assert b["accuracy"] == pytest.approx(100 * right.mean())
    assert b["se"] == pytest.approx(100 * right.mean(1).std(ddof=1) / 8 ** 0.5)
    text = (base_run / "table.md").read_text()
    assert f"{100 * right.mean():.2f} +- " in text and "avg@3" in text and "Eff" in text
    assert "engine" in json.loads((base_run / "versions.json").read_text())
    for row in rows.values():  # an independent grade: the word after \boxed{ in the tiny language
        boxed = re.findall(r"\\boxed\{ (\S+) \}", row["text"].rpartition("</think>")[2])
        assert row["correct"] == (row["finish"] == "stop" and boxed[-1:] == [row["gold"]])


def test_adapter_changes_the_samples(base_run: Path, adapter_run: Path) -> None:
    a, b = rows_of(base_run), rows_of(adapter_run)
    assert a.keys() == b.keys() and [r["seed"] for r in a.values()] == [b[k]["seed"] for k in a]
    assert any(a[k]["text"] != b[k]["text"] for k in a)
    assert json.loads((adapter_run / "settings.json").read_text())["training"] | {"run": ""} == {
        "gamma": 1.0, "W": 5, "step": 25, "run": ""}


def test_killed_run_goes_on_and_ends_with_the_same_samples(tmp_path: Path, base_run: Path) -> None:
    out, samples = tmp_path / "out", tmp_path / "out" / "samples.jsonl"
    command = [sys.executable, str(HERE / "eval.py"), *TINY, "--save_ids", "--batch", "3", "--out", str(out)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not samples.exists() or samples.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = samples.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    n = kept.count(b"\n")
    assert 4 <= n < 24 and not (out / "summary.json").exists()
    cut = kept[: len(kept) - 40]  # and its last line half-written
    samples.write_bytes(cut)
    ev.main([*TINY, "--save_ids", "--batch", "64", "--out", str(out)])
    assert samples.read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])  # only that line was lost
    assert rows_of(out) == rows_of(base_run)
    assert (out / "table.md").read_text() == (base_run / "table.md").read_text()
    assert (out / "summary.json").read_text() == (base_run / "summary.json").read_text()


def test_finished_run_loads_no_model(base_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "load_base", lambda *_: pytest.fail("a model was loaded"))
    before = (base_run / "samples.jsonl").read_bytes()
    ev.main([*TINY, "--save_ids", "--out", str(base_run)])
    assert (base_run / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("argv, name", [
    (["--temperature", "0.7"], "temperature 1.0 .now 0.7"), (["--K", "2"], "K 3 .now 2"), (["--seed", "1"], "seed 0"),
    (["--max_new", "50"], "max_new 96"), (["--no-thinking"], "thinking True"), (["--limit", "5"], "limit 8"),
    (["--grader", "paper"], "grader 'ours'"), (["--student_prompt", "{problem} ."], "student_prompt")])
def test_changed_setting_is_refused(argv: list[str], name: str, base_run: Path) -> None:
    with pytest.raises(SystemExit, match=f"other settings: .*{name}"):
        ev.main([*TINY, "--save_ids", "--out", str(base_run), *argv])


def test_changed_adapter_or_data_is_refused(tmp_path: Path, adapter_run: Path, adapter: Path) -> None:
    other = make_adapter(tmp_path / "a" / "step_25", 0.02, seed=1)
    with pytest.raises(SystemExit, match="adapter_weights"):
        ev.main([*TINY, "--out", str(adapter_run), "--adapter", str(other)])
    with pytest.raises(SystemExit, match="adapter_weights"):
        ev.main([*TINY, "--out", str(adapter_run)])
    moved = shutil.copytree(adapter, tmp_path / "moved")
    ev.main([*TINY, "--out", str(adapter_run), "--adapter", str(moved)])  # the same weights in another folder
    write_lines(tmp_path / "tiny.jsonl", [{"problem": f"Compute {n} #1 +1 .", "answer": str(n + 1)} for n in range(8)])
    with pytest.raises(SystemExit, match="problems"):
        ev.main([*TINY, "--out", str(adapter_run), "--adapter", str(adapter), "--data_dir", str(tmp_path)])


def test_damaged_line_is_named(tmp_path: Path, base_run: Path) -> None:
    out = shutil.copytree(base_run, tmp_path / "out")
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join([*lines[:2], "{oops\n", *lines[3:]]))
    with pytest.raises(SystemExit, match="line 3 is damaged"):
        ev.main([*TINY, "--save_ids", "--out", str(out)])


def test_samples_without_settings_or_fewer_than_the_summary_says_are_refused(base_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(base_run, tmp_path / "out")
    write_lines(out / "samples.jsonl", [*rows_of(out).values()][:10])
    with pytest.raises(SystemExit, match="14 samples are missing"):
        ev.main(["--compare", str(out), "--out", str(tmp_path / "compare")])
    ev.main(["--regrade", "--out", str(out)])
    assert not (out / "summary.json").exists() and not (out / "table.md").exists()
    (out / "settings.json").unlink()
    with pytest.raises(SystemExit, match="no settings.json"):
        ev.main([*TINY, "--out", str(out)])


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: shutil.rmtree(f), "are not both in it"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "are not both in it"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
    (lambda f: os.truncate(f / "adapter_model.safetensors", 5000), "cannot be read .SafetensorError"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "cannot be read .SafetensorError"),
    (lambda f: edit_weights(f, lambda k, t: None), "no LoRA weights"),
    (lambda f: edit_weights(f, lambda k, t: t * 0 if "lora_B" in k else t), "all zeros"),
    (lambda f: edit_weights(f, lambda k, t: t * math.nan), "not finite"),
    (lambda f: edit_weights(f, lambda k, t: t[:, :-8].contiguous() if "lora_A" in k else t), "of another shape"),
    (lambda f: edit_weights(f, lambda k, t: t[:-8] if "lora_B" in k else t), "of another shape"),
    (lambda f: edit_weights(f, lambda k, t: None if "layers.1" in k else t), "layers.1.* is missing"),
    (lambda f: edit_config(f, r=4), "of another shape"), (lambda f: edit_config(f, use_dora=True), "no plain LoRA"),
    (lambda f: edit_config(f, peft_type="IA3"), "no plain LoRA"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "is damaged .no JSON object"),
    (lambda f: add_weights(f), "no part of a LoRA adapter"),
    (lambda f: edit_config(f, base_model_name_or_path="Qwen/Qwen3-8B"), "was trained on Qwen/Qwen3-8B, not on --model"),
])
def test_bad_adapter_is_fatal(damage, sentence: str, tmp_path: Path, adapter: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "step_25")
    damage(folder)
    with pytest.raises(SystemExit, match=sentence):
        ev.main([*TINY, "--adapter", str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file
    tensors = {k: change(k, t) for k, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors")


def add_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(3)}, folder / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_engine_that_ignores_the_adapter_is_fatal(tmp_path: Path, adapter: Path, monkeypatch) -> None:
    import peft

    def ignore(model, folder: str):
        model.disable_adapter = contextlib.nullcontext
        return model

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", ignore)
    with pytest.raises(SystemExit, match="the engine ignores the adapter"):
        ev.main([*TINY, "--adapter", str(adapter), "--out", str(tmp_path / "out")])


def test_regrade_needs_no_model(tmp_path: Path, base_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "load_base", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(ev, "load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded"))
    out = shutil.copytree(base_run, tmp_path / "out")
    spoiled = [{**row, "correct": not row["correct"], "status": "timeout"} for row in rows_of(base_run).values()]
    write_lines(out / "samples.jsonl", spoiled)
    ev.main(["--regrade", "--out", str(out)])
    assert rows_of(out) == rows_of(base_run) and (out / "table.md").read_text() == (base_run / "table.md").read_text()
    write_lines(out / "samples.jsonl", [{**row, "gold": "2", "text": r"\boxed{2 x^0 \text{ m}}"} for row in spoiled])
    ev.main(["--regrade", "--out", str(out), "--grader", "paper"])
    assert json.loads((out / "settings.json").read_text())["grader"] == "paper"
    assert "grader paper" in (out / "table.md").read_text()


def test_minerva_reports_both_graders(tmp_path: Path) -> None:
    problems = [{"question": f"Compute {n} #1 +1 #2 +2 .", "answer": f"{n + 3}e0"} for n in range(4)]
    write_lines(tmp_path / "minerva.jsonl", problems)
    text = evaluate_file(tmp_path, "minerva")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "minerva, grader ours: " in text and "minerva, grader paper: " in text
    assert summary["benchmarks"]["minerva"]["graders"]["ours"][0] == summary["benchmarks"]["minerva"]["accuracy"] > 0


def test_aime24_reports_the_spread_over_runs(tmp_path: Path) -> None:
    problems = [{"problem": f"Compute {n} #1 +1 #2 +2 .", "answer": f"0{n + 3}"} for n in range(3)]
    write_lines(tmp_path / "aime24.jsonl", problems)
    text = evaluate_file(tmp_path, "aime24", "--K", "2")
    rows = rows_of(tmp_path / "out").values()
    assert len(rows) == 3 * 2 * 5 and len({row["seed"] for row in rows}) == 30
    by_run = [np.mean([100 * row["correct"] for row in rows if row["run"] == run]) for run in range(5)]
    assert f"sd between runs {np.std(by_run, ddof=1):.2f}" in text and "5 x 2" in text


# --- comparison ------------------------------------------------------------------------------------------------------


def fake_run(source: Path, folder: Path, training: dict, flips: int) -> Path:
    """A finished evaluation like `source`, from another training, with `flips` more right samples."""
    shutil.copytree(source, folder)
    rows = list(rows_of(folder).values())
    for row in [row for row in rows if not row["correct"]][:flips]:
        row["correct"] = True
    write_lines(folder / "samples.jsonl", rows)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "training": training}))
    return folder


def test_compare(tmp_path: Path, base_run: Path, adapter_run: Path, capsys: pytest.CaptureFixture) -> None:
    ev.main(["--compare", str(base_run), str(adapter_run), "--paper", "qwen3-8b", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    a, b = (np.array([row["correct"] for row in rows_of(run).values()]).reshape(8, 3).mean(1)
            for run in (adapter_run, base_run))
    d, se = 100 * (a - b).mean(), 100 * (a - b).std(ddof=1) / 8 ** 0.5
    assert f"{d:+.2f} +- {se:.2f}" + (" ~" if abs(d) <= 2 * se else "") in text
    assert "paper, Table 3: CL-EGRSD gamma 1.0 W 5 (its six benchmarks)" in text and "69.32" in text
    assert "12,232" in text and "12,097" in text
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "heatmaps.png").exists()
    json.loads((tmp_path / "out" / "summary.json").read_text())


def test_compare_marks_differences_within_two_standard_errors(tmp_path: Path, base_run: Path) -> None:
    same, far = fake_run(base_run, tmp_path / "same", {}, 0), fake_run(base_run, tmp_path / "far", {}, 99)
    ev.main(["--compare", str(base_run), str(same), str(far), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    same_line, far_line = [line for line in text.splitlines() if re.match(r"\| (same|far)", line)][-2:]
    assert "+0.00 +- 0.00 ~" in same_line and "~" not in far_line.split("|")[2]


def test_compare_sweeps(tmp_path: Path, base_run: Path) -> None:
    grid = [(g, W, 100) for g in (0.3, 1.0) for W in (0, 5)] + [(1.0, 5, step) for step in (25, 50, 75)]
    runs = [fake_run(base_run, tmp_path / f"g{g}W{W}-{step}", {"gamma": g, "W": W, "step": step, "run": f"g{g}W{W}"}, n)
            for n, (g, W, step) in enumerate(grid)]
    ev.main(["--compare", *map(str, runs), "--paper", "qwen3-8b", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    accuracy = {run.name: 100 * np.mean([row["correct"] for row in rows_of(run).values()]) for run in runs}
    snapshots = next(line for line in text.splitlines() if line.startswith("| gamma 1.0 W 5 "))
    assert re.findall(r"([\d.]+) \+-", snapshots) == [f"{accuracy[f'g1.0W5-{step}']:.2f}" for step in (25, 50, 75, 100)]
    assert "S4: 100" in text and "paper, Table 4: EGRSD gamma 0.3 W 0" in text
    last = next(line for line in text.splitlines() if line.startswith("| gamma 1.0 W 5, step 100"))
    assert f" {accuracy['g1.0W5-100']:.2f} +-" in last and "paper, Table A3: CL-EGRSD gamma 1.0 W 7" in text
    assert (tmp_path / "out" / "heatmaps.png").read_bytes().startswith(b"\x89PNG")


def test_the_paper_is_averaged_over_the_benchmarks_of_the_runs(tmp_path: Path, base_run: Path) -> None:
    run = fake_run(base_run, tmp_path / "run", {}, 0)
    rows = [*rows_of(run).values()]
    for n, row in enumerate(rows):
        row["benchmark"] = ("aime24", "aime25")[n % 2]
    write_lines(run / "samples.jsonl", rows)
    ev.main(["--compare", str(run), "--paper", "qwen3-8b", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    line = next(line for line in text.splitlines() if "Table 3: no-train" in line)
    _, _, aime24, aime25, average, tokens, eff, _ = (cell.strip() for cell in line.split("|"))
    assert float(average) == pytest.approx((float(aime24) + float(aime25)) / 2, abs=0.006) and tokens == eff == ""


def test_each_label_of_the_frontier_stands_near_its_point_and_on_no_other(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(compare_module, "save_figure", lambda path, figure, dpi: drawn.append(figure))
    points = [(f"run {i}", 28 + i / 3, 97 + i / 2, 0.3, 0.5, True) for i in range(5)] + [("base", 34, 57, 1, 1, True)]
    compare_module.draw_frontier(tmp_path / "x.png", points)
    figure, axis = drawn[0], drawn[0].axes[0]
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in axis.texts]
    assert [note.get_text() for note in axis.texts] == [p[0] for p in points]
    for box, point in zip(boxes, points):
        x, y = axis.transData.transform(point[1:3])
        away = math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))
        assert away < 60 * figure.dpi / 72
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("argv, sentence", [
    (["no/such/run"], "no finished evaluation"), (["{base}", "--paper", "gpt-5"], "no such rows"),
    (["{base}", "{other}"], "no benchmark in common")])
def test_compare_bad_input(argv: list[str], sentence: str, tmp_path: Path, base_run: Path) -> None:
    other = fake_run(base_run, tmp_path / "other", {}, 0)
    write_lines(other / "samples.jsonl", [{**row, "benchmark": "gsm8k"} for row in rows_of(other).values()])
    with pytest.raises(SystemExit, match=sentence):
        ev.main(["--compare", *(a.format(base=base_run, other=other) for a in argv), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="a comparison needs its own folder"):
        ev.main(["--compare", str(base_run), "--out", str(base_run)])


# --- other processes -------------------------------------------------------------------------------------------------


def test_import_does_no_work() -> None:
    code = "import sys, eval; print({'vllm', 'transformers', 'peft', 'datasets', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=ENV, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_two_processes_draw_the_same_samples(tmp_path: Path, base_run: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(HERE / "eval.py"), *TINY, "--save_ids", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(tmp_path / "out") == rows_of(base_run)
    assert (tmp_path / "out" / "table.md").read_text() == (base_run / "table.md").read_text()
    assert not list((tmp_path / "out").glob("samples-*"))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_serves_the_adapter(tmp_path: Path, adapter: Path) -> None:
    greedy = ["--preset", "tiny", "--limit", "16", "--K", "1", "--temperature", "0", "--adapter", str(adapter)]
    command = [sys.executable, str(HERE / "eval.py"), *greedy, "--engine", "vllm", "--out", str(tmp_path / "vllm")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]  # the engine's end included
    ev.main([*greedy, "--out", str(tmp_path / "hf")])
    ev.main([*greedy[:-2], "--out", str(tmp_path / "base")])
    vllm, hf, base = (rows_of(tmp_path / name) for name in ("vllm", "hf", "base"))
    assert vllm == hf and vllm != base
    with pytest.raises(SystemExit, match="engine 'vllm' .now 'hf'"):  # the engines draw differently: no mixing
        ev.main([*greedy, "--out", str(tmp_path / "vllm")])


def test_an_adapter_is_known_by_its_weights_and_scale_not_by_paths_or_the_order_of_a_set(tmp_path) -> None:
    import eval as evaluation
    marks = []
    cases = [("/a/tiny", ["q", "k"], 32, b"w"), ("/b/tiny", ["k", "q"], 32, b"w"), ("/a/tiny", ["q", "k"], 16, b"w"),
             ("/a/tiny", ["q", "k"], 32, b"v")]
    for n, (base, targets, alpha, weights) in enumerate(cases):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(
            {"base_model_name_or_path": base, "target_modules": targets, "r": 8, "lora_alpha": alpha}))
        (folder / "adapter_model.safetensors").write_bytes(weights)
        marks.append(evaluation.adapter_fingerprint(folder))
    assert marks[0] == marks[1] and len(set(marks)) == 3
