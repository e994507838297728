"""Comparison of finished evaluations: paired differences, the paper's rows beside ours, sweeps, plots."""
import json
import math
import statistics
from pathlib import Path

from support.basics import fail, first_wrong, make_folder, read_json, say, write_json, write_text
from support.benchmarks import FREE, read_samples
from support.plots import canvas, save_figure
from support.scores import (combine, grouped, missing_samples, paired_difference, paper_rows, pareto, run_scores, show,
                            table)

SIX = ("aime24", "aime25", "hmmt25", "math500", "minerva", "gsm8k")  # what the paper's averages, lengths and Eff span


def load_run(folder: str) -> dict:
    """{name, settings, gamma, W, step, run, samples by benchmark} of a finished evaluation."""
    path = Path(folder)
    if not (path / "summary.json").is_file():
        fail(f"--compare {folder}: no finished evaluation there (no summary.json). Its own command finishes it")
    settings, samples = read_json(path / "settings.json"), read_samples(path).values()
    if missing := missing_samples(settings, samples):
        fail(f"--compare {folder}: {missing} samples are missing since its summary was written. Its command goes on")
    return {"name": path.resolve().name, "folder": folder, "settings": settings, **settings["training"],
            "samples": grouped(samples, lambda row: row["benchmark"])}


def compare(out: Path, folders: tuple[str, ...], published: str) -> None:
    """The runs' figures, paired differences to the first, the paper's rows, sweeps over gamma, W and steps, plots."""
    runs = [load_run(folder) for folder in folders]
    names = [name for name in runs[0]["samples"] if all(name in run["samples"] for run in runs)]
    model, _, number = published.partition(":")
    main = {"qwen3-4b": "2", "qwen3-8b": "3", "acereason-7b": "A4", "olmo3-7b": "A5"}
    paper = [row for row in paper_rows(model, [number or main.get(model)]) if {"avg", *names} & {*row}]
    first_wrong([
        ((out / "samples.jsonl").exists(), f"--out {out} holds an evaluation; a comparison needs its own folder"),
        (not names, "--compare: the runs have no benchmark in common"),
        (published and not paper, f"--paper {published}: paper_tables.csv has no such rows, or none with an average; "
         f"it has {', '.join(main)}"),
    ], fail)
    for run in runs:
        run |= run_scores(run["samples"], names)
        run["label"] = run["name"] if [r["name"] for r in runs].count(run["name"]) == 1 else run["folder"]
    header = [*names, "Avg.", "tokens", "Eff"]

    def ours(label: str, run: dict) -> list[str]:
        cells = [show(b["accuracy"], b["se"]) for b in [*run["benchmarks"].values(), run]]
        return [label, *cells, show(run["length"], run["length_se"], 1), show(run["eff"])]

    def theirs(row: dict) -> list[str]:  # their figures must span the benchmarks that ours span
        label, cells = row["label"], [show(row.get(name)) for name in names]
        if {*names} != {*SIX} and {*names} <= {*row}:
            return [label, *cells, show(statistics.fmean(row[name] for name in names)), "", ""]
        label += "" if {*names} == {*SIX} else " (its six benchmarks)"
        return [label, *cells, show(row.get("avg")), show(row.get("length"), digits=0), show(row.get("eff"))]

    text = "Accuracy in %, +- one standard error\n\n"
    text += table(["run", *header], [ours(run["label"], run) for run in runs] + [theirs(row) for row in paper])
    unlike = [key for key in runs[0]["settings"] if key not in {*FREE, "weights", "adapter_weights", "benchmarks"}
              and len({json.dumps(run["settings"].get(key)) for run in runs}) > 1]
    text += f"\nThe runs also differ in {', '.join(unlike)}\n" if unlike else ""

    rows, first = [], runs[0]["samples"]
    for run in runs[1:]:
        pairs = [paired_difference(run["samples"][name], first[name]) for name in names]
        tokens = [paired_difference(run["samples"][name], first[name], lambda row: row["tokens"]) for name in names]
        means = [combine([d for d, *_ in parts], [se for _, se, _ in parts]) for parts in (pairs, tokens)]
        run["differences"] = dict(zip(header, [*pairs, *means]))
        rows.append([run["label"], *(
            show(d, se, 1 if name == "tokens" else 2, "+") + (" ~" if se is None or abs(d) <= 2 * se else "  ")
            for name, (d, se, *_) in run["differences"].items())])
    if rows:
        text += f"\nDifference to {runs[0]['label']}, paired by problem, +- one SE; ~ is within two SE of zero\n\n"
        text += table(["run", *header[:-1]], rows)

    order = lambda run: (run["gamma"], run["W"], run["run"])  # noqa: E731
    trained = sorted((run for run in runs if "gamma" in run), key=lambda run: (*order(run), run["step"]))
    trainings, steps = grouped(trained, order), sorted({run["step"] for run in trained})
    if len(steps) > 1:
        rows = []
        for (gamma, W, _), group in trainings.items():
            at = {run["step"]: show(run["accuracy"], run["se"]) for run in group}
            rows.append([f"gamma {gamma} W {W}", *(at.get(step, "") for step in steps)])
        if len(steps) == 4:
            rows += [[row["label"], *(show(row[f"S{n}"]) for n in range(1, 5))] for row in paper_rows(model, ["4"])]
        columns = ["training", *(f"S{n}: {step}" for n, step in enumerate(steps, 1))]
        text += "\nAvg. by training step (Table 4)\n\n" + table(columns, rows)
    last = {key: group[-1] for key, group in trainings.items()}
    if len(last) > 1:
        rows = [ours(f"gamma {gamma} W {W}, step {run['step']}", run) for (gamma, W, _), run in last.items()]
        rows += [theirs(row) for row in paper_rows(model, ["6", "A3"])]
        text += "\nLast step of each training (Tables 6, A3)\n\n" + table(["training", *header], rows)

    make_folder(out)
    draw_frontier(out / "frontier.png", [
        *((run["label"], run["length"], run["accuracy"], run["length_se"], run["se"], True) for run in runs),
        *((f"{row['method']} (paper)", row["length"], row["avg"], None, None, False) for row in paper
          if "eff" in row and {*names} == {*SIX})])
    cells = {(gamma, W): {**{name: b["accuracy"] for name, b in run["benchmarks"].items()}, "Avg.": run["accuracy"]}
             for (gamma, W, _), run in last.items()}
    (out / "heatmaps.png").unlink(missing_ok=True)  # of an earlier comparison
    if min(len({gamma for gamma, _ in cells}), len({W for _, W in cells})) > 1:
        draw_heatmaps(out / "heatmaps.png", cells)
    write_text(out / "table.md", text)
    write_json(out / "summary.json", [{k: v for k, v in r.items() if k not in ("samples", "settings")} for r in runs])
    say(f"{text}\nsaved in {out}: table.md, summary.json, {', '.join(sorted(path.name for path in out.glob('*.png')))}")


