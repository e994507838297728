"""The lab notebook of a run: log.jsonl, rollouts.jsonl, curves.png, summary.json, the bar."""

import math
import resource
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from support.shared.console import fail, first_line, progress, say
from support.shared.files import appender, read_json, write_json
from support.shared.plots import canvas, log_scale, write_figure
from support.shared.processes import rank_and_world, reduce_

ROLLOUT_KEYS = (
    "step",
    "index",
    "seed",
    "id",
    "problem",
    "solution",
    "answer",
    "prompt_ids",
    "completion_ids",
    "engine_logps",
    "text",
    "extracted",
    "correct",
    "status",
    "truncated",
    "reward",
    "advantage",
)
FIGURES = (  # of step_figures, in the order of the log
    "loss",
    "magnitude",
    "magnitude_off",
    "clipped",
    "delta_off",
    "delta_right",
    "delta_wrong",
    "canary",
    "entropy",
    "gate",
    "entropy_max",
)
PHASES = ("rollout", "passes", "update")
CURVES_SHARE = 0.02  # of the time: drawing takes about a second, as long as a small step
BLUE, RED, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito
PANELS = (  # of curves.png: title, unit, figures
    ("rollouts", "share (reward: r)", ("correct", "truncated", "reward")),
    ("completion length", "tokens", ("length",)),
    ("weights", "mean over tokens", ("gate", "magnitude")),
    ("teacher evidence \u03b4 by rollout", "nats a token", ("delta_right", "delta_wrong")),
    ("teacher entropy", "nats", ("entropy", "entropy_max")),
    ("gradient before clipping", "norm", ("grad_norm",)),
)


def start_wandb(project: str, out: Path, settings: dict) -> ModuleType | None:
    """wandb on rank 0, where there is a project; exits where it does not start."""
    if not project or rank_and_world()[0] > 0:
        return None
    import wandb

    try:
        wandb.init(project=project, dir=str(out), config=settings)
    except Exception as error:
        fail(f"--wandb {project} ({first_line(error)}): log in (wandb login), or leave it out")
    return wandb


def open_journal(
    out: Path,
    rows: Iterable[dict],
    settings: dict,
    start: int,
    wandb: ModuleType | None = None,
) -> SimpleNamespace:
    """What record_step needs; `rows` are those of the log so far, `start` the first to come."""
    bar = progress(total=settings["steps"], initial=start, desc="train", unit="step")
    # Of each step what the curves show, 8 bytes a figure: a long run must not fill the memory.
    curves = {"step": array("d")}
    for _, _, names in PANELS:
        for name in names:
            curves[name] = array("d")
    journal = SimpleNamespace(
        out=out,
        curves=curves,
        seconds=dict.fromkeys(PHASES, 0.0),
        bar=bar,
        wandb=wandb,
        max_grad_norm=settings["max_grad_norm"],
        max_length=settings["max_length"],
        draws=settings["curves"],
        drawn=time.perf_counter(),
        drawing=2.0,  # seconds, with the import of matplotlib; then what it took
    )
    if rank_and_world()[0] == 0:
        journal.add_rollouts = appender(out / "rollouts.jsonl")
        journal.add_row = appender(out / "log.jsonl")
    for row in rows:
        remember(journal, row)
    return journal


def remember(journal: SimpleNamespace, row: dict) -> None:
    """What curves.png and summary.json will need of a line of the log."""
    for name, values in journal.curves.items():
        values.append(math.nan if row[name] is None else row[name])
    for name in PHASES:
        journal.seconds[name] += row["seconds"][name]


# --------------------------------------------------------------------------------------------------
# Figures of one step


