"""How good is a base model of make.py: alone, and as a teacher who sees a reference?

    python tiny/measure.py DIR --max_completion 128 [any other option of egrsd.py]

Accuracy and mean length on DIR/test.jsonl, one sample a problem (T 1, top-p 0.95), in three
contexts. The last is the control: a teacher that takes another problem's reference for its own has
not learned to read it, whatever its accuracy.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import egrsd  # noqa: E402
from support.shared import data, engines, models, processes  # noqa: E402

SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 0}  # as egrsd.py evaluates


def give_contexts(rows: list[dict], tokenizer, s: egrsd.Settings) -> dict[str, list[dict]]:
    """The same problems with three prompts: alone, with their reference, with another's."""
    others = rows[1:] + rows[:1]
    contexts = {"alone": [], "with reference": [], "with another's": []}
    for row, other in zip(rows, others):
        prompts = (
            data.fill(s.student_prompt, row),
            data.fill(s.teacher_prompt, row),
            data.fill(s.teacher_prompt, {**row, "solution": other["solution"]}),
        )
        for batch, prompt in zip(contexts.values(), prompts):
            prompt_ids = data.encode_prompt(tokenizer, prompt, s.thinking)
            batch.append({**row, "prompt_ids": prompt_ids})
    return contexts


def measure(
    s: egrsd.Settings, limit: int | None = None, only: str = ""
) -> dict[str, dict[str, float]]:
    """Of each context its figures, on the first `limit` problems of --eval_data (None: on all).

    `only` is the name of the one context that is wanted.
    """
    device = processes.start_processes(s.threads)
    columns = {
        "problem": s.problem_column,
        "solution": s.solution_column,
        "answer": s.answer_column,
    }
    rows = data.load_problems(s.eval_data, columns, s.eval_split, "--eval_data")[:limit]
    tokenizer = models.load_tokenizer(s.model)
    base = models.load_base(s.model, device)
    ends = engines.end_tokens(base, tokenizer)
    sample, _ = egrsd.start_engine(s, base, ends, device, "hf", 1)
    found = {}
    for name, batch in give_contexts(rows, tokenizer, s).items():
        if only and name != only:
            continue
        done = egrsd.roll_out(sample, batch, tokenizer, ends, "evaluation", s, **SAMPLING)
        found[name] = figures_of(done)
    return found


def figures_of(done: list[dict]) -> dict[str, float]:
    """Of rollouts: accuracy, its standard error and the share that the cap cut, all in %; mean
    length and longest prompt in tokens."""
    n = len(done)
    right = cut = tokens = longest = 0
    for r in done:
        right += r["correct"]
        cut += r["truncated"]
        tokens += len(r["completion_ids"])
        longest = max(longest, len(r["prompt_ids"]))
    p = right / n
    return {
        "accuracy": 100 * p,
        "error": 100 * (p * (1 - p) / n) ** 0.5,
        "length": tokens / n,
        "cut": 100 * cut / n,
        "prompt": longest,
    }


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    folder, *options = sys.argv[1:]
    where = ["--model", folder, "--eval_data", str(Path(folder) / "test.jsonl")]
    s = egrsd.parse_settings(["--preset", "tiny", *where, *options])
    with torch.inference_mode():
        found = measure(s)
    for name, row in found.items():
        print(
            f"{name:15} {row['accuracy']:5.1f} +- {row['error']:.1f} %  {row['length']:5.1f} "
            f"tokens, {row['cut']:.1f} % cut, longest prompt {row['prompt']}"
        )
    longest = found["with reference"]["prompt"] + s.max_completion
    print(f"longest prompt and cap: {longest} tokens, --max_length {s.max_length}")


if __name__ == "__main__":
    main()
