"""Files: whoever looks finds the old one or the new one, whole."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from support.shared.console import fail, first_line, say


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {path} cannot be made ({error.strerror}); name a folder that can be written")


_locks: dict[Path, int] = {}  # the open descriptor, which holds the lock


def lock(path: Path) -> None:
    """One writer of a folder, or of a file that is made for it, until this process ends."""
    if path not in _locks:
        how = os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT
        with writing(path):
            _locks[path] = os.open(path, how)
    try:
        fcntl.flock(_locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {path}: wait for it, or take another --out")
    except OSError:
        say(f"{path} is on a file system without locks: nothing keeps a second process from it")


def unlock(path: Path) -> None:
    os.close(_locks.pop(path))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """End with a sentence where the disk is full or the file may not be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        fail(
            f"{path} could not be written ({reason}). What is saved stays: mend that, then start "
            "the same command again (a training run with --resume)"
        )


def read_json(path: Path, default: dict | None = None) -> dict:
    """The file's object; `default`, if one is given, where there is no such file."""
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} is damaged ({first_line(error)}). Put a copy of it back, or delete it")
    if not isinstance(value, dict):
        fail(f"{path} is damaged (no JSON object). Put a copy of it back, or delete it")
    return value


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a hidden neighbour, then rename it; half a file is not left to lie there."""
    beside = path.with_name(f".{path.name}")
    try:
        write(beside)
        beside.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()  # it takes room
        raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    with writing(path):
        write_beside(path, write)


def write_text(path: Path, text: str) -> None:
    def write(beside: Path) -> None:
        beside.write_text(text, "utf-8")

    write_whole(path, write)


def remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines)


def appender(path: Path) -> Callable[[list[dict]], None]:
    """-> append(rows), which ends the program where the file is not as long as it left it.

    Deleting a folder beside a running program can leave it there, with the files of that moment.
    """
    size = path.stat().st_size if path.exists() else 0

    def append(rows: list[dict]) -> None:
        nonlocal size
        with writing(path):
            if size and path.stat().st_size != size:
                fail(f"{path} was changed by another program: this one cannot go on with it")
            with path.open("a") as file:
                file.write(json_lines(rows))
                file.flush()
                size = file.tell()

    return append
