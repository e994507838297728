"""A rank killed, stopped or out of memory, and torchrun killed, in each phase; then resumed.

    python faults/ranks.py --seed 0                  # all, about half an hour on two cores
    python faults/ranks.py --fault stop --phase rollout
    python faults/ranks.py --of eval                 # eval.py, some ten minutes

Each run is a real torchrun with two ranks. The rank that is struck is struck by itself, as it
enters the phase. What is measured: seconds until every process has ended, also those that grade;
whether the message names rank and phase; whether the run, resumed on as many and on another number
of ranks, comes to the result of the one that nothing happened to. An evaluation is resumed by the
same command; its result is its samples and its table.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FAULTS = ("kill", "stop", "memory", "torchrun")
PHASES = {  # -> how often a run of RUN enters it before it is struck there: 1 is the first time
    "loading": 1,
    "engine start": 1,
    "evaluation": 1,
    "rollout": 3,
    "grading": 3,
    "passes": 3,
    "update": 3,
    "saving": 4,
    "end": 1,
}
EVAL_PHASES = {"loading": 1, "engine start": 1, "sampling": 1, "sampling, half done": 3, "end": 1}
PHASES_OF = {"train": PHASES, "eval": EVAL_PHASES}
RUN = "--preset tiny --batch_size 8 --max_completion 24 --steps 4 --save_every 2".split()
EVALUATION = "--preset tiny --limit 24 --K 4 --batch 4 --max_new 24".split()
LIMIT = 20  # seconds of --rank_timeout where a rank is stopped
MACHINE = ("seconds", "tokens_per_second", "memory_gib", "canary", "skipped_prompts")


# --------------------------------------------------------------------------------------------------
# Inside a rank


def strike(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "memory":
        import torch

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        torch.ones(1 << 28)  # a GiB, which is not to be had
    if fault == "torchrun":
        os.kill(os.getppid(), signal.SIGKILL)


def be_a_rank(argv: list[str]) -> None:
    """egrsd.py or eval.py, struck as FAULT_* of the environment say."""
    import egrsd
    import eval as ev
    from support.shared import processes

    fault = os.environ["FAULT"]
    phase = os.environ["FAULT_PHASE"]
    left = [int(os.environ["FAULT_TIME"])]
    real = processes.enter

    def enter(now: str) -> float:
        clock = real(now)
        left[0] -= now == phase
        if now == phase and left[0] == 0:
            time.sleep(1.5 * processes.TICK)  # the others know the phase by then
            Path(os.environ["FAULT_MARK"]).write_text(str(time.time()))
            strike(fault)
        return clock

    if processes.rank_and_world()[0] == int(os.environ["FAULT_RANK"]):
        processes.enter = enter
        load = egrsd.models.load_base
        skeleton = ev.models.load_skeleton
        appender = ev.appender

        def load_base(*args, **options):
            if os.environ["FAULT_OF"] == "train":
                enter("loading")
            return load(*args, **options)

        def load_skeleton(*args):
            if os.environ["FAULT_OF"] == "eval":
                enter("loading")
            return skeleton(*args)

        def appender_of(path: Path) -> Callable[[list[dict]], None]:
            append = appender(path)

            def append_and_enter(rows: list[dict]) -> None:
                append(rows)
                enter("sampling")  # once more, so that it can be struck in the middle

            return append_and_enter

        egrsd.models.load_base = load_base
        ev.models.load_skeleton = load_skeleton
        ev.appender = appender_of
    with processes.ending_together():
        if os.environ["FAULT_OF"] == "eval":
            ev.main(argv)
        else:
            egrsd.train(egrsd.parse_settings(argv))


# --------------------------------------------------------------------------------------------------
# Outside


def torchrun(nproc: int, *args: object, log: Path, **env: str) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    if nproc == 1:
        launch = [sys.executable]
    with log.open("w") as file:
        return subprocess.Popen(
            [*launch, *map(str, args)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            cwd=ROOT,
        )


def family_of(mark: str) -> list[int]:
    """The processes with `mark` in their environment: ranks, graders, torchrun."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def run_whole(of: str, argv: list[str], nproc: int, log: Path) -> None:
    script = {"train": "egrsd.py", "eval": "eval.py"}[of]
    process = torchrun(nproc, ROOT / script, *argv, log=log)
    if process.wait(900):
        raise SystemExit(f"{argv} on {nproc} ended badly:\n{log.read_text()[-3000:]}")


def run_struck(
    of: str, argv: list[str], fault: str, phase: str, rank: int, number: int, folder: Path
) -> tuple[float, str]:
    """-> seconds from the blow until the last process ended, and what was printed"""
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    name = f"{fault}-{phase}-{time.time()}"
    env = {"FAULT": fault, "FAULT_PHASE": phase, "FAULT_RANK": str(rank), "FAULT_NAME": name}
    env |= {"FAULT_MARK": str(mark), "FAULT_TIME": str(number), "FAULT_OF": of}
    log = folder / "log.txt"
    process = torchrun(2, __file__, "--as_rank", *argv, log=log, **env)
    deadline = time.time() + 300
    while process.poll() is None or family_of(name):
        if time.time() > deadline:
            for pid in family_of(name):
                os.kill(pid, signal.SIGKILL)
            return math.inf, log.read_text()
        time.sleep(0.1)
    if not mark.exists():
        raise SystemExit(f"{fault} in {phase}: it was never struck:\n{log.read_text()[-3000:]}")
    return time.time() - float(mark.read_text()), log.read_text()


