"""A disk that is full at every write, one after another; read-only; a folder that is removed.

    python faults/disk.py                       # training, eval.py, diagnostics.py
    python faults/disk.py --only train --every 7

For each write below the folder, in turn: it and all later ones fail. Once the file cannot be opened
(nor a folder made, nor a name changed: "open"), once it opens and takes no byte ("write": /dev/full
in its place, and safetensors' own error). As root also really, on RAM disks of growing size.

Each time the program must end with status 1 and a sentence, without a traceback; all checkpoints
that are there must be whole; and once there is room, what goes on must leave what a run leaves that
was never disturbed. A picture alone that cannot be written costs nothing.
"""

import argparse
import builtins
import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import diagnostics  # noqa: E402
from faults import kill  # noqa: E402
from support.training import run_folder  # noqa: E402

FOREVER = 1_000_000
FULL = os.strerror(errno.ENOSPC)


# --------------------------------------------------------------------------------------------------
# Breaking, in a process of its own


def counter(below: Path, first: int, seen: Path) -> Callable[[str, object], bool]:
    """-> fails(what, path): is this a write below the folder, and the `first` or a later one?"""
    count = [0]

    def fails(what: str, path: object) -> bool:
        if not isinstance(path, (str, Path)) or not str(path).startswith(f"{below}"):
            return False
        count[0] += 1
        if count[0] >= first:
            return True
        with seen.open("a") as file:
            file.write(f"{what} {Path(path).relative_to(below)}\n")
        return False

    return fails


def fail_to_open(fails: Callable[[str, object], bool], number: int) -> None:
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, args: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.truncate")
        if event == "open":
            writes = bool(args[2] & changes)
        if writes and fails(event, args[0]):
            raise OSError(number, os.strerror(number), args[0])

    sys.addaudithook(hook)


def fail_to_write(fails: Callable[[str, object], bool]) -> None:
    import safetensors.torch

    really_open = io.open
    really_serialize = safetensors.torch.serialize_file
    full = os.open("/dev/full", os.O_WRONLY)

    def opened(file: object, mode: str = "r", *args: object, **options: object):
        handle = really_open(file, mode, *args, **options)
        # Not "a+", which reads what is there: /dev/full has no end.
        writes = set(mode) & set("wx") or ("a" in mode and "+" not in mode)
        if writes and fails("write", file):
            os.dup2(full, handle.fileno())
        return handle

    def serialize(tensors: object, filename: object, *args: object, **options: object) -> None:
        if fails("write", filename):
            raise safetensors.SafetensorError(f"I/O error: {FULL} (os error {errno.ENOSPC})")
        really_serialize(tensors, filename, *args, **options)

    io.open = builtins.open = opened
    safetensors.torch.serialize_file = serialize


def broken(
    program: Callable, below: Path, how: str, first: int, seen: Path, number: int = errno.ENOSPC
) -> Callable[[list[str]], None]:
    """The program, whose `first` write below the folder fails, and all after it."""

    def run(argv: list[str]) -> None:
        fails = counter(below, first, seen)
        if how == "open":
            fail_to_open(fails, number)
        else:
            fail_to_write(fails)
        program(argv)

    return run


# --------------------------------------------------------------------------------------------------
# What must hold

SENTENCE = re.compile(r"could not be written|cannot be made|cannot be read|Input/output error")


def ends(program: Callable, argv: list[str], log: Path) -> tuple[int, str]:
    """-> status, all that it said"""
    log.write_text("")
    pid = kill.begin(program, argv, log, {})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text()


def complaint(code: int, said: str, out: Path) -> str:
    """What is wrong with this ending, "" for nothing."""
    if "Traceback" in said:
        return f"a traceback: {said[-1500:]}"
    if code not in (0, 1):
        return f"status {code}"
    if code == 1 and not SENTENCE.search(said):
        return f"no sentence: {said[-500:]}"
    for folder in run_folder.checkpoints(out):
        damage = run_folder.find_damage(folder)
        if damage:
            return f"{folder.name}: {damage}"
    return ""


def steps_of_training(argv: list[str], out: Path) -> list[str]:
    """How it goes on once there is room: with --resume where a run has begun."""
    return ["--resume", "--out", str(out)] if (out / "settings.json").exists() else argv


