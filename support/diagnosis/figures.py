"""The figures of diagnostics.py. A rollout is a dictionary, see token_stats.shown_rollouts."""

import argparse
import math
import re
from pathlib import Path

import numpy as np

from support.diagnosis.completions import read_rows
from support.diagnosis.token_stats import REGIMES, envelope, local_peaks, runs_of
from support.shared.console import fail
from support.shared.files import read_json
from support.shared.plots import canvas, log_scale

# Okabe and Ito
COLORS = {"lock": "#0072B2", "fork": "#D55E00", "pivot": "#009E73", "mid": "#767676"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WINDOW = 24  # tokens of a window of the pivot figure


TITLES = {  # file: title, words below it
    "deciles.png": (
        "Evidence by entropy decile (Figure 4a)",
        "Where the teacher is uncertain, how far apart are teacher and student, and how much "
        "weight is left? 95 % bars, resampling problems.",
    ),
    "regimes.png": (
        "Lock, fork, pivot, mid (Figure 4b)",
        "Lock: entropy at most {low:g} of the batch's maximum. Fork: at least {high:g}, and so "
        "for the next {W} tokens. Pivot: at least {high:g}, but at most {low:g} within {W} tokens. "
        "Mid: the rest. The thresholds are ours.",
    ),
    "trace.png": ("Entropy along one completion (Figure A3)", "Blue: lock. Green: pivot."),
    "peaks.png": (
        "The highest peaks and their left context (Figure A5)",
        "A peak that the lookahead resolves lies near 0 in the lower row.",
    ),
    "rescue.png": (
        "Pivot rescue (Figure A4)",
        "Green: pivots, whose weight the lookahead restores. Red and hatched: forks, which stay "
        "attenuated.",
    ),
    "heatmap.png": ("The completion as text (Figure 3)", "Yellow: the teacher is uncertain."),
    "dynamics.png": ("Training dynamics (Figure A1)", "What log.jsonl says."),
}


def draw_all(
    summary: dict,
    shown: dict[int, dict],
    logs: list[str],
    o: argparse.Namespace,
    gamma: float,
    W: int,
    max_grad_norm: float,
) -> list[tuple]:
    """(file, title, words, figure) of each picture in the report.

    `o` has the thresholds tau_low and tau_high, and the windows asked for.
    """
    number = summary["shown"][0]
    both = {n: shown[n] for n in summary["shown"]}
    figures = {
        "deciles.png": draw_deciles(summary, gamma),
        "regimes.png": draw_regimes(summary, gamma, W),
        "trace.png": draw_trace(shown[number], number),
        "peaks.png": draw_peaks(both, o.tau_low, W),
        "rescue.png": draw_rescue(shown, pivot_windows(shown, o.windows)),
        "heatmap.png": draw_heat_map(shown[number], number),
    }
    if logs:
        figures["dynamics.png"] = draw_dynamics(logs, max_grad_norm)
    pictures = []
    for name, figure in figures.items():
        title, words = TITLES[name]
        words = words.format(low=o.tau_low, high=o.tau_high, W=W)
        pictures.append((name, title, words, figure))
    return pictures


VISIBLE = {"\n": "\u21b5", "\t": "\u21e5"}


def label(text: str, longest: int = 12) -> str:
    """A token as a label: line breaks visible, unprintable characters replaced."""
    clean = ""
    for c in text.strip(" "):
        clean += c if c.isprintable() else VISIBLE.get(c, "\ufffd")
    if len(clean) > longest:
        return clean[: longest - 1] + "\u2026"
    return clean or "\u2423"


def with_errors(rows: dict | list[dict]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(G,) means and lengths of their error bars, of {"mean", "low", "high"} or a list of such."""
    bounds = []
    for key in ("mean", "low", "high"):
        values = [row[key] for row in rows] if isinstance(rows, list) else rows[key]
        bounds.append(np.array(values, float))  # None becomes NaN
    mean, low, high = bounds
    return mean, [mean - low, high - mean]


def draw_deciles(summary: dict, gamma: float):
    """Figure 4a: of all tokens, and of result tokens where they are known."""
    kinds = ["decile"]
    if "result decile" in summary:
        kinds.append("result decile")
    figure, axes = canvas(1, len(kinds), 6.5 * len(kinds), 4)
    for axis, kind in zip(axes.flat, kinds):
        right = axis.twinx()
        draw_decile_curves(axis, right, summary[kind], gamma)
        which = "all" if kind == "decile" else "result"
        axis.set_title(f"{which} tokens: {sum(summary[kind]['count']):,}")
    handles, labels = axis.get_legend_handles_labels()
    more, names = right.get_legend_handles_labels()
    columns = 4 if len(kinds) > 1 else 2
    figure.legend(handles + more, labels + names, loc="outside lower center", ncols=columns)
    return figure


def draw_decile_curves(axis, right, d: dict, gamma: float) -> None:
    """The gap on the left axis, both gates on the right one, a little apart."""
    xs = np.arange(1, 11)

    def curve(place, shift: float, key: str, color: str, style: str, name: str) -> None:
        mean, errors = with_errors(d[key])
        look = {"fmt": style, "color": COLORS[color], "capsize": 3}
        place.errorbar(xs + shift, mean, errors, label=name, **look)

    curve(axis, 0, "gap", "fork", "o-", "mean |\u03b4| (left)")
    curve(right, 0.08, "gate", "lock", "s--", "\u03c9 of EGRSD (right)")
    curve(right, -0.08, "gate_CL", "pivot", "^:", "\u03c9 of CL-EGRSD (right)")
    lowest = "lowest \u03c9 there can be (right)"
    right.axhline(max(0.1, 1 - gamma), color="#999999", linewidth=1, label=lowest)
    axis.set(xlabel="decile of the teacher's entropy (1 = most certain)", xticks=xs)
    axis.set(ylabel="mean |\u03b4| (nats)", ylim=(0, None))
    right.set(ylabel="mean gate \u03c9", ylim=(0, 1.05))
    right.spines["right"].set_visible(True)


def draw_regimes(summary: dict, gamma: float, W: int):
    """Figure 4b, and how the shares depend on the thresholds."""
    figure, axes = canvas(1, 2, 10.5, 3.6)
    left, right = axes[0]
    mean, errors = with_errors(list(summary["regimes"].values()))
    names = [f"{name}\n{row['share']:.1%}" for name, row in summary["regimes"].items()]
    left.bar(names, mean, yerr=errors, capsize=4, color=list(COLORS.values()))
    left.set(ylabel="mean \u03c9_CL \u2212 \u03c9", xlabel="regime and share of the tokens")
    left.set_title(f"weight that the lookahead restores (\u03b3 {gamma:g}, W {W})")

    rows = summary["sensitivity"]
    pairs = [f"{row['tau_low']:g}\n{row['tau_high']:g}" for row in rows]
    bottom = np.zeros(len(rows))
    for name, color in COLORS.items():
        height = np.array([row[name] for row in rows])
        right.bar(pairs, height, bottom=bottom, color=color, label=name)
        bottom += height
    right.set_xlabel("\u03c4_low (above) and \u03c4_high (below); the first pair is used elsewhere")
    right.set_ylabel("share of the tokens")
    right.set_title("how the shares move with the thresholds")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def shade(axis, one: dict, a: int, b: int, names: tuple[str, ...]) -> None:
    """Colour the spans of these regimes between tokens a and b, with a legend entry for each."""
    for name in names:
        style = {"color": COLORS[name], "alpha": 0.25, "linewidth": 0}
        style["hatch"] = "//" if name == "fork" else None
        axis.fill_between([], [], [], label=name, **style)
        for start, end in runs_of(one["regime"][a:b] == REGIMES.index(name)):
            axis.axvspan(a + start - 0.5, a + end - 0.5, **style)


def token_ticks(axis, one: dict, a: int, b: int) -> None:
    words = [label(text) for text in one["text"][a:b]]
    axis.set_xticks(range(a, b), words, rotation=90, fontsize=8, family="monospace")
    axis.set(xlim=(a - 0.5, b - 0.5), xlabel="token")


ZOOM = 17  # tokens of a zoom of the trace


def draw_trace(one: dict, number: int):
    """Figure A3: the whole completion; zooms on its longest certain span and two steep pivots."""
    figure, axes = canvas(2, 1, 12, 6.4)
    H_hat = one["H_hat"]
    T = len(H_hat)
    top = axes[0, 0]
    top.plot(H_hat, color="#222222", linewidth=0.9, label="entropy / batch maximum")
    smooth = envelope(H_hat, max(5, T // 40))
    top.plot(smooth, color="#E69F00", linewidth=2, label="smoothed envelope")
    shade(top, one, 0, T, ("lock", "pivot"))
    top.set(xlabel="token", ylabel="normalised entropy", xlim=(-0.5, T - 0.5), ylim=(0, 1.02))
    top.set_title(f"rollout {number}", loc="left")
    top.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))

    below = figure.add_subfigure(axes[1, 0].get_subplotspec()).subplots(1, 3, sharey=True)
    axes[1, 0].remove()
    for axis, name, t in zip(below, ("lock", "pivot", "pivot"), zoom_centres(one)):
        a = max(0, min(t - ZOOM // 2, T - ZOOM))
        b = min(T, a + ZOOM)
        axis.plot(range(a, b), H_hat[a:b], color="#222222", marker="o", markersize=3)
        shade(axis, one, a, b, ("lock", "pivot"))
        token_ticks(axis, one, a, b)
        there = REGIMES.index(name) in one["regime"][a:b]
        title = f"{name if there else f'no {name}'}: tokens {a} to {b - 1}"
        axis.set(ylim=(0, 1.02), title=title)
    below[0].set_ylabel("normalised entropy")
    return figure


def zoom_centres(one: dict) -> list[int]:
    """The middle of the longest certain span, then two steep pivots, apart if there is room."""
    spans = runs_of(one["regime"] == REGIMES.index("lock"))
    start, end = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    centres = [(start + end) // 2]
    pivot = one["regime"] == REGIMES.index("pivot")
    rise = (one["H_hat"] - one["H_hat_CL"]) * pivot
    tokens = np.arange(len(rise))
    for _ in range(2):
        distance = np.abs(tokens[:, None] - centres).min(1)
        centres.append(int(np.where(distance >= ZOOM, rise, rise - 2).argmax()))
    return centres


def draw_peaks(shown: dict[int, dict], tau_low: float, W: int, k: int = 7):
    """Figure A5: the k highest local peaks with their left context; below, the lookahead there."""
    n = len(shown)
    shape = {"sharey": "row", "sharex": "col", "height_ratios": [1.7, 1]}
    figure, axes = canvas(2, n, 8 * n, 7.5, **shape)
    for (above, below), (number, one) in zip(axes.T, shown.items()):
        peaks = local_peaks(one["H_hat"], k)
        above.plot(one["H_hat"], color="#222222", linewidth=1)
        above.plot(peaks, one["H_hat"][peaks], "o", color=COLORS["fork"], markersize=5)
        above.set(ylim=(0, 2.6), yticks=np.arange(0, 1.1, 0.25))
        above.set_ylabel("entropy\n/ batch maximum")
        below.plot(one["H_hat_CL"], color=COLORS["lock"], linewidth=1)
        below.plot(peaks, one["H_hat_CL"][peaks], "o", color=COLORS["fork"], markersize=5)
        below.set(xlabel="token", ylim=(-0.05, 1.05))
        below.set_ylabel(f"lookahead entropy (W {W})\n/ batch maximum")
        name_peaks(above, one, peaks)
        resolved = int((one["H_hat_CL"][peaks] <= tau_low).sum())
        low = f"the lookahead is at most {tau_low:g} at {resolved}"
        above.set_title(f"rollout {number}: {low} of {len(peaks)} peaks", fontsize=10)
    return figure


def name_peaks(axis, one: dict, peaks: np.ndarray) -> None:
    """The labels stand in a row above the curve, and a line leads to each peak."""
    line = {"arrowstyle": "-", "color": "#999999", "relpos": (0.5, 0)}
    style = {"rotation": 90, "fontsize": 8, "ha": "center", "family": "monospace"}
    for place, t in enumerate(peaks):
        context = label("".join(one["text"][max(0, t - 4) : t]), 26)
        x = (place + 0.5) / len(peaks) * len(one["H_hat"])
        words = f"{context} [{label(one['text'][t])}]"
        axis.annotate(words, (t, one["H_hat"][t]), (x, 1.12), arrowprops=line, **style)


def pivot_windows(shown: dict[int, dict], asked: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(rollout, start) of the windows asked for; else of three in which most weight is restored."""
    for window in asked:
        if not 0 <= window[1] < len(shown[window[0]]["text"]):
            fail(
                f"--windows {':'.join(map(str, window))}: it takes ROLLOUT:START, with a START "
                "inside that rollout"
            )
    if asked:
        return list(asked)
    windows = []
    for number, one in shown.items():
        gain = one["gate_lookahead"] - one["gate"]
        for a in range(max(1, len(gain) - WINDOW + 1)):
            windows.append((-float(gain[a : a + WINDOW].sum()), number, a))
    chosen = []
    for _, number, a in sorted(windows):
        apart = True
        for other, b in chosen:
            if number == other and abs(a - b) < WINDOW:
                apart = False
        if apart and len(chosen) < 3:
            chosen.append((number, a))
    return chosen


def draw_rescue(shown: dict[int, dict], windows: list[tuple[int, int]]):
    """Figure A4: entropies above, weights below, without and with lookahead."""
    n = len(windows)
    figure, axes = canvas(2, n, 5 * n + 1.5, 6, sharex="col", sharey="row")
    for (above, below), (number, a) in zip(axes.T, windows):
        one = shown[number]
        b = min(len(one["text"]), a + WINDOW)
        draw_pair(above, one, a, b, ("H_hat", "entropy"), ("H_hat_CL", "lookahead entropy"))
        draw_pair(
            below,
            one,
            a,
            b,
            ("gate", "\u03c9 of EGRSD"),
            ("gate_lookahead", "\u03c9 of CL-EGRSD"),
        )
        token_ticks(below, one, a, b)
        above.set_title(f"rollout {number}, tokens {a} to {b - 1}", fontsize=10)
    for row, name in zip(axes, ("normalised entropy", "weight")):
        row[0].set_ylabel(name)
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_pair(axis, one: dict, a: int, b: int, instant: tuple, lookahead: tuple) -> None:
    """Two curves, each (key, name), over the spans of pivots and forks."""
    shade(axis, one, a, b, ("pivot", "fork"))
    tokens = range(a, b)
    key, name = instant
    axis.plot(tokens, one[key][a:b], "-", color="#222222", marker=".", label=name)
    key, name = lookahead
    axis.plot(tokens, one[key][a:b], "--", color=COLORS["lock"], marker=".", label=name)
    axis.set_ylim(0, 1.05)


def draw_heat_map(one: dict, number: int, columns: int = 100, most: int = 1200):
    """Figure 3: the completion as text, coloured by entropy; its most uncertain 35 % bold."""
    from matplotlib import cm, colormaps, patches

    cells, height = lay_out(one["text"][:most], columns)
    figure, axes = canvas(1, 1, 12, 1.1 + 0.29 * height)
    axis = axes[0, 0]
    bold = one["entropy"] >= np.quantile(one["entropy"], 0.65)
    part = ""
    if len(bold) > most:
        part = f" (the first {most:,} of {len(bold):,} tokens)"
    axis.set_title(f"rollout {number}: teacher entropy; the top 35 % in bold{part}")
    axis.set(xlim=(0, columns), ylim=(height, 0))
    axis.axis("off")
    style = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 12.5}
    for t, x, y, text in cells:
        rgba = colormaps["cividis"](one["H_hat"][t])
        box = patches.Rectangle((x, y + 0.05), len(text), 0.9, color=rgba, linewidth=0)
        axis.add_patch(box)
        weight = "bold" if bold[t] else "normal"
        color = "white" if sum(rgba[:3]) < 1.5 else "black"
        axis.text(x + len(text) / 2, y + 0.52, text, weight=weight, color=color, **style)
    colors = cm.ScalarMappable(cmap="cividis")
    bar = {"orientation": "horizontal", "aspect": 60, "shrink": 0.5}
    figure.colorbar(colors, ax=axis, label="entropy / batch maximum", **bar)
    return figure


def lay_out(texts: list[str], columns: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """(token, column, row, text) of each piece on a grid of characters, and the number of rows."""
    cells = []
    x = 0
    y = 0
    for t, piece in enumerate(texts):
        for line in re.findall(r"[^\n]+|\n", piece):
            space = " " if line.startswith(" ") else ""
            text = space + label(line, columns - 1)
            if x + len(text) > columns:
                x = 0
                y += 1
            cells.append((t, x, y, text))
            x += len(text)
            if text == VISIBLE["\n"]:
                x = 0
                y += 1
    return cells, y + 1


DYNAMICS = {
    "grad_norm": "gradient norm before clipping",
    "reward": "mean reward r",
    "length": "mean length (tokens)",
    "gate": "mean gate \u03c9",
    "running_std": "\u03c3 of the rewards of earlier steps",
}
DASHES = ("-", "--", "-.", ":")


def draw_dynamics(paths: list[str], default_limit: float):
    """Figure A1: the gradient's norm before clipping, and what goes with it, of some runs."""
    figure, axes = canvas(2, 3, 13, 6.4)
    files = []
    for path in map(Path, paths):
        files.append(path / "log.jsonl" if path.is_dir() else path)
    names = [path.parent.name for path in files]
    limits = set()
    for number, path in enumerate(files):
        rows = read_rows(str(path), ("step",))
        settings = read_json(path.parent / "settings.json", {})
        limits.add(settings.get("max_grad_norm", default_limit))
        name = path.parent.name
        if names.count(name) > 1:
            name = str(path.parent)
        style = {"color": PALETTE[number % len(PALETTE)], "linewidth": 1.4, "label": name}
        steps = [row["step"] for row in rows]
        for axis, (key, title) in zip(axes.flat, DYNAMICS.items()):
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            if key == "running_std" and values and values[0] == 0:
                values[0] = math.nan  # no step is earlier than the first
            axis.plot(steps, values, DASHES[number % len(DASHES)], **style)
            axis.set(xlabel="step", ylabel=title)
    norm = axes[0, 0]
    for limit in limits:
        style = {"color": "#B00020", "linestyle": "-.", "linewidth": 1.2}
        norm.axhline(limit, label=f"clipped to {limit:g}", **style)
    log_scale(norm)
    axes[1, 2].axis("off")
    axes[1, 2].legend(*norm.get_legend_handles_labels(), loc="center")
    return figure
