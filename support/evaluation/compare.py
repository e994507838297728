"""Comparison of finished evaluations: paired differences, the paper's rows beside ours, sweeps."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from support.evaluation.benchmarks import FREE, read_samples
from support.evaluation.plots import draw_frontier, draw_heatmaps
from support.evaluation.scores import (
    column,
    combine,
    grouped,
    missing_samples,
    paired_difference,
    paper_rows,
    run_scores,
    show,
    table,
    tokens_of,
)
from support.shared.console import fail, say
from support.shared.files import make_folder, read_json, remove, write_json, write_text
from support.shared.options import check_rules

# What the paper's averages, lengths and Eff span.
SIX = ("aime24", "aime25", "hmmt25", "math500", "minerva", "gsm8k")
MAIN_TABLE = {"qwen3-4b": "2", "qwen3-8b": "3", "acereason-7b": "A4", "olmo3-7b": "A5"}
BULKY = ("samples", "settings")  # of a run, and no part of its summary
ALL_SIX = " (its six benchmarks)"  # of a published average beside fewer benchmarks of ours
NOT_A_DIFFERENCE = (*FREE, "weights", "adapter_weights", "benchmarks")


def compare(out: Path, folders: tuple[str, ...], published: str) -> None:
    """The runs' figures, paired differences to the first, the paper's rows, sweeps, plots."""
    runs = [load_run(folder) for folder in folders]
    names = common_benchmarks(runs)
    model, _, number = published.partition(":")
    paper = []
    for row in paper_rows(model, [number or MAIN_TABLE.get(model)]):
        if {"avg", *names} & {*row}:
            paper.append(row)
    rules = [
        (
            (out / "samples.jsonl").exists(),
            f"--out {out} holds an evaluation; a comparison needs its own folder",
        ),
        (not names, "--compare: the runs have no benchmark in common"),
        (
            published and not paper,
            f"--paper {published}: paper_tables.csv has no such rows, or none with an average; it "
            f"has {', '.join(MAIN_TABLE)}",
        ),
    ]
    check_rules(rules, fail)
    give_labels(runs)
    for run in runs:
        run.update(run_scores(run["samples"], names))
    last = last_of_each_training(runs)
    text = accuracy_text(runs, paper, names)
    text += difference_text(runs, names)
    text += steps_text(runs, model, names)
    text += sweep_text(last, model, names)

    make_folder(out)
    draw_frontier(out / "frontier.png", frontier_points(runs, paper, names))
    remove(out / "heatmaps.png")  # of an earlier comparison
    draw_heatmaps(out / "heatmaps.png", heatmap_cells(last))
    write_text(out / "table.md", text)
    kept = []
    for run in runs:
        kept.append({key: run[key] for key in run if key not in BULKY})
    write_json(out / "summary.json", kept)
    pictures = ", ".join(sorted(path.name for path in out.glob("*.png")))
    say(f"{text}\nsaved in {out}: table.md, summary.json, {pictures}")


# --------------------------------------------------------------------------------------------------
# The runs


def load_run(folder: str) -> dict:
    """{name, folder, settings, gamma, W, step, run, samples by benchmark} of an evaluation."""
    path = Path(folder)
    if not (path / "summary.json").is_file():
        fail(
            f"--compare {folder}: no finished evaluation there (no summary.json). Its own command "
            "finishes it"
        )
    settings = read_json(path / "settings.json")
    samples = read_samples(path).values()
    missing = missing_samples(settings, samples)
    if missing:
        fail(
            f"--compare {folder}: {missing} samples are missing since its summary was written. Its "
            "command goes on"
        )
    return {
        "name": path.resolve().name,
        "folder": folder,
        "settings": settings,
        **settings["training"],
        "samples": grouped(samples, lambda row: row["benchmark"]),
    }


def common_benchmarks(runs: list[dict]) -> list[str]:
    names = []
    for name in runs[0]["settings"]["problems"]:  # in the order in which they were asked for
        if all(name in run["samples"] for run in runs):
            names.append(name)
    return names


def give_labels(runs: list[dict]) -> None:
    """The folder's name, or its whole path where two have the same; and the method, if known."""
    names = column(runs, "name")
    for run in runs:
        run["label"] = run["name"] if names.count(run["name"]) == 1 else run["folder"]
        if "method" in run:
            run["label"] += f" ({run['method']})"


