"""Benchmarks, the samples that are wanted of them, and samples.jsonl, which holds those that are there."""
from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from support.basics import HERE, fail, first_rank_first, make_folder, read_json, write_json
from support.data import encode_prompt, fill, read_completion
from support.engines import rollout_seed
from support.grading import grade_completions

if TYPE_CHECKING:
    from eval import EvalSettings

BENCHMARKS = {  # name: hub id, config, split
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"), "aime25": ("math-ai/aime25", None, "test"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"), "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"), "gsm8k": ("openai/gsm8k", "main", "test"),
    "tiny": (str(HERE / "tiny" / "test.jsonl"), None, None)}
# Where and how fast an evaluation computes, not what. Model and adapter count by their content.
FREE = {"preset", "model", "adapter", "training", "data_dir", "tp", "gpu_memory", "batch", "threads", "out",
        "trust_remote_code", "regrade", "compare", "paper"}


def load_benchmark(name: str, e: EvalSettings) -> list[dict[str, str]]:
    """[{id, problem, solution, answer}]; `solution` may be empty. Exits with a sentence if a problem has no answer."""
    source, config, split = (f"{e.data_dir}/{name}.jsonl", None, None) if e.data_dir else BENCHMARKS[name]
    with first_rank_first():  # outside of the try: when rank 0 has failed, its siblings' wait ends with an exception
        try:
            if split:
                import datasets
                table = list(datasets.load_dataset(source, config, split=split))
            else:
                table = [json.loads(line) for line in Path(source).read_text("utf-8").split("\n") if line.strip()]
            table = [{k.lower(): "" if v is None else str(v).strip() for k, v in row.items()} for row in table]
        except Exception as error:  # datasets raises a dozen types; each means that there is nothing to evaluate on
            fail(f"{name}: {source} cannot be read ({type(error).__name__}: {str(error)[:200]}). --data_dir takes a "
                 f"folder with a {name}.jsonl")
    problems = []
    for n, row in enumerate(table):  # data sets differ in their columns, and GSM8K's answers end "... #### 1,234"
        worked, mark, gold = row.get("answer", "").rpartition("####")
        gold = re.sub(r"(?<=\d),(?=\d{3})", "", gold).strip() if mark else gold
        problems.append({"id": row.get("id") or row.get("unique_id") or row.get("problem_idx") or str(n),
                         "problem": row.get("problem") or row.get("question", ""), "answer": gold,
                         "solution": row.get("solution") or worked})
    bad = [p["id"] for p in problems if not (p["problem"] and p["answer"])]
    if bad or not problems or len({p["id"] for p in problems}) < len(problems):
        fail(f"{name}: {source} has {len(problems)} rows, {len(bad)} of them without problem or answer "
             f"({', '.join(bad[:5])}). It needs rows with a problem (or question), an answer, and no id twice")
    return problems[: e.limit or None]


def work_list(benchmarks: dict[str, list[dict]], tokenizer, e: EvalSettings) -> list[dict]:
    """One item for each sample, in an order that lets an engine reuse a prompt."""
    return [{"benchmark": name, "id": p["id"], "run": run, "sample": k, "gold": p["answer"], "problem": p["problem"],
             "solution": p["solution"], "prompt_ids": ids, "seed": rollout_seed(e.seed, f"{name}/{run}/{p['id']}", k)}
            for name, problems in benchmarks.items() for p in problems
            for ids in [encode_prompt(tokenizer, fill(e.student_prompt, p), e.thinking)]
            for run in range(e.aime24_runs if name == "aime24" else 1) for k in range(e.K)]



# ---------------------------------------------------------------------------------------------------------------------
# samples.jsonl


def sample_key(row: dict) -> tuple[str, str, int, int]:
    return row["benchmark"], row["id"], row["run"], row["sample"]


def open_folder(out: Path, settings: dict) -> None:
    """Refuse to mix samples drawn under different settings; leave whole lines only."""
    if any(path.stat().st_size for path in out.glob("samples*.jsonl")) and not (out / "settings.json").exists():
        fail(f"{out} holds samples and no settings.json: nobody knows how they were drawn. Take another --out")
    old = read_json(out / "settings.json") if (out / "settings.json").exists() else settings
    changed = [f"{k} {old.get(k)!r} (now {v!r})" for k, v in settings.items() if k not in FREE and old.get(k) != v]
    if changed:
        fail(f"{out} holds samples drawn with other settings: {'; '.join(changed)}. Take those, or another --out")
    make_folder(out)
    write_json(out / "settings.json", settings)
    mend_samples(out)


def mend_samples(out: Path) -> None:
    """Make samples.jsonl one file of whole lines: cut what a kill left half-written, append what other ranks wrote."""
    main = out / "samples.jsonl"
    for path in [main, *sorted(out.glob("samples-*.jsonl"))]:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if path == main and whole != data:
            os.truncate(main, len(whole))
        elif path != main:  # a kill before the unlink repeats lines; read_samples takes a key once
            with main.open("ab") as file:
                file.write(whole)
            path.unlink()


def read_samples(out: Path, everything: bool = False) -> dict[tuple, dict]:
    """key -> row of samples.jsonl; texts and token ids, which may be gigabytes, only if `everything` is asked for."""
    rows = {}
    with (out / "samples.jsonl").open("a+", encoding="utf-8") as file:  # a+: there may be none yet
        file.seek(0)
        for n, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                for bulky in () if everything else ("text", "prompt_ids", "completion_ids", "problem", "solution"):
                    row.pop(bulky, None)
                rows.setdefault(sample_key(row), row)
            except (ValueError, KeyError, TypeError):
                fail(f"{out}/samples.jsonl: line {n} is damaged. Delete that line and run the same command again")
    return rows


def finish_sample(item: dict, ids: list[int], tokenizer, ends: list[int], save_ids: bool) -> dict:
    """A row of samples.jsonl but for its grade. `tokens` counts all that were generated, thinking and end token too."""
    read = read_completion(tokenizer, item["prompt_ids"], ids, ends)
    row = {k: item[k] for k in ("benchmark", "id", "run", "sample", "seed", "gold")}
    row |= {"text": read["graded_text"], "tokens": len(ids), "finish": "length" if read["truncated"] else "stop"}
    if save_ids:
        row |= {k: item[k] for k in ("problem", "solution", "prompt_ids")} | {"completion_ids": ids}
    return row


def grade(rows: list[dict], grader: str) -> None:
    """Add correct, extracted and status to the rows; Minerva, where the graders differ most, gets both verdicts."""
    for which in ("ours", "paper"):
        mine = [row for row in rows if which == grader or row["benchmark"] == "minerva"]
        texts, golds = [row["text"] for row in mine], [row["gold"] for row in mine]
        for row, found in zip(mine, grade_completions(texts, golds, normalise=which == "ours")):
            correct = found.correct and row["finish"] == "stop"  # an answer before the cut is not a finished one
            if which == grader:
                row |= {"correct": correct, "extracted": found.answer, "status": found.status}
            if row["benchmark"] == "minerva":
                row["graders"] = {**row.get("graders", {}), which: correct}