def same_command(argv: list[str], out: Path) -> list[str]:
    return argv


def what_a_diagnosis_left(out: Path) -> dict[str, object]:
    found = {path.name: path.stat().st_size for path in out.iterdir() if path.suffix == ".png"}
    summary = json.loads((out / "summary.json").read_text())
    hidden = [path.name for path in out.glob(".*")]
    return {"pictures": sorted(found), "summary": summary, "hidden files": hidden}


def diagnose(argv: list[str]) -> None:
    diagnostics.main(argv)


def programs(folder: Path) -> dict[str, tuple]:
    """name: program, its options, what it leaves, how it goes on"""
    held_out = folder / "held_out.jsonl"
    few = (ROOT / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)[:4]
    held_out.write_text("".join(few))
    training = [*kill.TRAIN, "--eval_data", str(held_out)]
    looking = "--preset tiny --limit 4 --max_completion 24".split()
    return {
        "train": (kill.train, training, kill.what_a_run_left, steps_of_training),
        "eval": (kill.ev.main, kill.EVAL, kill.what_an_evaluation_left, same_command),
        "diagnose": (diagnose, looking, what_a_diagnosis_left, same_command),
    }


# --------------------------------------------------------------------------------------------------
# Four ways: each write in turn, RAM disks that are too small, read-only, removed


def try_each(name: str, how: str, every: int, parts: tuple, folder: Path) -> tuple[int, list[str]]:
    """Every `every`-th write of a program. -> how many were broken, what went wrong"""
    program, options, leaves, goes_on = parts
    seen = folder / "seen.txt"
    log = folder / "log.txt"
    out = folder / f"{name}-{how}"
    argv = [*options, "--out", str(out)]
    seen.write_text("")
    code, said = ends(broken(program, out, how, FOREVER, seen), argv, log)
    if code:
        raise SystemExit(said)
    wanted = leaves(out)
    writes = seen.read_text().splitlines()
    wrong = []
    tried = range(every, len(writes) + 1, every)
    for first in tried:
        shutil.rmtree(out)
        if first > 1:
            out.mkdir()
        code, said = ends(broken(program, out, how, first, folder / "seen2.txt"), argv, log)
        problem = complaint(code, said, out)
        problem = problem or go_on(program, goes_on(argv, out), out, leaves, wanted, log)
        where = f"{name}, {how}, write {first} of {len(writes)} ({writes[first - 1]})"
        if problem:
            wrong.append(f"{where}: {problem}")
        print(f"  {where}: {'WRONG' if problem else 'as it should'}, status {code}", flush=True)
    shutil.rmtree(out)
    return len(tried), wrong


def go_on(
    program: Callable, argv: list[str], out: Path, leaves: Callable, wanted: dict, log: Path
) -> str:
    code, said = ends(program, argv, log)
    if code:
        return f"does not go on: {said[-1500:]}"
    different = kill.differences(leaves(out), wanted)
    return f"differs in {', '.join(different)}" if different else ""


@contextlib.contextmanager
def ram_disk(folder: Path, kib: int) -> Iterator[Path]:
    place = folder / "ram"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, option: str) -> bool:
    """-> did it work? A disk that is being written to cannot become read-only."""
    command = ["mount", "-o", f"remount,{option}", str(place)]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        try:
            with ram_disk(Path(name), 64):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def try_small_disks(name: str, count: int, parts: tuple, folder: Path) -> tuple[int, list[str]]:
    """Really full, at `count` places of what the program writes."""
    program, options, leaves, goes_on = parts
    log = folder / "log.txt"
    with ram_disk(folder, 1 << 18) as place:
        code, said = ends(program, [*options, "--out", str(place / "out")], log)
        if code:
            raise SystemExit(said)
        wanted = leaves(place / "out")
        used = shutil.disk_usage(place).used >> 10
    wrong = []
    full = 0
    for number in range(count):
        kib = 4 + (used - 4) * number // count // 4 * 4
        with ram_disk(folder, kib) as place:
            out = place / "out"
            argv = [*options, "--out", str(out)]
            code, said = ends(program, argv, log)
            full += code == 1
            problem = complaint(code, said, out)
            remount(place, f"size={1 << 18}k")
            problem = problem or go_on(program, goes_on(argv, out), out, leaves, wanted, log)
        where = f"{name}, a disk of {kib} of {used} KiB"
        if problem:
            wrong.append(f"{where}: {problem}")
        print(f"  {where}: {'WRONG' if problem else 'as it should'}, status {code}", flush=True)
    return full, wrong


