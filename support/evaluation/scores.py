"""Scores of samples: standard errors clustered by problem, paired differences, and their tables."""

import collections
import csv
import math
import statistics
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from support.evaluation.benchmarks import read_samples
from support.shared.console import fail, say
from support.shared.files import read_json, remove, write_json, write_text

# --------------------------------------------------------------------------------------------------
# Statistics: pure functions of samples. Accuracies and shares are in percent, lengths in tokens.


def grouped(rows: Iterable[dict], key: Callable, value: Callable = lambda row: row) -> dict:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[key(row)].append(value(row))
    return dict(groups)


def column(rows: Iterable[dict], key: str) -> list:
    return [row[key] for row in rows]


def percent_right(row: dict) -> float:
    return 100.0 * row["correct"]


def tokens_of(row: dict) -> int:
    return row["tokens"]


def problem_of(row: dict) -> tuple[str, str]:
    return row["id"], row["gold"]


def problem_means(samples: Iterable[dict], value: Callable) -> dict[tuple[str, str], float]:
    """(id, gold) -> mean of value(row) over the problem's samples, of all runs."""
    means = {}
    for key, values in grouped(samples, problem_of, value).items():
        means[key] = statistics.fmean(values)
    return means


def mean_and_se(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean of n independent values and sd / sqrt(n), n - 1 in the sd; None for a single one."""
    values = list(values)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def combine(means: list[float], errors: list[float | None]) -> tuple[float, float | None]:
    """Mean of independent figures and its SE, sqrt(sum of SE^2) / n."""
    if None in errors:
        return statistics.fmean(means), None
    return statistics.fmean(means), math.hypot(*errors) / len(errors)


def benchmark_scores(samples: list[dict]) -> dict:
    """Every figure of one benchmark; a problem's samples are one observation of the SEs."""
    accuracy, se = mean_and_se(problem_means(samples, percent_right).values())
    length, length_se = mean_and_se(problem_means(samples, tokens_of).values())
    attempts = grouped(samples, lambda row: (row["run"], row["id"]), lambda row: row["correct"])
    passed = [any(tries) for tries in attempts.values()]
    by_run = grouped(samples, lambda row: row["run"], percent_right)
    runs = []
    for run in sorted(by_run):
        runs.append(statistics.fmean(by_run[run]))
    return {
        "problems": len(grouped(samples, lambda row: row["id"])),
        "samples": len(samples),
        "accuracy": accuracy,
        "se": se,
        "pass_at_k": 100 * statistics.fmean(passed),
        "length": length,
        "length_se": length_se,
        "truncated": percent_of(samples, "finish", "length"),
        "unboxed": percent_of(samples, "extracted", None),
        "timeouts": column(samples, "status").count("timeout"),
        "run_accuracies": runs,
        "run_sd": statistics.stdev(runs) if len(runs) > 1 else None,
        "graders": grader_scores(samples),
    }


def percent_of(samples: list[dict], key: str, value: object) -> float:
    return 100 * column(samples, key).count(value) / len(samples)


def grader_scores(samples: list[dict]) -> dict[str, tuple[float, float | None]]:
    """Accuracy and SE by each grader whose verdicts the samples hold."""
    scores = {}
    for which in samples[0].get("graders", ()):
        right = problem_means(samples, lambda row, which=which: 100.0 * row["graders"][which])
        scores[which] = mean_and_se(right.values())
    return scores


def run_scores(samples: dict[str, list[dict]], names: Iterable[str]) -> dict:
    """{benchmarks: {name: scores}, accuracy, se, length, length_se, eff}; all weigh the same."""
    scores = {name: benchmark_scores(samples[name]) for name in names}
    each = scores.values()
    accuracy, se = combine(column(each, "accuracy"), column(each, "se"))
    length, length_se = combine(column(each, "length"), column(each, "length_se"))
    return {
        "benchmarks": scores,
        "accuracy": accuracy,
        "se": se,
        "length": length,
        "length_se": length_se,
        "eff": accuracy / (length / 1000),
    }


def paired_difference(
    ours: list[dict], reference: list[dict], value: Callable = percent_right
) -> tuple[float, float | None, int]:
    """Mean of the differences by problem, its SE, and the number of problems that both answered.

    What makes a problem hard is in both runs and cancels, so this SE is smaller than that of two
    separate runs.
    """
    a = problem_means(ours, value)
    b = problem_means(reference, value)
    differences = []
    for key in a:
        if key in b:
            differences.append(a[key] - b[key])
    if not differences:
        fail("--compare: the runs have no problem (same id and answer) in common")
    mean, se = mean_and_se(differences)
    return mean, se, len(differences)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the (length, accuracy) that no other is at most as long and at least as right."""
    best = []
    for i, (x, y) in enumerate(points):
        beaten = False
        for u, v in points:
            if (u, v) != (x, y) and u <= x and v >= y:
                beaten = True
        if not beaten:
            best.append(i)
    return best


# --------------------------------------------------------------------------------------------------
# Tables


def show(value: float | None, se: float | None = None, digits: int = 2, sign: str = "") -> str:
    text = "" if value is None else f"{value:{sign},.{digits}f}"
    return text if se is None else f"{text} +- {se:,.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned so that it reads on a screen too: first column left, others right."""
    lines = []
    for row in (header, *rows):
        lines.append([cell.replace("|", r"\|") for cell in row])  # of a folder's name, say
    header, *rows = lines
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0]]
    for width in widths[1:]:
        rule.append("-" * (width - 1) + ":")
    text = ""
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:]):
            cells.append(cell.rjust(width))
        text += "| " + " | ".join(cells) + " |\n"
    return text


