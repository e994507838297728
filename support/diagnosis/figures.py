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

COLORS = {
    "lock": "#0072B2",
    "fork": "#D55E00",
    "pivot": "#009E73",
    "mid": "#767676",
}  # Okabe and Ito
WINDOW = 24  # tokens of a window of the pivot figure


def draw_all(
    summary: dict,
    shown: dict[int, dict],
    logs: list[str],
    o: argparse.Namespace,
    gamma: float,
    W: int,
    max_grad_norm: float,
) -> list[tuple]:
    """(file, title, words, figure) of each picture in the report."""
    number = summary["shown"][0]
    both = {n: shown[n] for n in summary["shown"]}
    pictures = [
        (
            "deciles.png",
            "Evidence by entropy decile (Figure 4a)",
            "Where the teacher is uncertain, how far apart are "
            "teacher and student, and how much weight is left? 95 % bars, resampling rollouts.",
            draw_deciles(summary, gamma),
        ),
        (
            "regimes.png",
            "Lock, fork, pivot, mid (Figure 4b)",
            f"Lock: entropy at most {o.tau_low:g} of the batch's "
            f"maximum. Fork: at least {o.tau_high:g}, and so for the next {W} tokens. Pivot: at "
            f"least {o.tau_high:g}, "
            f"but at most {o.tau_low:g} within {W} tokens. Mid: the rest. The thresholds are ours.",
            draw_regimes(summary, gamma, W),
        ),
        (
            "trace.png",
            "Entropy along one completion (Figure A3)",
            "Blue: lock. Green: pivot.",
            draw_trace(shown[number], number),
        ),
        (
            "peaks.png",
            "The highest peaks and their left context (Figure A5)",
            "A peak that the lookahead resolves lies near 0 in the lower row.",
            draw_peaks(both, o.tau_low, W),
        ),
        (
            "rescue.png",
            "Pivot rescue (Figure A4)",
            "Green: pivots, whose weight the lookahead restores. Red and "
            "hatched: forks, which stay attenuated.",
            draw_rescue(shown, pivot_windows(shown, o.windows)),
        ),
        (
            "heatmap.png",
            "The completion as text (Figure 3)",
            "Yellow: the teacher is uncertain.",
            draw_heat_map(shown[number], number),
        ),
    ]
    if logs:
        pictures.append(
            (
                "dynamics.png",
                "Training dynamics (Figure A1)",
                "What log.jsonl says.",
                draw_dynamics(logs, max_grad_norm),
            )
        )
    return pictures


def label(text: str, longest: int = 12) -> str:
    """A token as a label: line breaks visible, unprintable characters replaced."""
    text = "".join(
        c if c.isprintable() else {"\n": "\u21b5", "\t": "\u21e5"}.get(c, "\ufffd")
        for c in text.strip(" ")
    )
    return text[: longest - 1] + "\u2026" if len(text) > longest else text or "\u2423"


