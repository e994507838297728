"""
The paper's evaluation (section 5.1): sampled accuracy and length on six benchmarks, with standard errors.

    python eval.py --model Qwen/Qwen3-8B --adapter runs/qwen3-8b/step_100         # vLLM on one GPU
    torchrun --nproc_per_node 8 eval.py --adapter runs/qwen3-8b/step_100          # eight engines, an eighth each
    python eval.py --preset tiny --adapter runs/tiny/step_100                     # no GPU, no network
    python eval.py --out evals/qwen3-8b-step_100 --regrade --grader paper         # saved samples again, no model
    python eval.py --compare evals/a evals/b --paper qwen3-8b                     # paired differences, sweeps, plots

What the tables say (a sample is one completion; a problem has K of them, in AIME24 K in each of five runs):
    avg@K       percent of right samples; one that is cut at --max_new is wrong and stays in the denominator
    +-          one standard error: sd of the problems' means / sqrt(problems). Samples of one problem are not
                independent: counted one by one, they would make the bar up to sqrt(K) times too short
    pass@K      percent of (run, problem) with a right sample among the K
    Avg.        mean of the benchmarks, +- sqrt(sum of SE^2) / benchmarks; Eff is Avg. / (mean length / 1000)
    difference  mean over problems of (this run - the first run), +- its SE; ~ marks one within two SE of zero

samples.jsonl grows as samples end. The same command goes on where a run was stopped, in whatever way: the seed of a
sample follows from its benchmark, run, problem and number, not from its place in a batch.
"""
import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import statistics
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from egrsd import (HERE, PRESETS, Generate, Settings, append_lines, choose_engine, encode_prompt, end_tokens, fail,
                   fill, first_rank_first, gather, grade_completions, hf_generate, load_base, load_tokenizer,
                   make_folder, opt, progress, rank_and_world, read_completion, rollout_seed, say, start_processes,
                   start_vllm, tensor_parallel, versions, vllm_generate, write_beside, write_json)

BENCHMARKS = {  # name: hub id, config, split
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"), "aime25": ("math-ai/aime25", None, "test"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"), "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"), "gsm8k": ("openai/gsm8k", "main", "test"),
    "tiny": (str(HERE / "tiny" / "test.jsonl"), None, None)}

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Each default is followed by where it comes from.


@dataclasses.dataclass
class EvalSettings:
    preset: str = opt("model", "qwen3-8b", "what goes with a model: qwen3-8b, qwen3-4b or tiny")
    model: str = opt("model", "Qwen/Qwen3-8B", "hub id or local folder")  # section 5.1
    adapter: str = opt("model", "", "folder of a LoRA adapter, such as runs/x/step_100; none: the base model")
    trust_remote_code: bool = opt("model", False, "run Python code that comes with the model")  # ours

    benchmarks: str = opt("data", "aime24,aime25,hmmt25,math500,minerva,gsm8k", "names, comma-separated")  # section 5.1
    data_dir: str = opt("data", "", "folder with a NAME.jsonl (problem, answer) for each; by default the hub")  # ours
    limit: int = opt("data", 0, "only the first problems of each benchmark, 0 = all")  # ours
    student_prompt: str = opt("data", Settings.student_prompt, "what the model is asked, as in training")  # D7
    thinking: bool = opt("data", True, "thinking mode, where the chat template has one")  # section 5.1

    K: int = opt("sampling", 4, "samples of a problem in a run")  # section 5.1
    aime24_runs: int = opt("sampling", 5, "runs of AIME24; the other benchmarks have one")  # section 5.1
    temperature: float = opt("sampling", 1.0, "sampling temperature")  # section 5.1
    top_p: float = opt("sampling", 0.95, "nucleus of the sampling")  # section 5.1
    top_k: int = opt("sampling", 0, "most tokens that sampling considers, 0 = all")  # ours: the paper names none
    max_new: int = opt("sampling", 32_768, "longest completion in tokens")  # section 5.1
    seed: int = opt("sampling", 0, "seed from which that of each sample follows")  # ours

    engine: str = opt("engine", "auto", "vllm, hf (transformers) or auto")  # ours
    tp: int = opt("engine", 1, "GPUs that share one vLLM engine; the others run side by side")  # ours
    gpu_memory: float = opt("engine", 0.9, "share of the GPU's memory that vLLM takes")  # ours
    batch: int = opt("engine", 64, "completions at a time of transformers' generate")  # ours
    threads: int = opt("engine", 0, "CPU threads of torch, 0 = torch decides")  # ours

    out: str = opt("output", "", "folder of the evaluation; by default evals/ and the adapter's name")
    grader: str = opt("output", "ours", "ours, or paper: without the normalisation of answers")  # ours
    save_ids: bool = opt("output", False, "save problem, solution and token ids too, for diagnostics.py")  # ours
    regrade: bool = opt("output", False, "grade the samples in --out again; loads no model")
    compare: tuple = opt("output", (), "folders of finished evaluations; differences are to the first")
    paper: str = opt("output", "", "with --compare: the paper's rows for this model; qwen3-8b:7 takes Table 7")