def step_figures(
    rollouts: list[dict], tokens: dict[str, Tensor], eps: float
) -> dict[str, float | None]:
    """The whole step's figures, from each rank's rollouts and what was computed of their tokens.

    Means over tokens, but for the loss (a sum) and entropy_max. delta_right and delta_wrong are
    those of right and of wrong rollouts. None: there is no such token, or no such figure, since a
    method without a teacher has no logp_T, H, omega or w.
    """
    device = tokens["logp"].device
    lengths = torch.tensor([len(r["completion_ids"]) for r in rollouts], device=device)
    correct = torch.tensor([r["correct"] for r in rollouts], device=device)
    right = correct.repeat_interleave(lengths)  # (N,)
    everywhere = torch.ones_like(right)
    each = {"loss": (tokens["loss"], everywhere)}  # name: values, tokens that count
    if "w" in tokens:
        w = tokens["w"]
        each["magnitude"] = (w, everywhere)
        each["magnitude_off"] = ((w - 1).abs(), everywhere)
        each["clipped"] = ((w <= 1 - eps) | (w >= 1 + eps), everywhere)
    if "logp_T" in tokens:
        delta = tokens["logp_T"] - tokens["logp"]
        each["delta_off"] = (delta.abs(), everywhere)
        each["delta_right"] = (delta, right)
        each["delta_wrong"] = (delta, ~right)
    if "H" in tokens:
        each["entropy"] = (tokens["H"], everywhere)
    if "omega" in tokens:
        each["gate"] = (tokens["omega"], everywhere)
    if all(r["engine_logps"] for r in rollouts):
        each["canary"] = (distance_to_engine(rollouts, tokens["raw_logp"]), everywhere)

    sums = []
    for value, counted in each.values():
        sums += [value[counted].double().sum(), counted.double().sum()]
    sums = reduce_(torch.stack(sums).cpu()).tolist()
    figures = dict.fromkeys(FIGURES)
    for name, total, count in zip(each, sums[::2], sums[1::2]):
        figures[name] = total / count if count else None
    figures["loss"] = sums[0]
    if "H" in tokens:
        figures["entropy_max"] = reduce_(tokens["H"].max().cpu(), "MAX").item()
    return figures


def distance_to_engine(rollouts: list[dict], logp: Tensor) -> Tensor:
    """(N,) nats between the engine's and the trainer's log-probability of each token."""
    engine_logp = []
    for r in rollouts:
        engine_logp += r["engine_logps"]
    return (logp - torch.tensor(engine_logp, device=logp.device)).abs()


def log_row(
    step: int,
    rollouts: list[dict],
    skipped: list[str],
    figures: dict,
    clock: list[float],
    device: torch.device,
) -> dict:
    """One line of log.jsonl: each figure is the whole step's; those of the machine come last."""
    n = len(rollouts)
    tokens = 0
    unboxed = 0
    timeouts = 0
    row = {"step": step, "reward": 0.0, "correct": 0.0, "truncated": 0.0, "advantage": 0.0}
    for r in rollouts:
        for key in ("reward", "correct", "truncated", "advantage"):
            row[key] += r[key] / n
        tokens += len(r["completion_ids"])
        unboxed += r["extracted"] is None
        timeouts += r["status"] == "timeout"
    row["length"] = tokens / n
    row["unboxed"] = unboxed / n
    row["timeouts"] = timeouts
    row.update(figures)
    row["skipped"] = len(skipped)
    row["skipped_prompts"] = skipped
    row["seconds"] = {}
    for name, begin, end in zip(PHASES, clock, clock[1:]):
        row["seconds"][name] = round(end - begin, 4)
    row["tokens_per_second"] = round(tokens / (clock[-1] - clock[0]), 1)
    row["memory_gib"] = round(peak_memory(device) / 2**30, 2)
    return row


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --------------------------------------------------------------------------------------------------
# Writing


