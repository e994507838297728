"""The study: which runs there are, two processes that do them, a row of a CSV for each.

A run is a line of the plan: a regime of tiny/make.py, a base (its seed), an arm (a name and its
options) and a seed. Rows that results/runs.csv holds already are not run again, so that the study
goes on where it was stopped, and from the rows of another machine.
"""

import argparse
import collections
import csv
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.comparison import report
from support.shared.console import fail, say, versions
from support.shared.files import make_folder, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]

# What all runs share. 40 steps: after 100 the best methods are too close to the ceiling to compare.
COMMON = ["--preset", "tiny", "--steps", "40", "--save_every", "40", "--batch_size", "32"]
COMMON += ["--no-eval_before", "--no-curves"]
CAPS = {"embedded": 96, "h1": 128, "h2": 160, "h3": 192}  # ours: completion cap in tokens
RATES = ("3e-4", "1e-3", "3e-3")  # ours: the learning rates that each method is tried with

# Arms: name: options. "reward" is EGRSD with w = omega = 1, so that arms differ by one thing.
CORE = {
    "reward": ["--method", "rlsd", "--eps", "0"],
    "rlsd": ["--method", "rlsd"],
    "egrsd": ["--gamma", "1", "--W", "0"],
    "cl-egrsd": ["--gamma", "1", "--W", "5"],
    "shuffled": ["--gamma", "1", "--W", "0", "--control", "shuffled"],
    "inverted": ["--gamma", "1", "--W", "0", "--control", "inverted"],
    "evidence": ["--gamma", "1", "--W", "0", "--control", "evidence"],
}
OTHERS = {
    "grpo": ["--method", "grpo"],
    "sft": ["--method", "sft"],
    "opsd": ["--method", "opsd"],
    "opsd-reverse": ["--method", "opsd", "--divergence", "reverse"],
    "crisp": ["--method", "crisp", "--teacher_every", "20"],
    "atesd": ["--method", "atesd"],
    "atesd-half": ["--method", "atesd", "--exposure", "0.5"],
    "student-entropy": ["--gamma", "1", "--W", "0", "--control", "student_entropy"],
    # The paper's 0.99, 20 and 50, which are of 100 steps, in proportion.
    "ema": ["--gamma", "1", "--W", "0", "--teacher", "ema", "--teacher_alpha", "0.975"],
    "copy-8": ["--gamma", "1", "--W", "0", "--teacher", "copy", "--teacher_every", "8"],
    "copy-20": ["--gamma", "1", "--W", "0", "--teacher", "copy", "--teacher_every", "20"],
    "gamma-up": ["--gamma", "1", "--W", "0", "--gamma_schedule", "up", "--gamma_steps", "40"],
    "gamma-down": ["--gamma", "1", "--W", "0", "--gamma_schedule", "down", "--gamma_steps", "40"],
}
SWEEP = {}
for gamma in ("0.1", "0.3", "0.5", "0.7"):
    SWEEP[f"egrsd-{gamma}"] = ["--gamma", gamma, "--W", "0"]
for gamma, W in (*itertools.product(("0.3", "1"), ("1", "3", "7")), ("0.3", "5")):
    SWEEP[f"cl-egrsd-{gamma}-{W}"] = ["--gamma", gamma, "--W", W]
# The three groups below were added when first results had been seen, see do_more.
# As many steps as the paper has, where reward may catch up.
LONG = {}
for name in ("reward", "rlsd", "egrsd"):
    LONG[f"long-{name}"] = [*CORE[name], "--steps", "100", "--save_every", "100"]
# Reward alone at RLSD's rate in h2, where its own was a tie between that and a third of it.
GIVEN_RATE = {"reward-1e-3": "1e-3"}
SAME_RATE = {"reward-1e-3": CORE["reward"]}
# Three times RLSD's rate, which a search of their own found for EGRSD and CL-EGRSD in h1.
HIGH_RATE = {}
for name in ("rlsd", "egrsd", "cl-egrsd", "shuffled"):
    GIVEN_RATE[f"{name}-3e-3"] = "3e-3"
    HIGH_RATE[f"{name}-3e-3"] = CORE[name]
ARMS = {
    "none": ["--method", "none", "--steps", "0"],
    **CORE,
    **OTHERS,
    **SWEEP,
    **LONG,
    **SAME_RATE,
    **HIGH_RATE,
}
UNTRAINED = ("none", "teacher")  # the base alone, and with the reference in view