# Where and how fast a run computes, not what. Model and adapter count by their content, see evaluate().
FREE = {"preset", "model", "adapter", "training", "data_dir", "tp", "gpu_memory", "batch", "threads", "out",
        "trust_remote_code", "regrade", "compare", "paper"}


def parse_eval(argv: list[str] | None = None) -> EvalSettings:
    """Defaults, then the preset, then (with --regrade) the run's own, then the options; exits with a sentence."""
    parser = argparse.ArgumentParser(prog="eval.py", usage="%(prog)s [options]", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0].strip(),
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(EvalSettings):
        how = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
               {"nargs": "+", "metavar": "DIR"} if f.type is tuple else {"type": f.type, "metavar": f.type.__name__})
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **how)
    first = parser.parse_args(argv)
    if first.preset not in PRESETS:
        parser.error(f"--preset {first.preset}: choose one of {', '.join(PRESETS)}")
    base, adapter = Settings(**PRESETS[first.preset]), Path(first.adapter).resolve()
    name = f"{adapter.parent.name}-{adapter.name}" if first.adapter else f"{first.preset}-base"
    out = first.out or f"evals/{'compare' if first.compare else name}"
    defaults = {"model": base.model, "student_prompt": base.student_prompt, "threads": base.threads, "out": out}
    if first.preset == "tiny":
        defaults |= {"benchmarks": "tiny", "max_new": base.max_completion}
    if first.regrade:
        if not (Path(out) / "settings.json").is_file():
            parser.error(f"--regrade: {out} holds no evaluation; name its folder with --out")
        saved = read_json(Path(out) / "settings.json")
        defaults |= {k: v for k, v in saved.items() if k in vars(first) and k not in FREE}
    parser.set_defaults(**defaults)
    e = EvalSettings(**vars(parser.parse_args(argv)))
    known = sorted(path.stem for path in Path(e.data_dir).glob("*.jsonl")) if e.data_dir else list(BENCHMARKS)
    names = e.benchmarks.split(",")
    unknown = [] if e.regrade or e.compare else [name for name in names if name not in known]
    for wrong, sentence in [
        (not known, f"--data_dir {e.data_dir}: there is no .jsonl file in it"),
        (unknown, f"--benchmarks: no {', '.join(map(repr, unknown))} among {', '.join(known)}"),
        (len(set(names)) < len(names), "--benchmarks names one twice"),
        (min(e.K, e.aime24_runs, e.max_new, e.tp, e.batch) < 1 or e.limit < 0,
         "--K, --aime24_runs, --max_new, --tp and --batch must be at least 1, --limit at least 0"),
        (not (e.temperature >= 0 and 0 < e.top_p <= 1 and e.top_k >= 0 and 0 < e.gpu_memory <= 1),
         "--temperature and --top_k must be at least 0, --top_p and --gpu_memory in (0, 1]"),
        (e.temperature == 0 and e.K > 1, "--temperature 0 gives one completion over and over: it goes with --K 1"),
        (e.engine not in ("auto", "vllm", "hf"), f"--engine {e.engine}: choose auto, vllm or hf"),
        (e.grader not in ("ours", "paper"), f"--grader {e.grader}: choose ours or paper"),
        ("{problem}" not in e.student_prompt or "{solution}" in e.student_prompt,
         "--student_prompt must hold {problem} and not {solution}"),
        (e.paper and not e.compare, "--paper goes with --compare"),
    ]:
        if wrong:
            parser.error(sentence)
    return e


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Problems and the work list


def load_benchmark(name: str, e: EvalSettings) -> list[dict[str, str]]:
    """[{id, problem, solution, answer}]; `solution` may be empty. Exits with a sentence if a problem has no answer."""
    source, config, split = (f"{e.data_dir}/{name}.jsonl", None, None) if e.data_dir else BENCHMARKS[name]
    try:
        if split:
            import datasets
            with first_rank_first():
                table = list(datasets.load_dataset(source, config, split=split))
        else:
            table = [json.loads(line) for line in Path(source).read_text("utf-8").split("\n") if line.strip()]
        table = [{k.lower(): "" if value is None else str(value).strip() for k, value in row.items()} for row in table]
    except Exception as error:  # datasets raises a dozen types; each means that there is nothing to evaluate on
        fail(f"{name}: {source} cannot be read ({type(error).__name__}: {str(error)[:200]}). --data_dir takes a folder "
             f"with a {name}.jsonl")
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
# The adapter and the engine: nothing may end in the base model's score under the adapter's name


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the names, sizes and ends of files: tells weights apart without reading all 16 GB of them."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def adapter_fingerprint(folder: Path) -> str:
    """Hash of the weights and of what scales them; the rest of its config is paths, and sets in any order."""
    config = read_json(folder / ADAPTER_FILES[0])
    return fingerprint([folder / ADAPTER_FILES[1]]) + f" r {config['r']} alpha {config.get('lora_alpha')}"