def record_step(
    journal: SimpleNamespace, row: dict, rollouts: list[dict], redraw: bool = False
) -> None:
    """Add the step to the files of the run, and say what a user should not miss.

    The curves are drawn where `redraw` says so, and now and then as the run goes.
    """
    journal.bar.update()
    journal.bar.set_postfix(
        reward=f"{row['reward']:.2f}", right=f"{row['correct']:.0%}", length=f"{row['length']:.0f}"
    )
    if rank_and_world()[0] > 0:
        return
    kept = []
    for r in rollouts:
        kept.append({key: r[key] for key in ROLLOUT_KEYS})
    journal.add_rollouts(kept)
    journal.add_row([row])
    remember(journal, row)
    began = time.perf_counter()
    due = redraw or journal.drawing < CURVES_SHARE * (began - journal.drawn)
    if journal.draws and due:
        curves = journal.out / "curves.png"
        show(f"{curves}", draw_curves, curves, journal.curves, journal.max_grad_norm)
        journal.drawn = time.perf_counter()
        journal.drawing = journal.drawn - began
    if journal.wandb:
        show("the line for Weights & Biases", journal.wandb.log, row, step=row["step"])
    warn(row, rollouts, journal.max_length)


def show(what: str, work: Callable, *args: object, **options: object) -> None:
    """Do it, or say why not: neither a picture nor another's server may cost the run."""
    try:
        work(*args, **options)
    except Exception as error:
        say(f"{what} could not be written ({first_line(error)}): the run goes on without it")


def warn(row: dict, rollouts: list[dict], max_length: int) -> None:
    step = row["step"]
    for name in row["skipped_prompts"]:
        say(
            f"step {step}: skipped problem {name}, which does not fit into --max_length "
            f"{max_length}"
        )
    if not any(r["reward"] for r in rollouts):  # [D8]
        say(
            f"step {step}: NOT ONE ROLLOUT EARNED A REWARD ({row['truncated']:.0%} truncated, "
            f"{row['unboxed']:.0%} without a boxed answer): try a longer --max_completion, "
            "--no-thinking, or easier problems"
        )


def read_summary(out: Path) -> dict:
    return read_json(out / "summary.json", {})


def write_summary(
    journal: SimpleNamespace, summary: dict, steps: int | None = None, began: float = 0.0
) -> None:
    """summary.json, and the table of before and after; `steps` and `began` once it has ended."""
    if rank_and_world()[0] > 0:
        return
    if steps is not None:
        seconds = {}
        for name in PHASES:
            seconds[name] = round(journal.seconds[name], 1)
        seconds["this_start"] = round(time.perf_counter() - began, 1)  # the others: of all starts
        summary = {**summary, "steps": steps, "seconds": seconds}
    write_json(journal.out / "summary.json", summary)
    if "after" in summary:
        say("\n          accuracy   length")
        for when in ("before", "after"):
            if when in summary:
                scores = summary[when]
                say(f"{when:<8} {scores['accuracy']:>7.1f} % {scores['length']:>8.1f}")


MOST_POINTS = 500  # of a curve: drawing a long log takes no longer than a short one


def thin(values: array) -> Tensor:
    """Means of consecutive values, without NaN among them; the values themselves while few."""
    points = torch.from_numpy(np.array(values))  # one copy; torch.tensor reads value by value
    width = math.ceil(len(points) / MOST_POINTS)
    if width <= 1:
        return points
    whole = pad(points, (0, -len(points) % width), value=math.nan)
    return whole.view(-1, width).nanmean(1)


def draw_curves(path: Path, curves: dict[str, array], max_grad_norm: float) -> None:
    """curves.png: what to watch in a run, redrawn as it goes; of a long one, means over steps."""
    figure, axes = canvas(2, 3, 13, 6.5)
    steps = thin(curves["step"])
    xlabel = "step"
    if len(steps) < len(curves["step"]):
        xlabel = f"step (means of {len(curves['step']) / len(steps):.0f})"
    for axis, (title, unit, names) in zip(axes.flat, PANELS):
        for name, color, dash in zip(names, (BLUE, RED, GREY), ("-", "--", ":")):
            values = thin(curves[name])
            axis.plot(steps, values, dash, color=color, label=name.replace("_", " "))
        if names == ("grad_norm",):
            axis.axhline(max_grad_norm, color=RED, linestyle="--", linewidth=1, label="clipped to")
            log_scale(axis)
        axis.set(title=title, xlabel=xlabel, ylabel=unit)
        axis.legend(fontsize=8)
    write_figure(path, figure)
