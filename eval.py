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
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from egrsd import PRESETS, Settings
from support.basics import (append_lines, barrier, ending_together, fail, first_wrong, json_lines, make_parser, opt,
                            progress, rank_and_world, read_json, say, start_processes, versions, write_json, write_text)
from support.benchmarks import (BENCHMARKS, FREE, finish_sample, grade, load_benchmark, mend_samples, open_folder,
                                read_samples, sample_key, work_list)
from support.compare import compare
from support.engines import (Generate, choose_engine, end_tokens, hf_generate, start_vllm, tensor_parallel,
                             vllm_generate)
from support.models import (adapter_fingerprint, check_adapter, fingerprint, load_base, load_skeleton, load_tokenizer,
                            training_settings)
from support.scores import report

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Each default is followed by where it comes from.


@dataclasses.dataclass
class EvalSettings:
    preset: str = opt("model", "qwen3-8b", "what goes with a model", *PRESETS)
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

    engine: str = opt("engine", "auto", "hf is transformers' generate", "auto", "vllm", "hf")  # ours
    tp: int = opt("engine", 1, "GPUs that share one vLLM engine; the others run side by side")  # ours
    gpu_memory: float = opt("engine", 0.9, "share of the GPU's memory that vLLM takes")  # ours
    batch: int = opt("engine", 64, "completions at a time of transformers' generate")  # ours
    threads: int = opt("engine", 0, "CPU threads of torch, 0 = torch decides")  # ours

    out: str = opt("output", "", "folder of the evaluation; by default evals/ and the adapter's name")
    grader: str = opt("output", "ours", "paper: without the normalisation of answers", "ours", "paper")  # ours
    save_ids: bool = opt("output", False, "save problem, solution and token ids too, for diagnostics.py")  # ours
    regrade: bool = opt("output", False, "grade the samples in --out again; loads no model")
    compare: tuple = opt("output", (), "folders of finished evaluations; differences are to the first")
    paper: str = opt("output", "", "with --compare: the paper's rows for this model; qwen3-8b:7 takes Table 7")


def parse_eval(argv: list[str] | None = None) -> EvalSettings:
    """Defaults, then the preset, then (with --regrade) the run's own, then the options; exits with a sentence."""
    parser = make_parser(EvalSettings, "eval.py", __doc__)
    first = parser.parse_args(argv)
    base, adapter = Settings(**PRESETS[first.preset]), Path(first.adapter).resolve()
    plain = first.preset if first.model == EvalSettings.model else Path(first.model).name
    name = f"{adapter.parent.name}-{adapter.name}" if first.adapter else f"{plain}-base"
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
    first_wrong([
        (not known, f"--data_dir {e.data_dir}: there is no .jsonl file in it"),
        (unknown, f"--benchmarks: no {', '.join(map(repr, unknown))} among {', '.join(known)}"),
        (len(set(names)) < len(names), "--benchmarks names one twice"),
        (min(e.K, e.aime24_runs, e.max_new, e.tp, e.batch) < 1 or e.limit < 0,
         "--K, --aime24_runs, --max_new, --tp and --batch must be at least 1, --limit at least 0"),
        (not (e.temperature >= 0 and 0 < e.top_p <= 1 and e.top_k >= 0 and 0 < e.gpu_memory <= 1),
         "--temperature and --top_k must be at least 0, --top_p and --gpu_memory in (0, 1]"),
        (e.temperature == 0 and e.K > 1, "--temperature 0 gives one completion over and over: it goes with --K 1"),
        ("{problem}" not in e.student_prompt or "{solution}" in e.student_prompt,
         "--student_prompt must hold {problem} and not {solution}"),
        (e.paper and not e.compare, "--paper goes with --compare"),
    ], parser.error)
    return e


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


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


def generate_samples(todo: list[dict], done: list[dict], generate: Generate, tokenizer, ends: list[int],
                     e: EvalSettings, batch: int, path: Path | None) -> None:
    """Sample `todo`, `batch` items at a time; grade each as it ends, append it to `path` (None: another rank does)."""
    left = collections.Counter(sample_key(item)[:3] for item in todo)  # samples that a problem still waits for
    problems, tokens, began = len({sample_key(row)[:3] for row in [*done, *todo]}), 0, time.perf_counter()
    verdicts = [row["correct"] for row in done]
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


def evaluate(e: EvalSettings) -> None:
    """Check all that can be checked before a model is loaded; then sample, grade, save and report."""
    device, out, (rank, world) = start_processes(e.threads), Path(e.out), rank_and_world()
    s = Settings(model=e.model, trust_remote_code=e.trust_remote_code, rollout=e.engine, rollout_tp=e.tp)
    benchmarks = {name: load_benchmark(name, e) for name in e.benchmarks.split(",")}
    tokenizer, skeleton = load_tokenizer(s), load_skeleton(s)
    lora_rank = check_adapter(e.adapter, e.model, skeleton) if e.adapter else 0
    engine, why = choose_engine(s, device)
    tp = tensor_parallel(s, skeleton.config) if engine == "vllm" else 1
    ends = end_tokens(skeleton, tokenizer)
    work = work_list(benchmarks, tokenizer, e)
    longest, room = max(len(item["prompt_ids"]) for item in work) + e.max_new, skeleton.config.max_position_embeddings
    if longest > room:
        fits = room - longest + e.max_new
        fail(f"the longest prompt and --max_new {e.max_new} are {longest} tokens; --model {e.model} has a context of "
             f"{room}. " + (f"--max_new {fits} fits" if fits > 0 else "That prompt fits no --max_new"))
    if rank == 0:
        weights = sorted(Path(e.model).glob("*.safetensors")) if Path(e.model).is_dir() else []
        open_folder(out, {
            **dataclasses.asdict(e), "engine": engine, "weights": fingerprint(weights) if weights else e.model,
            "adapter_weights": adapter_fingerprint(Path(e.adapter)) if e.adapter else None,
            "training": training_settings(Path(e.adapter)) if e.adapter else {},
            "problems": {name: [len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]]
                         for name, rows in benchmarks.items()}})
    barrier()  # nobody reads before the file is whole
    done = read_samples(out)
    todo = [item for item in work if sample_key(item) not in done]
    if rank == 0 and todo:
        write_json(out / "versions.json", {**versions(), "engine": f"{engine} ({why})", "processes": world})
    elif not todo:
        say(f"all {len(work):,} samples are in {out} already: nothing is sampled")
    barrier()  # nobody writes before all have read
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
    barrier()  # all have written
    if rank == 0:
        mend_samples(out)
        report(out)


def regrade(out: Path, grader: str) -> None:
    """Grade the saved samples again, with today's code and --grader."""
    mend_samples(out)
    rows = list(read_samples(out, everything=True).values())
    with progress(total=len(rows), desc="grade", unit="sample") as bar:
        for part in (rows[i : i + 256] for i in range(0, len(rows), 256)):
            grade(part, grader)
            bar.update(len(part))
    write_text(out / "samples.jsonl", json_lines(rows))
    write_json(out / "settings.json", {**read_json(out / "settings.json"), "grader": grader})
    report(out)


def main(argv: list[str] | None = None) -> None:
    e = parse_eval(argv)
    try:
        if e.compare:
            compare(Path(e.out), e.compare, e.paper)
        elif e.regrade:
            regrade(Path(e.out), e.grader)
        else:
            evaluate(e)
    except KeyboardInterrupt:
        fail("stopped. What is saved stays; the same command goes on from there")


if __name__ == "__main__":
    with ending_together():
        main()
