"""One writer a folder: an evaluation takes its folder as a training run does, all ranks of it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import eval as ev
from support.evaluation import benchmarks
from support.shared import files

TINY = ["--preset", "tiny", "--limit", "1", "--K", "1"]


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Locked as another process would: through a descriptor of its own."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
    os.close(descriptor)


def test_a_second_evaluation_in_a_folder_is_refused_and_changes_nothing(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples.jsonl").write_text("")
    (out / "settings.json").write_text("{}")
    with held(out):
        for argv in ([*TINY], ["--regrade"]):
            with pytest.raises(SystemExit, match="another process is writing to"):
                ev.main([*argv, "--out", str(out)])
    assert (out / "settings.json").read_text() == "{}"


def test_a_rank_that_outlives_its_evaluation_keeps_its_file(tmp_path) -> None:
    path = tmp_path / "samples-1.jsonl"
    path.write_text('{"half": ')
    with held(path), pytest.raises(SystemExit, match="another process is writing to .*samples-1"):
        benchmarks.open_folder(tmp_path, {})
    (tmp_path / "samples.jsonl").write_text("")
    path.unlink()
    path.write_text("")
    benchmarks.open_folder(tmp_path, {})  # its lock ended with it
    assert not path.exists()


def test_an_evaluation_keeps_its_folder_until_it_ends(tmp_path) -> None:
    out = tmp_path / "out"
    ev.main([*TINY, "--out", str(out)])
    with pytest.raises(BlockingIOError), held(out):
        pass
    files.unlock(out)
    with held(out):
        pass