# Whose learning rate an arm takes. What weighs tokens by w takes RLSD's, so that such arms differ
# by one thing; the others have their own.
TUNED = ("reward", "rlsd", "grpo", "sft", "opsd", "opsd-reverse", "crisp", "atesd")
RATE_OF = {"atesd-half": "atesd", "long-reward": "reward"}
CHECKED = ("egrsd", "cl-egrsd")  # is RLSD's rate theirs as well? See HIGH_RATE

# "When does the gate matter?": one property of the task at a time, with the gate and without.
PROPERTIES = {
    "p_reference_hard": ("0.2", "0.8"),
    "p_hard_low": ("0.7", "0.85"),  # its habits are surer; meant to make rewards sparse
    "p_stop": ("0.1", "0.4"),
    "p_filler": ("0.05", "0.5"),
    "p_style": ("0.3", "0.9"),
}

KEY = ("regime", "base", "arm", "seed", "lr", "split")
COLUMNS = (
    *KEY,
    "accuracy",
    "length",
    "problems",
    "delta_off",
    "magnitude_off",
    "gate",
    "seconds",
    "commit",
)
OPERATIONS = ("checks", "slips", "left")  # see operations_of
CURVE = (*KEY, "step", "correct", "length", *OPERATIONS)  # means of ten steps
WRITTEN = re.compile(r"(#\d+) (\d) ([+-]\d) = (\d)")  # an operation in a solution

# --------------------------------------------------------------------------------------------------
# The plan


def plan(which: str, chosen: dict[tuple[str, str], str]) -> Iterator[dict[str, str]]:
    """Runs in order: what answers most comes first, and seed by seed, so that it may stop anywhere.

    `which` is "whole", "more", "quick" or "large". `chosen` is the learning rate of each (regime,
    tuned arm), as far as it is known.
    """
    if which == "quick":
        for seed, arm in itertools.product("01", ("none", "reward", "rlsd", "egrsd", "cl-egrsd")):
            yield line("embedded", "0", arm, seed, "2e-3")
        return
    if which == "large":
        # ours: RLSD's rate in h1 and h2, not searched again
        same_rate = {("h3", "reward"): "1e-3", ("h3", "rlsd"): "1e-3"}
        arms = (*UNTRAINED, "reward", "rlsd", "egrsd", "shuffled")
        yield from every("h3", "0", "012345", arms, same_rate)
        return
    for regime in ("h1", "h2"):
        yield from search_rates(regime)
        yield from every(regime, "012", "012345", (*UNTRAINED, *CORE), chosen)
    yield from every("h1", "012", "012345", OTHERS, chosen)
    methods = [arm for arm in OTHERS if arm in TUNED]
    yield from every("h2", "012", "012345", methods, chosen)
    yield from change_properties("0", chosen)
    yield from every("h1", "012", "012345", SWEEP, chosen)
    if which == "more":
        yield from do_more(chosen)


def change_properties(bases: str, chosen: dict) -> Iterator[dict[str, str]]:
    """Each value has bases of its own: the property is one of what they are pre-trained on."""
    for name, values in PROPERTIES.items():
        for value in values:
            arms = (*UNTRAINED, "rlsd", "egrsd")
            yield from every(f"h2:{name}={value}", bases, "012", arms, chosen)


def do_more(chosen: dict) -> Iterator[dict[str, str]]:
    """What was added when first results had been seen; then h2's other arms, and more bases."""
    yield from every("h1", "012", "012345", HIGH_RATE, chosen)
    yield from every("h1", "012", "012345", LONG, chosen)
    yield from every("h2", "012", "012345", SAME_RATE, chosen)
    variants = [arm for arm in (*OTHERS, *SWEEP) if arm not in TUNED]
    yield from every("h2", "012", "012345", variants, chosen)
    for base in "12":
        yield from change_properties(base, chosen)


def search_rates(regime: str) -> Iterator[dict[str, str]]:
    """On validation problems, each method with the same budget: three rates, one seed."""
    for lr, arm in itertools.product(RATES, (*TUNED, *CHECKED)):
        yield line(regime, "0", arm, "0", lr, split="validation")


def every(regime: str, bases: str, seeds: str, arms, chosen: dict) -> Iterator[dict[str, str]]:
    for seed, base, arm in itertools.product(seeds, bases, arms):
        if arm in UNTRAINED and seed != "0":
            continue  # the base has no seed
        lr = rate_of(regime, arm, chosen)
        if lr:
            yield line(regime, base, arm, seed, lr)