def with_errors(rows: dict | list[dict]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(G,) means and lengths of their error bars, of {"mean", "low", "high"} or a list of such."""
    rows = (
        {key: [row[key] for row in rows] for key in ("mean", "low", "high")}
        if isinstance(rows, list)
        else rows
    )
    mean, low, high = (
        np.array(rows[key], float) for key in ("mean", "low", "high")
    )  # None becomes NaN
    return mean, [mean - low, high - mean]


def draw_deciles(summary: dict, gamma: float):
    """Figure 4a."""
    kinds, xs = [kind for kind in ("decile", "result decile") if kind in summary], np.arange(1, 11)
    figure, axes = canvas(1, len(kinds), 6.5 * len(kinds), 4)
    for axis, kind in zip(axes.flat, kinds):
        right = axis.twinx()
        for place, at, key, color, style, name in [
            (axis, 0, "gap", "fork", "o-", "mean |\u03b4| (left)"),
            (right, 0.08, "gate", "lock", "s--", "\u03c9 of EGRSD (right)"),
            (right, -0.08, "gate_CL", "pivot", "^:", "\u03c9 of CL-EGRSD (right)"),
        ]:
            mean, errors = with_errors(summary[kind][key])
            place.errorbar(
                xs + at, mean, errors, fmt=style, color=COLORS[color], capsize=3, label=name
            )
        right.axhline(
            max(0.1, 1 - gamma),
            color="#999999",
            linewidth=1,
            label="lowest \u03c9 there can be (right)",
        )
        axis.set(
            xlabel="decile of the teacher's entropy (1 = most certain)",
            ylabel="mean |\u03b4| (nats)",
            xticks=xs,
            title=f"{kind.replace('decile', '') or 'all '}tokens: {sum(summary[kind]['count']):,}",
            ylim=(0, None),
        )
        right.set(ylabel="mean gate \u03c9", ylim=(0, 1.05))
        right.spines["right"].set_visible(True)
    handles = [pair for a in (axis, right) for pair in zip(*a.get_legend_handles_labels())]
    figure.legend(*zip(*handles), loc="outside lower center", ncols=4 if len(kinds) > 1 else 2)
    return figure


def draw_regimes(summary: dict, gamma: float, W: int):
    """Figure 4b, and how the shares depend on the thresholds."""
    figure, axes = canvas(1, 2, 10.5, 3.6)
    left, right = axes[0]
    mean, errors = with_errors(list(summary["regimes"].values()))
    names = [f"{name}\n{row['share']:.1%}" for name, row in summary["regimes"].items()]
    left.bar(names, mean, yerr=errors, capsize=4, color=[*COLORS.values()])
    left.set(
        ylabel="mean \u03c9_CL \u2212 \u03c9",
        xlabel="regime and share of the tokens",
        title=f"weight that the lookahead restores (\u03b3 {gamma:g}, W {W})",
    )
    pairs, bottom = summary["sensitivity"], np.zeros(len(summary["sensitivity"]))
    for name, color in COLORS.items():
        height, names = (
            np.array([row[name] for row in pairs]),
            [f"{r['tau_low']:g}\n{r['tau_high']:g}" for r in pairs],
        )
        right.bar(names, height, bottom=bottom, color=color, label=name)
        bottom += height
    right.set(
        xlabel="\u03c4_low (above) and \u03c4_high (below); the first pair is used elsewhere",
        ylabel="share of the tokens",
        title="how the shares move with the thresholds",
    )
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def shade(axis, one: dict, a: int, b: int, names: tuple[str, ...]) -> None:
    """Colour the spans of these regimes between tokens a and b, with a legend entry for each."""
    for name in names:
        how = {
            "color": COLORS[name],
            "alpha": 0.25,
            "linewidth": 0,
            "hatch": "//" if name == "fork" else None,
        }
        axis.fill_between([], [], [], label=name, **how)
        for start, end in runs_of(one["regime"][a:b] == REGIMES.index(name)):
            axis.axvspan(a + start - 0.5, a + end - 0.5, **how)


def token_ticks(axis, one: dict, a: int, b: int) -> None:
    words = [label(text) for text in one["text"][a:b]]
    axis.set_xticks(range(a, b), words, rotation=90, fontsize=8, family="monospace")
    axis.set(xlim=(a - 0.5, b - 0.5), xlabel="token")


def draw_trace(one: dict, number: int):
    """Figure A3: the whole completion; zooms on its longest certain span and two steep pivots."""
    figure, axes = canvas(2, 1, 12, 6.4)
    T, rise = (
        len(one["H_hat"]),
        (one["H_hat"] - one["H_hat_CL"]) * (one["regime"] == REGIMES.index("pivot")),
    )
    zooms = [
        sum(max(runs_of(one["regime"] == 0), key=lambda run: run[1] - run[0], default=(0, 0))) // 2
    ]
    for _ in range(
        2
    ):  # windows of 17 tokens that do not overlap, where the completion is long enough
        apart = np.abs(np.arange(T)[:, None] - zooms).min(1) > 16
        zooms.append(int(np.where(apart, rise, rise - 2).argmax()))
    top = axes[0, 0]
    top.plot(one["H_hat"], color="#222222", linewidth=0.9, label="entropy / batch maximum")
    top.plot(
        envelope(one["H_hat"], max(5, T // 40)),
        color="#E69F00",
        linewidth=2,
        label="smoothed envelope",
    )
    shade(top, one, 0, T, ("lock", "pivot"))
    top.set(xlabel="token", ylabel="normalised entropy", xlim=(-0.5, T - 0.5), ylim=(0, 1.02))
    top.set_title(f"rollout {number}", loc="left")
    top.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    below = figure.add_subfigure(axes[1, 0].get_subplotspec()).subplots(1, 3, sharey=True)
    axes[1, 0].remove()
    for axis, (name, t) in zip(below, zip(("lock", "pivot", "pivot"), zooms)):
        a = max(0, min(t - 8, T - 17))
        b = min(T, a + 17)
        axis.plot(range(a, b), one["H_hat"][a:b], color="#222222", marker="o", markersize=3)
        shade(axis, one, a, b, ("lock", "pivot"))
        token_ticks(axis, one, a, b)
        axis.set(ylim=(0, 1.02), title=f"{name}: tokens {a} to {b - 1}")
    below[0].set_ylabel("normalised entropy")
    return figure


def draw_peaks(shown: dict[int, dict], tau_low: float, W: int, k: int = 7):
    """Figure A5: the k highest local peaks with their left context; below, the lookahead there."""
    figure, axes = canvas(
        2, len(shown), 8 * len(shown), 7.5, sharey="row", sharex="col", height_ratios=[1.7, 1]
    )
    for (above, below), (number, one) in zip(axes.T, shown.items()):
        peaks = local_peaks(one["H_hat"], k)
        for axis, key, name in (
            (above, "H_hat", "entropy"),
            (below, "H_hat_CL", f"lookahead entropy (W {W})"),
        ):
            axis.plot(one[key], color="#222222" if axis is above else COLORS["lock"], linewidth=1)
            axis.plot(peaks, one[key][peaks], "o", color=COLORS["fork"], markersize=5)
            axis.set_ylabel(f"{name}\n/ batch maximum")
        above.set(ylim=(0, 2.6), yticks=np.arange(0, 1.1, 0.25))
        below.set(xlabel="token", ylim=(-0.05, 1.05))
        for place, t in enumerate(
            peaks
        ):  # the labels stand in a row above the curve, and a line leads to each peak
            context = label("".join(one["text"][max(0, t - 4) : t]), 26)
            above.annotate(
                f"{context} [{label(one['text'][t])}]",
                (t, one["H_hat"][t]),
                ((place + 0.5) / len(peaks) * len(one["H_hat"]), 1.12),
                rotation=90,
                fontsize=8,
                ha="center",
                family="monospace",
                arrowprops={"arrowstyle": "-", "color": "#999999", "relpos": (0.5, 0)},
            )
        low = f"the lookahead is at most {tau_low:g} at {(one['H_hat_CL'][peaks] <= tau_low).sum()}"
        above.set_title(f"rollout {number}: {low} of {len(peaks)} peaks", fontsize=10)
    return figure


def pivot_windows(shown: dict[int, dict], asked: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(rollout, start) of the windows asked for; else of three in which most weight is restored."""
    for window in asked:
        if len(window) != 2 or not 0 <= window[1] < len(shown[window[0]]["text"]):
            fail(
                f"--windows {':'.join(map(str, window))}: it takes ROLLOUT:START, with a START "
                "inside that rollout"
            )
    restored = [
        (-float((one["gate_lookahead"] - one["gate"])[a : a + WINDOW].sum()), number, a)
        for number, one in shown.items()
        for a in range(max(1, len(one["text"]) - WINDOW + 1))
    ]
    chosen = list(asked)
    for _, number, a in sorted(restored) if not asked else ():
        if len(chosen) < 3 and all(number != other or abs(a - b) >= WINDOW for other, b in chosen):
            chosen.append((number, a))
    return chosen


def draw_rescue(shown: dict[int, dict], windows: list[tuple[int, int]]):
    """Figure A4."""
    figure, axes = canvas(2, len(windows), 5 * len(windows) + 1.5, 6, sharex="col", sharey="row")
    for column, (number, a) in zip(axes.T, windows):
        one, b = shown[number], min(len(shown[number]["text"]), a + WINDOW)
        for axis, lines in zip(
            column,
            (
                [("H_hat", "entropy"), ("H_hat_CL", "lookahead entropy")],
                [("gate", "\u03c9 of EGRSD"), ("gate_lookahead", "\u03c9 of CL-EGRSD")],
            ),
        ):
            shade(axis, one, a, b, ("pivot", "fork"))
            for (key, name), color, dash in zip(lines, ("#222222", COLORS["lock"]), ("-", "--")):
                axis.plot(range(a, b), one[key][a:b], dash, color=color, marker=".", label=name)
            axis.set_ylim(0, 1.05)
        token_ticks(axis, one, a, b)
        column[0].set_title(f"rollout {number}, tokens {a} to {b - 1}", fontsize=10)
    for axis, name, last in zip(axes[:, 0], ("normalised entropy", "weight"), axes[:, -1]):
        axis.set_ylabel(name)
        last.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_heat_map(one: dict, number: int, columns: int = 100, most: int = 1200):
    """Figure 3: the completion as text, coloured by entropy; its most uncertain 35 % bold."""
    from matplotlib import cm, colormaps, patches

    cells, x, y = [], 0, 0
    for t, piece in enumerate(one["text"][:most]):
        for line in re.findall(r"[^\n]+|\n", piece):
            line = " " * line.startswith(" ") + label(line, columns - 1)
            if x + len(line) > columns:
                x, y = 0, y + 1
            cells.append((t, x, y, line))
            x, y = (0, y + 1) if line == "\u21b5" else (x + len(line), y)
    figure, axes = canvas(1, 1, 12, 1.1 + 0.29 * (y + 1))
    axis, bold = axes[0, 0], one["entropy"] >= np.quantile(one["entropy"], 0.65)
    part = f" (the first {most:,} of {len(bold):,} tokens)" if len(bold) > most else ""
    axis.set(
        xlim=(0, columns),
        ylim=(y + 1, 0),
        title=f"rollout {number}: teacher entropy; the top 35 % in bold{part}",
    )
    axis.axis("off")
    for t, x, y, line in cells:
        rgba = colormaps["cividis"](one["H_hat"][t])
        axis.add_patch(patches.Rectangle((x, y + 0.05), len(line), 0.9, color=rgba, linewidth=0))
        axis.text(
            x + len(line) / 2,
            y + 0.52,
            line,
            ha="center",
            va="center",
            family="monospace",
            fontsize=12.5,
            weight="bold" if bold[t] else "normal",
            color="white" if sum(rgba[:3]) < 1.5 else "black",
        )
    figure.colorbar(
        cm.ScalarMappable(cmap="cividis"),
        ax=axis,
        orientation="horizontal",
        aspect=60,
        shrink=0.5,
        label="entropy / batch maximum",
    )
    return figure


def draw_dynamics(paths: list[str], default_limit: float):
    """Figure A1: the gradient's norm before clipping, and what goes with it, of some runs."""
    figure, axes = canvas(2, 3, 13, 6.4)
    panels = {
        "grad_norm": "gradient norm before clipping",
        "reward": "mean reward r",
        "length": "mean length (tokens)",
        "gate": "mean gate \u03c9",
        "running_std": "\u03c3 of the rewards of earlier steps",
    }
    files, limits = (
        [Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path) for path in paths],
        set(),
    )
    names = [path.parent.name for path in files]
    for number, path in enumerate(files):
        rows, settings = read_rows(str(path), ("step",)), path.parent / "settings.json"
        limits.add(read_json(settings, {}).get("max_grad_norm", default_limit))
        color = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")[number % 6]
        for axis, (key, name) in zip(axes.flat, panels.items()):
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            if key == "running_std" and values and values[0] == 0:
                values[0] = math.nan  # no step is earlier than the first
            axis.plot(
                [row["step"] for row in rows],
                values,
                ("-", "--", "-.", ":")[number % 4],
                color=color,
                linewidth=1.4,
                label=names[number] if names.count(names[number]) == 1 else str(path.parent),
            )
            axis.set(xlabel="step", ylabel=name)
    for limit in limits:
        axes[0, 0].axhline(
            limit, color="#B00020", linestyle="-.", linewidth=1.2, label=f"clipped to {limit:g}"
        )
    log_scale(axes[0, 0])
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    return figure
