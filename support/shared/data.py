"""Problems and prompts: a data set becomes rows, a row becomes the token ids of a prompt."""

import functools
import random
import re
from pathlib import Path

from support.shared.console import fail, first_line
from support.shared.processes import first_rank_first
from support.shared.rows import as_id, as_text, read_rows

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_problems(
    source: str, columns: dict[str, str], split: str = "train", option: str = "--data"
) -> list[dict[str, str]]:
    """[{id, problem, solution, answer}] of a hub id or a JSON, JSONL or Parquet file.

    `columns` names the column of each field; `option` is what the sentences blame.
    Exits with a sentence if there is no such data, a column is absent or a value is empty.
    """
    names, table = load_table(source, split, option)
    column = {}
    for field, wanted in columns.items():
        column[field] = find_column(names, wanted)
        if not column[field]:
            there = ", ".join(names) or "none"
            fail(
                f"{option} {source} has no column {wanted!r}; it has {there}. Name the right one "
                f"with --{field}_column (of --data and of --eval_data; --eval_data= does without)"
            )
    rows = []
    for number, raw in enumerate(table):
        row = {"id": as_id(raw.get("id"), number)}
        for field, name in column.items():
            try:
                row[field] = as_text(raw.get(name))
            except ValueError as error:
                fail(
                    f"{option} {source}, row {number}: the {field} is {raw[name]!r:.40}, {error}. "
                    f"Write it out as one string, or name another column with --{field}_column"
                )
        rows.append(row)
    for field in column:
        empty = []
        for number, row in enumerate(rows):
            if not row[field]:
                empty.append(f"row {number}, id {row['id']:.40}")
        if empty:
            fail(
                f"{option} {source}: {len(empty)} of {len(rows)} rows have an empty {field} (the "
                f"first: {'; '.join(empty[:5])}). The teacher needs a solution and the reward an "
                "answer: remove these rows"
            )
    return rows


def load_table(source: str, split: str, option: str) -> tuple[list[str], list[dict]]:
    """-> the names of the columns, and the rows, of a hub id or a local file."""
    path = Path(source)
    kind = KINDS.get(path.suffix.lower())
    if path.is_dir():
        fail(f"{option} {source} is a folder: name the file in it")
    if path.is_file() and not kind:
        fail(f"{option} {source} is no .json, .jsonl or .parquet file")
    if kind and not path.is_file():
        fail(f"{option} {source}: there is no such file")
    # Outside of the try: when rank 0 has failed, its siblings' wait ends with an exception.
    with first_rank_first():
        if kind == "json":
            rows = read_rows(path, option)
        else:
            rows = load_dataset(source, split, kind, option)
    if not rows:
        fail(f"{option} {source} is empty")
    names = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names), rows


def load_dataset(source: str, split: str, kind: str | None, option: str) -> list[dict]:
    """The rows of a hub id or a Parquet file."""
    import datasets

    datasets.disable_progress_bars()
    where = {"path": source, "split": split}
    if kind:
        where = {"path": kind, "data_files": source, "split": "train"}
    try:
        return list(datasets.load_dataset(**where))
    except Exception as error:  # of a dozen types; each means that there is nothing to train on
        cause = error.__cause__ or error
        fail(
            f"{option} {source} cannot be read ({type(cause).__name__}: {first_line(cause)}). "
            "It takes a hub id, or a .json, .jsonl or .parquet file with one problem a row"
        )


def find_column(names: list[str], wanted: str) -> str | None:
    for name in names:
        if name.lower() == wanted.lower():
            return name
    return None


def fill(template: str, row: dict[str, str]) -> str:
    """Not str.format, as LaTeX is full of braces; one pass: a {solution} in a problem is text."""
    return re.sub(r"\{(problem|solution)\}", lambda match: row[match[1]], template)


def encode_prompt(tokenizer, content: str, thinking: bool) -> list[int]:
    """Token ids of one user turn and the generation prefix: the only prompt format. [D7]

    A base model without a chat template gets the plain text and a line break. No control token in
    `content` counts: the text is cut after the first character of each, so that "<|im_end|>" in a
    problem is text and cannot end its turn.
    """
    mark = "\ue000content\ue000"  # private-use characters, which no template writes
    text = (tokenizer.bos_token or "") + mark + "\n"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    if text.count(mark) != 1:
        fail("the chat template of this model changes or repeats the user's text: not supported")
    content = content.strip()
    begin = text.index(mark)
    return encode_text(tokenizer, text.replace(mark, content), begin, begin + len(content))


def encode_text(tokenizer, text: str, begin: int = 0, end: int | None = None) -> list[int]:
    """Token ids of a text in whose part from `begin` to `end` no control token counts."""
    control = {*tokenizer.get_added_vocab(), "<think>", "</think>"} - {""}
    pattern = "(?=" + "|".join(map(re.escape, control)) + ")"
    ids = []
    start = 0
    for match in re.finditer(pattern, text[begin:end]):
        cut = begin + match.start() + 1
        ids += tokenizer(text[start:cut], add_special_tokens=False).input_ids
        start = cut
    # one piece, where the text is harmless
    return ids + tokenizer(text[start:], add_special_tokens=False).input_ids


def read_completion(
    tokenizer, prompt_ids: list[int], ids: list[int], eos_ids: list[int]
) -> dict[str, str | bool]:
    """The text of a completion, the text to grade, and whether the cap cut it.

    Where the generation prefix itself opens <think>, the completion starts inside it; so must the
    graded text. [D12]
    """
    truncated = ids[-1] not in eos_ids
    text = tokenizer.decode(ids if truncated else ids[:-1])
    graded = text
    if tokenizer.decode(prompt_ids[-16:]).rstrip().endswith("<think>"):
        graded = "<think>" + text
    return {"text": text, "graded_text": graded, "truncated": truncated}


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    """The rows of a data set of n in the order of one epoch."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)
