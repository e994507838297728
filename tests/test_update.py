"""bench/update.py in short: ours and the full logits give one gradient, and the floor is shown."""

import json
import re

import pytest
from helpers import ROOT, run

PROGRAM = str(ROOT / "bench" / "update.py")
TINY = (
    "--shape",
    "rehearsal",
    "--vocab",
    5_000,
    "--completion",
    24,
    "--device",
    "cpu",
    "--threads",
    1,
)


def test_ours_and_full_logits_have_one_gradient_norm() -> None:
    output = run(PROGRAM, *TINY, "--repeats", 1, "--cases", "ours,full,trl", "--memory", 8)
    rows = {}
    for line in re.findall(r"^\| (.*) \|$", output, re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        rows[cells[0]] = cells
    assert float(rows["ours"][6]) == pytest.approx(float(rows["full"][6]), rel=1e-4)
    assert float(rows["ours"][6]) > 0.01 and float(rows["ours"][1]) > 0
    assert "skipped: trl is not installed" in rows["trl"][1] or float(rows["trl"][6]) > 0.01
    for part in ("teacher, head", "student, layers", "the whole update"):
        assert float(rows[part][1]) > 0 and float(rows[part][2]) > 0, part


def test_a_case_that_does_not_fit_is_named_and_the_rest_runs() -> None:
    output = run(PROGRAM, *TINY, "--repeats", 1, "--cases", "full", "--memory", 0.001, "--no-floor")
    assert re.search(r"\| full \| skipped: \S+ GiB of logits", output)


def test_memory_above_the_model_is_what_a_known_case_takes() -> None:
    """With all logits, at least two float32 tensors of tokens by vocabulary."""
    sizes = ("--vocab", 100_000, "--completion", 40, "--repeats", 1)
    line = run(PROGRAM, *TINY, *sizes, "--worker", "full").splitlines()[-1]
    logits = 4 * 40 * 100_000 * 4 / 2**30
    assert 2 * logits < json.loads(line)["gib"] < 10 * logits
