"""The folder of a run: its settings, its checkpoints, and what is cleared from it.

Rank 0 writes. A checkpoint is a PEFT adapter that loads anywhere, and the trainer's state; nothing
in it is a pickle.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from support.shared.adapters import fingerprint
from support.shared.console import fail, first_line, say
from support.shared.files import (
    lock,
    make_folder,
    read_json,
    write_beside,
    write_json,
    write_text,
    writing,
)
from support.shared.models import model_files
from support.shared.processes import barrier, gather, rank_and_world

DATA_KEYS = ("id", "problem", "solution", "answer")

# --------------------------------------------------------------------------------------------------
# Taking and clearing the folder


def saved_settings(
    out: Path, defaults: dict[str, object], free: Iterable[str]
) -> dict[str, object]:
    """The settings of the run in `out`, {} for none; the `defaults` where it has none of a name.

    Those that are not `free` to change are its last checkpoint's, whatever settings.json says.
    Exits where the run has settings that have no default: another program began it.
    """
    path = out / "settings.json"
    kept = {}
    for folder in newest_first(out):
        with contextlib.suppress(ValueError):
            kept = read_state(folder)["settings"]
            break
    try:
        saved = read_json(path, {})
    except SystemExit as error:
        if not kept:
            raise
        say(f"{error}: the settings are those of the last checkpoint")
        saved = {}
    fixed = {name: value for name, value in kept.items() if name not in free}
    changed = [name for name, value in fixed.items() if saved.get(name, value) != value]
    if changed:
        say(f"{path} is not that of its checkpoint ({', '.join(changed)}): the checkpoint's count")
    foreign = sorted((kept or saved).keys() - defaults.keys())
    if foreign:
        fail(
            f"{out} is a run of another program, or of another version: this one knows no setting "
            f"{foreign[0]!r}. Resume it with the one that began it"
        )
    found = {**kept, **saved, **fixed}
    if not found:
        return {}
    values = {name: found.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        number = isinstance(default, float) and type(values[name]) is int  # JSON need not tell them
        if type(values[name]) is not type(default) and not number:
            fail(
                f"{path}: {name} is {values[name]!r}, which is no {type(default).__name__}: "
                "somebody has edited it"
            )
    return values


def open_run(out: Path, resume: bool, overwrite: bool, settings: dict) -> Path | None:
    """Take the run folder for this process. -> the checkpoint to go on from. Nothing is deleted."""
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
    checkpoint = whole_checkpoint(out) if resume else None
    if resume and not checkpoint:
        say(f"--resume: {out} holds no checkpoint, so the run starts from the beginning")
    if rank_and_world()[0] == 0 and not begun:
        # At once, so that --resume knows them wherever a kill strikes.
        write_json(out / "settings.json", settings)
    compare_ranks(out, checkpoint, settings)
    return checkpoint


def compare_ranks(out: Path, checkpoint: Path | None, settings: dict) -> None:
    """Refuse ranks that would go on from another state, or with other settings, than rank 0."""
    seen = "no checkpoint"
    if checkpoint:  # its name, and which of those that have had it
        digest = hashlib.sha256((checkpoint / "trainer.json").read_bytes()).hexdigest()
        seen = f"{checkpoint.name} ({digest[:8]})"
    views = gather([(seen, settings)])
    for rank, (other, theirs) in enumerate(views):
        differ = [name for name, value in views[0][1].items() if theirs[name] != value]
        if other != views[0][0] or differ:
            fail(
                f"rank 0 sees {views[0][0]} in {out}, rank {rank} {other}"
                f"{', and other settings: ' + ', '.join(differ) if differ else ''}. Several "
                "machines go on with a run where all see its folder: put --out on a file system "
                "that they share, or copy settings.json and the last step_N to each"
            )


def compare_fingerprints(mine: dict[str, str]) -> None:
    """Refuse ranks that read other data, or load another model, than rank 0."""
    views = gather([mine])
    for rank, theirs in enumerate(views):
        differ = [name for name, value in views[0].items() if theirs[name] != value]
        if differ:
            fail(f"rank {rank} has not what rank 0 has: {', '.join(differ)} differ. Copy rank 0's")


def whole_checkpoint(out: Path) -> Path | None:
    """The last checkpoint that is as it was written; what came after is put aside, and said."""
    found = None
    damaged = []
    for folder in newest_first(out):
        damage = find_damage(folder)
        if not damage:
            found = folder
            break
        damaged.append(folder)
        say(f"{folder} IS DAMAGED: {damage}")
    if damaged and not found:
        fail(
            f"{out} holds no checkpoint that is whole. Put a copy of one back, or delete "
            f"{', '.join(path.name for path in damaged)}: --resume then starts over"
        )
    barrier()  # every rank has looked
    if damaged and rank_and_world()[0] == 0:
        for folder in damaged:
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            with writing(aside):
                folder.rename(aside)
        say(f"it goes on from {found}, the one before; the others are now damaged_step_*")
    barrier()
    return found


def method_begun(out: Path) -> str | None:
    """The method of the run that is to be resumed, however short; None where there is none."""
    for folder in newest_first(out):
        with contextlib.suppress(ValueError):
            return read_state(folder)["settings"].get("method", "egrsd")
    if not (out / "settings.json").exists():
        return None
    return read_json(out / "settings.json", {}).get("method", "egrsd")


def holds_a_run(out: Path) -> bool:
    if latest_checkpoint(out):
        return True
    for name in ("log.jsonl", "rollouts.jsonl", "summary.json"):
        path = out / name
        if path.exists() and path.stat().st_size:
            return True
    return False


def clear_run(
    out: Path, checkpoint: Path | None, step: int, files: dict[str, str]
) -> Iterable[dict]:
    """Delete what this run does not go on from, then write `files`. -> rows of the log that stay.

    For when all that the run needs is loaded: an engine that does not start must not cost the run
    that was there.
    """
    if rank_and_world()[0] > 0:
        return []
    # First: where a kill strikes after it, --resume takes the new settings, or, while there is a
    # checkpoint of the old run, that one's.
    for name, text in files.items():
        write_text(out / name, text)
    with writing(out):
        if not checkpoint:
            hide_old_run(out)
        for path in out.glob(".step_*"):
            if re.fullmatch(r"\.step_\d+", path.name):
                shutil.rmtree(path)  # half-written ones too
    for name, key in (("rollouts.jsonl", "completion_ids"), ("log.jsonl", "seconds")):
        steps = cut_log(out / name, step, key)
        if steps < step:
            say(
                f"{out}/{name} HAS ONLY {steps} OF THE {step} STEPS of the checkpoint: somebody "
                "shortened it"
            )
    return log_rows(out / "log.jsonl")


def hide_old_run(out: Path) -> None:
    """All of it out of sight before the slow part: --resume must not go on with what is left."""
    for path in checkpoints(out):
        hidden = path.with_name(f".{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    for name in ("summary.json", "log.jsonl", "rollouts.jsonl", "curves.png"):
        (out / name).unlink(missing_ok=True)


def cut_log(path: Path, step: int, key: str) -> int:
    """Cut off half a line, and what came after the checkpoint. -> steps that the file now holds.

    In place and line by line: a log may be larger than the memory, and the disk may be full. Each
    line holds `key`: else it is a line of another file.
    """
    steps = set()
    end = 0
    try:
        with writing(path), path.open("a+b") as file:  # a+: there may be none yet
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                row[key]
                if row["step"] >= step:
                    break
                steps.add(row["step"])
                end += len(line)
            file.truncate(end)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(
            f"{path} is damaged: a line is no step ({first_line(error)}). Mend or delete it (the "
            "run goes on without the steps before), or start anew with --overwrite"
        )
    return len(steps)


def log_rows(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]


def newest_first(out: Path) -> list[Path]:
    return sorted(checkpoints(out), key=lambda path: int(path.name[5:]), reverse=True)


def latest_checkpoint(out: Path) -> Path | None:
    return next(iter(newest_first(out)), None)


def file_hashes(folder: Path) -> dict[str, str]:
    """Of each file of a checkpoint but trainer.json, which holds them, and the model card."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in ("trainer.json", "README.md"):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def read_state(folder: Path) -> dict:
    """What trainer.json says of a checkpoint; a ValueError says why it cannot be believed."""
    try:
        state = json.loads((folder / "trainer.json").read_text("utf-8"))
        for key in ("step", "position", "stats", "settings"):
            state[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"trainer.json cannot be read ({first_line(error)})") from error
    if state.get("sum", sum_of(state)) != sum_of(state):
        raise ValueError("trainer.json is not as it was written")
    if f"step_{state['step']}" != folder.name:
        raise ValueError(f"its trainer.json is that of step {state['step']}")
    return state


