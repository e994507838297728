"""The folder of a run: its settings, its checkpoints, and what is cleared from it.

Rank 0 writes. A checkpoint is a PEFT adapter that loads anywhere, and the trainer's state; nothing
in it is a pickle.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from support.shared.console import fail, first_line, say
from support.shared.files import (
    json_lines,
    lock,
    make_folder,
    read_json,
    write_beside,
    write_json,
    write_text,
)
from support.shared.processes import barrier, gather, rank_and_world

# --------------------------------------------------------------------------------------------------
# Taking and clearing the folder


def saved_settings(out: Path, names: Iterable[str]) -> dict[str, object]:
    """The settings of the run in `out`, as far as there are options of these names; {} for none."""
    saved = read_json(out / "settings.json", {})
    return {name: saved[name] for name in names if name in saved}


def open_run(out: Path, resume: bool, overwrite: bool, settings: dict) -> Path | None:
    """Take the run folder for this process. -> the checkpoint to go on from. Nothing is deleted."""
    checkpoint = latest_checkpoint(out) if resume else None
    if resume and not checkpoint:
        say(f"--resume: {out} holds no checkpoint, so the run starts from the beginning")
    begun = holds_a_run(out)
    if begun and not resume and not overwrite:
        fail(
            f"{out} already holds a run. --resume goes on with it, --overwrite deletes it, --out "
            "names another folder"
        )
    barrier()  # every rank has looked
    if rank_and_world()[0] == 0:
        make_folder(out)
        lock(out)
        if not begun:  # at once, so that --resume knows them wherever a kill strikes
            write_json(out / "settings.json", settings)
    return checkpoint


def holds_a_run(out: Path) -> bool:
    if latest_checkpoint(out):
        return True
    for name in ("log.jsonl", "rollouts.jsonl", "summary.json"):
        path = out / name
        if path.exists() and path.stat().st_size:
            return True
    return False


def adapter_shelf(out: Path, size: int) -> Path:
    """A folder through which an adapter of `size` bytes passes to the engine, deleted at the end.

    In memory where there is a RAM disk with twice the room: a container may have 64 MB alone.
    """
    ram = Path("/dev/shm")
    room = os.access(ram, os.W_OK) and shutil.disk_usage(ram).free > 2 * size
    out = out.resolve()
    shelf = ram if all(gather([room])) else out
    name = hashlib.sha256(str(out).encode()).hexdigest()[:12]
    folder = shelf / f".egrsd-{name}-{os.environ.get('GROUP_RANK', 0)}"  # one for each machine
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def clear_run(out: Path, checkpoint: Path | None, step: int, files: dict[str, str]) -> list[dict]:
    """Delete what this run does not go on from, then write `files`. -> rows of the log that stay.

    For when all that the run needs is loaded: an engine that does not start must not cost the run
    that was there.
    """
    if rank_and_world()[0] > 0:
        return []
    if not checkpoint:
        hide_old_run(out)
    for path in out.glob(".step_*"):
        if re.fullmatch(r"\.step_\d+", path.name):
            shutil.rmtree(path)  # half-written ones too
    rows = []
    for name in ("rollouts.jsonl", "log.jsonl"):
        rows = rows_before(out / name, step)
        write_text(out / name, json_lines(rows))
    if len(rows) < step:
        say(
            f"{out}/log.jsonl HAS ONLY {len(rows)} OF THE {step} STEPS of the checkpoint: somebody "
            "shortened it"
        )
    for name, text in files.items():
        write_text(out / name, text)
    return rows


def hide_old_run(out: Path) -> None:
    """All of it out of sight before the slow part: --resume must not go on with what is left."""
    for path in checkpoints(out):
        hidden = path.with_name(f".{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    for name in ("summary.json", "log.jsonl", "rollouts.jsonl", "curves.png"):
        (out / name).unlink(missing_ok=True)


def rows_before(path: Path, step: int) -> list[dict]:
    """The rows of earlier steps, without what came after the checkpoint or half a line."""
    rows = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
            if row["step"] < step:
                rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            fail(
                f"{path} is damaged: a line is no step ({first_line(error)}). Mend it, or start "
                "anew with --overwrite"
            )
    return rows


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]


def latest_checkpoint(out: Path) -> Path | None:
    return max(checkpoints(out), key=lambda path: int(path.name[5:]), default=None)


def save_checkpoint(
    out: Path,
    step: int,
    position: int,
    stats: dict[str, float],
    settings: dict,
    *,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    others: dict[str, Tensor],
    save_student: Callable[[Path], None],
) -> None:
    """Write step_N beside and rename it: a kill, or a full disk, leaves the last one whole.

    `others` are tensors that are neither the student's nor the optimizer's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_student(folder)
        tensors = {"torch_random_state": torch.get_rng_state()}
        for name, value in others.items():
            tensors[f"others/{name}"] = value
        for name, p in parameters.items():
            for slot, value in optimizer.state[p].items():
                tensors[f"{name}/{slot}"] = value
        save_file(tensors, folder / "trainer.safetensors")
        state = {"step": step, "position": position, "stats": stats, "settings": settings}
        (folder / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")

    folder = out / f"step_{step}"
    try:
        if rank_and_world()[0] == 0 and not folder.exists():
            write_beside(folder, write)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder.with_name(f".{folder.name}"), ignore_errors=True)
        last = latest_checkpoint(out) or "none, so that it starts over"
        fail(
            f"{folder} could not be written ({first_line(error)}). Make room, then --resume: the "
            f"last whole checkpoint is {last}"
        )
    barrier()  # nobody leaves before it is whole


def load_checkpoint(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    others: dict[str, Tensor],
    load_student: Callable[[Path], None],
) -> tuple[int, int, dict[str, float]]:
    """Put everything back as it was. -> step, data position, reward statistics"""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = read_json(folder / "trainer.json")
        tensors = load_file(folder / "trainer.safetensors")
        load_student(folder)
        torch.set_rng_state(tensors.pop("torch_random_state"))
        for name, value in others.items():
            value.copy_(tensors.pop(f"others/{name}"))
    except (OSError, KeyError, SafetensorError) as error:
        fail(
            f"{folder} is damaged ({first_line(error)}). Delete it: --resume goes on from the "
            "checkpoint before it"
        )
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        p = parameters[name]
        optimizer.state[p][slot] = value if slot == "step" else value.to(p.device)
    return state["step"], state["position"], state["stats"]