def rate_of(regime: str, arm: str, chosen: dict[tuple[str, str], str]) -> str | None:
    """The learning rate of an arm; None while it is being searched."""
    if arm in UNTRAINED:
        return "0"
    if arm in GIVEN_RATE:
        return GIVEN_RATE[arm]
    tuned = arm if arm in TUNED else RATE_OF.get(arm, "rlsd")
    return chosen.get((regime.split(":")[0], tuned))


def line(regime: str, base: str, arm: str, seed: str, lr: str, split: str = "test") -> dict:
    return {"regime": regime, "base": base, "arm": arm, "seed": seed, "lr": lr, "split": split}


def choose_rates(rows: list[dict]) -> dict[tuple[str, str], str]:
    """(regime, arm) -> the rate with the best validation accuracy, once all are there.

    Where two are equal, the lower one. Seed 0 alone, which each method has: the same budget.
    """
    groups = {}
    for row in rows:
        if row["split"] == "validation" and row["seed"] == "0":
            scores = groups.setdefault((row["regime"], row["arm"]), {})
            scores[row["lr"]] = float(row["accuracy"])
    chosen = {}
    for key, scores in groups.items():
        if len(scores) == len(RATES):
            chosen[key] = max(RATES, key=scores.get)  # the first of the best: RATES go up
    return chosen


def at_chosen_rates(rows: list[dict], chosen: dict[tuple[str, str], str]) -> list[dict]:
    """Without test runs at a rate that was the arm's before its own had been searched, and without
    second seeds of that search."""
    kept = []
    for row in rows:
        if row["split"] == "validation" and row["seed"] != "0":
            continue
        lr = rate_of(row["regime"], row["arm"], chosen)
        rateless = row["split"] != "test" or row["arm"] in UNTRAINED
        if rateless or lr in (None, row["lr"]):
            kept.append(row)
    return kept


# --------------------------------------------------------------------------------------------------
# One run


def name_base(out: Path, regime: str, base: str) -> Path:
    if regime == "embedded":
        return ROOT / "tiny"
    return out / "bases" / f"{regime.replace(':', '-')}-{base}"


def base_is_there(out: Path, regime: str, base: str) -> bool:
    return (name_base(out, regime, base) / "model.safetensors").exists()


def base_folder(out: Path, regime: str, base: str) -> Path:
    """The folder of a base model; whoever asks first makes it with tiny/make.py."""
    folder = name_base(out, regime, base)
    if regime == "embedded":
        return folder
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for it
        if not base_is_there(out, regime, base):
            make_base(folder, regime, base)
    return folder


def make_base(folder: Path, regime: str, base: str) -> None:
    import torch

    name, _, changed = regime.partition(":")
    command = [sys.executable, str(ROOT / "tiny" / "make.py"), "--regime", name, "--seed", base]
    if name == "h3" and torch.cuda.is_available():
        command += ["--device", "cuda"]
    if changed:
        option, _, value = changed.partition("=")
        command += [f"--{option}", value]
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    subprocess.run([*command, "--out", str(beside)], check=True, capture_output=True)
    beside.rename(folder)


def options_of(run: dict[str, str], base: Path, folder: Path) -> list[str]:
    """The options of baselines.py that this run is."""
    options = [*COMMON, "--model", str(base), "--data", str(base / "train.jsonl")]
    options += ["--eval_data", str(base / f"{run['split']}.jsonl"), "--out", str(folder)]
    options += ["--max_completion", str(CAPS[run["regime"].split(":")[0]]), "--seed", run["seed"]]
    if run["regime"] == "h3":  # its prompts are longer than the preset's limit allows
        options += ["--max_length", "384"]
    options += ARMS.get(run["arm"], [])
    if run["arm"] not in UNTRAINED:
        options += ["--lr", run["lr"]]
    return options


def measure_teacher(
    run: dict[str, str], base: Path, see_reference: Callable[[list[str]], dict[str, float]]
) -> tuple[dict, list[dict]]:
    """The row of a base with the reference in view, and no curve."""
    began = time.perf_counter()
    found = see_reference(options_of(run, base, base))
    row = {**run, **dict.fromkeys(COLUMNS[len(KEY) :], "")}
    row["accuracy"] = round(found["accuracy"], 2)
    row["length"] = round(found["length"], 2)
    row["problems"] = sum(1 for _ in (base / f"{run['split']}.jsonl").open())
    row["seconds"] = round(time.perf_counter() - began, 1)
    row["commit"] = versions().get("commit", "")
    return row, []