def sum_of(state: dict) -> str:
    text = json.dumps({**state, "sum": ""}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_damage(folder: Path) -> str:
    """Which file of a checkpoint is not as it was written, "" for none."""
    try:
        written = read_state(folder).get("files", {})  # none in those of older versions
        now = file_hashes(folder)
    except (OSError, ValueError) as error:
        return first_line(error)
    changed = [name for name, value in written.items() if now.get(name) != value]
    return f"{', '.join(changed)} is not as it was written" if changed else ""


TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template).*|.*model"
)


def fingerprints(rows: dict[str, list[dict]], model: str) -> dict[str, str]:
    """option or part -> hash: what a run is resumed with must be what it began with.

    Of the weights, names, sizes and ends count: 16 GB are not read.
    """
    found = {}
    for option, table in rows.items():
        digest = hashlib.sha256()
        for row in table:
            digest.update(json.dumps([row[key] for key in DATA_KEYS]).encode())
        found[f"the rows of {option}"] = digest.hexdigest()[:16]
    config = hashlib.sha256()
    tokenizer = hashlib.sha256()
    weights = []
    for path in model_files(model):
        if path.suffix == ".safetensors":
            weights.append(path)
        elif path.name in ("config.json", "generation_config.json"):
            config.update(path.read_bytes())
        elif TOKENIZER.fullmatch(path.name):
            tokenizer.update(path.read_bytes())
    found["the model's config"] = config.hexdigest()[:16]
    found["its tokenizer"] = tokenizer.hexdigest()[:16]
    found["its weights"] = fingerprint(weights)
    return found