def lines_in(out: Path) -> int:
    lines = 0
    for path in (out / "log.jsonl", out / "samples.jsonl"):
        if path.exists():
            lines += path.read_bytes().count(b"\n")
    return lines


def disturb(
    program: Callable, argv: list[str], log: Path, out: Path, after: int, change: Callable
) -> tuple[int, str]:
    """Start it, and once its log has so many lines call `change` until that says True."""
    log.write_text("")
    pid = kill.begin(program, argv, log, {})
    done = False
    ended = status = 0
    while not ended:
        if not done and lines_in(out) >= after:
            done = change()
        time.sleep(0.002)
        ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), log.read_text()


def removed(out: Path) -> bool:
    shutil.rmtree(out, ignore_errors=True)
    return not out.exists()


def try_to_disturb(
    name: str, kind: str, afters: tuple[int, ...], parts: tuple, folder: Path
) -> tuple[int, list[str]]:
    """Read-only from some line of the log on, or the folder removed there."""
    program, options, leaves, goes_on = parts
    log = folder / "log.txt"
    out = folder / "whole"
    ends(program, [*options, "--out", str(out)], log)
    wanted = leaves(out)
    shutil.rmtree(out)
    struck = 0
    wrong = []
    for after in afters:
        with contextlib.ExitStack() as stack:
            place = folder
            if kind == "read-only":
                place = stack.enter_context(ram_disk(folder, 1 << 18))
            out = place / "out"
            argv = [*options, "--out", str(out)]
            change = functools.partial(removed, out)
            if kind == "read-only":
                change = functools.partial(remount, place, "ro")
            code, said = disturb(program, argv, log, out, after, change)
            struck += code == 1
            problem = complaint(code, said, out)
            if kind == "removed" and code == 0:
                problem = problem or "it noticed nothing"
            if kind == "read-only":
                remount(place, "rw")
            else:  # it may have been writing a checkpoint just then, which is left
                shutil.rmtree(out, ignore_errors=True)
            problem = problem or go_on(program, goes_on(argv, out), out, leaves, wanted, log)
            where = f"{name}, {kind} after {after} lines"
            if problem:
                wrong.append(f"{where}: {problem}")
            print(f"  {where}: {'WRONG' if problem else 'as it should'}, status {code}", flush=True)
            shutil.rmtree(out)
    return struck, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=["train", "eval", "diagnose"], default=[])
    parser.add_argument("--how", nargs="*", choices=["open", "write"], default=["open", "write"])
    parser.add_argument("--every", type=int, default=1, help="only every N-th write")
    parser.add_argument("--disks", type=int, default=20, help="RAM disks of growing size")
    parser.add_argument("--disturb", type=int, default=6, help="read-only disks, removed folders")
    given = parser.parse_args()
    wrong = []

    def report(title: str, found: tuple[int, list[str]]) -> None:
        times, bad = found
        wrong.extend(bad)
        print(f"{title}: {times} times, {len(bad)} wrong", flush=True)

    real = may_mount()
    if not real:
        print("no RAM disk may be mounted here: that part is left out")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for name, parts in programs(folder).items():
            if name in given.only or not given.only:
                for how in given.how:
                    found = try_each(name, how, given.every, parts, folder)
                    report(f"{name}, {how}", found)
                if real and given.disks:
                    found = try_small_disks(name, given.disks, parts, folder)
                    report(f"{name}, really full", found)
                if name == "diagnose" or not given.disturb:
                    continue  # diagnostics.py has no log to go by
                afters = tuple(range(given.disturb))
                if real:
                    found = try_to_disturb(name, "read-only", afters, parts, folder)
                    report(f"{name}, read-only", found)
                found = try_to_disturb(name, "removed", afters[1:], parts, folder)
                report(f"{name}, removed", found)
    print("\n".join(wrong) or "nothing wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
