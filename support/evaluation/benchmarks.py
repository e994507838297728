"""Benchmarks, the samples that are wanted of them, and samples.jsonl, which holds them."""

import json
import os
import re
from pathlib import Path

from support.shared.console import ROOT, fail
from support.shared.data import encode_prompt, fill, read_completion
from support.shared.engines import rollout_seed
from support.shared.files import lock, make_folder, read_json, unlock, write_json, writing
from support.shared.grading import grade_completions
from support.shared.processes import first_rank_first
from support.shared.rows import as_id, as_text, read_rows

BENCHMARKS = {  # name: hub id, config, split
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "tiny": (str(ROOT / "tiny" / "test.jsonl"), None, None),
}
# Where and how fast an evaluation computes, not what. Model and adapter count by their content.
FREE = (
    "preset model adapter training data_dir tp gpu_memory batch threads rank_timeout out "
    "trust_remote_code regrade compare paper"
).split()


def load_benchmark(name: str, data_dir: str, limit: int) -> list[dict[str, str]]:
    """[{id, problem, solution, answer}]; `solution` may be empty; `limit` 0 takes all of them.

    Exits with a sentence if it cannot be read, a problem has no answer, or an id stands twice.
    """
    source, config, split = BENCHMARKS.get(name, ("", None, None))
    if data_dir:
        source = f"{data_dir}/{name}.jsonl"
        split = None
    problems = []
    for number, row in enumerate(read_table(name, source, config, split)):
        try:
            problems.append(as_problem(row, number))
        except ValueError as error:
            fail(f"{name}: {source}, row {number}: {error}. Write it out as one string")
    ids = set()
    bad = []
    for p in problems:
        ids.add(p["id"])
        if not p["problem"] or not p["answer"]:
            bad.append(p["id"])
    if bad or not problems or len(ids) < len(problems):
        fail(
            f"{name}: {source} has {len(problems)} rows, {len(bad)} of them without problem or "
            f"answer ({', '.join(bad[:5])}). It needs rows with a problem (or question), an "
            "answer, and no id twice"
        )
    return problems[: limit or None]


def read_table(name: str, source: str, config: str | None, split: str | None) -> list[dict]:
    """Rows of a hub data set, or of a local file where there is no split."""
    # Outside of the try: when rank 0 has failed, its siblings' wait ends with an exception.
    with first_rank_first():
        if not split:
            return read_rows(Path(source), f"{name}:")
        try:
            import datasets

            return list(datasets.load_dataset(source, config, split=split))
        except Exception as error:  # of a dozen types; each means that there is nothing to evaluate
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            fail(
                f"{name}: {source} cannot be read ({reason}). --data_dir takes a folder with a "
                f"{name}.jsonl"
            )


def as_problem(raw: dict, number: int) -> dict[str, str]:
    """Data sets differ in their columns, and GSM8K's answers end "... #### 1,234".

    A ValueError says which of its cells is no text.
    """
    row = {}
    cells = {key.lower(): value for key, value in raw.items()}
    for key in ("problem", "question", "answer", "solution"):
        try:
            row[key] = as_text(cells.get(key))
        except ValueError as error:
            raise ValueError(f"the {key} is {cells[key]!r:.40}, {error}") from error
    worked, mark, gold = row["answer"].rpartition("####")
    if mark:
        gold = re.sub(r"(?<=\d),(?=\d{3})", "", gold).strip()
    labels = [cells.get(key) for key in ("id", "unique_id", "problem_idx")]
    label = next((value for value in labels if value not in (None, "")), None)
    return {
        "id": as_id(label, number),
        "problem": row["problem"] or row["question"],
        "answer": gold,
        "solution": row["solution"] or worked,
    }


def work_list(
    benchmarks: dict[str, list[dict]],
    tokenizer,
    student_prompt: str,
    thinking: bool,
    K: int,
    aime24_runs: int,
    seed: int,
) -> list[dict]:
    """One item for each sample, in an order that lets an engine reuse a prompt."""
    work = []
    for name, problems in benchmarks.items():
        runs = aime24_runs if name == "aime24" else 1
        for p in problems:
            prompt_ids = encode_prompt(tokenizer, fill(student_prompt, p), thinking)
            for run in range(runs):
                for k in range(K):
                    item = {
                        "benchmark": name,
                        "id": p["id"],
                        "run": run,
                        "sample": k,
                        "gold": p["answer"],
                        "problem": p["problem"],
                        "solution": p["solution"],
                        "prompt_ids": prompt_ids,
                        "seed": rollout_seed(seed, f"{name}/{run}/{p['id']}", k),
                    }
                    work.append(item)
    return work