def figures_of(out: Path) -> list[dict]:
    rows = []
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if key not in MACHINE})
    return rows


def same(out: Path, whole: Path, exact: bool) -> bool:
    """The same log, rollouts and adapter: to the last bit, or up to the order of sums."""
    name = "step_4/adapter_model.safetensors"
    if exact:
        equal = (out / name).read_bytes() == (whole / name).read_bytes()
        return equal and figures_of(out) == figures_of(whole)
    rows = figures_of(out)
    wanted = figures_of(whole)
    if len(rows) != len(wanted):
        return False
    for row, want in zip(rows, wanted):
        for key, value in want.items():
            numbers = isinstance(value, float) and isinstance(row[key], float)
            near = numbers and math.isclose(row[key], value, rel_tol=1e-3, abs_tol=1e-5)
            if row[key] != value and not near:
                return False
    return True


def same_evaluation(out: Path, whole: Path) -> bool:
    """The same samples, in any order, and the same table."""
    lines = []
    for folder in (out, whole):
        lines.append(sorted((folder / "samples.jsonl").read_text().splitlines()))
    tables = [(folder / "table.md").read_bytes() for folder in (out, whole)]
    return lines[0] == lines[1] and tables[0] == tables[1]


def message_of(text: str, fault: str) -> str:
    """The sentence that says who it was."""
    for pattern in (r"rank \d+ (?:died|has given|has not|ended) .*?(?=\. All|\n|$)",):
        found = re.search(pattern, text)
        if found:
            return found[0][:110]
    return "(none: torchrun is gone)" if fault == "torchrun" else "NONE"


def strike_and_resume(
    of: str, fault: str, name: str, rank: int, nproc: int, argv: list[str], folder: Path
) -> list[str]:
    """Print one row of the table, resumed on `nproc` ranks. -> what was wrong with it"""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    phase = name.partition(",")[0]
    number = PHASES_OF[of][name]
    limit = LIMIT if fault == "stop" else 600
    given = [*argv, "--out", str(out)]
    timed = [*given, "--rank_timeout", str(limit)]
    seconds, text = run_struck(of, timed, fault, phase, rank, number, folder)
    wrong = []
    message = message_of(text, fault)
    if fault != "torchrun" and (f"rank {rank} " not in message or phase not in message):
        wrong.append(f"names another rank or phase: {message}")
    allowed = 60 + (LIMIT if fault == "stop" else 0)
    if seconds > allowed:
        wrong.append(f"took {seconds:.0f} s to end")
    if of == "train":
        again = ["--resume", "--rank_timeout", "600", "--out", str(out)]
        run_whole(of, again, nproc, folder / "resume.txt")
        equal = same(out, folder / "whole", nproc == 2)
    else:
        run_whole(of, timed, nproc, folder / "resume.txt")
        equal = same_evaluation(out, folder / "whole")
    if not equal:
        wrong.append(f"resumed on {nproc}: another result")
    verdict = "WRONG" if wrong else "ok"
    resumed = f"resumed on {nproc}: {'equal' if equal else 'DIFFERS'}"
    print(f"{fault:<9}{name:<20}rank {rank} {seconds:6.1f} s  {resumed}  {verdict}")
    print(f"    {message}", flush=True)
    return [f"{fault}, {name}, rank {rank}: {sentence}" for sentence in wrong]


def options_for(of: str, folder: Path) -> list[str]:
    """Of a run that is over in seconds."""
    if of == "eval":
        return EVALUATION
    held_out = folder / "held_out.jsonl"
    few = (ROOT / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)[:8]
    held_out.write_text("".join(few))
    return [*RUN, "--eval_data", str(held_out)]


def main() -> None:
    if sys.argv[1:2] == ["--as_rank"]:
        be_a_rank(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--of", choices=["train", "eval"], default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, nargs="+", default=FAULTS)
    parser.add_argument("--phase", choices=[*PHASES, *EVAL_PHASES], nargs="+", help="default: all")
    parser.add_argument("--resume_on", type=int, nargs="+", default=[2, 1], help="in turn")
    given = parser.parse_args()
    phases = given.phase or [*PHASES_OF[given.of]]
    if not set(phases) <= set(PHASES_OF[given.of]):
        parser.error(f"--phase: those of --of {given.of} are {', '.join(PHASES_OF[given.of])}")
    rng = random.Random(given.seed)
    wrong = []
    rows = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = options_for(given.of, folder)
        run_whole(given.of, [*argv, "--out", str(folder / "whole")], 2, folder / "log.txt")
        for phase in phases:
            for fault in given.fault:
                rank = rng.randrange(2)
                nproc = given.resume_on[rng.randrange(len(given.resume_on))]
                wrong += strike_and_resume(given.of, fault, phase, rank, nproc, argv, folder)
                rows += 1
    print(f"{rows} struck, {len(wrong)} wrong")
    for sentence in wrong:
        print(f"  {sentence}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
