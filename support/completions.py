"""Completions to look at: read from a run or an evaluation, given a reference, prompts for the teacher, and checked.

A row has the key of its problem, problem, solution, answer, prompt_ids, completion_ids, correct, and later reference,
teacher_ids and other_ids (the teacher's prompt with the own reference, and with that of another problem).
"""
from __future__ import annotations

import collections
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

from support.basics import fail
from support.data import encode_prompt, fill
from support.models import head_of

if TYPE_CHECKING:
    from egrsd import Settings


def read_rows(path: str, keys: tuple[str, ...]) -> list[dict]:
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            fail(f"{path}, line {number} is not JSON: a run that was killed may have left half a line; remove it")
        if not isinstance(rows[-1], dict):
            fail(f"{path}, line {number} is no JSON object")
        missing = [key for key in keys if rows[-1].get(key) is None]
        if missing:
            fail(f"{path}, line {number} has no {' and no '.join(missing)}. The passes need the token ids as sampled: "
                 "a samples.jsonl has them if eval.py ran with --save_ids, a rollouts.jsonl of egrsd.py always")
        for key in {*keys} & {"prompt_ids", "completion_ids"}:
            ids = rows[-1][key]
            numbers = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
            if not numbers or not ids and key == "prompt_ids":
                fail(f"{path}, line {number}: {key} is no list of token ids")
    return rows


def run_rows(path: str, limit: int) -> list[dict]:
    """The first rollouts of a run, in whole steps."""
    rows = read_rows(path, ("step", "prompt_ids", "completion_ids", "engine_logps", "problem", "correct", "advantage"))
    steps = {row["step"] for row in rows[: limit or None]}
    return [{"answer": "", "solution": "", **row, "batch": row["step"], "key": row["id"]}
            for row in rows if row["step"] in steps]


def eval_rows(path: str, limit: int) -> list[dict]:
    """Samples of eval.py --save_ids: all of some problems, drawn at random, since the short ones may stand first."""
    problems = collections.defaultdict(list)
    for row in read_rows(path, ("id", "gold", "problem", "text", "correct", "prompt_ids", "completion_ids")):
        key = (row.get("benchmark"), row["id"])  # the benchmarks' problems are kept apart
        problems[key].append({**row, "key": key, "answer": str(row["gold"]), "solution": row.get("solution") or ""})
    rows = []
    for key in random.Random(0).sample(sorted(problems, key=str), len(problems)):
        if not limit or len(rows) < limit:
            rows += sorted(problems[key], key=lambda row: (row.get("run", 0), row.get("sample", 0)))
    return rows


def give_references(rows: list[dict]) -> dict[str, int]:
    """D14: fill in each row's solution; -> how many rows have which kind. A completion is never its own reference."""
    right, kinds = collections.defaultdict(list), collections.Counter()
    for row in rows:
        if row["correct"]:
            right[row["key"]].append(row)
    for row in rows:
        others = [r["text"] for r in right[row["key"]] if r["completion_ids"] != row["completion_ids"]]
        texts = {"worked solution": row["solution"],
                 "a right completion": (others or [""])[0].rsplit("</think>", 1)[-1], "bare answer": row["answer"]}
        kind = next((kind for kind, text in texts.items() if text and text.strip()), None)
        if kind is None:
            fail(f"problem {row['key']} has an empty reference: no solution, no other right completion and no answer. "
                 "The teacher would be shown nothing: remove it, or give --data with solutions or answers")
        row["reference"] = texts[kind].strip()
        kinds[kind] += 1
    return dict(kinds)


def give_prompts(rows: list[dict], tokenizer, s: Settings) -> str:
    """teacher_ids, and other_ids with the reference of another problem; -> a note for the report, '' for none.

    Both contexts need the generation prefix that the samples were drawn with (D7): it tells whether thinking was on.
    """
    matches = [thinking for thinking in (s.thinking, not s.thinking)
               if encode_prompt(tokenizer, fill(s.student_prompt, rows[0]), thinking) == rows[0]["prompt_ids"]]
    s.thinking = matches[0] if matches else s.thinking
    reference = {str(row["key"]): row["reference"] for row in rows}
    keys = random.Random(0).sample(sorted(reference), len(reference))
    following = dict(zip(keys, keys[1:] + keys[:1]))
    for row in rows:
        for name, text in (("teacher_ids", row["reference"]), ("other_ids", reference[following[str(row["key"])]])):
            row[name] = encode_prompt(tokenizer, fill(s.teacher_prompt, {**row, "solution": text}), s.thinking)
    return "" if matches else ("The student prompts in the file are not what --student_prompt makes now: delta "
                               "measures that difference too. ")


def check_rows(rows: list[dict], model, s: Settings) -> None:
    V, longest = head_of(model).shape[0], getattr(model.config, "max_position_embeddings", math.inf)
    ids = [i for row in rows for i in (*row["prompt_ids"], *row["completion_ids"])]
    if not 0 <= min(ids) <= max(ids) < V:
        fail(f"the completions hold token id {max(ids)}, but {s.model} has {V} tokens: they come from another model")
    if s.W >= max(len(row["completion_ids"]) for row in rows):
        fail(f"--W {s.W} is longer than every completion: no token would have a whole window. Lower --W")
    long = [row["key"] for row in rows
            if max(len(row["prompt_ids"]), len(row["teacher_ids"])) + len(row["completion_ids"]) > longest]
    if long:
        fail(f"{len(long)} completions do not fit, with their reference, into the {longest} positions of {s.model} "
             f"(the first: problem {long[0]}): remove them")
