"""Scores of samples: standard errors clustered by problem, paired differences, and the tables that show them."""
import collections
import csv
import math
import statistics
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from support.basics import fail, read_json, say, write_json, write_text
from support.benchmarks import read_samples



# ---------------------------------------------------------------------------------------------------------------------
# Statistics: pure functions of samples. Accuracies and shares are in percent, lengths in tokens.


def grouped(rows: Iterable[dict], key: Callable, value: Callable = lambda row: row) -> dict:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[key(row)].append(value(row))
    return dict(groups)


def percent_right(row: dict) -> float:
    return 100.0 * row["correct"]


def problem_means(samples: Iterable[dict], value: Callable) -> dict[tuple[str, str], float]:
    """(id, gold) -> mean of value(row) over the problem's samples, of all runs."""
    return {k: statistics.fmean(v) for k, v in grouped(samples, lambda row: (row["id"], row["gold"]), value).items()}


def mean_and_se(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean of n independent values and sd / sqrt(n), with n - 1 in the sd; a single value has no standard error."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def combine(means: list[float], errors: list[float | None]) -> tuple[float, float | None]:
    """Mean of independent figures and its SE, sqrt(sum of SE^2) / n."""
    return statistics.fmean(means), None if None in errors else math.sqrt(sum(se * se for se in errors)) / len(errors)


def benchmark_scores(samples: list[dict]) -> dict:
    """Every figure of one benchmark; the standard errors take a problem's samples as one observation."""
    accuracy, se = mean_and_se(problem_means(samples, percent_right).values())
    length, length_se = mean_and_se(problem_means(samples, lambda row: row["tokens"]).values())
    attempts = grouped(samples, lambda row: (row["run"], row["id"]), lambda row: row["correct"])
    runs = [statistics.fmean(v) for _, v in sorted(grouped(samples, lambda row: row["run"], percent_right).items())]
    share = lambda flags: 100 * statistics.fmean(flags)  # noqa: E731
    return {"problems": len({row["id"] for row in samples}), "samples": len(samples), "accuracy": accuracy, "se": se,
            "pass_at_k": share(any(v) for v in attempts.values()), "length": length, "length_se": length_se,
            "truncated": share(row["finish"] == "length" for row in samples),
            "unboxed": share(row["extracted"] is None for row in samples),
            "timeouts": sum(row["status"] == "timeout" for row in samples), "run_accuracies": runs,
            "run_sd": statistics.stdev(runs) if len(runs) > 1 else None,
            "graders": {which: mean_and_se(problem_means(samples, lambda row: 100.0 * row["graders"][which]).values())
                        for which in samples[0].get("graders", ())}}


def run_scores(samples: dict[str, list[dict]], names: Iterable[str]) -> dict:
    """{benchmarks: {name: scores}, accuracy, se, length, length_se, eff} of a run; all benchmarks weigh the same."""
    scores = {name: benchmark_scores(samples[name]) for name in names}
    column = lambda key: [b[key] for b in scores.values()]  # noqa: E731
    accuracy, se = combine(column("accuracy"), column("se"))
    length, length_se = combine(column("length"), column("length_se"))
    return {"benchmarks": scores, "accuracy": accuracy, "se": se, "length": length, "length_se": length_se,
            "eff": accuracy / (length / 1000)}


def paired_difference(ours: list[dict], reference: list[dict], value: Callable = percent_right) -> tuple:
    """Mean of the differences by problem, its SE (or None), and the number of problems; those that both runs answered.

    What makes a problem hard is in both runs and cancels, so this SE is smaller than that of two separate runs.
    """
    a, b = problem_means(ours, value), problem_means(reference, value)
    common = [k for k in a if k in b]
    if not common:
        fail("--compare: the runs have no problem (same id and answer) in common")
    return *mean_and_se(a[k] - b[k] for k in common), len(common)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the (length, accuracy) that no other one beats by being at most as long and at least as right."""
    return [i for i, (x, y) in enumerate(points) if not any(u <= x and v >= y and (u, v) != (x, y) for u, v in points)]



# ---------------------------------------------------------------------------------------------------------------------
# Tables


def show(value: float | None, se: float | None = None, digits: int = 2, sign: str = "") -> str:
    text = "" if value is None else f"{value:{sign},.{digits}f}"
    return text if se is None else f"{text} +- {se:,.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned so that it reads on a screen as well."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rows = [header, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows]
    pads = [str.ljust, *[str.rjust] * len(widths)]
    return "".join("| " + " | ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths)) + " |\n" for row in rows)


def missing_samples(settings: dict, rows: Collection[dict]) -> int:
    """How many samples an evaluation still lacks, by its settings.json."""
    runs = {"aime24": settings["aime24_runs"]}
    return sum(n * settings["K"] * runs.get(name, 1) for name, (n, _) in settings["problems"].items()) - len(rows)


def report(out: Path) -> None:
    """Print and save table.md and summary.json, once every sample is there."""
    settings, rows = read_json(out / "settings.json"), read_samples(out).values()
    K, runs = settings["K"], {"aime24": settings["aime24_runs"]}
    if missing := missing_samples(settings, rows):
        for name in ("summary.json", "table.md"):  # of samples that are gone
            (out / name).unlink(missing_ok=True)
        return say(f"{out} lacks {missing} samples, no table yet. Its command without --regrade goes on")
    scores = run_scores(grouped(rows, lambda row: row["benchmark"]), settings["problems"])
    lines = [[name, str(b.get("problems", "")), f"{runs.get(name, 1)} x {K}" if "problems" in b else "",
              show(b["accuracy"], b["se"]), show(b.get("pass_at_k")), show(b["length"], b["length_se"], 1),
              show(b.get("truncated")), show(b.get("unboxed")), str(b.get("timeouts", ""))]
             for name, b in [*scores["benchmarks"].items(), ("Avg.", scores)]]
    text = table(["benchmark", "problems", "runs x K", f"avg@{K} %", f"pass@{K} %", "tokens", "cut %", "no box %",
                  "time-outs"], lines)
    text += f"\nEff {scores['eff']:.2f} (percent per 1,000 tokens), grader {settings['grader']}; +- is one SE\n"
    for name, b in scores["benchmarks"].items():
        if b["run_sd"] is not None:
            text += f"{name} by run: {', '.join(map(show, b['run_accuracies']))}; sd between runs {b['run_sd']:.2f}\n"
        text += "".join(f"{name}, grader {which}: {show(*both)}\n" for which, both in b["graders"].items())
    about = {k: settings[k] for k in ("model", "adapter", "training", "K", "grader")}
    write_json(out / "summary.json", about | scores)
    write_text(out / "table.md", text)
    say(f"\n{text}\nsaved in {out}")


def paper_rows(model: str, tables: Iterable[str]) -> list[dict]:
    """[{label, method, metric: value}] of some published tables; a length printed in another table is filled in."""
    with Path(__file__).with_name("paper_tables.csv").open(newline="") as file:
        figures = [row for row in csv.DictReader(file) if row["model"] == model]
    rows = []
    for (number, method, gamma, W), metrics in grouped(figures, lambda f: (f["table"], f["method"], f["gamma"], f["W"]),
                                                       lambda f: (f["metric"], float(f["value"]))).items():
        label = f"paper, Table {number}: {method}" + f" gamma {gamma}" * bool(gamma) + f" W {W}" * bool(W)
        rows.append({"table": number, "method": method, "label": label, **dict(metrics)})
    for row in rows:
        twins = [r for r in rows if r["method"] == row["method"] and "length" in r and r["avg"] == row.get("avg")]
        row |= {"length": twins[0]["length"], "eff": row["avg"] / twins[0]["length"] * 1000} if twins else {}
    return [row for row in rows if row["table"] in tables]