def training_label(run: dict) -> str:
    """ "gamma 1.0 W 5", and the method where that does not tell it."""
    about = f"gamma {run['gamma']} W {run['W']}"
    method = run.get("method", "EGRSD")
    if method in ("EGRSD", "CL-EGRSD", "RLSD"):
        return about
    return f"{method}, {about}" if method.startswith(("EGRSD", "CL-EGRSD")) else method


def unlike(run: dict, runs: Iterable[dict]) -> str:
    """The training's label, with its folder where another has the same: other seeds, say."""
    label = training_label(run)
    if sum(training_label(other) == label for other in runs) > 1:
        return f"{label}, {run['run']}"
    return label


def by_training(runs: list[dict]) -> dict[tuple, list[dict]]:
    """(gamma, W, run) -> its evaluated steps in order; runs without an adapter are left out."""
    trained = [run for run in runs if "gamma" in run]
    trained.sort(key=lambda run: (run["gamma"], run["W"], run["run"], run["step"]))
    return grouped(trained, lambda run: (run["gamma"], run["W"], run["run"]))


def last_of_each_training(runs: list[dict]) -> dict[tuple, dict]:
    last = {}
    for training, group in by_training(runs).items():
        last[training] = group[-1]
    return last


# --------------------------------------------------------------------------------------------------
# Rows and tables


def our_row(label: str, run: dict) -> list[str]:
    cells = [show(b["accuracy"], b["se"]) for b in run["benchmarks"].values()]
    cells.append(show(run["accuracy"], run["se"]))
    return [label, *cells, show(run["length"], run["length_se"], 1), show(run["eff"])]


def paper_row(row: dict, names: list[str]) -> list[str]:
    """The paper's averages span its six benchmarks: beside fewer, only their own mean will do."""
    label = row["label"]
    cells = list(map(show, map(row.get, names)))
    all_six = {*names} == {*SIX}
    if not all_six and {*names} <= {*row}:
        mean = statistics.fmean(map(row.get, names))
        return [label, *cells, show(mean), "", ""]
    if not all_six and "avg" in row:
        label += ALL_SIX
    length = show(row.get("length"), digits=0)
    return [label, *cells, show(row.get("avg")), length, show(row.get("eff"))]


def lines_of_paper(rows: list[dict], names: list[str]) -> list[list[str]]:
    """The table rows of those that say anything about these benchmarks."""
    lines = []
    for row in rows:
        line = paper_row(row, names)
        if any(line[1:]):
            lines.append(line)
    return lines


def accuracy_text(runs: list[dict], paper: list[dict], names: list[str]) -> str:
    header = ["run", *names, "Avg.", "tokens", "Eff"]
    rows = []
    for run in runs:
        rows.append(our_row(run["label"], run))
    rows += lines_of_paper(paper, names)
    text = "Accuracy in %, +- one standard error\n\n" + table(header, rows)
    unlike = []
    for key in runs[0]["settings"]:
        values = {json.dumps(run["settings"].get(key)) for run in runs}
        if key not in NOT_A_DIFFERENCE and len(values) > 1:
            unlike.append(key)
    if unlike:
        text += f"\nThe runs also differ in {', '.join(unlike)}\n"
    return text


def difference_text(runs: list[dict], names: list[str]) -> str:
    """Each run against the first, problem by problem; also kept in run["differences"]."""
    first = runs[0]
    header = ["run", *names, "Avg.", "tokens"]
    rows = []
    for run in runs[1:]:
        run["differences"] = differences_to(first, run, names)
        cells = []
        for name, (difference, se, *_) in run["differences"].items():
            clear = se is None or abs(difference) > 2 * se  # of one problem nothing is known
            digits = 1 if name == "tokens" else 2
            cells.append(show(difference, se, digits, "+") + ("  " if clear else " ~"))
        rows.append([run["label"], *cells])
    if not rows:
        return ""
    text = f"\nDifference to {first['label']}, paired by problem, +- one SE; ~ is within two SE of "
    return text + "zero\n\n" + table(header, rows) + partly_paired(runs, names)