def measure(run: dict[str, str], folder: Path) -> tuple[dict, list[dict]]:
    """A row of runs.csv and its rows of curves.csv, from the run's own files."""
    summary = read_json(folder / "summary.json")
    log = []
    if (folder / "log.jsonl").exists():
        log = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    row = {**run, **dict.fromkeys(COLUMNS[len(KEY) :], "")}
    row["accuracy"] = summary["after"]["accuracy"]
    row["length"] = summary["after"]["length"]
    row["problems"] = summary["after"]["samples"]
    row["seconds"] = summary["seconds"]["this_start"]
    row["commit"] = read_json(folder / "versions.json", {}).get("commit", "")
    for name in ("delta_off", "magnitude_off", "gate"):  # over the last twenty steps
        values = [step[name] for step in log[-20:] if step[name] is not None]
        if values:
            row[name] = round(statistics.fmean(values), 4)
    curve = []
    for start in range(0, len(log), 10):
        part = log[start : start + 10]
        means = {}
        for name in ("correct", "length"):
            means[name] = round(statistics.fmean(step[name] for step in part), 4)
        steps = range(start, start + len(part))
        if run["arm"] != "sft":  # its rollouts are the references
            means |= operations_of(folder / "rollouts.jsonl", steps)
        curve.append({**run, "step": start + len(part), **means})
    return row, curve


def operations_of(rollouts: Path, steps: range) -> dict[str, float]:
    """Of the operations in these steps' rollouts: how often one is checked; and the shares of them
    whose first value is wrong, and whose last one is. Nothing without rollouts."""
    counts = collections.Counter()
    if rollouts.exists():
        for text in rollouts.read_text().splitlines():
            row = json.loads(text)
            if row["step"] in steps:
                counts += operations_in(row["text"])
    total = counts["operations"]
    return {name: round(counts[name] / total, 4) for name in OPERATIONS if total}


def operations_in(text: str) -> collections.Counter:
    """Each is judged by itself: a wrong value that the next one starts from counts once."""
    counts = collections.Counter(checks=text.count("wait check"))
    last = {}
    for label, x, change, value in WRITTEN.findall(text):
        wrong = (int(x) + int(change)) % 10 != int(value)
        if label not in last:
            counts.update(operations=1, slips=wrong)
        last[label] = wrong
    counts["left"] = sum(last.values())
    return counts


