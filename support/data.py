"""Problems and prompts: a data set becomes rows, a row becomes the token ids that the student and the teacher see."""
from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from support.basics import fail, first_line, first_rank_first

if TYPE_CHECKING:
    from egrsd import Settings


def load_problems(source: str, s: Settings, option: str = "--data") -> list[dict[str, str]]:
    """[{id, problem, solution, answer}] of a hub id or a JSON, JSONL or Parquet file; exits with a sentence if bad."""
    import datasets
    datasets.disable_progress_bars()
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(source).suffix.lower())
    if Path(source).is_file() and not (kind and Path(source).stat().st_size):
        fail(f"{option} {source} " + ("is empty" if kind else "is no .json, .jsonl or .parquet file"))
    if kind and not Path(source).is_file():
        fail(f"{option} {source}: there is no such file")
    local = {"path": kind, "data_files": source, "split": "train"}
    with first_rank_first():  # outside of the try: when rank 0 has failed, its siblings' wait ends with an exception
        try:
            table = datasets.load_dataset(**(local if kind else {"path": source, "split": s.split}))
        except Exception as error:  # datasets raises a dozen types; each means that there is nothing to train on
            cause = error.__cause__ or error
            if "corresponds to no data" in str(error):
                fail(f"{option} {source} is empty")
            fail(f"{option} {source} cannot be read ({type(cause).__name__}: {first_line(cause)}). It takes a hub id, "
                 "or a .json, .jsonl or .parquet file with one problem a row")
    column = {}
    for field in ("problem", "solution", "answer"):
        wanted = getattr(s, f"{field}_column")
        column[field] = next((name for name in table.column_names if name.lower() == wanted.lower()), None)
        if not column[field]:
            fail(f"{option} {source} has no column {wanted!r}; it has {', '.join(table.column_names) or 'none'}. Name "
                 f"the right one with --{field}_column (of --data and of --eval_data; --eval_data= does without)")
    text = lambda value: "" if value is None else str(value).strip()  # noqa: E731
    rows = [{"id": str(row.get("id", n)), **{field: text(row[name]) for field, name in column.items()}}
            for n, row in enumerate(table)]
    if not rows:
        fail(f"{option} {source} is empty")
    for field in column:
        if empty := [row["id"] for row in rows if not row[field]]:
            fail(f"{option} {source}: {len(empty)} of {len(rows)} rows have an empty {field} (the first: "
                 f"{', '.join(empty[:5])}). The teacher needs a solution and the reward an answer: remove these rows")
    return rows


def fill(template: str, row: dict[str, str]) -> str:
    """Not str.format, as LaTeX is full of braces; in one pass: a problem that says {solution} reveals nothing."""
    return re.sub(r"\{(problem|solution)\}", lambda match: row[match[1]], template)


def encode_prompt(tokenizer, content: str, thinking: bool) -> list[int]:
    """Token ids of one user turn and the generation prefix: the only prompt format, for both roles and for eval. [D7]

    A base model without a chat template gets the plain text and a line break. No control token in `content` counts: the
    text is cut after the first character of each, so that "<|im_end|>" in a problem is text and cannot end its turn.
    """
    mark = "\uE000content\uE000"  # private-use characters, which no template writes
    text = (tokenizer.bos_token or "") + mark + "\n"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=thinking)
    if text.count(mark) != 1:
        fail("the chat template of this model changes or repeats the user's text, which is not supported")
    content, begin = content.strip(), text.index(mark)
    control = {*tokenizer.get_added_vocab(), "<think>", "</think>"} - {""}
    inside = re.finditer("(?=" + "|".join(map(re.escape, control)) + ")", content)
    text = text.replace(mark, content)
    cuts = [0, *(begin + match.start() + 1 for match in inside), len(text)]
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:])]  # one, where the content is harmless
    return [i for piece in pieces if piece for i in tokenizer(piece, add_special_tokens=False).input_ids]


def read_completion(tokenizer, prompt_ids: list[int], ids: list[int], ends: list[int]) -> dict[str, str | bool]:
    """The text of a completion, the text to grade, and whether the cap cut it.

    Where the generation prefix itself opens <think>, the completion starts inside it; so must the graded text. [D12]
    """
    truncated = ids[-1] not in ends
    text = tokenizer.decode(ids if truncated else ids[:-1])
    opened = tokenizer.decode(prompt_ids[-16:]).rstrip().endswith("<think>")
    return {"text": text, "graded_text": "<think>" * opened + text, "truncated": truncated}


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def load_held_out(tokenizer, s: Settings) -> list[dict]:
    """The problems of --eval_data with the student's prompts; refused if one does not fit, for all must count."""
    rows = [{**row, "prompt_ids": encode_prompt(tokenizer, fill(s.student_prompt, row), s.thinking)}
            for row in load_problems(s.eval_data, s, "--eval_data")]
    if long := [row["id"] for row in rows if len(row["prompt_ids"]) + s.max_completion > s.max_length]:
        fail(f"--eval_data {s.eval_data}: {len(long)} problems (the first: {', '.join(long[:5])}) and --max_completion "
             f"{s.max_completion} exceed --max_length {s.max_length}: remove them, or raise it")
    return rows
