"""--check_data: what training would make of a data set. No model is read, but its tokenizer.

Said, and no fault: what will be skipped [D10], golds that no grader reads, problems that stand
twice. A fault: a gold that no completion can match, no problem that fits, a held-out problem that
does not.
"""

import statistics
from collections.abc import Iterable

from support.shared.console import fail, progress, say
from support.shared.data import encode_prompt, fill, load_problems
from support.shared.grading import ask_workers, grade_completions
from support.shared.models import load_tokenizer

MOST_NAMED = 10  # rows in a line


def check_data(settings: dict) -> None:
    """Report on --data and --eval_data; end with status 1 where training would go wrong."""
    columns = {}
    for field in ("problem", "solution", "answer"):
        columns[field] = settings[f"{field}_column"]
    tokenizer = find_tokenizer(settings["model"], settings["trust_remote_code"])
    room = settings["max_length"] - settings["max_completion"]
    student = {"student": settings["student_prompt"]}
    sets = {"--data": {**student, "teacher": settings["teacher_prompt"]}}
    if settings["eval_data"]:
        sets["--eval_data"] = student
    faults = []
    for option, asked in sets.items():
        source = settings[option[2:]]
        split = settings["split" if option == "--data" else "eval_split"]
        rows = load_problems(source, columns, split, option)
        say(f"{option} {source}: {len(rows):,} problems")
        too_long = report_lengths(rows, asked, tokenizer, settings["thinking"], room)
        report_twice(rows, "problem")
        report_twice(rows, "id")
        hopeless = report_golds(rows)
        if len(too_long) == len(rows):
            faults.append(f"{option}: no problem fits into --max_length")
        elif too_long and option == "--eval_data":
            faults.append(f"{option}: all of its problems must fit, and {len(too_long)} do not")
        if hopeless:
            faults.append(f"{option}: {len(hopeless)} golds that no completion can match")
    if faults:
        fail(f"{'; '.join(faults)}. The rows stand above: mend or remove them")
    say("training would take this data")


def find_tokenizer(model: str, trust_remote_code: bool):
    """The model's tokenizer, or None where there is none."""
    try:
        return load_tokenizer(model, trust_remote_code)
    except SystemExit as error:
        say(f"{error}. Lengths are in characters, and what will be skipped is not known")
        return None


def report_lengths(
    rows: list[dict], prompts: dict[str, str], tokenizer, thinking: bool, room: int
) -> list[int]:
    """-> numbers of the rows of which a prompt is longer than `room` tokens"""
    lengths = {}
    for row in progress(rows, desc="lengths", unit="problem"):
        for name, template in prompts.items():
            asked = fill(template, row)
            if tokenizer:
                asked = encode_prompt(tokenizer, asked, thinking)
            lengths.setdefault(name, []).append(len(asked))
    unit = "tokens" if tokenizer else "characters"
    say(f"  prompt in {unit:<10}     min   median      max")
    for name, values in lengths.items():
        middle = statistics.median_low(values)
        say(f"  {name:<20} {min(values):>8,} {middle:>8,} {max(values):>8,}")
    if not tokenizer:
        return []
    too_long = []
    for number, row in enumerate(zip(*lengths.values())):
        if max(row) > room:
            too_long.append(number)
    say(f"  too long beside --max_completion, to be skipped: {name_rows(too_long)}")
    return too_long


def report_twice(rows: list[dict], field: str) -> None:
    """Say which rows share a problem or an id, white space aside."""
    found = {}
    for number, row in enumerate(rows):
        found.setdefault("".join(row[field].split()), []).append(number)
    twice = []
    differ = []
    for numbers in found.values():
        twice += numbers[1:]
        answers = {"".join(rows[number]["answer"].split()) for number in numbers}
        if len(answers) > 1:
            differ += numbers
    say(f"  {field}s that stand in an earlier row too: {name_rows(twice)}")
    if differ and field == "problem":
        say(f"  ... and have another answer there: {name_rows(differ)}")


def report_golds(rows: list[dict]) -> list[int]:
    """-> numbers of the rows whose gold, written by the model itself, would not be right"""
    golds = [row["answer"] for row in rows]
    hopeless = []
    boxed = ["\\boxed{" + gold + "}" for gold in golds]
    for number, grade in enumerate(grade_completions(boxed, golds)):
        if not grade.correct:
            hopeless.append(number)
    unread = []
    verdicts = read_golds(golds)
    for number, gold in enumerate(golds):
        if not verdicts.get(gold, True) and number not in hopeless:
            unread.append(number)
    say(f"  golds that no completion can match: {name_rows(hopeless)}")
    for number in hopeless[:MOST_NAMED]:
        say(f"    row {number}: {golds[number]!r:.60}, {len(golds[number]):,} characters")
    say(f"  golds that only the same text matches: {name_rows(unread)}")
    for number in unread[:MOST_NAMED]:
        say(f"    row {number}: {golds[number]!r:.60}")
    return hopeless


def read_golds(golds: list[str]) -> dict[str, bool]:
    """gold -> is it equal to itself to the grader's mathematics? Not asked of whole numbers."""
    asked = [gold for gold in dict.fromkeys(golds) if not gold.isdecimal()]
    verdicts = {}
    if not asked:
        return verdicts
    with progress(total=len(asked), desc="golds", unit="gold") as bar:
        for start in range(0, len(asked), 256):
            part = asked[start : start + 256]
            questions = {gold: [gold, gold, True] for gold in part}
            for gold, (correct, _) in ask_workers(questions).items():
                verdicts[gold] = correct
            bar.update(len(part))
    return verdicts


def name_rows(numbers: Iterable[int]) -> str:
    """How many rows, and the first of them by number (from 0)."""
    numbers = list(numbers)
    if not numbers:
        return "none"
    first = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = ", ..." if len(numbers) > MOST_NAMED else ""
    return f"{len(numbers):,} (row {first}{more})"
