"""Grading processes: verdicts, time limits, what they leave behind."""

import subprocess
import sys
import time

import pytest
from helpers import ROOT, alive

from support.shared import grading
from support.shared.grading import answers_match, extract_answer, grade_completions


def test_grades_statuses_and_the_last_box_after_the_last_thought() -> None:
    cases = [
        (r"so \boxed{4}", "4", True, "ok"),
        (r"\boxed{ 4 }", "4", True, "ok"),
        (r"\boxed{\frac12}", "0.5", True, "ok"),
        (r"\boxed{5}", "4", False, "ok"),
        (r"\boxed{4} or \boxed{5}", "4", False, "ok"),
        ("4", "4", False, "no_box"),
        (r"<think>\boxed{4}</think> 4", "4", False, "no_box"),
        (r"<think> \boxed{4}", "4", False, "unfinished"),
        (r"\boxed{4} and \boxed{}", "4", False, "no_box"),
        (r"\boxed{4} and \boxed{4", "4", False, "no_box"),
        (r"<think> x </think> \boxed{\{4\}}", r"\{ 4 \}", True, "ok"),
        (r"\boxed{" + "4" * 1001 + "}", "4", False, "no_box"),
        (r"\boxed{073}", "73", True, "ok"),
        (r"\boxed{4.5\times10^{33}}", "4.5e33", True, "ok"),
        (r"\boxed{73}", "7" * 5000, False, "ok"),  # more digits than int() takes
    ]
    texts, golds, right, status = zip(*cases)
    grades = grade_completions(texts, golds)
    assert [(g.correct, g.status) for g in grades] == list(zip(right, status))
    assert [extract_answer(text) for text in texts] == [g.answer for g in grades]


def test_an_ordinary_batch_takes_under_a_second_and_a_hostile_one_no_longer_than_its_limit() -> (
    None
):
    texts, golds = (
        [rf"Therefore \boxed{{\frac{{{i}}}{{7}}}}" for i in range(64)],
        [f"{2 * i}/14" for i in range(64)],
    )
    grade_completions(texts, golds)  # warms the pool up
    began = time.perf_counter()
    assert all(g.correct for g in grade_completions(texts, golds))
    assert time.perf_counter() - began < 1
    hostile = [
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{(10^8)!}",
        r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    ]
    for text in hostile:
        began = time.perf_counter()
        (grade,) = grade_completions([text], ["1/3"])
        assert not grade.correct
        assert time.perf_counter() - began < 9  # 8 s, and a loaded machine
    assert grade_completions([r"\boxed{\frac26}"], ["1/3"])[0].correct  # the pool goes on


def test_what_cannot_be_read_is_wrong_and_what_fails_for_another_reason_is_told(
    monkeypatch,
) -> None:
    def failing(error: type[BaseException]):
        def fail(*_):
            raise error

        return fail

    monkeypatch.setattr(grading, "parse_answer", failing(ValueError))
    assert not answers_match("1/2", "0.5")
    for error in (MemoryError, RecursionError):  # the worker makes "error" of them
        monkeypatch.setattr(grading, "parse_answer", failing(error))
        with pytest.raises(error):
            answers_match("1/2", "0.5")
    monkeypatch.undo()
    monkeypatch.setattr(grading, "numbers_match", failing(AttributeError))
    with pytest.raises(AttributeError):
        answers_match("1/2", "0.5")
    monkeypatch.undo()
    assert answers_match("1/2", "0.5")


def test_too_slow_a_comparison_of_numbers_is_a_timeout(monkeypatch) -> None:
    import sympy

    def late(*_):
        while True:
            pass

    monkeypatch.setattr(sympy, "N", late)
    with pytest.raises(TimeoutError):
        answers_match("0.25", "0.5", seconds=1)


def test_grading_processes_start_whatever_the_working_directory_holds(tmp_path) -> None:
    (tmp_path / "support.py").write_text("raise RuntimeError('not this one')")
    script = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; "
        "from support.shared.grading import grade_completions; "
        r"print(grade_completions([r'\boxed{1/2}'], ['0.5'])[0].correct)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_grading_processes_end_with_a_killed_parent(tmp_path) -> None:
    script = (
        "import time; from support.shared import grading; "
        r"grading.grade_completions([r'\boxed{1/2}'], ['0.5']); "
        "print(*[w.pid for w in grading._workers], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pids and not any(alive(pid) for pid in pids)


def test_time_limits_count_what_is_computed_and_not_what_others_compute_meanwhile() -> None:
    script = """
import signal, time
from support.shared.grading import count_processor_time
def late(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, late)
count_processor_time()
signal.alarm(1)
time.sleep(1.2)
print("slept")
try:
    while True:
        pass
except TimeoutError:
    print("late")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["slept", "late"], done.stderr
