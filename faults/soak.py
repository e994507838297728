"""Hours of tiny steps in one process, and hundreds of pushes to vLLM: does anything grow?

    python faults/soak.py --minutes 120 --csv steps.csv    # training, ended by Ctrl-C
    python faults/soak.py --pushes 200 --csv pushes.csv    # needs vLLM; its CPU build will do
    python faults/soak.py --read steps.csv                 # what a file of measurements says

Every few seconds, or after every push: memory, open files, processes and threads, processor time. A
slope is that of a line through the means of 20 blocks of measurements, with its 95 % interval: the
measurements themselves depend on one another. The first quarter is the warm-up, and left out.
"""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TRAIN = "--preset tiny --eval_data= --batch_size 4 --max_completion 24 --save_every 1000".split()
PUSH = "--preset tiny --eval_data= --batch_size 4 --max_completion 24 --engine vllm".split()
COLUMNS = (
    "what",  # step or push
    "seconds",  # since the first measurement
    "steps",  # or pushes
    "memory",  # MiB that are resident, of the process
    "graders",  # likewise, of its child processes together
    "descriptors",  # open files, pipes and sockets
    "processes",  # its children
    "threads",
    "processor",  # seconds, of the process
)
BLOCKS = 20
STUDENT_T = 2.101  # 97.5 % point, 20 - 2 degrees of freedom
MOST_GROWTH = {"step": 0.5, "push": 1.0}  # MiB per 1,000


# --------------------------------------------------------------------------------------------------
# Measuring


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(after_name[1]) == pid:
            found.append(int(path.parent.name))
    return found


