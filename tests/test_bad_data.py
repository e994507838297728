"""Rows that would be trained on without a word, or end in a traceback: refused, by number."""

import json
from pathlib import Path

import pytest
from helpers import ROOT, tiny_settings

import egrsd
from faults import bad_rows
from support.shared import console
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
    with pytest.raises(SystemExit, match="row 0: the problem is .*lone surrogate"):
        load_problems(str(path), COLUMNS)


def test_a_folder_is_no_data_set(tmp_path) -> None:
    write(tmp_path / "data.jsonl", GOOD)
    with pytest.raises(SystemExit, match="is a folder: name the file in it"):
        load_problems(str(tmp_path), COLUMNS)


def test_a_megabyte_in_a_field_and_odd_characters_pass_unchanged(tmp_path) -> None:
    odd = "x" * 1_000_000 + " \u202e\u0301 <|im_end|> {solution} \\boxed{1}"
    path = write(tmp_path / "data.jsonl", {**GOOD, "problem": odd})
    assert load_problems(path, COLUMNS)[0]["problem"] == odd


def test_a_thousand_malformed_rows_end_as_documented() -> None:
    cases, wrong = bad_rows.try_all(1000, seed=0)
    assert not wrong, wrong
    assert sum(cases.values()) == 1000 and len(cases) >= 30
    told = (ROOT / "docs" / "faults.md").read_text()
    assert not [kind for kind in cases if kind not in told]


def test_a_row_that_is_too_long_is_skipped_by_number_and_an_escape_code_is_inert(
    tokenizer, tmp_path, capsys
) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, {**GOOD, "solution": "1 " * 500_000})
    s = tiny_settings("--batch_size", 1)
    rows = load_problems(path, COLUMNS)
    seen = []
    for position in range(2):
        batch, _, skipped = egrsd.next_problems(rows, tokenizer, s, position)
        seen += [row["id"] for row in batch] + skipped
    assert set(seen) == {"0", "1"} and seen.count("0") == 2
    console.say("skipped problem \x1b[2J\r\u202e, which \ud800 ")
    assert capsys.readouterr().out == "skipped problem \\x1b[2J\\r\\u202e, which \\ud800 \n"
    with pytest.raises(SystemExit, match=r"\\x1b\[31m"):
        console.fail("\x1b[31m")
