"""The study of baselines.py: its plan, its statistics, going on from the rows that are there."""

import csv
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run

from baselines import parse_comparison
from support.comparison import report, study


def row(arm: str, base: str, seed: str, accuracy: float, **fields: str) -> dict[str, str]:
    made = {"regime": "h1", "base": base, "arm": arm, "seed": seed, "lr": "1e-3", "split": "test"}
    made.update(accuracy=str(accuracy), length="50.0", seconds="30", commit="abc")
    return {**made, **fields}


def test_interval_is_students() -> None:
    # scipy.stats.t.interval(0.95, 4, 3.0, sem): 3 +- 1.9632
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.9632, abs=2e-3)
    assert report.interval([7.0]) == (7.0, None)
    assert len(report.T_95) == 31 and report.T_95[10] == 2.228


def test_slope_and_its_interval() -> None:
    xs, ys = (0.0, 0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 1.0, 4.0, 5.0)
    line, covariance = np.polyfit(xs, ys, 1, cov=True)
    rise, half = report.slope(xs, ys)
    assert rise == pytest.approx(line[0])
    assert half == pytest.approx(3.182 * math.sqrt(covariance[0, 0]))  # t of 3 degrees of freedom
    assert report.slope([0.0, 2.0], [1.0, 5.0]) == (2.0, None)


def test_differences_are_paired_by_base_and_seed_and_bases_are_counted_once() -> None:
    rows = [
        row("rlsd", "0", "0", 80),
        row("rlsd", "0", "1", 70),
        row("rlsd", "1", "0", 60),
        row("rlsd", "2", "0", 10),  # no partner
        row("egrsd", "0", "0", 84),
        row("egrsd", "0", "1", 72),
        row("egrsd", "1", "0", 61),
    ]
    found = report.differences(rows, "egrsd", "rlsd", "accuracy")
    assert found == {"0": [4.0, 2.0], "1": [1.0]}
    assert report.base_means(found) == [3.0, 1.0]
    table = report.questions_table(rows)
    line = next(text for text in table.splitlines() if "egrsd − rlsd" in text)
    pairs = [4.0, 2.0, 1.0]
    half = 4.303 * statistics.stdev(pairs) / math.sqrt(3)
    assert f"| 3 | +2.3 ± {half:.1f} |" in line and "| +3.0 ± 12.7, +1.0 |" in line
    assert "± 12.7 " in line  # over two bases: t = 12.71 times sd / sqrt(2) = 1
    assert "shuffled" not in table  # nothing is said of what was not run


def test_the_rate_is_chosen_on_validation_problems_alone_and_only_when_all_are_there() -> None:
    rows = []
    for lr, accuracy in zip(study.RATES, (50, 70, 60)):
        rows.append(row("rlsd", "0", "0", accuracy, lr=lr, split="validation"))
    rows.append(row("rlsd", "0", "0", 99, lr=study.RATES[0]))
    rows.append(row("rlsd", "0", "1", 90, lr=study.RATES[0], split="validation"))  # seed 1
    assert study.choose_rates(rows) == {("h1", "rlsd"): study.RATES[1]}
    equal = [{**r, "accuracy": "50"} for r in rows]
    assert study.choose_rates(equal[::-1]) == {("h1", "rlsd"): study.RATES[0]}
    assert study.at_chosen_rates(rows, study.choose_rates(rows)) == rows[:3]
    rows = rows[:4]
    assert study.choose_rates(rows[1:]) == {}
    # What ran at another rate before is in the CSV, and not on the page.
    rows.append(row("egrsd", "0", "0", 99, lr=study.RATES[1]))
    rows.append(row("egrsd", "0", "0", 99, lr=study.RATES[2]))
    rows.append(row("none", "0", "0", 30, lr="0"))
    rows.append(row("rlsd", "0", "0", 99, lr=study.RATES[0], regime="h3"))
    kept = study.at_chosen_rates(rows, study.choose_rates(rows))
    assert kept == [*rows[:3], rows[4], *rows[6:]]


def test_any_beginning_of_the_core_is_balanced_and_each_run_is_one_that_can_be_parsed() -> None:
    chosen = {(regime, arm): "1e-3" for regime in ("h1", "h2") for arm in study.TUNED}
    runs = [r for r in study.plan("whole", chosen) if r["split"] == "test" and r["regime"] == "h1"]
    core = [r for r in runs if r["arm"] in study.CORE]
    first = core[: 3 * len(study.CORE)]
    assert {r["seed"] for r in first} == {"0"} and {r["base"] for r in first} == {"0", "1", "2"}
    assert len(core) == 3 * 6 * len(study.CORE)
    everything = [*study.plan("more", chosen)]
    assert everything[: len([*study.plan("whole", chosen)])] == [*study.plan("whole", chosen)]
    assert len({study.key_of(r) for r in everything}) == len(everything)
    for name, options in study.ARMS.items():
        made = dict(zip(study.KEY, ("h1", "0", name, "0", "1e-3", "test")))
        s = parse_comparison(study.options_of(made, ROOT / "tiny", ROOT / "runs" / "x"))
        steps = {"none": 0, **dict.fromkeys(study.LONG, 100)}
        assert s.steps == steps.get(name, 40) and s.batch_size == 32
        assert options


