"""Rows that would be trained on without a word, or end in a traceback: refused, by number."""

import json
from pathlib import Path

import pytest

from support.shared.data import load_problems

COLUMNS = {"problem": "problem", "solution": "solution", "answer": "answer"}
GOOD = {"problem": "What is 1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("field", ["problem", "solution", "answer"])
@pytest.mark.parametrize("value", [["4"], [], {"text": "4"}, [["4"]], {"a": None}])
def test_lists_and_objects_are_refused_with_their_row(field, value, tmp_path) -> None:
    path = write(tmp_path / "data.jsonl", {**GOOD, field: value})
    with pytest.raises(SystemExit) as error:
        load_problems(path, COLUMNS)
    assert f"row 0: the {field} is" in str(error.value)
    assert f"--{field}_column" in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_no_numbers_are_refused(value, tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    text = json.dumps({**GOOD, "answer": 1.5}) + "\n"
    path.write_text(text + text.replace("1.5", value))
    with pytest.raises(SystemExit, match="row 1: the answer is"):
        load_problems(str(path), COLUMNS)


@pytest.mark.parametrize("value", ["", "  \t\n", "\x00\x01\x1b", "\u200b\u2060", "\u00a0", None])
def test_what_cannot_be_seen_is_empty(value, tmp_path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, {**GOOD, "id": "bad", "solution": value})
    with pytest.raises(SystemExit, match=r"1 of 2 rows have an empty solution.*bad"):
        load_problems(path, COLUMNS)


@pytest.mark.parametrize("value, text", [(3, "3"), (1.5, "1.5"), (-2, "-2"), (True, "True")])
def test_numbers_are_text(value, text, tmp_path) -> None:
    path = write(tmp_path / "data.jsonl", {**GOOD, "answer": value})
    assert load_problems(path, COLUMNS)[0]["answer"] == text


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-32"])
def test_other_encodings_are_named_with_their_line(encoding, tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [GOOD, {**GOOD, "problem": "Wie gro\u00df ist \u00e9?"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode(encoding))
    with pytest.raises(SystemExit, match=r"line \d+ is not UTF-8|cannot be read"):
        load_problems(str(path), COLUMNS)
    if encoding == "latin-1":
        with pytest.raises(SystemExit, match="line 2 is not UTF-8"):
            load_problems(str(path), COLUMNS)


def test_a_lone_surrogate_is_refused(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**GOOD, "problem": "\ud800"}) + "\n")
    with pytest.raises(SystemExit, match="cannot be read"):
        load_problems(str(path), COLUMNS)


def test_a_folder_is_no_data_set(tmp_path) -> None:
    write(tmp_path / "data.jsonl", GOOD)
    with pytest.raises(SystemExit, match="is a folder: name the file in it"):
        load_problems(str(tmp_path), COLUMNS)


def test_a_megabyte_in_a_field_and_odd_characters_pass_unchanged(tmp_path) -> None:
    odd = "x" * 1_000_000 + " \u202e\u0301 <|im_end|> {solution} \\boxed{1}"
    path = write(tmp_path / "data.jsonl", {**GOOD, "problem": odd})
    assert load_problems(path, COLUMNS)[0]["problem"] == odd