# --------------------------------------------------------------------------------------------------
# samples.jsonl

BULKY = ("text", "prompt_ids", "completion_ids", "problem", "solution")  # may be gigabytes


def sample_key(row: dict) -> tuple[str, str, int, int]:
    return row["benchmark"], row["id"], row["run"], row["sample"]


def open_folder(out: Path, settings: dict) -> None:
    """Refuse to mix samples drawn under different settings; leave whole lines only.

    The folder is this process's until it ends, as a run's is.
    """
    make_folder(out)
    lock(out)
    for path in out.glob("samples-*.jsonl"):  # of a rank that outlived its first one
        lock(path)
        unlock(path)
    saved = out / "settings.json"
    begun = any(path.stat().st_size for path in out.glob("samples*.jsonl"))
    if begun and not saved.exists():
        fail(
            f"{out} holds samples and no settings.json: nobody knows how they were drawn. "
            "Take another --out"
        )
    old = read_json(saved, settings) if begun else settings
    changed = []
    for key, value in settings.items():
        if key not in FREE and old.get(key) != value:
            changed.append(f"{key} {old.get(key)!r} (now {value!r})")
    if changed:
        fail(
            f"{out} holds samples drawn with other settings: {'; '.join(changed)}. Take those, or "
            "another --out"
        )
    write_json(saved, settings)
    mend_samples(out)


def mend_samples(out: Path) -> None:
    """Make samples.jsonl one file of whole lines.

    Cut what a kill left half-written, append what other ranks wrote.
    """
    main = out / "samples.jsonl"
    with writing(main):
        whole = whole_lines(main)
        if main.exists() and len(whole) < main.stat().st_size:
            os.truncate(main, len(whole))
        # A kill before the unlink repeats lines; read_samples takes a key once.
        for path in sorted(out.glob("samples-*.jsonl")):
            with main.open("ab") as file:
                file.write(whole_lines(path))
            path.unlink()


def whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def read_samples(out: Path, everything: bool = False) -> dict[tuple, dict]:
    """key -> row of samples.jsonl; texts and token ids only if `everything` is asked for."""
    rows = {}
    path = out / "samples.jsonl"
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return {}
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    with file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if not everything:
                    for key in BULKY:
                        row.pop(key, None)
                rows.setdefault(sample_key(row), row)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                fail(
                    f"{out}/samples.jsonl: line {number} is damaged. Delete that line and run the "
                    "same command again"
                )
    return rows


def refuse_other_samples(out: Path, done: dict[tuple, dict], work: list[dict]) -> None:
    """Samples with another seed or gold than those that are wanted were copied from elsewhere."""
    for item in work:
        row = done.get(sample_key(item), item)
        if row.get("seed") != item["seed"] or row.get("gold") != item["gold"]:
            fail(
                f"{out}/samples.jsonl holds samples of other work, such as {sample_key(item)}: "
                "another evaluation's file was copied here. Put its own back, or take another --out"
            )


def finish_sample(
    item: dict, ids: list[int], tokenizer, eos_ids: list[int], save_ids: bool
) -> dict:
    """A row of samples.jsonl but for its grade.

    `tokens` counts all that were generated, thinking and end token too.
    """
    read = read_completion(tokenizer, item["prompt_ids"], ids, eos_ids)
    row = {key: item[key] for key in ("benchmark", "id", "run", "sample", "seed", "gold")}
    row["text"] = read["graded_text"]
    row["tokens"] = len(ids)
    row["finish"] = "length" if read["truncated"] else "stop"
    if save_ids:
        for key in ("problem", "solution", "prompt_ids"):
            row[key] = item[key]
        row["completion_ids"] = ids
    return row


def grade(rows: list[dict], grader: str) -> None:
    """Add correct, extracted and status; Minerva, where the graders differ, gets both verdicts."""
    for which in ("ours", "paper"):
        mine = [row for row in rows if which == grader or row["benchmark"] == "minerva"]
        texts = [row["text"] for row in mine]
        golds = [row["gold"] for row in mine]
        for row, found in zip(mine, grade_completions(texts, golds, normalise=which == "ours")):
            # An answer before the cut is not a finished one.
            correct = found.correct and row["finish"] == "stop"
            if which == grader:
                row["correct"] = correct
                row["extracted"] = found.answer
                row["status"] = found.status
            if row["benchmark"] == "minerva":
                row["graders"] = {**row.get("graders", {}), which: correct}