def check_fingerprints(checkpoint: Path, now: dict[str, str]) -> None:
    """Refuse to go on with another data set, model or tokenizer under the same name."""
    before = read_json(checkpoint / "trainer.json").get("fingerprints")
    if before is None:
        say(
            f"{checkpoint} is of an older version, which kept no fingerprints: whether data, model "
            "or tokenizer changed since could not be checked"
        )
        return
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    if changed:
        fail(
            f"--resume: {', '.join(changed)} changed since {checkpoint} was written. Put back what "
            "was there, or start a new run in another --out"
        )


def save_checkpoint(
    out: Path,
    step: int,
    position: int,
    stats: dict[str, float],
    settings: dict,
    fingerprints: dict[str, str],
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

    tensors = {"torch_random_state": torch.get_rng_state()}
    for name, value in others.items():
        tensors[f"others/{name}"] = value
    for name, p in parameters.items():
        for slot, value in optimizer.state[p].items():
            tensors[f"{name}/{slot}"] = value

    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()  # else PEFT would make a run's folder anew that somebody removed
        save_student(folder)
        save_file(tensors, folder / "trainer.safetensors")
        state = {"step": step, "position": position, "stats": stats, "settings": settings}
        state["fingerprints"] = fingerprints
        state["files"] = file_hashes(folder)
        state["sum"] = sum_of(state)
        (folder / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")

    folder = out / f"step_{step}"
    writes = rank_and_world()[0] == 0 and not folder.exists()
    try:
        if writes:
            refuse_not_finite(folder, {**tensors, **parameters})
            write_beside(folder, write)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder.with_name(f".{folder.name}"), ignore_errors=True)
        last = latest_checkpoint(out) or "none, so that it starts over"
        fail(
            f"{folder} could not be written ({first_line(error)}). Make room, then --resume: the "
            f"last whole checkpoint is {last}"
        )
    barrier()  # nobody leaves before it is whole


def refuse_not_finite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """What went wrong since the update looked must not be what a run goes on from."""
    bad = []
    for name, value in tensors.items():
        # What a method keeps may hold NaN, for "not seen yet"; in a pass it would show.
        if not name.startswith("others/") and not value.isfinite().all():
            bad.append(name)
    if bad:
        last = latest_checkpoint(folder.parent) or "none, so that it starts over"
        fail(
            f"{folder} is not written: {len(bad)} tensors are not finite, the first is {bad[0]}. "
            f"--resume goes on from the last checkpoint: {last}"
        )


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
        there = {key for key in tensors if key.startswith("others/")}
        wanted = {f"others/{name}" for name in others}
        if there != wanted:
            fail(
                f"{folder} is of another method or version: it has {', '.join(sorted(there)[:3])} "
                f"and this run needs {', '.join(sorted(wanted)[:3])} (empty: nothing)"
            )
        for name, value in others.items():
            value.copy_(tensors.pop(f"others/{name}"))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        fail(
            f"{folder} is damaged ({first_line(error)}). Delete it: --resume goes on from the "
            "checkpoint before it"
        )
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        p = parameters[name]
        optimizer.state[p][slot] = value if slot == "step" else value.to(p.device)
    return state["step"], state["position"], state["stats"]
