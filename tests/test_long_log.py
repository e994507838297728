"""A log of 100,000 lines: a step, a picture and a start cost what they cost with a short one."""

import math
import sys
import time
from pathlib import Path

import pytest
from helpers import read_log

from support.training import journal, run_folder

LONG = 100_000


def make_logs(folder: Path, whole: Path, steps: int) -> Path:
    """log.jsonl and a tenth of rollouts.jsonl, of lines as a run writes them."""
    folder.mkdir()
    for name, count in (("log.jsonl", steps), ("rollouts.jsonl", steps // 10)):
        line = (whole / name).read_text().splitlines()[0]
        assert line.startswith('{"step": 0,')
        with (folder / name).open("w") as file:
            for step in range(count):
                file.write(f'{{"step": {step},{line[11:]}\n')
    return folder


def open_one(out: Path, steps: int):
    rows = run_folder.clear_run(out, out / f"step_{steps}", steps, {})
    settings = {"steps": 10 * LONG, "max_grad_norm": 0.1, "max_length": 256}
    settings.update(wandb="", curves=True)
    return journal.open_journal(out, rows, settings, steps)


def spent(work) -> float:
    """Seconds of processor time."""
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.fixture(scope="module")
def logs(uninterrupted, tmp_path_factory) -> dict[str, tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("logs")
    short = make_logs(folder / "short", uninterrupted, 1000)
    long = make_logs(folder / "long", uninterrupted, LONG)
    return {"short": (short, 1000), "long": (long, LONG)}


def test_steps_and_pictures_take_no_longer_and_the_start_is_in_proportion(
    logs, uninterrupted
) -> None:
    (row,) = read_log(uninterrupted)[:1]
    row["seconds"] = {"rollout": 1.0, "passes": 1.0, "update": 1.0}
    start = {}  # seconds a line
    step = {}
    draw = {}
    books = {}
    for name, (out, steps) in logs.items():
        start[name] = spent(lambda: books.update({name: open_one(out, steps)})) / steps  # noqa: B023
        step[name] = draw[name] = math.inf
    for _ in range(6):  # in turn, and the least of each: a busy machine slows both alike
        for name, book in books.items():
            drawn = spent(lambda: journal.record_step(book, row, [], redraw=True))  # noqa: B023
            plain = spent(lambda: journal.record_step(book, row, []))  # noqa: B023
            draw[name] = min(draw[name], drawn)
            step[name] = min(step[name], plain)
    print(start, step, draw)
    for name, (_, steps) in logs.items():
        assert len(books[name].curves["step"]) == steps + 12
        assert sum(map(sys.getsizeof, books[name].curves.values())) < 150 * steps  # bytes
    assert start["long"] < 2 * start["short"] + 50e-6  # seconds a line
    assert step["long"] < 2 * step["short"] + 1e-3
    assert draw["long"] < 1.5 * draw["short"] + 0.05  # of all points: 4 times


def test_a_resume_of_a_long_log_cuts_it_in_place(logs, tmp_path) -> None:
    out = logs["short"][0]
    before = (out / "log.jsonl").stat().st_ino
    assert run_folder.cut_log(out / "log.jsonl", 700, "seconds") == 700
    assert (out / "log.jsonl").stat().st_ino == before
    assert [row["step"] for row in read_log(out)] == list(range(700))