def status(pid: int, field: str) -> int:
    """A number of /proc/PID/status; memory is in KiB. 0 for a process that is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def processor_seconds(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(after_name[11]) + int(after_name[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(pid: int, seconds: float, steps: int) -> dict[str, float]:
    graders = children(pid)
    held = 0
    for child in graders:
        held += status(child, "VmRSS")
    return {
        "what": "push" if pid == os.getpid() else "step",
        "seconds": round(seconds, 2),
        "steps": steps,
        "memory": round(status(pid, "VmRSS") / 1024, 3),
        "graders": round(held / 1024, 3),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "processes": len(graders),
        "threads": status(pid, "Threads"),
        "processor": processor_seconds(pid),
    }


def write_rows(path: Path, rows: Iterator[dict]) -> None:
    """As they come, so that they can be read meanwhile."""
    with path.open("w", buffering=1, newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows:
            table.writerow(row)


def read_rows(path: Path) -> tuple[str, list[dict[str, float]]]:
    """-> step or push, the measurements"""
    rows = []
    what = "step"
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values():  # half a line
                continue
            what = row.pop("what", what)
            rows.append({name: float(value) for name, value in row.items()})
    return what, rows


def hard_to_grade(path: Path) -> None:
    """The tiny problems with fractions as answers: a grading process must compare them."""
    lines = []
    for line in (ROOT / "tiny" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        row["answer"] = f"\\frac{{{2 * int(row['answer'])}}}{{2}}"
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def train(folder: Path, minutes: float, every: float) -> Iterator[dict]:
    """A run of the command line, ended by Ctrl-C when its time is up."""
    out = folder / "run"
    hard_to_grade(folder / "data.jsonl")
    argv = [sys.executable, str(ROOT / "egrsd.py"), *TRAIN, "--steps", "10000000"]
    argv += ["--data", str(folder / "data.jsonl")]
    with (folder / "log.txt").open("w") as log:
        run = subprocess.Popen([*argv, "--out", str(out)], stdout=log, stderr=log)
    try:
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").stat().st_size:
            if run.poll() is not None:
                raise SystemExit(f"it ended:\n{(folder / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.2)
        began = time.monotonic()
        steps = 0
        with (out / "log.jsonl").open("rb") as lines:
            while run.poll() is None and time.monotonic() - began < 60 * minutes:
                steps += lines.read().count(b"\n")
                yield measure(run.pid, time.monotonic() - began, steps)
                time.sleep(every)
        workers = children(run.pid)
        run.send_signal(signal.SIGINT)
        code = run.wait(120)
    finally:
        run.kill()
        run.wait()
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    if code or left or not list(out.glob("step_*")):
        ending = (folder / "log.txt").read_text()[-3000:]
        raise SystemExit(f"IT ENDED BADLY: status {code}, processes left {left}\n{ending}")


def push(folder: Path, pushes: int) -> Iterator[dict]:
    """Another random adapter each time; what vLLM then samples must be of that adapter."""
    import torch

    import egrsd
    from support.shared import engines

    s = egrsd.parse_settings([*PUSH, "--out", str(folder / "run")])
    run = egrsd.load_run(s)
    batch, _, _ = egrsd.next_problems(run.problems, run.tokenizer, s, 0)
    parts = s, run.model, run.eos_ids, run.device, "vllm", 1
    sample, to_engine = egrsd.start_engine(*parts)
    adapter = egrsd.trainable(run.model)
    noise = torch.Generator().manual_seed(0)
    began = time.monotonic()
    for number in range(1, pushes + 1):
        for name, p in adapter.items():
            if "lora_B" in name:
                p.data.copy_(0.05 * torch.randn(p.shape, generator=noise))
        to_engine()
        prompts = [row["prompt_ids"] for row in batch]
        seeds = [engines.rollout_seed(number, 0, i) for i in range(len(batch))]
        drawn = sorted(sample(prompts, seeds, max_new=8, **run.sampling))
        rollouts = []
        engine_logps = []
        for i, ids, logps in drawn:
            rollouts.append({"prompt_ids": prompts[i], "completion_ids": ids})
            engine_logps += logps
        logp, _ = egrsd.score_completions(run.model, rollouts, "prompt_ids", s)
        distance = (logp - torch.tensor(engine_logps)).abs().max().item()
        if distance > 1e-3:
            raise SystemExit(f"push {number} did not arrive: {distance:.2g} nats from the trainer")
        yield measure(os.getpid(), time.monotonic() - began, number)


# --------------------------------------------------------------------------------------------------
# Reading


def blocks(rows: list[dict]) -> list[list[dict]]:
    """20 stretches of as many steps each, without the first quarter."""
    last = rows[-1]["steps"]
    width = 0.75 * last / BLOCKS
    parts = [[] for _ in range(BLOCKS)]
    for row in rows:
        place = math.ceil((row["steps"] - 0.25 * last) / width) - 1
        if place >= 0:
            parts[min(place, BLOCKS - 1)].append(row)
    if min(map(len, parts)) < 2:
        raise SystemExit(f"{len(rows)} measurements are too few for {BLOCKS} blocks")
    return parts


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """-> slope of the line of least squares, half its 95 % interval; for 20 points."""
    xs, ys = zip(*points)
    x_mean = statistics.fmean(xs)
    y_mean = statistics.fmean(ys)
    spread = 0.0
    together = 0.0
    for x, y in points:
        spread += (x - x_mean) ** 2
        together += (x - x_mean) * (y - y_mean)
    b = together / spread
    squares = 0.0
    for x, y in points:
        squares += (y - y_mean - b * (x - x_mean)) ** 2
    variance = squares / (len(points) - 2)
    return b, STUDENT_T * math.sqrt(variance / spread)


def means(parts: list[list[dict]], column: str) -> list[tuple[float, float]]:
    points = []
    for part in parts:
        x = statistics.fmean(row["steps"] for row in part)
        points.append((x / 1000, statistics.fmean(row[column] for row in part)))
    return points


def rates(parts: list[list[dict]], column: str) -> list[tuple[float, float]]:
    """Milliseconds a step of each block."""
    points = []
    for part in parts:
        first, last = part[0], part[-1]
        steps = last["steps"] - first["steps"]
        x = (first["steps"] + last["steps"]) / 2000
        points.append((x, 1000 * (last[column] - first[column]) / steps))
    return points


def with_slope(points: list[tuple[float, float]], unit: str) -> str:
    b, half = slope(points)
    first, last = points[0][1], points[-1][1]
    return (
        f"{first:.1f} to {last:.1f} {unit}, {b:+.3f} per 1,000 (95 %: {b - half:+.3f} to "
        f"{b + half:+.3f})"
    )


def read(what: str, rows: list[dict]) -> bool:
    """Say what the measurements say. -> does nothing grow?"""
    parts = blocks(rows)
    kept = sum(parts, [])
    memory = means(parts, "memory")
    b, half = slope(memory)
    grows = b - half > MOST_GROWTH[what]
    last = rows[-1]
    print(
        f"{last['steps']:,.0f} times a {what}, in {last['seconds'] / 60:.0f} minutes, {len(rows)} "
        f"measurements, the first quarter left out; first to last of {BLOCKS} blocks:"
    )
    print(f"  memory            {with_slope(memory, 'MiB')}")
    print(f"  grading processes {with_slope(means(parts, 'graders'), 'MiB')}")
    print(f"  one, clock        {with_slope(rates(parts, 'seconds'), 'ms')}")
    print(f"  one, processor    {with_slope(rates(parts, 'processor'), 'ms')}")
    for name in ("descriptors", "processes", "threads"):
        values = [row[name] for row in kept]
        print(f"  {name:<17} {min(values):.0f} to {max(values):.0f}, at the end {values[-1]:.0f}")
        half_way = len(values) // 2
        grows = grows or min(values[half_way:]) > max(values[:half_way])
    print("SOMETHING GROWS" if grows else "nothing grows")
    return not grows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=120, help="of training")
    parser.add_argument("--every", type=float, default=10, help="seconds between measurements")
    parser.add_argument("--pushes", type=int, help="of adapters to vLLM, in place of training")
    parser.add_argument("--csv", type=Path, default=Path("soak.csv"), help="the measurements")
    parser.add_argument("--read", type=Path, help="say what such a file says")
    given = parser.parse_args()
    if given.read:
        raise SystemExit(not read(*read_rows(given.read)))
    with tempfile.TemporaryDirectory() as name:
        if given.pushes:
            rows = push(Path(name), given.pushes)
        else:
            rows = train(Path(name), given.minutes, given.every)
        write_rows(given.csv, rows)
    raise SystemExit(not read(*read_rows(given.csv)))


if __name__ == "__main__":
    main()