def load_skeleton(e: EvalSettings):
    """The model without weights: configuration, modules, shapes, end tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    try:
        config = AutoConfig.from_pretrained(e.model, trust_remote_code=e.trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=e.trust_remote_code)
    except (OSError, ValueError) as error:
        fail(f"--model {e.model} cannot be loaded ({(str(error).splitlines() or [''])[0]})")
    with contextlib.suppress(OSError):  # not every model has one; the configuration knows the end token too
        skeleton.generation_config = GenerationConfig.from_pretrained(e.model)
    return skeleton


def check_adapter(e: EvalSettings, skeleton) -> int:
    """The rank of an adapter that is whole, not zero, and made for this base model; exits with a sentence if not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = Path(e.adapter)
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        fail(f"--adapter {folder}: {' and '.join(ADAPTER_FILES)} are not both in it. It takes a checkpoint's folder, "
             f"such as {next(folder.glob('step_*'), 'runs/x/step_100')}")
    try:
        config, tensors = read_json(folder / ADAPTER_FILES[0]), load_file(folder / ADAPTER_FILES[1])
        base, rank, targets = config["base_model_name_or_path"] or "?", config["r"], config["target_modules"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fail(f"--adapter {folder} cannot be read ({type(error).__name__}: {error}). Copy it again, or take another")
    linear = {n: (m.out_features, m.in_features) for n, m in skeleton.named_modules() if hasattr(m, "in_features")}
    parts = {(m[1], m[2]): tensor for key, tensor in tensors.items()
             if (m := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key))}
    misfits = [name for (name, kind), tensor in parts.items()  # lora_A is (r, in), lora_B (out, r)
               if name not in linear or tensor.shape[kind == "A"] != linear[name][kind == "A"]]
    if isinstance(targets, list) and not config.get("layers_to_transform"):  # then each such layer must have its pair
        misfits += [n for n in linear if n.split(".")[-1] in targets and not {(n, "A"), (n, "B")} <= parts.keys()]
    for wrong, sentence in [
        (not parts, "holds no LoRA weights"),
        (Path(base).name != Path(e.model).name, f"was trained on {base}, not on --model {e.model}. If that is the same "
         "model under another name, correct base_model_name_or_path in adapter_config.json"),
        (misfits, f"does not fit --model {e.model}: {', '.join(misfits[:3])} is missing, or of another shape. It is "
         "another model's"),
        (not all(tensor.isfinite().all() for tensor in parts.values()), "holds weights that are not finite"),
        (not any(tensor.any() for (_, kind), tensor in parts.items() if kind == "B"),
         "is all zeros: it would score as the base model. Leave --adapter out to evaluate that"),
    ]:
        if wrong:
            fail(f"--adapter {folder} {sentence}")
    return rank


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def training_settings(adapter: Path) -> dict:
    """gamma, W, step and folder of the training run that an adapter comes from, as far as its files tell."""
    for path in (adapter.parent / "settings.json", adapter / "trainer.json"):
        saved = read_json(path) if path.is_file() else {}
        saved = saved.get("settings", saved)
        if "gamma" in saved and "W" in saved:
            step = re.fullmatch(r"step_(\d+)", adapter.resolve().name)
            known = {"gamma": saved["gamma"], "W": saved["W"], "run": str(adapter.parent)}
            return {**known, "step": int(step[1]) if step else 0}
    return {}


def open_engine(e: EvalSettings, s: Settings, engine: str, tp: int, ends: list[int], longest: int, lora_rank: int,
                device: torch.device) -> tuple[Generate, Generate]:
    """-> generate with the adapter, and generate without it. `longest` is that of prompt and completion, in tokens."""
    if engine == "vllm":
        gpu = device.type == "cuda"
        room = {"gpu_memory_utilization": e.gpu_memory} if gpu else {"kv_cache_memory_bytes": 256 << 20}
        llm = start_vllm(e.model, device, tp, longest, lora_rank, trust_remote_code=e.trust_remote_code, **room)
        from vllm.lora.request import LoRARequest
        lora = LoRARequest("adapter", 1, str(Path(e.adapter).resolve())) if e.adapter else None
        return functools.partial(vllm_generate, llm, lora, ends), functools.partial(vllm_generate, llm, None, ends)
    model, off = load_base(s, device), contextlib.nullcontext
    if e.adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, e.adapter).eval()
        off = model.disable_adapter

    def plain(*work: list, **how: object) -> Iterator:
        with off():
            yield from hf_generate(model, ends, *work, **how)

    return functools.partial(hf_generate, model, ends, batch=e.batch), plain