# --------------------------------------------------------------------------------------------------
# All runs, in processes side by side


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def add_rows(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """One writer at a time."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns)
        if not file.seek(0, 2):
            writer.writeheader()
        writer.writerows(rows)


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def next_run(which: str, results: Path, taken: set, out: Path) -> dict[str, str] | None:
    """The first run of the plan that nobody has done or is doing, and whose base nobody makes."""
    rows = read_rows(results / "runs.csv")
    done = {key_of(row) for row in rows} | taken
    waited_for = {key[:2] for key in taken if not base_is_there(out, *key[:2])}
    for run in plan(which, choose_rates(rows)):
        if key_of(run) not in done and (run["regime"], run["base"]) not in waited_for:
            return run
    return None


def end_with_parent() -> None:
    """Else what a killed study has begun goes on, in the folder that the next study writes to."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(
    inbox: multiprocessing.Queue,
    outbox: multiprocessing.Queue,
    out: Path,
    log: Path,
    train: Callable,
    see_reference: Callable,
) -> None:
    """A process that does one run after another; what it would print goes to a file."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)  # of Ctrl-C the study itself speaks
    threading.Thread(target=end_with_parent, daemon=True).start()
    while (run := inbox.get()) is not None:
        folder = out / "runs" / "-".join(key_of(run)).replace(":", "-")
        shutil.rmtree(folder, ignore_errors=True)  # half a run is begun again
        try:
            base = base_folder(out, run["regime"], run["base"])
            if run["arm"] == "teacher":
                outbox.put((run, measure_teacher(run, base, see_reference), ""))
                continue
            train(options_of(run, base, folder))
            outbox.put((run, measure(run, folder), ""))
        except (SystemExit, Exception) as error:  # whatever it is, the study must not wait for it
            outbox.put((run, None, f"{type(error).__name__}: {error}"))


def do_runs(
    which: str,
    out: Path,
    results: Path,
    jobs: int,
    minutes: float,
    train: Callable,
    see_reference: Callable,
) -> None:
    """Keep `jobs` processes busy until the plan is done, or the minutes are over."""
    end = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    outbox = context.Queue()
    workers = []
    idle = []
    for number in range(jobs):
        inbox = context.Queue()
        log = out / f"worker_{number}.log"
        given = inbox, outbox, out, log, train, see_reference
        worker = context.Process(target=work, args=given, daemon=True)
        worker.start()
        workers.append(worker)
        idle.append(inbox)
    try:
        keep_busy(which, results, idle, functools.partial(take, outbox, workers), end, out)
        for inbox in idle:
            inbox.put(None)
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        fail("stopped. The same command goes on: finished runs are not run again")
    finally:
        for worker in workers:
            worker.kill()  # a training run takes SIGTERM for "save, then end"


def take(outbox: multiprocessing.Queue, workers: list) -> tuple:
    """What a process has to say next; exits where one of them is gone."""
    while True:
        try:
            return outbox.get(timeout=5)
        except queue.Empty:
            if not all(worker.is_alive() for worker in workers):
                fail("a process of the study is gone: killed, by somebody or for want of memory")


def keep_busy(
    which: str,
    results: Path,
    idle: list[multiprocessing.Queue],
    take_result: Callable[[], tuple],
    end: float,
    out: Path,
) -> None:
    """Give a run to whoever is idle, and write down what comes back."""
    from tqdm import tqdm

    busy = {}
    bar = tqdm(desc="study", unit="run")
    while True:
        while idle and time.monotonic() < end:
            run = next_run(which, results, set(busy), out)
            if run is None:
                break
            inbox = idle.pop()
            busy[key_of(run)] = inbox
            inbox.put(run)
        if not busy:
            break
        run, measured, error = take_result()
        idle.append(busy.pop(key_of(run)))
        if error:
            fail(f"{' '.join(key_of(run))} ended with {error}; see {out}/worker_*.log")
        row, curve = measured
        add_rows(results / "curves.csv", CURVE, curve)
        add_rows(results / "runs.csv", COLUMNS, [row])
        bar.update()
        bar.set_postfix_str(f"{run['regime']} {run['arm']} {row['accuracy']} %")
    bar.close()


def main(
    argv: list[str],
    train: Callable[[list[str]], None],
    see_reference: Callable[[list[str]], dict[str, float]],
) -> None:
    """`train(options)` is one run of baselines.py, `see_reference(options)` gives the accuracy and
    length of a base that sees the references. Other processes must be able to import both.
    """
    parser = argparse.ArgumentParser(
        prog="baselines.py --study", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--study", action="store_true", help="this")
    which = {"dest": "which", "action": "store_const", "default": "whole"}
    add("--more", const="more", **which, help="then h2's other arms, more bases, later ideas")
    add("--quick", const="quick", **which, help="ten runs of the embedded task, minutes")
    add("--large", const="large", **which, help="regime h3, 29 times as large, for a GPU")
    add("--report", action="store_true", help="no run: draw tables and figures again")
    add("--jobs", type=int, default=2, help="processes side by side, each on one core")
    add("--minutes", type=float, default=1e6, help="start no run after that time")
    add("--out", type=Path, default=Path("runs/study"), help="folder for bases, runs and logs")
    add("--results", type=Path, help="folder of the CSV files; by default results, or OUT/quick")
    o = parser.parse_args(argv)
    if o.jobs < 1:
        parser.error("--jobs must be at least 1")
    results = o.results or (o.out / "quick" if o.which == "quick" else ROOT / "results")
    if not o.report:
        make_folder(o.out / "bases")
        make_folder(results)
        write_json(o.out / "arms.json", ARMS)
        do_runs(o.which, o.out, results, o.jobs, o.minutes, train, see_reference)
    if not (results / "runs.csv").exists():
        fail(f"--report: there is no {results}/runs.csv; --study without --report makes it")
    page = ROOT / "RESULTS.md" if results == ROOT / "results" else results / "RESULTS.md"
    rows = read_rows(results / "runs.csv")
    curves = read_rows(results / "curves.csv")
    chosen = choose_rates(rows)
    report.write(at_chosen_rates(rows, chosen), at_chosen_rates(curves, chosen), results, page)
    say(f"tables in {page}, figures in {results}")
