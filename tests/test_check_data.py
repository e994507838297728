"""--check_data: what training would make of a data set, by row, before any model is loaded."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import TINY, run, tiny_settings

from support.training.check_data import check_data

GOOD = {"problem": "Compute 1 #1 +6 #2 -3 .", "solution": "1 +6 = 7", "answer": "7"}


def settings_of(tmp_path: Path, rows: list[dict], *args: object) -> dict:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.asdict(tiny_settings("--eval_data=", "--data", path, *args))


def test_each_thing_that_training_would_stumble_over_is_named_by_row(tmp_path, capsys) -> None:
    rows = [
        {**GOOD, "id": "a"},
        {**GOOD, "problem": "Compute 2 .", "answer": "9" * 1001, "id": "b"},
        {**GOOD, "problem": "Compute 3 .", "answer": r"\{1,2", "id": "a"},
        {**GOOD, "problem": "Compute 4 .", "answer": r"\frac{1}{2", "id": "c"},
        {**GOOD, "problem": "Compute  2 . ", "id": "d"},
        {**GOOD, "problem": "Compute 5 .", "solution": "1 " * 300, "id": "e"},
        {**GOOD, "problem": "Compute 6 .", "answer": r"\frac{1}{0}", "id": "f"},
        {**GOOD, "problem": "Compute 7 .", "answer": r"\frac{1}{2}", "id": "g"},
    ]
    with pytest.raises(SystemExit, match="--data: 2 golds that no completion can match"):
        check_data(settings_of(tmp_path, rows))
    said = " ".join(capsys.readouterr().out.split())
    assert "8 problems" in said
    assert "to be skipped: 1 (row 5)" in said
    assert "problems that stand in an earlier row too: 1 (row 4)" in said
    assert "and have another answer there: 2 (row 1, 4)" in said
    assert "ids that stand in an earlier row too: 1 (row 2)" in said
    assert "no completion can match: 2 (row 1, 3)" in said and "1,001 characters" in said
    assert "only the same text matches: 1 (row 6)" in said


def test_data_of_which_nothing_fits_or_held_out_problems_that_do_not_are_faults(tmp_path) -> None:
    with pytest.raises(SystemExit, match="no problem fits"):
        check_data(settings_of(tmp_path, [GOOD] * 2, "--max_length", 100))
    settings = settings_of(tmp_path, [GOOD, {**GOOD, "problem": "1 " * 300}])
    with pytest.raises(SystemExit, match="all of its problems must fit, and 1 do not"):
        check_data({**settings, "data": str(TINY / "train.jsonl"), "eval_data": settings["data"]})


def test_without_a_tokenizer_lengths_are_in_characters(tmp_path, capsys) -> None:
    (tmp_path / "model").mkdir()
    check_data(settings_of(tmp_path, [GOOD], "--model", tmp_path / "model"))
    said = " ".join(capsys.readouterr().out.split())
    assert "Lengths are in characters" in said and "student 23 23 23" in said
    assert "to be skipped:" not in said


def test_the_command_needs_no_weights_and_leaves_no_run(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    options = ("--preset", "tiny", "--model", folder, "--out", tmp_path / "run")
    assert "training would take this data" in run(*options, "--check_data", "--eval_data=")
    assert not (tmp_path / "run").exists()
