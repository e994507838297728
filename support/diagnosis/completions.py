"""The completions to look at: read, given a reference and prompts for the teacher, and checked.

A row has the key of its problem, problem, solution, answer, prompt_ids, completion_ids, correct,
and later reference, teacher_prompt_ids and other_prompt_ids (the teacher's prompt with its own
reference, and with that of another problem).
"""

import collections
import json
import random
from pathlib import Path

from support.shared.console import fail
from support.shared.data import encode_prompt, fill
from support.shared.models import context_of, head_of

RUN_KEYS = (
    "step",
    "id",
    "prompt_ids",
    "completion_ids",
    "engine_logps",
    "problem",
    "correct",
    "advantage",
)
SAMPLE_KEYS = ("id", "gold", "problem", "text", "correct", "prompt_ids", "completion_ids")


def read_rows(path: str, keys: tuple[str, ...]) -> list[dict]:
    """The objects of a JSONL file, each with these keys; exits with a sentence if one has not."""
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            fail(f"{where} is not JSON: a run that was killed may have left half a line; remove it")
        if not isinstance(row, dict):
            fail(f"{where} is no JSON object")
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            fail(
                f"{where} has no {' and no '.join(missing)}. The passes need the token ids as "
                "sampled: a samples.jsonl has them if eval.py ran with --save_ids, a "
                "rollouts.jsonl of egrsd.py always"
            )
        if "prompt_ids" in keys and not (row["prompt_ids"] and are_ids(row["prompt_ids"])):
            fail(f"{where}: prompt_ids is no list of token ids")
        if "completion_ids" in keys and not are_ids(row["completion_ids"]):
            fail(f"{where}: completion_ids is no list of token ids")
        rows.append(row)
    return rows


def are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def run_rows(path: str, limit: int) -> list[dict]:
    """The first rollouts of a run, in whole steps."""
    rows = read_rows(path, RUN_KEYS)
    steps = {row["step"] for row in rows[: limit or None]}
    chosen = []
    for row in rows:
        if row["step"] in steps:
            row.setdefault("answer", "")
            row.setdefault("solution", "")
            row.setdefault("text", "")
            row["batch"] = row["step"]
            row["key"] = row["id"]
            chosen.append(row)
    return chosen


def eval_rows(path: str, limit: int) -> list[dict]:
    """Samples of eval.py --save_ids: all of some problems, at random.

    Not the first ones of the file, which vLLM finished first: those are the shortest.
    """
    problems = collections.defaultdict(list)
    for row in read_rows(path, SAMPLE_KEYS):
        row["key"] = (row.get("benchmark"), row["id"])  # benchmarks' problems are kept apart
        row["answer"] = str(row["gold"])
        row["solution"] = row.get("solution") or ""
        problems[row["key"]].append(row)
    rows = []
    for key in random.Random(0).sample(sorted(problems, key=str), len(problems)):
        if not limit or len(rows) < limit:
            rows += sorted(problems[key], key=lambda row: (row.get("run", 0), row.get("sample", 0)))
    return rows


def give_references(rows: list[dict]) -> dict[str, int]:
    """Fill in each row's reference. -> how many rows have which kind [D14]

    A completion is never its own reference.
    """
    right = collections.defaultdict(list)
    for row in rows:
        if row["correct"]:
            right[row["key"]].append(row)
    kinds = collections.Counter()
    for row in rows:
        kind, text = choose_reference(row, right[row["key"]])
        row["reference"] = text
        kinds[kind] += 1
    return dict(kinds)


def choose_reference(row: dict, right: list[dict]) -> tuple[str, str]:
    """The kind of a row's reference, and its text; `right`: its problem's right completions."""
    other = ""
    for r in right:
        if not other and r["completion_ids"] != row["completion_ids"]:
            other = r["text"].rsplit("</think>", 1)[-1]
    for kind, text in (
        ("worked solution", row["solution"]),
        ("a right completion", other),
        ("bare answer", row["answer"]),
    ):
        if text and text.strip():
            return kind, text.strip()
    return fail(
        f"problem {row['key']} has an empty reference: no solution, no other right completion and "
        "no answer. The teacher would be shown nothing: remove it, or give --data with solutions "
        "or answers"
    )


def give_prompts(
    rows: list[dict], tokenizer, student_prompt: str, teacher_prompt: str, thinking: bool
) -> str:
    """teacher_prompt_ids and other_prompt_ids of each row. -> a note for the report, '' for none

    Both contexts need the generation prefix that the samples were drawn with (D7): it tells whether
    thinking was on.
    """
    prompt = fill(student_prompt, rows[0])
    note = (
        "The student prompts in the file are not what --student_prompt makes now: delta measures "
        "that difference too. "
    )
    for mode in (thinking, not thinking):
        if note and encode_prompt(tokenizer, prompt, mode) == rows[0]["prompt_ids"]:
            note = ""
            thinking = mode
    reference = {str(row["key"]): row["reference"] for row in rows}
    keys = random.Random(0).sample(sorted(reference), len(reference))
    following = dict(zip(keys, keys[1:] + keys[:1]))  # each problem's reference misleads one other
    for row in rows:
        own = {**row, "solution": row["reference"]}
        other = {**row, "solution": reference[following[str(row["key"])]]}
        row["teacher_prompt_ids"] = encode_prompt(tokenizer, fill(teacher_prompt, own), thinking)
        row["other_prompt_ids"] = encode_prompt(tokenizer, fill(teacher_prompt, other), thinking)
    return note


def check_rows(rows: list[dict], model, name: str, W: int) -> None:
    """Refuse completions of another model, too short for W, or too long for the model `name`."""
    V = len(head_of(model))
    room = context_of(model.config)
    longest = 0
    too_long = []
    for row in rows:
        ids = row["prompt_ids"] + row["completion_ids"]
        if max(ids) >= V:
            fail(
                f"the completions hold token id {max(ids)}, but {name} has {V} tokens: they come "
                "from another model"
            )
        prompt = max(len(row["prompt_ids"]), len(row["teacher_prompt_ids"]))
        if prompt + len(row["completion_ids"]) > room:
            too_long.append(row["key"])
        longest = max(longest, len(row["completion_ids"]))
    if longest <= W:
        fail(
            f"--W {W} is longer than every completion: no token would have a whole window. Lower "
            "--W"
        )
    if too_long:
        fail(
            f"{len(too_long)} completions do not fit, with their reference, into the {room:.0f} "
            f"positions of {name} (the first: problem {too_long[0]}): remove them"
        )
    for row in rows:
        if len(row.get("engine_logps", row["completion_ids"])) != len(row["completion_ids"]):
            fail(f"problem {row['key']}: engine_logps is not one number for each of completion_ids")
