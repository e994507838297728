"""Tables and figures of the study, from its CSV files alone.

Seeds are nested in bases: two runs on one base share what that base happens to be. So each
difference is paired by (base, seed), and is given three times: for each base with the spread over
its seeds; with the spread over all pairs, as if none shared anything, so that it mixes seeds and
bases; and with the spread over the bases' own means, which tells what would happen on another base.
All intervals are 95 %, by Student's t.
"""

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

QUESTIONS = (  # question († added after results), arm, minus arm
    ("Does the ratio help?", "rlsd", "reward"),
    ("... at the same rate? †", "rlsd", "reward-1e-3"),
    ("... after 100 steps? †", "long-rlsd", "long-reward"),
    ("Does the gate help?", "egrsd", "rlsd"),
    ("... after 100 steps? †", "long-egrsd", "long-rlsd"),
    ("... at three times the rate? †", "egrsd-3e-3", "rlsd-3e-3"),
    ("", "cl-egrsd-3e-3", "rlsd-3e-3"),
    ("... knowing where? †", "egrsd-3e-3", "shuffled-3e-3"),
    ("... at its own rate? †", "egrsd-3e-3", "rlsd"),
    ("Does it know where?", "egrsd", "shuffled"),
    ("", "shuffled", "rlsd"),
    ("", "inverted", "rlsd"),
    ("Through which term?", "egrsd", "evidence"),
    ("", "evidence", "rlsd"),
    ("Does the lookahead help?", "cl-egrsd", "egrsd"),
    ("", "cl-egrsd", "rlsd"),
    ("Whose entropy?", "student-entropy", "egrsd"),
    ("Should the teacher follow?", "ema", "egrsd"),
    ("", "copy-8", "egrsd"),
    ("", "copy-20", "egrsd"),
    ("Should gamma move?", "gamma-up", "egrsd"),
    ("", "gamma-down", "egrsd"),
    ("Groups or history?", "grpo", "reward"),
    ("Full distillation?", "opsd", "rlsd"),
    ("", "opsd-reverse", "opsd"),
    ("... in reverse? †", "opsd-reverse", "rlsd"),
    ("... without a reference? †", "crisp", "rlsd"),
    ("References alone? †", "sft", "rlsd"),
    ("How much of the reference?", "atesd", "opsd"),
    ("", "atesd-half", "opsd"),
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
MARKS = "os^Dv<>P*Xhp"
# The arms of the figures: methods. Controls and schedules are in the tables, and would hide them.
METHODS = (
    "none", "reward", "rlsd", "egrsd", "cl-egrsd", "grpo",
    "sft", "opsd", "opsd-reverse", "crisp", "atesd",
)  # fmt: skip
UNCHANGED = {  # the properties' values in regime h2, as tiny/make.py has them
    "p_reference_hard": 0.5,
    "p_hard_low": 0.5,
    "p_stop": 0.15,
    "p_filler": 0.4,
    "p_style": 0.5,
}
MEANING = {  # of a higher value
    "p_reference_hard": "noisier reference",
    "p_hard_low": "surer wrong habits",
    "p_stop": "shorter runs of filler",
    "p_filler": "more runs of filler",
    "p_style": "stronger leak of style",
}

# --------------------------------------------------------------------------------------------------
# Statistics


def where(rows: list[dict], **fields: str) -> list[dict]:
    """The rows with these values."""
    found = []
    for row in rows:
        if all(row[name] == value for name, value in fields.items()):
            found.append(row)
    return found


def different(rows: list[dict], name: str) -> list[str]:
    """The values of a column, each once, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def column(rows: list[dict], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the length of its 95 % interval; None for a single value."""
    mean = statistics.fmean(values)
    n = len(values)
    if n < 2:
        return mean, None
    t = T_95[min(n - 1, len(T_95) - 1)]
    return mean, t * statistics.stdev(values) / math.sqrt(n)


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single value."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def slope(xs: list[float], ys: list[float]) -> tuple[float, float | None]:
    """Of the straight line through the points, and half its 95 % interval; None with two points."""
    line = statistics.linear_regression(xs, ys)
    degrees = len(xs) - 2
    if not degrees:
        return line.slope, None
    squares = 0.0
    for x, y in zip(xs, ys):
        squares += (y - line.intercept - line.slope * x) ** 2
    spread = len(xs) * statistics.pvariance(xs)
    t = T_95[min(degrees, len(T_95) - 1)]
    return line.slope, t * math.sqrt(squares / degrees / spread)


def by_pair(rows: list[dict], arm: str, name: str) -> dict[tuple[str, str], float]:
    """(base, seed) -> the figure of this arm's run."""
    return {(row["base"], row["seed"]): float(row[name]) for row in where(rows, arm=arm)}


def differences(rows: list[dict], arm: str, other: str, name: str) -> dict[str, list[float]]:
    """base -> arm minus other of each seed that both have."""
    mine = by_pair(rows, arm, name)
    theirs = by_pair(rows, other, name)
    found = {}
    for key in sorted(mine.keys() & theirs.keys()):
        found.setdefault(key[0], []).append(mine[key] - theirs[key])
    return found


def on_the_pairs_of(some: list[dict], rows: list[dict]) -> list[dict]:
    """Of the rows, those whose base and seed some of the others have."""
    pairs = {(row["base"], row["seed"]) for row in some}
    return [row for row in rows if (row["base"], row["seed"]) in pairs]


def gate_by_base(rows: list[dict]) -> dict[str, list[float]]:
    """base -> gate minus no gate of its seeds, in points of accuracy."""
    return differences(rows, "egrsd", "rlsd", "accuracy")


def base_means(found: dict[str, list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in found.values()]


def each_base(found: dict[str, list[float]], sign: str = "+") -> str:
    """Mean and interval of each base over its seeds."""
    return ", ".join(plus_minus(*interval(values), sign) for values in found.values())


def all_pairs(found: dict[str, list[float]]) -> list[float]:
    return sum(found.values(), [])


def on_all_bases(rows: list[dict], regime: list[dict]) -> tuple[list[dict], list[str]]:
    """-> rows of the arms that ran on each base of the regime, and the names of the others.

    Bases differ by more than arms do: the mean of one base beside that of three says nothing.
    """
    bases = set(different(regime, "base"))
    whole = [arm for arm in different(regime, "arm") if set(bases_of(regime, arm)) == bases]
    others = [arm for arm in different(regime, "arm") if arm not in whole]
    return [row for row in rows if row["arm"] in whole], others


def bases_of(rows: list[dict], arm: str) -> list[str]:
    return different(where(rows, arm=arm), "base")


def plus_minus(mean: float, half: float | None, sign: str = "+") -> str:
    text = f"{mean:{sign}.1f}"
    return text if half is None else f"{text} ± {half:.1f}"


def listed(values: list[float], sign: str = "+") -> str:
    return ", ".join(f"{value:{sign}.1f}" for value in values)


# --------------------------------------------------------------------------------------------------
# Tables


def arms_table(rows: list[dict], curves: list[dict]) -> str:
    """Each arm's accuracy, over bases and of each, and length, best first; and of its last ten
    steps of training how it carried out operations, see study.operations_of."""
    last = {}
    for row in curves:
        last[row["arm"], row["base"], row["seed"]] = row
    lines = []
    for arm in different(rows, "arm"):
        mine = where(rows, arm=arm)
        bases = {}
        for row in mine:
            bases.setdefault(row["base"], []).append(float(row["accuracy"]))
        lr = mine[0]["lr"] if mine[0]["lr"] != "0" else ""
        tokens = statistics.fmean(column(mine, "length"))
        mean, half = interval(base_means(bases))
        text = f"| {arm} | {lr} | {len(mine)} | {plus_minus(mean, half, '')} "
        text += f"| {each_base(bases, '')} | {tokens:.1f} "
        ends = [last.get((arm, row["base"], row["seed"]), {}) for row in mine]
        text += f"| {mean_of(ends, 'checks', 1, 2)} "
        text += f"| {mean_of(ends, 'slips', 100, 1)} | {mean_of(ends, 'left', 100, 1)} |\n"
        lines.append((mean, text))
    head = "| arm | lr | runs | accuracy, % | by base | tokens | checks | slips, % | left, % |\n"
    head += "|---|---|---|---|---|---|---|---|---|\n"
    return head + "".join(text for _, text in sorted(lines, reverse=True))


def mean_of(rows: list[dict], name: str, factor: float, digits: int) -> str:
    """Of those that have the figure; empty where none has."""
    values = []
    for row in rows:
        if row.get(name):
            values.append(factor * float(row[name]))
    return f"{statistics.fmean(values):.{digits}f}" if values else ""


def gamma_and_window(arm: str) -> tuple[float, int] | None:
    """Of EGRSD and CL-EGRSD (1 and 0, 1 and 5), and of their sweeps; None of other arms."""
    found = re.fullmatch(r"egrsd(?:-([\d.]+))?", arm)
    if found:
        return float(found[1] or 1), 0
    found = re.fullmatch(r"cl-egrsd(?:-([\d.]+)-(\d+))?", arm)
    if found:
        return float(found[1] or 1), int(found[2] or 5)
    return None


def is_sweep(arm: str) -> bool:
    return gamma_and_window(arm) is not None and arm not in ("egrsd", "cl-egrsd")


def sweep_table(rows: list[dict]) -> str:
    """Each gamma and W beside no gate, and beside that gamma without a window, on the bases and
    seeds that all of them have."""
    swept = [row for row in rows if is_sweep(row["arm"])]
    if not swept:
        return ""
    same = set(by_pair(rows, "rlsd", "accuracy"))
    for arm in different(swept, "arm"):
        same &= by_pair(swept, arm, "accuracy").keys()
    common = [row for row in rows if (row["base"], row["seed"]) in same]
    lines = {}
    for arm in different(common, "arm"):
        setting = gamma_and_window(arm)
        if not setting:
            continue
        gamma, W = setting
        scores = column(where(common, arm=arm), "accuracy")
        text = f"| {gamma:g} | {W} | {len(scores)} | {statistics.fmean(scores):.1f} "
        text += both_differences(common, arm, "rlsd")
        windowless = "egrsd" if gamma == 1 else f"egrsd-{gamma:g}"
        text += both_differences(common, arm, windowless) if W else "|  |  "
        lines[W > 0, gamma, W] = text + "|\n"
    head = "| gamma | W | pairs | accuracy, % | minus no gate | tokens "
    head += "| minus no window | tokens |\n|---|---|---|---|---|---|---|---|\n"
    return head + "".join(lines[key] for key in sorted(lines))


def both_differences(rows: list[dict], arm: str, other: str) -> str:
    """Two cells: of accuracy and of length, over pairs."""
    text = ""
    for name in ("accuracy", "length"):
        pairs = all_pairs(differences(rows, arm, other, name))
        text += f"| {plus_minus(*interval(pairs)) if pairs else ''} "
    return text


def questions_table(rows: list[dict]) -> str:
    """Each question's paired difference, in points of accuracy and in tokens."""
    text = "| question | difference | pairs | accuracy, over pairs | over bases | by base "
    text += "| tokens, over pairs |\n|---|---|---|---|---|---|---|\n"
    last = ""
    for question, arm, other in QUESTIONS:
        last = question or last
        found = differences(rows, arm, other, "accuracy")
        if not found:
            continue
        pairs = all_pairs(found)
        means = base_means(found)
        tokens = all_pairs(differences(rows, arm, other, "length"))
        text += f"| {last} | {arm} − {other} | {len(pairs)} | {plus_minus(*interval(pairs))} "
        text += f"| {plus_minus(*interval(means))} | {each_base(found)} "
        text += f"| {plus_minus(*interval(tokens))} |\n"
    return text


def rates_table(rows: list[dict]) -> str:
    """Validation accuracy of each arm at each learning rate; the best is in bold."""
    rates = sorted(different(rows, "lr"), key=float)
    text = f"| arm | {' | '.join(rates)} |\n|---|{'---|' * len(rates)}\n"
    for arm in different(rows, "arm"):
        means = {}
        for lr in rates:
            values = column(where(rows, arm=arm, lr=lr), "accuracy")
            means[lr] = statistics.fmean(values) if values else -1.0
        best = max(means, key=means.get)
        text += f"| {arm} |"
        for lr, mean in means.items():
            cell = f"{mean:.1f}" if mean >= 0 else ""
            text += f" **{cell}** |" if lr == best else f" {cell} |"
        text += "\n"
    return text


# --------------------------------------------------------------------------------------------------
# Figures


def look_of(arm: str) -> dict[str, str]:
    """Mark and color of a method, the same in all figures; no two are alike."""
    k = METHODS.index(arm)
    return {"marker": MARKS[k], "color": COLORS[k % len(COLORS)]}


def draw_questions(path: Path, rows: list[dict], regime: str) -> None:
    """The study's picture: each difference that was fixed before, with its two intervals."""
    shown = []
    last = ""
    for question, arm, other in QUESTIONS:
        last = question or last
        if "†" in last:
            continue
        found = differences(rows, arm, other, "accuracy")
        if len(all_pairs(found)) > 1:
            shown.append((f"{arm} \u2212 {other}", found))
    if not shown:
        return
    figure, axes = canvas(1, 1, 7.5, 1.2 + 0.42 * len(shown))
    axis = axes[0, 0]
    for y, (_, found) in enumerate(shown):
        pairs, over_pairs = interval(all_pairs(found))
        mean, over_bases = interval(base_means(found))
        axis.errorbar(pairs, -y, xerr=over_pairs, fmt="o", color=COLORS[0], capsize=4)
        if over_bases is not None:
            style = {"fmt": "s", "color": COLORS[1], "markersize": 4, "linewidth": 1}
            axis.errorbar(mean, -y - 0.25, xerr=over_bases, **style)
    axis.plot([], [], "o-", color=COLORS[0], label="95 % over pairs of base and seed")
    if any(len(found) > 1 for _, found in shown):
        axis.plot([], [], "s-", color=COLORS[1], label="95 % over bases", ms=4, lw=1)
    axis.axvline(0, color="#555555", lw=1)
    names, _ = zip(*shown)
    axis.set_yticks(range(0, -len(shown), -1), names)
    axis.set(xlabel="difference of held-out accuracy (points)", title=f"regime {regime}")
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(path, figure)


def draw_frontier(path: Path, rows: list[dict], regime: str) -> None:
    """Accuracy over length: a point a method, and the frontier that none beats.

    Bars are standard errors, so that neighbours can be told apart.
    """
    figure, axes = canvas(1, 1, 7.5, 5)
    axis = axes[0, 0]
    points = []
    for arm in different(rows, "arm"):
        y, yerr = mean_and_error(column(where(rows, arm=arm), "accuracy"))
        x, xerr = mean_and_error(column(where(rows, arm=arm), "length"))
        style = {"ls": "", "capsize": 2, "elinewidth": 0.8, **look_of(arm)}
        axis.errorbar(x, y, yerr=yerr, xerr=xerr, label=arm, **style)
        points.append((x, y))
    best = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    # To the right edge, so that a single method that none beats shows as what it is.
    best.append((axis.get_xlim()[1], best[-1][1]))
    style = {"color": "#777777", "lw": 1, "ls": ":", "drawstyle": "steps-post"}
    axis.plot(*zip(*best), **style, label="frontier")
    axis.set(xlabel="mean length (tokens)", ylabel="held-out accuracy (%)")
    axis.set_title(f"regime {regime}: bars are one standard error over runs")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(path, figure)


def draw_curves(path: Path, curves: list[dict], regime: str) -> None:
    """Share of right rollouts while training: means over runs."""
    figure, axes = canvas(1, 1, 7.5, 4.5)
    axis = axes[0, 0]
    for arm in different(curves, "arm"):
        mine = where(curves, arm=arm)
        steps = different(mine, "step")
        means = []
        for step in steps:
            means.append(100 * statistics.fmean(column(where(mine, step=step), "correct")))
        steps = list(map(int, steps))
        axis.plot(steps, means, ms=4, lw=1.2, label=arm, **look_of(arm))
    axis.set(xlabel="step", ylabel="right rollouts (%, means of ten steps)")
    axis.set_title(f"regime {regime}: sampled at T 1.1 while training")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(path, figure)


def properties_of(rows: list[dict]) -> dict[str, list[tuple[float, list[dict]]]]:
    """property -> its values in order, each with the runs that have it.

    Those of the unchanged regime h2 on the bases and seeds that the others have, too.
    """
    found = {}
    for regime in different(rows, "regime"):
        _, _, changed = regime.partition(":")
        name, _, value = changed.partition("=")
        if not changed:
            continue
        mine = where(rows, regime=regime)
        if name not in found:
            unchanged = on_the_pairs_of(mine, where(rows, regime="h2"))
            found[name] = [(UNCHANGED[name], unchanged)]
        found[name].append((float(value), mine))
    for values in found.values():
        values.sort(key=lambda pair: pair[0])
    return dict(sorted(found.items()))


def properties_table(rows: list[dict]) -> str:
    """The bases, their teachers, no gate and the gate, and their paired difference."""
    text = "| property | value | base, % | teacher, % | rlsd, % | egrsd, % "
    text += "| egrsd − rlsd | pairs | by base |\n|---|---|---|---|---|---|---|---|---|\n"
    for name, values in properties_of(rows).items():
        for value, mine in values:
            cells = []
            for arm in ("none", "teacher"):
                cells.append(listed(column(where(mine, arm=arm), "accuracy"), ""))
            for arm in ("rlsd", "egrsd"):
                scores = column(where(mine, arm=arm), "accuracy")
                cells.append(f"{statistics.fmean(scores):.1f}" if scores else "")
            found = gate_by_base(mine)
            pairs = all_pairs(found)
            cells.append(plus_minus(*interval(pairs)) if pairs else "")
            cells += [str(len(pairs)), listed(base_means(found))]
            unchanged = " (h2)" if value == UNCHANGED[name] else ""
            text += f"| {name} | {value:g}{unchanged} | {' | '.join(cells)} |\n"
    return text


def slopes_table(rows: list[dict]) -> str:
    """What the gate gains from each property's lowest value to its highest, by a straight line.

    A point of the line is a base: its seeds share what it happens to be.
    """
    text = "| a higher value means | from | to | egrsd − rlsd changes by | bases |\n"
    text += "|---|---|---|---|---|\n"
    for name, values in properties_of(rows).items():
        xs, ys = [], []
        for value, mine in values:
            means = base_means(gate_by_base(mine))
            xs += [value] * len(means)
            ys += means
        if len(set(xs)) < 2:
            continue
        low, high = values[0][0], values[-1][0]
        rise, half = slope(xs, ys)
        change = plus_minus((high - low) * rise, half and (high - low) * half)
        text += f"| {MEANING[name]} ({name}) | {low:g} | {high:g} | {change} | {len(ys)} |\n"
    return text


def draw_properties(path: Path, rows: list[dict]) -> None:
    """Gate minus no gate where one property of the task is changed at a time."""
    found = properties_of(rows)
    figure, axes = canvas(1, len(found), 2.6 * len(found), 3.6, sharey=True)
    for axis, (name, values) in zip(axes[0], found.items()):
        for value, mine in values:
            gains = gate_by_base(mine)
            if not gains:
                continue
            means = base_means(gains)
            axis.plot([value] * len(means), means, "s", color=COLORS[1], ms=4)
            mean, half = interval(all_pairs(gains))
            axis.errorbar(value, mean, half, fmt="o", color=COLORS[0], capsize=3)
        axis.axhline(0, color="#555555", lw=1)
        axis.set_xlabel(f"{name}\n\u2192 {MEANING[name]}")
    axes[0, 0].set_ylabel("egrsd \u2212 rlsd (points)")
    axes[0, 0].plot([], [], "o-", color=COLORS[0], label="95 % over pairs of base and seed")
    axes[0, 0].plot([], [], "s", color=COLORS[1], ms=4, label="mean of one base")
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(path, figure)


def over_all_bases(rows: list[dict]) -> str:
    """Gate minus no gate: the mean over the bases of all regimes, each base once."""
    means = []
    for regime in different(rows, "regime"):
        mine = where(rows, regime=regime)
        means += base_means(gate_by_base(mine))
    text = plus_minus(*interval(means))
    return f"egrsd − rlsd over all {len(means)} bases of all regimes, each once: {text} points.\n"


def draw_by_teacher(path: Path, rows: list[dict]) -> None:
    """Gate minus no gate of each base, over how well its teacher reads: which regime pays?"""
    figure, axes = canvas(1, 1, 7.5, 4.5)
    axis = axes[0, 0]
    groups = {"h1": [], "h2": [], "h2, one property changed": [], "h3": []}
    for regime in different(rows, "regime"):
        name, _, changed = regime.partition(":")
        for base in different(where(rows, regime=regime), "base"):
            mine = where(rows, regime=regime, base=base)
            pairs = all_pairs(gate_by_base(mine))
            teacher = column(where(mine, arm="teacher"), "accuracy")
            if teacher and len(pairs) > 1:
                group = f"{name}, one property changed" if changed else name
                groups[group].append((teacher[0], *interval(pairs)))
    for (group, points), color, mark in zip(groups.items(), COLORS, MARKS):
        if points:
            axis.errorbar(*zip(*points), fmt=mark, color=color, capsize=3, label=group)
    axis.axhline(0, color="#555555", lw=1)
    axis.set(xlabel="the teacher's own accuracy (%)", ylabel="egrsd \u2212 rlsd (points)")
    axis.set_title("each base: 95 % over its seeds")
    axis.legend(fontsize=8)
    save_figure(path, figure)


# --------------------------------------------------------------------------------------------------
# The page


def write(rows: list[dict], curves: list[dict], results: Path, page: Path) -> None:
    """Fill the page's blocks; what stands between them is written by hand and stays."""
    test = where(rows, split="test")
    for regime in different(rows, "regime"):
        if ":" in regime:  # one property of the task changed: in draw_properties
            continue
        mine = where(test, regime=regime)
        tried = where(rows, regime=regime, split="validation")
        if tried:
            fill(page, f"rates {regime}", rates_table(tried))
        if not mine:
            continue
        fill(page, f"questions {regime}", questions_table(mine))
        draw_questions(results / f"questions-{regime}.png", mine, regime)
        table = sweep_table(mine)
        if table:
            fill(page, f"sweep {regime}", table)
        single = [row for row in mine if not is_sweep(row["arm"])]
        compared, others = on_all_bases(single, single)
        trained = where(curves, regime=regime, split="test")
        table = arms_table(compared, trained)
        if others:
            table += f"\nNot yet run on all bases, and so not here: {', '.join(others)}.\n"
        fill(page, f"arms {regime}", table)
        methods = filter(lambda row: row["arm"] in METHODS, compared)
        draw_frontier(results / f"frontier-{regime}.png", list(methods), regime)
        learning, _ = on_all_bases(trained, single)
        # Not SFT, which trains on references.
        sampled = [row for row in learning if row["arm"] in METHODS and row["arm"] != "sft"]
        draw_curves(results / f"curves-{regime}.png", sampled, regime)
    if properties_of(test):
        tables = (properties_table(test), slopes_table(test), over_all_bases(test))
        fill(page, "properties", "\n".join(tables))
        draw_properties(results / "properties.png", test)
    if where(test, arm="teacher"):
        draw_by_teacher(results / "by-teacher.png", test)
    hours = sum(column(rows, "seconds")) / 3600
    # Until lately "-dirty" said no more than that results/ had grown.
    commits = {commit.removesuffix("-dirty") for commit in different(rows, "commit")} - {""}
    text = f"{len(rows)} runs, {hours:.1f} hours of a core, commits {', '.join(sorted(commits))}.\n"
    fill(page, "runs", text)


def fill(page: Path, name: str, text: str) -> None:
    """Put the text between the page's `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    old = page.read_text() if page.exists() else "# Results\n"
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin not in old:
        old += f"\n## {name}\n\n{begin}{end}"
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    write_text(page, re.sub(pattern, lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL))
