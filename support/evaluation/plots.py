"""The plots of a comparison: the accuracy-length frontier, and heat maps over gamma and W."""

import math
from pathlib import Path

from support.evaluation.scores import pareto
from support.shared.plots import canvas, save_figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY = "#666666"
MARKERS = "oD^v"
LABEL_HEIGHTS = (7, -15, 20, -28, 33, -41, 46, -54, 59, -67)  # points above a marker, to be tried


def draw_frontier(path: Path, points: list[dict]) -> None:
    """Figure 1: accuracy over length, with one SE each way.

    A point has label, length, accuracy, length_se, se, and whether it is ours.
    """
    figure, axes = canvas(1, 1, 7.5, 5)
    axis = axes[0, 0]
    places = [(p["length"], p["accuracy"]) for p in points]
    best = pareto(places)
    frontier = sorted(places[i] for i in best)
    axis.plot(*zip(*frontier), "--", color="#999999", linewidth=1, zorder=1)
    colors = []
    for i, p in enumerate(points):
        color = PALETTE[i % len(PALETTE)] if p["ours"] else GREY
        marker = MARKERS[i // len(PALETTE) % len(MARKERS)] if p["ours"] else "s"
        axis.errorbar(
            p["length"],
            p["accuracy"],
            p["se"],
            p["length_se"],
            marker,
            color=color,
            markersize=7,
            elinewidth=1,
            markerfacecolor=color if i in best else "white",
        )
        colors.append(color)
    axis.margins(0.3, 0.2)
    axis.set(xlabel="mean length in tokens", ylabel="accuracy in %")
    axis.xaxis.set_major_formatter("{x:,g}")
    title = "filled: on the Pareto frontier; bars: one standard error"
    axis.set_title(title, fontsize=9, loc="left", color=GREY)
    figure.draw_without_rendering()  # settles the layout: the texts have an extent from here on
    write_labels(axis, [p["label"] for p in points], places, colors)
    save_figure(path, figure, 150)


def write_labels(axis, labels: list[str], places: list[tuple], colors: list[str]) -> None:
    """Each label takes the first place near its point, inside the axes, that is free."""
    left, bottom, right, top = axis.bbox.extents
    far = 1e6
    taken = [
        (-far, -far, left, far),
        (right, -far, far, far),
        (-far, -far, far, bottom),
        (-far, top, far, far),
    ]
    for x, y in axis.transData.transform(places):
        taken.append((x - 8, y - 8, x + 8, y + 8))
    offsets = []
    for dy in LABEL_HEIGHTS:
        offsets += [(9, dy), (-9, dy)]
    box = {"fc": "white", "ec": "none", "pad": 0, "alpha": 0.7}
    for label, place, color in zip(labels, places, colors):
        for dx, dy in offsets:
            note = axis.annotate(
                label,
                place,
                (dx, dy),
                textcoords="offset points",
                fontsize=9,
                color=color,
                zorder=5,
                ha="left" if dx > 0 else "right",
                bbox=box,
            )
            extent = tuple(note.get_window_extent().extents)
            if (dx, dy) == offsets[-1] or is_free(extent, taken):
                break
            note.remove()
        taken.append(extent)


def is_free(a: tuple, taken: list[tuple]) -> bool:
    """Does a box (left, bottom, right, top) overlap with none that is taken?"""
    for b in taken:
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            return False
    return True


def draw_heatmaps(path: Path, cells: dict[tuple[float, int], dict[str, float]]) -> None:
    """Figure A2: a panel for each benchmark, each with its own colours.

    cells: (gamma, W) -> {name: accuracy}. Nothing is drawn with a single gamma or W.
    """
    gammas = set()
    Ws = set()
    for gamma, W in cells:
        gammas.add(gamma)
        Ws.add(W)
    if len(gammas) < 2 or len(Ws) < 2:
        return
    gammas = sorted(gammas)
    Ws = sorted(Ws)
    names = list(next(iter(cells.values())))
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    width = 1 + columns * (1 + 0.75 * len(Ws))
    figure, axes = canvas(rows, columns, width, rows * (1 + 0.5 * len(gammas)))
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        grid = []
        for gamma in gammas:
            grid.append([cells.get((gamma, W), {}).get(name, math.nan) for W in Ws])
        draw_heatmap(axis, grid)
        axis.set(title=f"{name}, %", xlabel="W in tokens", ylabel="gamma")
        axis.set(xticks=range(len(Ws)), xticklabels=Ws)
        axis.set(yticks=range(len(gammas)), yticklabels=gammas)
    save_figure(path, figure, 150)


def draw_heatmap(axis, grid: list[list[float]]) -> None:
    image = axis.imshow(grid, cmap="cividis", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            text = "not run" if math.isnan(value) else f"{value:.1f}"
            color = "white" if image.norm(value) < 0.5 else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
