"""A JSON file becomes rows, each with its number; what is wrong is named by its line or row.

Lines count from 1, as in an editor; rows from 0, as ids do. `datasets` is not asked: it takes a
column's type from the first rows, and where a later one has another it names no row.
"""

import datetime
import decimal
import json
import math
from pathlib import Path

from support.shared.console import fail, first_line


def read_rows(path: Path, option: str) -> list[dict]:
    """The objects of a file: one a line, or one list of them. Exits with a sentence, and a line."""
    lines = read_lines(path, option)
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        return []
    first = lines[filled[0] - 1]
    one_list = first.lstrip().startswith("[") and (len(filled) == 1 or not is_json(first))
    if one_list:
        rows = parse("".join(lines), 1, path, option)
    else:
        rows = []
        for number in filled:
            rows.append(parse(lines[number - 1].strip(), number, path, option))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            fail(f"{option} {path}, row {number} is {row!r:.40}, no object with named columns")
    return rows


def read_lines(path: Path, option: str) -> list[str]:
    """JSON is UTF-8, with a byte order mark or without."""
    lines = []
    try:
        with path.open("rb") as file:
            for line in file:
                lines.append(line.decode("utf-8"))
    except UnicodeDecodeError:
        fail(f"{option} {path}, line {len(lines) + 1} is not UTF-8: save the file as UTF-8")
    except OSError as error:
        fail(f"{option} {path} cannot be read ({error.strerror}): see who may read it")
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")
    return lines


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse(text: str, number: int, path: Path, option: str) -> object:
    """The JSON value that begins in line `number`, each number as the text it is."""
    value = None
    reason = ""
    try:
        value = json.loads(text, object_pairs_hook=each_once, parse_float=str, parse_int=str)
    except json.JSONDecodeError as error:
        number += error.lineno - 1
        reason = f"no JSON: {error.msg}, column {error.colno}"
        if "\0" in text:
            reason = "no JSON: it holds null bytes, as UTF-16 does"
    except ValueError as error:  # of each_once
        reason = f"no JSON to rely on: {first_line(error)}"
    except RecursionError:
        reason = "JSON nested too deeply"
    if reason:
        fail(
            f"{option} {path}, line {number} cannot be read ({reason}). It takes one object a "
            "line, or one list of objects, in UTF-8"
        )
    return value


def each_once(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.40} stands twice in one object")
    return row


def as_text(value: object) -> str:
    """A cell as text, "" where nothing in it can be seen; a ValueError says why it is none.

    The Python text of a list or an object would be asked, or graded against, without a word.
    """
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("no number")
    if not isinstance(value, (str, int, float, datetime.date, decimal.Decimal)):
        raise ValueError("not text")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("which holds half a character (a lone surrogate)") from error
    return text if any(c.isprintable() and not c.isspace() for c in text) else ""


def as_id(value: object, number: int) -> str:
    """An id is a label: where it is no text, the row's number does."""
    try:
        return as_text(value) or str(number)
    except ValueError:
        return str(number)
