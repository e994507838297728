"""Tables and figures of the study, from its CSV files alone.

Seeds are nested in bases: two runs on one base share what that base happens to be. So each
difference is paired by (base, seed), and is given twice: with the spread over these pairs, which
tells what would happen with more seeds on these bases, and with the spread over the bases' own
means, which tells what would happen on another base. All intervals are 95 %, by Student's t.
"""

import itertools
import math
import re
import statistics
from pathlib import Path

from support.shared.files import write_text
from support.shared.plots import canvas, save_figure

# Two-sided 95 % points of Student's t, by degrees of freedom; above 30 as at 30.
T_95 = (
    math.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

QUESTIONS = (  # question, arm, minus arm
    ("Does the ratio help?", "rlsd", "reward"),
    ("Does the gate help?", "egrsd", "rlsd"),
    ("Does it know where?", "egrsd", "shuffled"),
    ("", "shuffled", "rlsd"),
    ("", "inverted", "rlsd"),
    ("Through which term?", "egrsd", "evidence"),
    ("", "evidence", "rlsd"),
    ("Does the lookahead help?", "cl-egrsd", "egrsd"),
    ("Whose entropy?", "student-entropy", "egrsd"),
    ("Should the teacher follow?", "ema", "egrsd"),
    ("", "copy-20", "egrsd"),
    ("", "copy-50", "egrsd"),
    ("Should gamma move?", "gamma-up", "egrsd"),
    ("", "gamma-down", "egrsd"),
    ("Groups or history?", "grpo", "reward"),
    ("Full distillation?", "opsd", "rlsd"),
    ("", "opsd-reverse", "opsd"),
    ("How much of the reference?", "atesd", "opsd"),
    ("", "atesd-half", "opsd"),
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
MARKS = "os^Dv<>P*Xhp"

# --------------------------------------------------------------------------------------------------
# Statistics


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the length of its 95 % interval; None for a single value."""
    mean = statistics.fmean(values)
    n = len(values)
    if n < 2:
        return mean, None
    t = T_95[min(n - 1, len(T_95) - 1)]
    return mean, t * statistics.stdev(values) / math.sqrt(n)


def by_pair(rows: list[dict], arm: str, name: str) -> dict[tuple[str, str], float]:
    """(base, seed) -> the figure of this arm's run."""
    return {(r["base"], r["seed"]): float(r[name]) for r in rows if r["arm"] == arm}


def differences(rows: list[dict], arm: str, other: str, name: str) -> dict[str, list[float]]:
    """base -> arm minus other of each seed that both have."""
    mine = by_pair(rows, arm, name)
    theirs = by_pair(rows, other, name)
    found = {}
    for key in sorted(mine.keys() & theirs.keys()):
        found.setdefault(key[0], []).append(mine[key] - theirs[key])
    return found


def base_means(found: dict[str, list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in found.values()]


def pm(mean: float, half: float | None) -> str:
    return f"{mean:+.1f}" if half is None else f"{mean:+.1f} ± {half:.1f}"


# --------------------------------------------------------------------------------------------------
# Tables


def arms_table(rows: list[dict]) -> str:
    """Each arm's accuracy and length over all its runs, best first."""
    text = "| arm | lr | runs | accuracy, % | by base | tokens |\n|---|---|---|---|---|---|\n"
    found = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        accuracy = by_pair(rows, arm, "accuracy")
        length = by_pair(rows, arm, "length")
        found.append((interval([*accuracy.values()]), arm, accuracy, length))
    for (mean, half), arm, accuracy, length in sorted(found, key=lambda f: -f[0][0]):
        bases = {}
        for (base, _), value in sorted(accuracy.items()):
            bases.setdefault(base, []).append(value)
        each = ", ".join(f"{value:.1f}" for value in base_means(bases))
        lr = next(r["lr"] for r in rows if r["arm"] == arm)
        spread = "" if half is None else f" ± {half:.1f}"
        tokens = statistics.fmean(length.values())
        text += f"| {arm} | {lr if arm != 'none' else ''} | {len(accuracy)} | {mean:.1f}{spread} "
        text += f"| {each} | {tokens:.1f} |\n"
    return text


def questions_table(rows: list[dict]) -> str:
    """Each question's paired difference, in points of accuracy and in tokens."""
    text = "| question | difference | pairs | accuracy, over pairs | over bases | by base "
    text += "| tokens, over pairs |\n|---|---|---|---|---|---|---|\n"
    last = ""
    for question, arm, other in QUESTIONS:
        question = last = question or last
        found = differences(rows, arm, other, "accuracy")
        if not found:
            continue
        pairs = sum(found.values(), [])
        tokens = sum(differences(rows, arm, other, "length").values(), [])
        each = ", ".join(f"{value:+.1f}" for value in base_means(found))
        text += f"| {question} | {arm} − {other} | {len(pairs)} | {pm(*interval(pairs))} "
        text += f"| {pm(*interval(base_means(found)))} | {each} | {pm(*interval(tokens))} |\n"
    return text


def rates_table(rows: list[dict]) -> str:
    """Validation accuracy of each arm at each learning rate; the best is in bold."""
    rates = sorted({r["lr"] for r in rows}, key=float)
    text = f"| arm | {' | '.join(rates)} |\n|---|{'---|' * len(rates)}\n"
    for arm in dict.fromkeys(r["arm"] for r in rows):
        means = {}
        for lr in rates:
            values = [float(r["accuracy"]) for r in rows if (r["arm"], r["lr"]) == (arm, lr)]
            means[lr] = statistics.fmean(values) if values else -1.0
        best = max(means, key=means.get)
        cells = []
        for lr, mean in means.items():
            cell = f"{mean:.1f}" if mean >= 0 else ""
            cells.append(f"**{cell}**" if lr == best else cell)
        text += f"| {arm} | {' | '.join(cells)} |\n"
    return text


# --------------------------------------------------------------------------------------------------
# Figures


def draw_questions(path: Path, rows: list[dict], regime: str) -> None:
    """The study's picture: each difference with its two intervals."""
    shown = []
    for _, arm, other in QUESTIONS:
        found = differences(rows, arm, other, "accuracy")
        if sum(map(len, found.values())) > 1:
            shown.append((f"{arm} \u2212 {other}", found))
    if not shown:
        return
    figure, axes = canvas(1, 1, 7.5, 1.2 + 0.42 * len(shown))
    axis = axes[0, 0]
    for y, (_, found) in enumerate(shown):
        pairs, over_pairs = interval(sum(found.values(), []))
        mean, over_bases = interval(base_means(found))
        axis.errorbar(pairs, -y, xerr=over_pairs, fmt="o", color=COLORS[0], capsize=4)
        if over_bases is not None:
            axis.errorbar(mean, -y - 0.25, xerr=over_bases, fmt="s", color=COLORS[1], ms=4, lw=1)
    axis.plot([], [], "o-", color=COLORS[0], label="95 % over pairs of base and seed")
    axis.plot([], [], "s-", color=COLORS[1], label="95 % over bases", ms=4, lw=1)
    axis.axvline(0, color="#555555", lw=1)
    limit = max(abs(statistics.fmean(sum(found.values(), []))) for _, found in shown)
    axis.set_xlim(-1.6 * limit - 5, 1.6 * limit + 5)
    axis.set_yticks([-y for y in range(len(shown))], [name for name, _ in shown])
    axis.set(xlabel="difference of held-out accuracy (points)", title=f"regime {regime}")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16 - 0.5 / len(shown)), ncols=2)
    save_figure(path, figure)


def draw_frontier(path: Path, rows: list[dict], regime: str) -> None:
    """Accuracy over length: a point an arm, 95 % bars, and the frontier that no arm beats."""
    figure, axes = canvas(1, 1, 7.5, 5)
    axis = axes[0, 0]
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    looks = itertools.product(MARKS, COLORS)
    points = []
    for arm, (mark, color) in zip(arms, looks):
        y, yerr = interval([*by_pair(rows, arm, "accuracy").values()])
        x, xerr = interval([*by_pair(rows, arm, "length").values()])
        style = {"fmt": mark, "color": color, "capsize": 2, "elinewidth": 0.8}
        axis.errorbar(x, y, yerr=yerr, xerr=xerr, label=arm, **style)
        points.append((x, y))
    best = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    axis.plot(*zip(*best), color="#777777", lw=1, ls=":", drawstyle="steps-post", label="frontier")
    axis.set(xlabel="mean length (tokens)", ylabel="held-out accuracy (%)")
    axis.set_title(f"regime {regime}: bars are 95 % over runs")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(path, figure)


def draw_curves(path: Path, curves: list[dict], regime: str) -> None:
    """Share of right rollouts while training: means over runs."""
    figure, axes = canvas(1, 1, 7.5, 4.5)
    axis = axes[0, 0]
    arms = list(dict.fromkeys(r["arm"] for r in curves))
    for arm, (mark, color) in zip(arms, itertools.product(MARKS, COLORS)):
        by_step = {}
        for r in curves:
            if r["arm"] == arm:
                by_step.setdefault(int(r["step"]), []).append(100 * float(r["correct"]))
        steps = sorted(by_step)
        means = [statistics.fmean(by_step[step]) for step in steps]
        axis.plot(steps, means, marker=mark, color=color, ms=4, lw=1.2, label=arm)
    axis.set(xlabel="step", ylabel="right rollouts (%, means of ten steps)")
    axis.set_title(f"regime {regime}: sampled at T 1.1 while training")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(path, figure)


def draw_properties(path: Path, rows: list[dict]) -> bool:
    """Gate minus no gate where one property of the task is changed at a time."""
    names = {}
    for regime in {r["regime"] for r in rows if ":" in r["regime"]}:
        name, _, value = regime.partition(":")[2].partition("=")
        names.setdefault(name, []).append((float(value), regime))
    if not names:
        return False
    figure, axes = canvas(1, len(names), 3.2 * len(names), 3.4, sharey=True)
    for axis, (name, values) in zip(axes[0], sorted(names.items())):
        for (arm, other), color, mark in zip((("egrsd", "rlsd"), ("rlsd", "reward")), COLORS, "os"):
            xs, means, bars = [], [], []
            for value, regime in sorted(values):
                mine = [r for r in rows if r["regime"] == regime]
                pairs = sum(differences(mine, arm, other, "accuracy").values(), [])
                if len(pairs) > 1:
                    mean, half = interval(pairs)
                    xs.append(value)
                    means.append(mean)
                    bars.append(half)
            axis.errorbar(xs, means, bars, fmt=f"{mark}-", color=color, capsize=3)
            axis.plot([], [], f"{mark}-", color=color, label=f"{arm} \u2212 {other}")
        axis.axhline(0, color="#555555", lw=1)
        axis.set_xlabel(name)
    axes[0, 0].set_ylabel("difference (points)")
    axes[0, 0].legend(fontsize=8)
    save_figure(path, figure)
    return True


# --------------------------------------------------------------------------------------------------
# The page


def write(rows: list[dict], curves: list[dict], results: Path, page: Path) -> None:
    """Fill the page's blocks; what stands between them is written by hand and stays."""
    test = [r for r in rows if r["split"] == "test"]
    for regime in dict.fromkeys(r["regime"] for r in rows if ":" not in r["regime"]):
        mine = [r for r in test if r["regime"] == regime]
        tried = [r for r in rows if r["regime"] == regime and r["split"] == "validation"]
        if tried:
            fill(page, f"rates {regime}", rates_table(tried))
        if not mine:
            continue
        fill(page, f"questions {regime}", questions_table(mine))
        fill(page, f"arms {regime}", arms_table(mine))
        draw_questions(results / f"questions-{regime}.png", mine, regime)
        draw_frontier(results / f"frontier-{regime}.png", mine, regime)
        learning = [r for r in curves if r["regime"] == regime and r["split"] == "test"]
        draw_curves(results / f"curves-{regime}.png", learning, regime)
    draw_properties(results / "properties.png", test)
    commits = sorted({r["commit"] for r in rows if r["commit"]})
    hours = sum(float(r["seconds"]) for r in rows) / 3600
    text = f"{len(rows)} runs, {hours:.1f} hours of one core each, commit {', '.join(commits)}.\n"
    fill(page, "runs", text)


def fill(page: Path, name: str, text: str) -> None:
    """Put the text between the page's `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    old = page.read_text() if page.exists() else "# Results\n"
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin not in old:
        old += f"\n## {name}\n\n{begin}{end}"
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    write_text(page, re.sub(pattern, lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL))