def draw_frontier(path: Path, points: list[tuple]) -> None:
    """Figure 1: accuracy over length, with one SE each way. points: (label, length, accuracy, their SEs, is it ours)"""
    figure, axes = canvas(1, 1, 7.5, 5)
    axis, best = axes[0, 0], pareto([p[1:3] for p in points])
    axis.plot(*zip(*sorted(points[i][1:3] for i in best)), "--", color="#999999", linewidth=1, zorder=1)
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
    colors = [palette[i % 6] if p[5] else "#666666" for i, p in enumerate(points)]
    for i, (_, x, y, x_se, y_se, ours) in enumerate(points):
        axis.errorbar(x, y, y_se, x_se, "oD^v"[i // 6 % 4] if ours else "s", color=colors[i], markersize=7,
                      elinewidth=1, markerfacecolor=colors[i] if i in best else "white")
    axis.margins(0.2)
    axis.set(xlabel="mean length in tokens", ylabel="accuracy in %")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_title("filled: on the Pareto frontier; bars: one standard error", fontsize=9, loc="left", color="#666666")
    figure.draw_without_rendering()  # settles the layout: the texts have an extent from here on
    places = axis.transData.transform([p[1:3] for p in points])
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in places]
    offsets = [(9 * side, dy) for dy in (7, -15, 20, -28, 33, -41, 46, -54, 59, -67) for side in (1, -1)]
    for p, color in zip(points, colors):  # each label takes the first place near its point where nothing stands yet
        for dx, dy in offsets:
            note = axis.annotate(p[0], p[1:3], (dx, dy), textcoords="offset points", fontsize=9, color=color, zorder=5,
                                 ha="left" if dx > 0 else "right",
                                 bbox={"fc": "white", "ec": "none", "pad": 0, "alpha": 0.7})
            a = note.get_window_extent().extents
            if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken):
                break
            if (dx, dy) != offsets[-1]:
                note.remove()
        taken.append(tuple(a))
    save_figure(path, figure, 150)


def draw_heatmaps(path: Path, cells: dict[tuple[float, int], dict[str, float]]) -> None:
    """Figure A2: a panel for each benchmark, each with its own colours. cells: (gamma, W) -> {name: accuracy}"""
    gammas, Ws, names = sorted({g for g, _ in cells}), sorted({W for _, W in cells}), [*next(iter(cells.values()))]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = canvas(rows, columns, 1 + columns * (1 + 0.75 * len(Ws)), rows * (1 + 0.5 * len(gammas)))
    for axis in axes.flat[len(names):]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        grid = [[cells.get((g, W), {}).get(name, math.nan) for W in Ws] for g in gammas]
        image = axis.imshow(grid, cmap="cividis", aspect="auto")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                axis.text(j, i, "not run" if math.isnan(value) else f"{value:.1f}", ha="center", va="center",
                          fontsize=9, color="white" if image.norm(value) < 0.5 else "black")
        axis.set(title=f"{name}, %", xlabel="W in tokens", ylabel="gamma", xticks=range(len(Ws)), xticklabels=Ws,
                 yticks=range(len(gammas)), yticklabels=gammas)
    save_figure(path, figure, 150)