def missing_samples(settings: dict, rows: Collection[dict]) -> int:
    """How many samples an evaluation still lacks, by its settings.json."""
    wanted = 0
    for name, (problems, _) in settings["problems"].items():
        runs = settings["aime24_runs"] if name == "aime24" else 1
        wanted += problems * settings["K"] * runs
    return wanted - len(rows)


def report(out: Path) -> None:
    """Print and save table.md and summary.json, once every sample is there."""
    settings = read_json(out / "settings.json")
    rows = read_samples(out).values()
    missing = missing_samples(settings, rows)
    if missing:
        for name in ("summary.json", "table.md"):  # of samples that are gone
            remove(out / name)
        say(
            f"{out} lacks {missing} samples, no table yet. Its original command goes on, "
            f"with --grader {settings['grader']}"
        )
        return
    scores = run_scores(grouped(rows, lambda row: row["benchmark"]), settings["problems"])
    text = report_text(scores, settings)
    about = {key: settings[key] for key in ("model", "adapter", "training", "K", "grader")}
    write_json(out / "summary.json", {**about, **scores})
    write_text(out / "table.md", text)
    say(f"\n{text}\nsaved in {out}")


def report_text(scores: dict, settings: dict) -> str:
    """The table of a run, and what does not fit into it."""
    K = settings["K"]
    header = ["benchmark", "problems", "runs x K", f"avg@{K} %", f"pass@{K} %", "tokens"]
    header += ["cut %", "no box %", "time-outs"]
    lines = []
    for name, b in scores["benchmarks"].items():
        runs = settings["aime24_runs"] if name == "aime24" else 1
        line = [name, str(b["problems"]), f"{runs} x {K}", show(b["accuracy"], b["se"])]
        line += [show(b["pass_at_k"]), show(b["length"], b["length_se"], 1)]
        line += [show(b["truncated"]), show(b["unboxed"]), str(b["timeouts"])]
        lines.append(line)
    average = ["Avg.", "", "", show(scores["accuracy"], scores["se"]), ""]
    average += [show(scores["length"], scores["length_se"], 1), "", "", ""]
    text = table(header, [*lines, average])
    text += f"\nEff {scores['eff']:.2f} (percent per 1,000 tokens), grader {settings['grader']}"
    text += "; +- is one SE\n"
    for name, b in scores["benchmarks"].items():
        if b["run_sd"] is not None:
            runs = ", ".join(map(show, b["run_accuracies"]))
            text += f"{name} by run: {runs}; sd between runs {b['run_sd']:.2f}\n"
        for which, (accuracy, se) in b["graders"].items():
            text += f"{name}, grader {which}: {show(accuracy, se)}\n"
    return text


def paper_rows(model: str, tables: Iterable[str]) -> list[dict]:
    """[{label, method, metric: value}] of some published tables.

    A length that is printed in another table is filled in.
    """
    with Path(__file__).with_name("paper_tables.csv").open(newline="") as file:
        figures = [row for row in csv.DictReader(file) if row["model"] == model]
    by_row = grouped(figures, lambda f: (f["table"], f["method"], f["gamma"], f["W"]))
    rows = []
    for (number, method, gamma, W), metrics in by_row.items():
        label = f"paper, Table {number}: {method}"
        if gamma:
            label += f" gamma {gamma}"
        if W:
            label += f" W {W}"
        row = {"table": number, "method": method, "label": label}
        for f in metrics:
            row[f["metric"]] = float(f["value"])
        rows.append(row)
    for row in rows:
        twin = row_with_length(rows, row)
        if twin:
            row["length"] = twin["length"]
            row["eff"] = row["avg"] / twin["length"] * 1000
    return [row for row in rows if row["table"] in tables]


def row_with_length(rows: list[dict], row: dict) -> dict | None:
    """The first row of the same run, told by method and average, that has a length."""
    for twin in rows:
        if "length" not in twin:
            continue
        if twin["method"] == row["method"] and twin["avg"] == row.get("avg"):
            return twin
    return None
