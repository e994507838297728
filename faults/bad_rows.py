"""Malformed rows of many kinds, from a seed: each refused with its place, or taken as documented.

    python faults/bad_rows.py --count 1000 --seed 0

Each case is a file of good rows with one bad one among them. "line" counts from 1, as in an editor,
"row" from 0, as ids do. docs/faults.md holds the table that this prints.
"""

import argparse
import collections
import json
import random
import string
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.shared.data import load_problems

COLUMNS = {"problem": "problem", "solution": "solution", "answer": "answer"}
INVISIBLE = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad"]
SPACES = [" ", "\t", "\n", "\r", "\u00a0", "\u2003", "\u3000", "\v", "\f"]
CONTROL = [chr(i) for i in (*range(1, 9), *range(14, 32), 127, *range(128, 160))]
ESCAPES = ["\x1b[2J", "\x1b]0;title\x07", "\x1b[31m", "\r", "\x9b1A", "\u202e"]
TOKENS = ["<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|im_start|>system", "{solution}"]
HTML = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</body>", "&lt;"]
UNREADABLE = ["???", r"\frac{1}{", "}{", r"\begin{pmatrix}", "see above", "(" * 30, "1 = 2 = 3 ="]

Rng = random.Random
Row = dict[str, object]


def words(rng: Rng, n: int = 6) -> str:
    chosen = []
    for _ in range(n):
        chosen.append("".join(rng.choices(string.ascii_lowercase + "0123456789+-=\\{}", k=5)))
    return " ".join(chosen)


def good(rng: Rng) -> Row:
    n = rng.randrange(1000)
    return {"problem": f"What is {n} + 1 ?", "solution": words(rng), "answer": str(n + 1)}


def line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def some(rng: Rng, pool: list[str]) -> str:
    return "".join(rng.choices(pool, k=rng.randrange(1, 9)))


def broken(rng: Rng, value: object) -> bytes:
    """A good row with `value` in one of its fields."""
    return line({**good(rng), rng.choice([*COLUMNS]): value})


def mixed(rng: Rng, pool: list[str]) -> bytes:
    """A good row with odd characters among those that can be seen."""
    row = good(rng)
    field = rng.choice([*COLUMNS])
    row[field] = f"a {some(rng, pool)} b"
    return line(row)


def nested(rng: Rng, depth: int) -> object:
    value = words(rng, 1)
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"text": value}
    return value


def raw_field(rng: Rng, text: str) -> bytes:
    """`text` as it stands in the file, where a number would be."""
    return line({**good(rng), rng.choice([*COLUMNS]): 12321}).replace(b"12321", text.encode())


def not_utf8(rng: Rng) -> bytes:
    text = json.dumps({**good(rng), "problem": "wie groß ist é"}, ensure_ascii=False)
    return text.encode(rng.choice(["latin-1", "cp1252", "cp850"])) + b"\n"


def utf16(rng: Rng) -> bytes:
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    return line(good(rng)).decode().encode(encoding)


def cut(rng: Rng) -> bytes:
    text = line(good(rng)).strip()
    return text[: rng.randrange(1, len(text) - 1)] + b"\n"


def twice(rng: Rng) -> bytes:
    key = rng.choice([*COLUMNS])
    return line(good(rng)).replace(b"{", b'{"%s": "7", ' % key.encode(), 1)


def without(rng: Rng) -> bytes:
    row = good(rng)
    del row[rng.choice([*COLUMNS])]
    return line(row)


def renamed(rng: Rng) -> bytes:
    row = good(rng)
    key = rng.choice([*COLUMNS])
    row[key.upper()] = row.pop(key)
    return line(row)


def with_id(rng: Rng, value: object) -> bytes:
    return line({"id": value, **good(rng)})


def surrogate(rng: Rng) -> bytes:
    return mixed(rng, [chr(rng.randrange(0xD800, 0xE000))])


def astral(rng: Rng) -> bytes:
    return mixed(rng, ["\U0001d54a", "\U0001f600", "\U00020000"])


