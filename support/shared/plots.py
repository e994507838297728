"""What the figures of egrsd.py, eval.py and diagnostics.py have in common."""

from pathlib import Path

from support.shared.files import write_beside, writing

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a $ in a completion is a dollar
}


def canvas(rows: int, columns: int, width: float, height: float, **options: object):
    """-> a matplotlib Figure of that many inches and its (rows, columns) axes; no display."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def log_scale(axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")  # the default writes mathematics, which is off
    axis.yaxis.set_minor_formatter(NullFormatter())


def write_figure(path: Path, figure, dpi: int = 110) -> None:
    """As a PNG; an OSError where that cannot be."""

    def write(beside: Path) -> None:
        figure.savefig(beside, dpi=dpi, format="png")

    write_beside(path, write)


def save_figure(path: Path, figure, dpi: int = 110) -> None:
    with writing(path):
        write_figure(path, figure, dpi)
