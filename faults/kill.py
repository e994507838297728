"""SIGKILL at random moments: what is resumed equals what was never interrupted, bit for bit.

    python faults/kill.py --count 20 --seed 0

`count` kills each of training (also while resuming and while overwriting), of eval.py, and of
eval.py with two processes. Each run is a fork of this process, which has imported everything: the
kills then fall into the work and not into the imports.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import datasets  # noqa: E402, F401 - imported before any fork
import math_verify  # noqa: E402, F401
import peft  # noqa: E402, F401
import transformers  # noqa: E402, F401

import egrsd  # noqa: E402
import eval as ev  # noqa: E402
from support.shared import processes  # noqa: E402

MACHINE = ("seconds", "tokens_per_second", "memory_gib")  # of a log line: may differ
TRAIN = "--preset tiny --batch_size 4 --max_completion 24 --steps 6 --save_every 2".split()
EVAL = "--preset tiny --limit 12 --K 2 --batch 4 --max_new 24".split()


def begin(program: Callable[[list[str]], None], argv: list[str], log: Path, env: dict) -> int:
    """A process of its own that runs the program. -> its id"""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        with processes.ending_together():
            program(argv)
        code = 0
    except SystemExit as error:
        print(error)
        code = int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def train(argv: list[str]) -> None:
    egrsd.train(egrsd.parse_settings(argv))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(program: Callable, argv: list[str], log: Path, nproc: int) -> list[int]:
    """`nproc` ranks, as torchrun starts them."""
    if nproc == 1:
        return [begin(program, argv, log, {})]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    shared.update(WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
    pids = []
    for rank in range(nproc):
        env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pids.append(begin(program, argv, log, env))
    return pids


def wait(pids: list[int], seconds: float = 600.0) -> bool:
    """Let them run that long, then kill what is left. -> did all of them end well by themselves?"""
    deadline = time.monotonic() + seconds
    left = set(pids)
    well = True
    while left and time.monotonic() < deadline:
        for pid in [*left]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.discard(pid)
                well = well and status == 0
        time.sleep(0.001)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return well and not left


def run_through(program: Callable, argv: list[str], log: Path, nproc: int = 1) -> float:
    """-> seconds that it took"""
    began = time.monotonic()
    if not wait(start(program, argv, log, nproc)):
        raise RuntimeError(f"{argv} ended badly:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began


def run_killed(
    program: Callable, argv: list[str], log: Path, seconds: float, nproc: int = 1
) -> bool:
    """Killed after that long. -> was it still running?"""
    began = time.monotonic()
    killed = not wait(start(program, argv, log, nproc), seconds)
    if not killed:
        lasted.append(time.monotonic() - began)
    return killed


lasted: list[float] = []  # runs that ended before their kill: a machine may become less busy


def rows_of(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if key not in MACHINE})
    return rows


def what_a_run_left(out: Path) -> dict[str, object]:
    """All that must be the same: adapter, optimizer, log, rollouts, accuracies, and no litter."""
    last = out / "step_6"
    summary = json.loads((out / "summary.json").read_text())
    return {
        "adapter": (last / "adapter_model.safetensors").read_bytes(),
        "optimizer": (last / "trainer.safetensors").read_bytes(),
        "log": rows_of(out / "log.jsonl"),
        "rollouts": (out / "rollouts.jsonl").read_bytes(),
        "before and after": [summary.get("before"), summary.get("after"), summary["steps"]],
        "hidden files": [path.name for path in out.glob(".*")],
    }


def what_an_evaluation_left(out: Path) -> dict[str, object]:
    rows = rows_of(out / "samples.jsonl")
    return {
        "samples": sorted(json.dumps(row, sort_keys=True) for row in rows),
        "table": (out / "table.md").read_text(),
        "other files": [path.name for path in out.glob("samples-*")],
    }


def phase_of(out: Path) -> str:
    """Where in a run the kill struck, by what it left."""
    if list(out.glob(".step_*")):
        return "writing a checkpoint, or overwriting"
    if not (out / "settings.json").exists():
        return "before the folder was taken"
    log = out / "log.jsonl"
    steps = log.read_bytes().count(b"\n") if log.exists() else 0
    rolled = out / "rollouts.jsonl"
    written = rolled.read_bytes().count(b"\n") // 4 if rolled.exists() else 0
    if written > steps:
        return "logging"
    if steps == 6:
        return "after the last step"
    return "within a step" if steps else "loading, evaluating before, first step"


def differences(found: dict, *wanted: dict) -> list[str]:
    """[] if what was found is one of what is wanted, else what differs from the last of them."""
    for want in wanted:
        if found == want:
            return []
    return [name for name, value in wanted[-1].items() if found[name] != value]


def kill_training(count: int, seed: int, folder: Path) -> tuple[collections.Counter, list[str]]:
    held_out = folder / "held_out.jsonl"
    few = (ROOT / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)[:4]
    held_out.write_text("".join(few))
    log = folder / "log.txt"
    new = [*TRAIN, "--eval_data", str(held_out)]
    old = [*new, "--seed", "9"]
    seconds = run_through(train, [*new, "--out", str(folder / "new")], log)
    run_through(train, [*old, "--out", str(folder / "old")], log)
    wanted = what_a_run_left(folder / "new")
    older = what_a_run_left(folder / "old")
    struck = collections.Counter()
    wrong = []
    number = 0
    while sum(struck.values()) < count:
        rng = random.Random(f"{seed}/train/{number}")
        seconds = min([seconds, *lasted])
        number += 1
        how = rng.choice(["run", "run", "resume", "overwrite"])
        out = folder / f"run-{number}"
        argv = [*new, "--out", str(out)]
        if how == "overwrite":
            shutil.copytree(folder / "old", out)
            argv.append("--overwrite")
        if not run_killed(train, argv, log, rng.uniform(0.02, 1.0) * seconds):
            continue  # it had ended
        phase = phase_of(out)
        if how == "resume":
            again = ["--resume", *argv]
            if run_killed(train, again, log, rng.uniform(0.02, 0.8) * seconds):
                phase = phase_of(out)
        struck[f"{how}: {phase}"] += 1
        begun = (out / "settings.json").exists()
        run_through(train, ["--resume", "--out", str(out)] if begun else argv, log)
        # An --overwrite that was killed before it deleted anything leaves the old run as it was.
        either = (older, wanted) if how == "overwrite" else (wanted,)
        different = differences(what_a_run_left(out), *either)
        if different:
            wrong.append(f"training, kill {number} ({how}: {phase}): {', '.join(different)}")
        print(f"  kill {number}, {how}: {phase}", "DIFFERS" if different else "equal", flush=True)
        shutil.rmtree(out)
    return struck, wrong


def kill_evaluation(
    count: int, seed: int, folder: Path, nproc: int
) -> tuple[collections.Counter, list[str]]:
    log = folder / f"log-{nproc}.txt"
    lasted.clear()
    whole = folder / f"whole-{nproc}"
    seconds = run_through(ev.main, [*EVAL, "--out", str(whole)], log, nproc)
    wanted = what_an_evaluation_left(whole)
    struck = collections.Counter()
    wrong = []
    number = 0
    while sum(struck.values()) < count:
        rng = random.Random(f"{seed}/eval {nproc}/{number}")
        seconds = min([seconds, *lasted])
        number += 1
        out = folder / f"eval-{nproc}-{number}"
        argv = [*EVAL, "--out", str(out)]
        if not run_killed(ev.main, argv, log, rng.uniform(0.05, 1.0) * seconds, nproc):
            continue  # it had ended
        done = 0
        for path in out.glob("samples*.jsonl"):
            done += path.read_bytes().count(b"\n")
        struck[f"{done // 8 * 8} to {done // 8 * 8 + 7} of 24 samples"] += 1
        run_through(ev.main, argv, log, nproc)
        different = differences(what_an_evaluation_left(out), wanted)
        if different:
            wrong.append(f"evaluation on {nproc}, kill {number}: {', '.join(different)}")
        print(f"  kill {number}, {done} samples", "DIFFERS" if different else "equal", flush=True)
        shutil.rmtree(out)
    return struck, wrong


def report(title: str, found: tuple[collections.Counter, list[str]]) -> list[str]:
    struck, wrong = found
    kills = sum(struck.values())
    print(f"{title}: {kills - len(wrong)} of {kills} equal", flush=True)
    for phase, times in sorted(struck.items()):
        print(f"  {times:>3} x {phase}", flush=True)
    for sentence in wrong:
        print(f"  WRONG: {sentence}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["train", "eval", "eval2"])
    given = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only in (None, "train"):
            wrong += report("training", kill_training(given.count, given.seed, folder))
        for nproc, option in ((1, "eval"), (2, "eval2")):
            if given.only in (None, option):
                found = kill_evaluation(given.count, given.seed, folder, nproc)
                wrong += report(f"eval.py, {nproc} process(es)", found)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