def test_a_study_goes_on_from_its_rows_and_a_report_needs_no_run(tmp_path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    done = []
    for made in study.plan("quick", {}):
        accuracy = 50 + 10 * len(made["arm"]) + int(made["seed"])
        done.append({**dict.fromkeys(study.COLUMNS, ""), **made, "accuracy": accuracy})
        done[-1].update(length=30.5, seconds=20)
    missing = done.pop(3)
    study.add_rows(results / "runs.csv", study.COLUMNS, done)
    curve = {key: done[1][key] for key in study.KEY} | {"step": 10, "correct": 0.5, "length": 33}
    study.add_rows(results / "curves.csv", study.CURVE, [curve])
    left = study.next_run("quick", results, set(), tmp_path)
    assert left == {key: missing[key] for key in study.KEY}
    assert study.next_run("quick", results, {study.key_of(missing)}, tmp_path) is None

    where = ["--study", "--quick", "--out", tmp_path, "--results", results]
    assert "RESULTS.md" in run(ROOT / "baselines.py", *where, "--report")
    page = (results / "RESULTS.md").read_text()
    assert "egrsd − rlsd" in page and "9 runs" in page
    (results / "RESULTS.md").write_text("By hand.\n" + page)
    run(ROOT / "baselines.py", *where, "--report")
    assert (results / "RESULTS.md").read_text() == "By hand.\n" + page
    assert (results / "frontier-embedded.png").stat().st_size > 10_000
    with (results / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9


A_STUDY = """
import os, sys, time
from pathlib import Path
here = Path(__file__).parent
sys.path.insert(0, ROOT)
from support.comparison import study

def train(options):
    (here / "pid").write_text(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    (here / "results").mkdir()
    study.do_runs("quick", here, here / "results", 1, 9.0, train, train)
"""


def test_the_processes_of_a_killed_study_end_with_it(tmp_path) -> None:
    script = tmp_path / "a_study.py"
    script.write_text(A_STUDY.replace("ROOT", repr(str(ROOT))))
    (tmp_path / "bases").mkdir()
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    told = tmp_path / "pid"
    wait_for(lambda: told.exists() and told.read_text())
    worker = Path("/proc") / told.read_text()
    assert worker.exists()
    parent.kill()
    parent.wait()
    wait_for(lambda: not worker.exists())


def test_a_run_that_fails_and_a_process_that_is_killed_end_the_study(tmp_path) -> None:
    (tmp_path / "bases").mkdir()
    ends = {"raise RuntimeError('CUDA error')": "CUDA error", "os.kill(os.getpid(), 9)": "is gone"}
    for what, sentence in ends.items():
        script = tmp_path / "a_study.py"
        study_of_one = A_STUDY.replace("ROOT", repr(str(ROOT)))
        script.write_text(study_of_one.replace("time.sleep(100)", what))
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
        assert done.returncode and sentence in done.stdout + done.stderr
        shutil.rmtree(tmp_path / "results")


def wait_for(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_measures_of_a_run_come_from_its_own_files(tmp_path) -> None:
    made = dict(zip(study.KEY, ("h1", "0", "egrsd", "0", "1e-3", "test")))
    log = []
    for step in range(25):
        log.append({"step": step, "correct": step / 100, "length": 40, "gate": 0.5})
        log[-1].update(delta_off=None, magnitude_off=step)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    summary = {
        "after": {"accuracy": 61.2, "length": 44.0, "samples": 7},
        "seconds": {"this_start": 9},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    measured, curve = study.measure(made, tmp_path)
    assert (measured["accuracy"], measured["problems"], measured["delta_off"]) == (61.2, 7, "")
    assert measured["magnitude_off"] == statistics.fmean(range(5, 25))
    assert [line["step"] for line in curve] == [10, 20, 25]
    assert curve[0]["correct"] == pytest.approx(statistics.fmean(range(10)) / 100)


def test_an_arm_stands_beside_others_only_where_it_ran_on_the_same_bases() -> None:
    rows = []
    for arm, base in (("egrsd", "0"), ("egrsd", "1"), ("rlsd", "0"), ("rlsd", "1"), ("sft", "0")):
        rows.append({"arm": arm, "base": base})
    compared, others = report.on_all_bases(rows, rows)
    assert compared == rows[:4] and others == ["sft"]


def test_nobody_waits_for_a_base_that_another_process_makes(tmp_path) -> None:
    first = study.next_run("whole", tmp_path, set(), tmp_path)
    assert (first["regime"], first["base"]) == ("h1", "0")
    other = study.next_run("whole", tmp_path, {study.key_of(first)}, tmp_path)
    assert (other["regime"], other["base"]) == ("h1", "1")
    base = study.name_base(tmp_path, "h1", "0")
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"")
    other = study.next_run("whole", tmp_path, {study.key_of(first)}, tmp_path)
    assert (other["regime"], other["base"]) == ("h1", "0")


def test_operations_are_judged_each_by_itself_in_the_steps_asked_for(tmp_path) -> None:
    texts = [
        (0, "#1 1 +1 = 3 wait check yes wait check no redo #1 1 +1 = 2 wait check yes"),
        (9, "#1 1 -2 = 9 #2 9 +3 = 2 so #3 2 +5 = 8 wait check no redo #3 2 +5 = 6"),
        (10, "#1 4 +4 = 9 wait check yes"),
    ]
    path = tmp_path / "rollouts.jsonl"
    assert study.operations_of(path, range(10)) == {}
    path.write_text("".join(json.dumps({"step": s, "text": t}) + "\n" for s, t in texts))
    # Four operations, four checks; #1 and #3 begin wrong, #3 stays so.
    assert study.operations_of(path, range(10)) == {"checks": 1.0, "slips": 0.5, "left": 0.25}
    assert study.operations_of(path, range(10, 20)) == {"checks": 1, "slips": 1, "left": 1}
    curves = []
    for step in ("10", "20"):
        end = {"step": step, "checks": step, "slips": "0.5", "left": ""}
        curves.append({**row("rlsd", "0", "0", 50), **end})
    assert "| 50.0 | 50.0 | 50.0 | 20.00 | 50.0 |  |" in report.arms_table(curves[:1], curves)


def test_a_sweep_is_compared_where_all_its_arms_ran() -> None:
    for arm in study.ARMS:  # the names say what the options are
        setting = report.gamma_and_window(arm)
        if setting:
            options = study.ARMS[arm]
            assert setting == (float(options[1]), int(options[3])), arm
    assert report.is_sweep("egrsd-0.3") and not report.is_sweep("cl-egrsd")
    rows = [row("rlsd", "0", seed, 50) for seed in "012"]
    rows += [row("egrsd", "0", seed, 60 + 10 * int(seed)) for seed in "012"]
    rows += [row("egrsd-0.3", "0", seed, 70) for seed in "01"]
    table = report.sweep_table(rows).splitlines()
    assert table[2].startswith("| 0.3 | 0 | 2 | 70.0 | +20.0 ± 0.0 |")
    assert table[3].startswith("| 1 | 0 | 2 | 65.0 | +15.0 ± 63.5 |")  # without seed 2


def test_a_property_is_compared_with_as_many_seeds_of_the_unchanged_task(tmp_path) -> None:
    rows = [row("none", "0", "0", 30, regime="h2:p_style=0.9")]
    rows.append(row("teacher", "0", "0", 80, regime="h2:p_style=0.9"))
    for seed in "01":
        rows.append(row("rlsd", "0", seed, 50, regime="h2:p_style=0.9"))
        rows.append(row("egrsd", "0", seed, 55, regime="h2:p_style=0.9"))
    for seed in "0123":
        rows.append(row("rlsd", "0", seed, 40 + int(seed), regime="h2"))
        rows.append(row("egrsd", "0", seed, 40, regime="h2"))
    rows.append(row("egrsd", "1", "0", 99, regime="h2"))  # another base
    table = report.properties_table(rows).splitlines()
    assert table[2].startswith("| p_style | 0.5 (h2) |  |  | 40.5 | 40.0 | -0.5 ±")
    assert table[3] == "| p_style | 0.9 | 30.0 | 80.0 | 50.0 | 55.0 | +5.0 ± 0.0 | 2 | +5.0 |"
    line = "| stronger leak of style (p_style) | 0.5 | 0.9 | +5.5 | 2 |"
    assert report.slopes_table(rows).splitlines()[2] == line
    report.draw_properties(tmp_path / "properties.png", rows)
    means = [5.0, -1.5, 99.0 - 50.0]  # of the changed task, and of two bases of h2
    rows.append(row("rlsd", "1", "0", 50, regime="h2"))
    pooled = report.plus_minus(*report.interval(means))
    assert f"over all 3 bases of all regimes, each once: {pooled} points" in report.over_all_bases(
        rows
    )
    report.draw_by_teacher(tmp_path / "teachers.png", rows)
    for name in ("properties.png", "teachers.png"):
        assert (tmp_path / name).stat().st_size > 5_000