def partly_paired(runs: list[dict], names: list[str]) -> str:
    """Where the runs share only some problems, the differences are of those alone."""
    text = ""
    for run in runs[1:]:
        for name in names:
            shared = run["differences"][name][2]
            each = [r["benchmarks"][name]["problems"] for r in (runs[0], run)]
            if shared < max(each):
                text += f"{run['label']}, {name}: {shared} problems in common\n"
    return text and f"\nNot all problems are in both runs. {text}"


def differences_to(first: dict, run: dict, names: list[str]) -> dict[str, tuple]:
    """benchmark, "Avg." and "tokens" -> (mean difference, its SE, ...)"""
    accuracy = {}
    tokens = []
    for name in names:
        ours = run["samples"][name]
        theirs = first["samples"][name]
        accuracy[name] = paired_difference(ours, theirs)
        tokens.append(paired_difference(ours, theirs, tokens_of))
    average = mean_difference(list(accuracy.values()))
    return {**accuracy, "Avg.": average, "tokens": mean_difference(tokens)}


def mean_difference(parts: list[tuple]) -> tuple[float, float | None]:
    means, errors, *_ = zip(*parts)
    return combine(list(means), list(errors))


def steps_text(runs: list[dict], model: str, names: list[str]) -> str:
    """Avg. over the training steps at which a run was evaluated."""
    trainings = by_training(runs)
    steps = set()
    for group in trainings.values():
        steps.update(column(group, "step"))
    if len(steps) < 2:
        return ""
    steps = sorted(steps)
    rows = []
    for group in trainings.values():
        at = {}
        for run in group:
            at[run["step"]] = show(run["accuracy"], run["se"])
        row = [unlike(group[0], [others[0] for others in trainings.values()])]
        for step in steps:
            row.append(at.get(step, ""))
        rows.append(row)
    if len(steps) == 4:
        for row in paper_rows(model, ["4"]):
            snapshots = row["S1"], row["S2"], row["S3"], row["S4"]
            label = row["label"] + ("" if {*names} == {*SIX} else ALL_SIX)
            rows.append([label, *map(show, snapshots)])
    header = ["training"]
    for n, step in enumerate(steps, 1):
        header.append(f"S{n}: {step}")
    return "\nAvg. by training step (Table 4)\n\n" + table(header, rows)


def sweep_text(last: dict[tuple, dict], model: str, names: list[str]) -> str:
    """The last step of each training side by side."""
    if len(last) < 2:
        return ""
    header = ["training", *names, "Avg.", "tokens", "Eff"]
    rows = []
    for run in last.values():
        rows.append(our_row(f"{unlike(run, last.values())}, step {run['step']}", run))
    rows += lines_of_paper(paper_rows(model, ["6", "A3"]), names)
    return "\nLast step of each training (Tables 6, A3)\n\n" + table(header, rows)


# --------------------------------------------------------------------------------------------------
# What the plots show


def frontier_points(runs: list[dict], paper: list[dict], names: list[str]) -> list[dict]:
    points = []
    for run in runs:
        points.append({**run, "ours": True})
    methods = column(paper, "method")
    for row in paper:
        if "eff" in row and {*names} == {*SIX}:
            about = row["method"]
            if methods.count(about) > 1:  # gamma and W tell them apart
                about = row["label"].partition(": ")[2]
            point = {"label": f"{about} (paper)", "length": row["length"], "accuracy": row["avg"]}
            points.append({**point, "length_se": None, "se": None, "ours": False})
    return points


def heatmap_cells(last: dict[tuple, dict]) -> dict[tuple[float, int], dict[str, float]]:
    """(gamma, W) -> {benchmark or "Avg.": accuracy}, of the runs that are told by these two.

    Several, of other seeds, are averaged.
    """
    found = {}
    for (gamma, W, _), run in last.items():
        if training_label(run) != f"gamma {gamma} W {W}":
            continue
        cell = {}
        for name, b in run["benchmarks"].items():
            cell[name] = b["accuracy"]
        cell["Avg."] = run["accuracy"]
        found.setdefault((gamma, W), []).append(cell)
    cells = {}
    for setting, several in found.items():
        cells[setting] = {}
        for name in several[0]:
            cells[setting][name] = statistics.fmean(column(several, name))
    return cells
