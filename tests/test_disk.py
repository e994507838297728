"""Full and read-only disks, folders that go: a small version of faults/disk.py, and pictures."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, read_log, tiny_settings

import egrsd
from support.shared import files, plots
from support.training import run_folder


def test_some_writes_of_a_run_and_of_an_evaluation_fail() -> None:
    options = "--only train eval --how write --every 10 --disks 0 --disturb 0".split()
    found = subprocess.run(
        [sys.executable, str(ROOT / "faults" / "disk.py"), *options],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert found.returncode == 0 and "nothing wrong" in found.stdout, found.stdout + found.stderr
    assert "train, write: 3 times, 0 wrong" in found.stdout
    assert "eval, write: 1 times, 0 wrong" in found.stdout
    assert found.stdout.count("as it should, status 1") == 4


def test_curves_that_cannot_be_written_do_not_cost_the_run(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    (out / ".curves.png").mkdir(parents=True)  # where the picture is drawn before it takes its name
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        egrsd.train(tiny_settings(*SMALL[2:], "--steps", 2, "--out", out))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "curves.png could not be written" in capsys.readouterr().out
    assert len(read_log(out)) == 2 and (out / "step_2").is_dir()
    assert not (out / "curves.png").exists()


def test_half_a_file_is_not_left_on_a_full_disk(tmp_path) -> None:
    def write(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit, match="x.json could not be written .No space left"):
        files.write_whole(tmp_path / "x.json", write)
    figure, _ = plots.canvas(1, 1, 1, 1)
    with pytest.raises(SystemExit, match="x.png could not be written"):
        plots.save_figure(tmp_path / "nowhere" / "x.png", figure)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_does_not_make_a_removed_folder_anew(tmp_path) -> None:
    parts = {"parameters": {}, "optimizer": None, "others": {}, "save_student": Path.mkdir}
    gone = tmp_path / "gone"
    with pytest.raises(SystemExit, match="step_1 could not be written.*No such file"):
        run_folder.save_checkpoint(gone, 1, 8, {}, {}, {}, **parts)
    assert not gone.exists()