def check_engine(adapted: Generate, plain: Generate, prompts: list[list[int]]) -> None:
    """Engines have been seen to ignore an adapter: with it some greedy log-probability must differ from the base's."""
    drawn = [sorted(generate(prompts, [0] * len(prompts), temperature=0.0, top_p=1.0, top_k=0, max_new=16))
             for generate in (adapted, plain)]
    if drawn[0] == drawn[1]:
        fail("the engine ignores the adapter: all log-probabilities are those of the base model. Try --engine hf")


# ---------------------------------------------------------------------------------------------------------------------
# Samples: generated, graded and appended to samples.jsonl; what stands there is not computed again


def sample_key(row: dict) -> tuple[str, str, int, int]:
    return row["benchmark"], row["id"], row["run"], row["sample"]


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


def generate_samples(todo: list[dict], done: list[dict], generate: Generate, tokenizer, ends: list[int],
                     e: EvalSettings, batch: int, path: Path | None) -> None:
    """Sample `todo`, `batch` items at a time; grade each as it ends, append it to `path` (None: another rank does)."""
    left = collections.Counter(sample_key(item)[:3] for item in todo)  # samples that a problem still waits for
    problems, tokens, began, verdicts = len(left), 0, time.perf_counter(), [row["correct"] for row in done]
    with progress(total=len(done) + len(todo), initial=len(done), desc="evaluate", unit="sample") as bar:
        for part in (todo[i : i + batch] for i in range(0, len(todo), batch)):
            waiting, last = [], time.perf_counter()
            drawn = generate([item["prompt_ids"] for item in part], [item["seed"] for item in part],
                             temperature=e.temperature, top_p=e.top_p, top_k=e.top_k, max_new=e.max_new)
            for n, (i, ids, _) in enumerate(drawn, 1):
                waiting.append(finish_sample(part[i], ids, tokenizer, ends, e.save_ids))
                if path is None or n < len(part) and time.perf_counter() - last < 1:  # a kill costs a second's work
                    continue
                grade(waiting, e.grader)
                append_lines(path, waiting)
                left.subtract(sample_key(row)[:3] for row in waiting)
                verdicts += [row["correct"] for row in waiting]
                tokens += sum(row["tokens"] for row in waiting)
                bar.update(len(waiting))
                speed, ended = tokens / (time.perf_counter() - began), problems - len(+left)
                bar.set_postfix_str(f"problems {ended}/{problems}, {speed:.0f} tokens/s, "
                                    f"right {statistics.fmean(verdicts):.1%}")
                waiting, last = [], time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# Statistics: pure functions of samples. Accuracies and shares are in percent, lengths in tokens.


def grouped(rows: Iterable[dict], key: Callable, value: Callable = lambda row: row) -> dict:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[key(row)].append(value(row))
    return dict(groups)


def percent_right(row: dict) -> float:
    return 100.0 * row["correct"]


def problem_means(samples: Iterable[dict], value: Callable) -> dict[tuple[str, str], float]:
    """(id, gold) -> mean of value(row) over the problem's samples, of all runs."""
    return {k: statistics.fmean(v) for k, v in grouped(samples, lambda row: (row["id"], row["gold"]), value).items()}