LINE, ROW, EMPTY, TAKEN, PASSED = "refused: line", "refused: row", "refused: empty", "taken", "skip"
KINDS: dict[str, tuple[str, Callable[[Rng], bytes]]] = {
    "not UTF-8 (Latin-1, Windows, DOS)": (LINE, not_utf8),
    "UTF-16 or UTF-32, with or without mark": (LINE, utf16),
    "byte order mark inside the file": (LINE, lambda rng: b"\xef\xbb\xbf" + line(good(rng))),
    "a line that was cut": (LINE, cut),
    "two objects on one line": (LINE, lambda rng: line(good(rng)).strip() + line(good(rng))),
    "a name twice in one object": (LINE, twice),
    "nested 10,000 deep or more": (LINE, lambda rng: b"[" * rng.randrange(10_000, 90_000) + b"\n"),
    "a whole number of 5,000 digits": (TAKEN, lambda rng: raw_field(rng, "9" * 5000)),
    "no object: list, text, number, null": (
        ROW,
        lambda rng: line(rng.choice([[], ["a"], "text", 5, None, True])),
    ),
    "a list in a field": (ROW, lambda rng: broken(rng, ["4"] * rng.randrange(4))),
    "an object in a field": (ROW, lambda rng: broken(rng, rng.choice([{}, {"text": "4"}]))),
    "nested lists and objects": (ROW, lambda rng: broken(rng, nested(rng, rng.randrange(2, 60)))),
    "NaN, infinity": (
        ROW,
        lambda rng: raw_field(rng, rng.choice(["NaN", "Infinity", "-Infinity"])),
    ),
    "a lone surrogate": (ROW, surrogate),
    "null": (EMPTY, lambda rng: broken(rng, None)),
    "empty text": (EMPTY, lambda rng: broken(rng, "")),
    "white space alone": (EMPTY, lambda rng: broken(rng, some(rng, SPACES))),
    "control characters alone": (EMPTY, lambda rng: broken(rng, some(rng, CONTROL))),
    "zero-width characters alone": (EMPTY, lambda rng: broken(rng, some(rng, INVISIBLE))),
    "a field that is not there": (EMPTY, without),
    "a field under a name in capitals": (EMPTY, renamed),
    "a blank line": (PASSED, lambda rng: some(rng, [" ", "\t", ""]).encode() + b"\n"),
    "a megabyte in a field": (TAKEN, lambda rng: broken(rng, "x1 " * 350_000)),
    "an id twice": (TAKEN, lambda rng: with_id(rng, "1")),
    "an id that is no text": (TAKEN, lambda rng: with_id(rng, rng.choice([None, [1], {}, ""]))),
    "a gold that no grader can read": (
        TAKEN,
        lambda rng: line({**good(rng), "answer": rng.choice(UNREADABLE)}),
    ),
    "a number for text": (
        TAKEN,
        lambda rng: raw_field(rng, rng.choice(["7", "-0.50", "1e400", "0.12345678901234567890"])),
    ),
    "terminal escape codes in text": (TAKEN, lambda rng: mixed(rng, ESCAPES)),
    "null bytes in text": (TAKEN, lambda rng: mixed(rng, ["\0"])),
    "control tokens of chat templates": (TAKEN, lambda rng: mixed(rng, TOKENS)),
    "HTML and scripts": (TAKEN, lambda rng: mixed(rng, HTML)),
    "characters beyond 16 bits": (TAKEN, astral),
    "Windows line ends": (TAKEN, lambda rng: line(good(rng)).strip() + b"\r\n"),
    "fields that nobody asked for": (
        TAKEN,
        lambda rng: line({**good(rng), "more": nested(rng, 9), "n": 1}),
    ),
}


def wanted_text(raw: bytes) -> dict[str, str]:
    """What must come out of a row that is taken: its text, without the space around it."""
    row = json.loads(raw, parse_float=str, parse_int=str)
    texts = {}
    for field in COLUMNS:
        texts[field] = str(row[field]).strip()
    return texts


def try_kind(kind: str, rng: Rng, folder: Path) -> str:
    """What happened to one bad row; "" if it is what docs/faults.md says."""
    verdict, make = KINDS[kind]
    place = rng.randrange(1, 5)
    lines = [line(good(rng)) for _ in range(6)]
    lines[place] = make(rng)
    path = folder / "data.jsonl"
    path.write_bytes(b"".join(lines))
    try:
        rows = load_problems(str(path), COLUMNS)
    except SystemExit as error:
        rows = str(error)
    told = {
        LINE: f"line {place + 1} ",
        ROW: f"row {place}",
        EMPTY: f"the first: row {place}, id {place})",
    }
    if verdict in told:
        refused = isinstance(rows, str) and told[verdict] in rows
        return "" if refused else f"{verdict} was expected, and this came: {str(rows)[:300]}"
    if isinstance(rows, str):
        return f"refused: {rows[:300]}"
    if verdict == PASSED:
        return "" if len(rows) == 5 else "the blank line became a row"
    found = {field: rows[place][field] for field in COLUMNS}
    if len(rows) != 6 or found != wanted_text(lines[place]):
        return f"changed: {str(found)[:300]}"
    return ""


def try_all(count: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """-> cases of each kind, and what did not go as documented"""
    cases = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            kind = list(KINDS)[number % len(KINDS)]
            fault = try_kind(kind, random.Random(f"{seed}/{number}"), Path(folder))
            cases[kind] += 1
            if fault:
                wrong.append(f"case {number}, {kind}: {fault}")
    return cases, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cases, wrong = try_all(given.count, given.seed)
    print("| kind | what happens | cases |\n|---|---|---|")
    for kind, (verdict, _) in KINDS.items():
        print(f"| {kind} | {verdict} | {cases[kind]} |")
    print(f"\n{sum(cases.values())} rows of {len(KINDS)} kinds, {len(wrong)} not as documented")
    print("\n".join(wrong))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