def mean_and_se(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean of n independent values and sd / sqrt(n), with n - 1 in the sd; a single value has no standard error."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def combine(means: list[float], errors: list[float | None]) -> tuple[float, float | None]:
    """Mean of independent figures and its SE, sqrt(sum of SE^2) / n."""
    return statistics.fmean(means), None if None in errors else math.sqrt(sum(se * se for se in errors)) / len(errors)


def benchmark_scores(samples: list[dict]) -> dict:
    """Every figure of one benchmark; the standard errors take a problem's samples as one observation."""
    accuracy, se = mean_and_se(problem_means(samples, percent_right).values())
    length, length_se = mean_and_se(problem_means(samples, lambda row: row["tokens"]).values())
    attempts = grouped(samples, lambda row: (row["run"], row["id"]), lambda row: row["correct"])
    runs = [statistics.fmean(v) for _, v in sorted(grouped(samples, lambda row: row["run"], percent_right).items())]
    share = lambda flags: 100 * statistics.fmean(flags)  # noqa: E731
    return {"problems": len({row["id"] for row in samples}), "samples": len(samples), "accuracy": accuracy, "se": se,
            "pass_at_k": share(any(v) for v in attempts.values()), "length": length, "length_se": length_se,
            "truncated": share(row["finish"] == "length" for row in samples),
            "unboxed": share(row["extracted"] is None for row in samples),
            "timeouts": sum(row["status"] == "timeout" for row in samples), "run_accuracies": runs,
            "run_sd": statistics.stdev(runs) if len(runs) > 1 else None,
            "graders": {which: mean_and_se(problem_means(samples, lambda row: 100.0 * row["graders"][which]).values())
                        for which in samples[0].get("graders", ())}}


def run_scores(samples: dict[str, list[dict]], names: Iterable[str]) -> dict:
    """{benchmarks: {name: scores}, accuracy, se, length, length_se, eff} of a run; all benchmarks weigh the same."""
    scores = {name: benchmark_scores(samples[name]) for name in names}
    column = lambda key: [b[key] for b in scores.values()]  # noqa: E731
    accuracy, se = combine(column("accuracy"), column("se"))
    length, length_se = combine(column("length"), column("length_se"))
    return {"benchmarks": scores, "accuracy": accuracy, "se": se, "length": length, "length_se": length_se,
            "eff": accuracy / (length / 1000)}


def paired_difference(ours: list[dict], reference: list[dict], value: Callable = percent_right) -> tuple:
    """Mean of the differences by problem, its SE (or None), and the number of problems; those that both runs answered.

    What makes a problem hard is in both runs and cancels, so this SE is smaller than that of two separate runs.
    """
    a, b = problem_means(ours, value), problem_means(reference, value)
    common = [k for k in a if k in b]
    if not common:
        fail("--compare: the runs have no problem (same id and answer) in common")
    return *mean_and_se(a[k] - b[k] for k in common), len(common)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the (length, accuracy) that no other one beats by being at most as long and at least as right."""
    return [i for i, (x, y) in enumerate(points) if not any(u <= x and v >= y and (u, v) != (x, y) for u, v in points)]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def show(value: float | None, se: float | None = None, digits: int = 2, sign: str = "") -> str:
    text = "" if value is None else f"{value:{sign},.{digits}f}"
    return text if se is None else f"{text} +- {se:,.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned so that it reads on a screen as well."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rows = [header, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows]
    pads = [str.ljust, *[str.rjust] * len(widths)]
    return "".join("| " + " | ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths)) + " |\n" for row in rows)


def report(out: Path) -> None:
    """Print and save table.md and summary.json, once every sample is there."""
    settings, rows = read_json(out / "settings.json"), read_samples(out).values()
    K, runs = settings["K"], {"aime24": settings["aime24_runs"]}
    wanted = sum(n * K * runs.get(name, 1) for name, (n, _) in settings["problems"].items())
    if len(rows) < wanted:
        return say(f"{out} has {len(rows)} of {wanted} samples, no table yet. Its command without --regrade goes on")
    scores = run_scores(grouped(rows, lambda row: row["benchmark"]), settings["problems"])
    lines = [[name, str(b.get("problems", "")), f"{runs.get(name, 1)} x {K}" if "problems" in b else "",
              show(b["accuracy"], b["se"]), show(b.get("pass_at_k")), show(b["length"], b["length_se"], 1),
              show(b.get("truncated")), show(b.get("unboxed")), str(b.get("timeouts", ""))]
             for name, b in [*scores["benchmarks"].items(), ("Avg.", scores)]]
    text = table(["benchmark", "problems", "runs x K", f"avg@{K} %", f"pass@{K} %", "tokens", "cut %", "no box %",
                  "time-outs"], lines)
    text += f"\nEff {scores['eff']:.2f} (percent per 1,000 tokens), grader {settings['grader']}; +- is one SE\n"
    for name, b in scores["benchmarks"].items():
        if b["run_sd"] is not None:
            text += f"{name} by run: {', '.join(map(show, b['run_accuracies']))}; sd between runs {b['run_sd']:.2f}\n"
        text += "".join(f"{name}, grader {which}: {show(*both)}\n" for which, both in b["graders"].items())
    about = {k: settings[k] for k in ("model", "adapter", "training", "K", "grader")}
    write_json(out / "summary.json", about | scores)
    write_beside(out / "table.md", lambda beside: beside.write_text(text))
    say(f"\n{text}\nsaved in {out}")


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of finished runs


def paper_rows(model: str, tables: Iterable[str]) -> list[dict]:
    """[{label, method, metric: value}] of some published tables; a length printed in another table is filled in."""
    with (HERE / "paper_tables.csv").open(newline="") as file:
        figures = [row for row in csv.DictReader(file) if row["model"] == model]
    rows = []
    for (number, method, gamma, W), metrics in grouped(figures, lambda f: (f["table"], f["method"], f["gamma"], f["W"]),
                                                       lambda f: (f["metric"], float(f["value"]))).items():
        label = f"paper, Table {number}: {method}" + f" gamma {gamma}" * bool(gamma) + f" W {W}" * bool(W)
        rows.append({"table": number, "method": method, "label": label, **dict(metrics)})
    for row in rows:
        twins = [r for r in rows if r["method"] == row["method"] and "length" in r and r["avg"] == row.get("avg")]
        row |= {"length": twins[0]["length"], "eff": row["avg"] / twins[0]["length"] * 1000} if twins else {}
    return [row for row in rows if row["table"] in tables]


def draw_frontier(path: Path, points: list[tuple]) -> None:
    """Figure 1: accuracy over length, with one SE each way. points: (label, length, accuracy, their SEs, is it ours)"""
    figure, axes = subplots(1, 1, (7.5, 5))
    axis, best = axes[0, 0], pareto([p[1:3] for p in points])
    axis.plot(*zip(*sorted(points[i][1:3] for i in best)), "--", color="#999999", linewidth=1, zorder=1)
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
    colors = [palette[i % 6] if p[5] else "#666666" for i, p in enumerate(points)]
    for i, (_, x, y, x_se, y_se, ours) in enumerate(points):
        axis.errorbar(x, y, y_se, x_se, "o" if ours else "s", color=colors[i], markersize=7, elinewidth=1,
                      markerfacecolor=colors[i] if i in best else "white")
    axis.margins(0.2)
    axis.set(xlabel="mean length in tokens", ylabel="accuracy in %")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_title("filled: on the Pareto frontier; bars: one standard error", fontsize=9, loc="left", color="#666666")
    axis.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    places = axis.transData.transform([p[1:3] for p in points])
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in places]
    offsets = [(9 * side, dy) for dy in (7, -15, 20, -28, 33, -41, 46, -54, 59, -67) for side in (1, -1)]
    for p, color in zip(points, colors):  # each label takes the first place near its point where nothing stands yet
        for dx, dy in offsets:
            note = axis.annotate(p[0], p[1:3], (dx, dy), textcoords="offset points", fontsize=9, color=color, zorder=5,
                                 ha="left" if dx > 0 else "right",
                                 bbox={"fc": "white", "ec": "none", "pad": 0, "alpha": 0.7})
            a = note.get_window_extent().extents
            if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken):
                break
            if (dx, dy) != offsets[-1]:
                note.remove()
        taken.append(tuple(a))
    write_beside(path, lambda beside: figure.savefig(beside, dpi=150, format="png"))


def draw_heatmaps(path: Path, cells: dict[tuple[float, int], dict[str, float]]) -> None:
    """Figure A2: a panel for each benchmark, each with its own colours. cells: (gamma, W) -> {name: accuracy}"""
    gammas, Ws, names = sorted({g for g, _ in cells}), sorted({W for _, W in cells}), [*next(iter(cells.values()))]
    columns = min(4, len(names))
    size = (1 + columns * (1 + 0.75 * len(Ws)), 1 + 0.5 * len(gammas))
    figure, axes = subplots(-(-len(names) // columns), columns, size)
    for axis in axes.flat[len(names):]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        grid = [[cells.get((g, W), {}).get(name, math.nan) for W in Ws] for g in gammas]
        image = axis.imshow(grid, cmap="cividis", aspect="auto")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                axis.text(j, i, "not run" if math.isnan(value) else f"{value:.1f}", ha="center", va="center",
                          fontsize=9, color="white" if image.norm(value) < 0.5 else "black")
        axis.set(title=f"{name}, %", xlabel="W in tokens", ylabel="gamma", xticks=range(len(Ws)), xticklabels=Ws,
                 yticks=range(len(gammas)), yticklabels=gammas)
    write_beside(path, lambda beside: figure.savefig(beside, dpi=150, format="png"))


def subplots(rows: int, columns: int, size: tuple[float, float]):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt.subplots(rows, columns, figsize=(size[0], size[1] * rows), layout="constrained", squeeze=False)


def load_run(folder: str) -> dict:
    """{name, settings, gamma, W, step, run, samples by benchmark} of a finished evaluation."""
    path = Path(folder)
    if not (path / "summary.json").is_file():
        fail(f"--compare {folder}: no finished evaluation there (no summary.json). Its own command finishes it")
    settings = read_json(path / "settings.json")
    return {"name": path.resolve().name, "folder": folder, "settings": settings, **settings["training"],
            "samples": grouped(read_samples(path).values(), lambda row: row["benchmark"])}


def compare(e: EvalSettings) -> None:
    """The runs' figures, paired differences to the first, the paper's rows, sweeps over gamma, W and steps, plots."""
    out, runs = Path(e.out), [load_run(folder) for folder in e.compare]
    names = [name for name in runs[0]["samples"] if all(name in run["samples"] for run in runs)]
    model, _, number = e.paper.partition(":")
    main = {"qwen3-4b": "2", "qwen3-8b": "3", "acereason-7b": "A4", "olmo3-7b": "A5"}
    paper = [row for row in paper_rows(model, [number or main.get(model)]) if {"avg", *names} & {*row}]
    for wrong, sentence in [
        ((out / "samples.jsonl").exists(), f"--out {out} holds an evaluation; a comparison needs a folder of its own"),
        (not names, "--compare: the runs have no benchmark in common"),
        (e.paper and not paper, f"--paper {e.paper}: no such rows in paper_tables.csv; it has {', '.join(main)}"),
    ]:
        if wrong:
            fail(sentence)
    for run in runs:
        run |= run_scores(run["samples"], names)
        run["label"] = run["name"] if [r["name"] for r in runs].count(run["name"]) == 1 else run["folder"]
    header = [*names, "Avg.", "tokens", "Eff"]

    def ours(label: str, run: dict) -> list[str]:
        cells = [show(b["accuracy"], b["se"]) for b in [*run["benchmarks"].values(), run]]
        return [label, *cells, show(run["length"], run["length_se"], 1), show(run["eff"])]

    def theirs(row: dict) -> list[str]:
        cells = [show(row.get(name)) for name in [*names, "avg"]]
        return [row["label"], *cells, show(row.get("length"), digits=0), show(row.get("eff"))]

    text = "Accuracy in %, +- one standard error\n\n"
    text += table(["run", *header], [ours(run["label"], run) for run in runs] + [theirs(row) for row in paper])
    unlike = [key for key in runs[0]["settings"] if key not in {*FREE, "weights", "adapter_weights", "benchmarks"}
              and len({json.dumps(run["settings"].get(key)) for run in runs}) > 1]
    text += f"\nThe runs also differ in {', '.join(unlike)}\n" if unlike else ""

    rows, first = [], runs[0]["samples"]
    for run in runs[1:]:
        pairs = [paired_difference(run["samples"][name], first[name]) for name in names]
        tokens = [paired_difference(run["samples"][name], first[name], lambda row: row["tokens"]) for name in names]
        means = [combine([d for d, *_ in parts], [se for _, se, _ in parts]) for parts in (pairs, tokens)]
        run["differences"] = dict(zip(header, [*pairs, *means]))
        rows.append([run["label"], *(
            show(d, se, 1 if name == "tokens" else 2, "+") + (" ~" if se is None or abs(d) <= 2 * se else "  ")
            for name, (d, se, *_) in run["differences"].items())])
    if rows:
        text += f"\nDifference to {runs[0]['label']}, paired by problem, +- one SE; ~ is within two SE of zero\n\n"
        text += table(["run", *header[:-1]], rows)

    order = lambda run: (run["gamma"], run["W"], run["run"])  # noqa: E731
    trained = sorted((run for run in runs if "gamma" in run), key=lambda run: (*order(run), run["step"]))
    trainings, steps = grouped(trained, order), sorted({run["step"] for run in trained})
    if len(steps) > 1:
        rows = []
        for (gamma, W, _), group in trainings.items():
            at = {run["step"]: show(run["accuracy"], run["se"]) for run in group}
            rows.append([f"gamma {gamma} W {W}", *(at.get(step, "") for step in steps)])
        if len(steps) == 4:
            rows += [[row["label"], *(show(row[f"S{n}"]) for n in range(1, 5))] for row in paper_rows(model, ["4"])]
        columns = ["training", *(f"S{n}: {step}" for n, step in enumerate(steps, 1))]
        text += "\nAvg. by training step (Table 4)\n\n" + table(columns, rows)
    last = {key: group[-1] for key, group in trainings.items()}
    if len(last) > 1:
        rows = [ours(f"gamma {gamma} W {W}, step {run['step']}", run) for (gamma, W, _), run in last.items()]
        rows += [theirs(row) for row in paper_rows(model, ["6", "A3"])]
        text += "\nLast step of each training (Tables 6, A3)\n\n" + table(["training", *header], rows)

    make_folder(out)
    draw_frontier(out / "frontier.png", [
        *((run["label"], run["length"], run["accuracy"], run["length_se"], run["se"], True) for run in runs),
        *((f"{row['method']} (paper)", row["length"], row["avg"], None, None, False) for row in paper if "eff" in row)])
    cells = {(gamma, W): {**{name: b["accuracy"] for name, b in run["benchmarks"].items()}, "Avg.": run["accuracy"]}
             for (gamma, W, _), run in last.items()}
    if min(len({gamma for gamma, _ in cells}), len({W for _, W in cells})) > 1:
        draw_heatmaps(out / "heatmaps.png", cells)
    write_beside(out / "table.md", lambda beside: beside.write_text(text))
    write_json(out / "summary.json", [{k: v for k, v in r.items() if k not in ("samples", "settings")} for r in runs])
    say(f"{text}\nsaved in {out}: table.md, summary.json, {', '.join(sorted(path.name for path in out.glob('*.png')))}")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def open_folder(out: Path, settings: dict) -> None:
    """Refuse to mix samples drawn under different settings; leave whole lines only."""
    old = read_json(out / "settings.json") if (out / "settings.json").exists() else settings
    changed = [f"{k} {old.get(k)!r} (now {v!r})" for k, v in settings.items() if k not in FREE and old.get(k) != v]
    if changed:
        fail(f"{out} holds samples drawn with other settings: {'; '.join(changed)}. Take those, or another --out")
    make_folder(out)
    write_json(out / "settings.json", settings)
    mend_samples(out)


def regrade(e: EvalSettings) -> None:
    """Grade the saved samples again, with today's code and --grader."""
    out = Path(e.out)
    mend_samples(out)
    rows = list(read_samples(out, everything=True).values())
    with progress(total=len(rows), desc="grade", unit="sample") as bar:
        for part in (rows[i : i + 256] for i in range(0, len(rows), 256)):
            grade(part, e.grader)
            bar.update(len(part))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_beside(out / "samples.jsonl", lambda beside: beside.write_text(lines))
    write_json(out / "settings.json", {**read_json(out / "settings.json"), "grader": e.grader})
    report(out)


def evaluate(e: EvalSettings) -> None:
    """Check all that can be checked before a model is loaded; then sample, grade, save and report."""
    torch.set_num_threads(e.threads or torch.get_num_threads())
    device, out, (rank, world) = start_processes(), Path(e.out), rank_and_world()
    s = Settings(model=e.model, trust_remote_code=e.trust_remote_code, rollout=e.engine, rollout_tp=e.tp)
    benchmarks = {name: load_benchmark(name, e) for name in e.benchmarks.split(",")}
    tokenizer, skeleton = load_tokenizer(s), load_skeleton(e)
    lora_rank = check_adapter(e, skeleton) if e.adapter else 0
    engine, why = choose_engine(s, device)
    tp = tensor_parallel(s, skeleton.config) if engine == "vllm" else 1
    ends = end_tokens(types.SimpleNamespace(generation_config=skeleton.generation_config), tokenizer)
    work = work_list(benchmarks, tokenizer, e)
    longest, room = max(len(item["prompt_ids"]) for item in work) + e.max_new, skeleton.config.max_position_embeddings
    if longest > room:
        fail(f"the longest prompt and --max_new {e.max_new} are {longest} tokens; --model {e.model} has a context of "
             f"{room}. --max_new {room - longest + e.max_new} fits")
    if rank == 0:
        weights = sorted(Path(e.model).glob("*.safetensors")) if Path(e.model).is_dir() else []
        open_folder(out, {
            **dataclasses.asdict(e), "engine": engine, "weights": fingerprint(weights) if weights else e.model,
            "adapter_weights": adapter_fingerprint(Path(e.adapter)) if e.adapter else None,
            "training": training_settings(Path(e.adapter)) if e.adapter else {},
            "problems": {name: [len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]]
                         for name, rows in benchmarks.items()}})
    gather([])  # nobody reads before the file is whole
    done = read_samples(out)
    todo = [item for item in work if sample_key(item) not in done]
    if rank == 0 and todo:
        write_json(out / "versions.json", {**versions(), "engine": f"{engine} ({why})", "processes": world})
    elif not todo:
        say(f"all {len(work):,} samples are in {out} already: nothing is sampled")
    gather([])  # nobody writes before all have read
    if todo:
        say(f"--- first prompt ---\n{tokenizer.decode(work[0]['prompt_ids'])}\n--- {len(work)} samples, {len(done)} of "
            f"them done; engine {engine} ({why}); output in {out} ---")
        adapted, plain = open_engine(e, s, engine, tp, ends, longest, lora_rank, device)
        if e.adapter:
            check_engine(adapted, plain, [item["prompt_ids"] for item in work[:: -(-len(work) // 8)]])
        group, groups = rank // tp, world // tp  # ranks that share an engine draw the same samples; the first writes
        path = out / (f"samples-{group}.jsonl" if group else "samples.jsonl")
        generate_samples(todo[group::groups], list(done.values())[group::groups], adapted, tokenizer, ends, e,
                         len(todo) if engine == "vllm" else e.batch, path if rank % tp == 0 else None)
    gather([])  # all have written
    if rank == 0:
        mend_samples(out)
        report(out)


def main(argv: list[str] | None = None) -> None:
    e = parse_eval(argv)
    try:
        (compare if e.compare else regrade if e.regrade else evaluate)(e)
    except KeyboardInterrupt:
        fail("stopped. What is saved stays; the same command goes on from there")


if __name__ == "__main__":
    main()
