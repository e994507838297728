"""
The paper's evaluation (section 5.1): sampled accuracy and length on six benchmarks, with errors.

    python eval.py --model Qwen/Qwen3-8B --adapter runs/qwen3-8b/step_100    # vLLM on one GPU
    torchrun --nproc_per_node 8 eval.py --adapter runs/qwen3-8b/step_100     # eight engines
    python eval.py --preset tiny --adapter runs/tiny/step_100                # no GPU, no network
    python eval.py --out evals/qwen3-8b-step_100 --regrade --grader paper    # no model
    python eval.py --compare evals/a evals/b --paper qwen3-8b                # differences, plots

What the tables say (a sample is one completion; a problem has K of them, in AIME24 K in each of
five runs):
    avg@K       percent of right samples; one that is cut at --max_new is wrong and stays in the
                denominator
    +-          one standard error: sd of the problems' means / sqrt(problems). Samples of one
                problem are not independent: counted one by one, they would make the bar up to
                sqrt(K) times too short, that of AIME24 sqrt(5 K) times
    pass@K      percent of (run, problem) with a right sample among the K
    Avg.        mean of the benchmarks, +- sqrt(sum of SE^2) / benchmarks; Eff is Avg. / (mean
                length / 1000)
    difference  mean over problems of (this run - the first run), +- its SE; ~ marks one within two
                SE of zero

samples.jsonl grows as samples end. The same command goes on where a run was stopped, in whatever
way: the seed of a sample follows from its benchmark, run, problem and number, not from its place in
a batch.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from egrsd import PRESETS, Settings, start_vllm, vllm_generate
from support.evaluation import benchmarks as samples
from support.evaluation.benchmarks import BENCHMARKS, FREE, sample_key
from support.evaluation.compare import compare
from support.evaluation.scores import report
from support.shared import adapters, engines, files, models, processes
from support.shared.console import fail, progress, say, versions
from support.shared.files import appender, json_lines, read_json, write_json, write_text
from support.shared.options import check_rules, make_parser, opt

# --------------------------------------------------------------------------------------------------
# Settings. Each default is followed by where it comes from.

SIX = "aime24,aime25,hmmt25,math500,minerva,gsm8k"


@dataclasses.dataclass
class EvalSettings:
    preset: str = opt("model", "qwen3-8b", "what goes with a model", *PRESETS)
    model: str = opt("model", "Qwen/Qwen3-8B", "hub id or local folder")  # section 5.1
    adapter: str = opt("model", "", "LoRA adapter, such as runs/x/step_100; none: the base")
    trust_remote_code: bool = opt("model", False, "run Python code that comes with it")  # ours

    benchmarks: str = opt("data", SIX, "names, comma-separated")  # section 5.1
    data_dir: str = opt("data", "", "folder with a NAME.jsonl for each; else the hub")  # ours
    limit: int = opt("data", 0, "only the first problems of each benchmark, 0 = all")  # ours
    student_prompt: str = opt("data", Settings.student_prompt, "what the model is asked")  # D7
    thinking: bool = opt("data", True, "thinking mode, if the template has one")  # section 5.1

    K: int = opt("sampling", 4, "samples of a problem in a run")  # section 5.1
    aime24_runs: int = opt("sampling", 5, "runs of AIME24; the others have one")  # section 5.1
    temperature: float = opt("sampling", 1.0, "sampling temperature")  # section 5.1
    top_p: float = opt("sampling", 0.95, "nucleus of the sampling")  # section 5.1
    top_k: int = opt("sampling", 0, "most tokens considered, 0 = all")  # ours: the paper names none
    max_new: int = opt("sampling", 32_768, "longest completion in tokens")  # section 5.1
    seed: int = opt("sampling", 0, "seed from which that of each sample follows")  # ours

    engine: str = opt(
        "engine", "auto", "hf is transformers' generate", "auto", "vllm", "hf"
    )  # ours
    tp: int = opt("engine", 1, "GPUs that share a vLLM engine; others run side by side")  # ours
    gpu_memory: float = opt("engine", 0.9, "share of the GPU's memory that vLLM takes")  # ours
    batch: int = opt("engine", 64, "completions at a time of transformers' generate")  # ours
    threads: int = opt("engine", 0, "CPU threads of torch, 0 = torch decides")  # ours
    rank_timeout: int = opt("engine", 1_800, "seconds that a rank may hang, 0 = no limit")  # ours

    out: str = opt("output", "", "folder of the evaluation; by default evals/ and a name")
    grader: str = opt("output", "ours", "paper: answers as they are", "ours", "paper")  # ours
    save_ids: bool = opt("output", False, "save token ids too, for diagnostics.py")  # ours
    regrade: bool = opt("output", False, "grade the samples in --out again; no model")
    compare: tuple = opt("output", (), "folders of evaluations; differences to the first")
    paper: str = opt("output", "", "with --compare: the paper's rows; qwen3-8b:7 is Table 7")


def parse_eval(argv: list[str] | None = None) -> EvalSettings:
    """Defaults, then the preset, then (with --regrade) the run's own, then the options.

    Exits with status 2 and a sentence where an option is unknown or a value makes no sense.
    """
    parser = make_parser(EvalSettings, "eval.py", __doc__)
    first = parser.parse_args(argv)  # a first time, for what sets the other defaults
    preset = Settings(**PRESETS[first.preset])
    parser.set_defaults(
        model=preset.model,
        student_prompt=preset.student_prompt,
        threads=preset.threads,
        out=first.out or default_folder(first),
    )
    if first.preset == "tiny":
        parser.set_defaults(benchmarks="tiny", max_new=preset.max_completion)
    if first.regrade:
        folder = Path(first.out or default_folder(first))
        if not (folder / "settings.json").is_file():
            parser.error(f"--regrade: {folder} holds no evaluation; name its folder with --out")
        for name, value in read_json(folder / "settings.json").items():
            if name in vars(first) and name not in FREE:
                parser.set_defaults(**{name: value})
    given = parser.parse_args(argv)
    check_rules(rules_of(given), parser.error)
    return EvalSettings(**vars(given))


def default_folder(given: argparse.Namespace) -> str:
    """evals/ and what is evaluated: the adapter's run and step, or the base model."""
    if given.compare:
        return "evals/compare"
    if given.adapter:
        adapter = Path(given.adapter).resolve()
        return f"evals/{adapter.parent.name}-{adapter.name}"
    if given.model == EvalSettings.model:
        return f"evals/{given.preset}-base"
    return f"evals/{Path(given.model).name}-base"


def rules_of(given: argparse.Namespace) -> list[tuple[object, str]]:
    names = given.benchmarks.split(",")
    known = list(BENCHMARKS)
    if given.data_dir:
        known = sorted(path.stem for path in Path(given.data_dir).glob("*.jsonl"))
    unknown = []
    if not given.regrade and not given.compare:
        unknown = [name for name in names if name not in known]
    smallest = min(given.K, given.aime24_runs, given.max_new, given.tp, given.batch)
    shares = 0 < given.top_p <= 1 and 0 < given.gpu_memory <= 1
    shows_problem = "{problem}" in given.student_prompt
    return [
        (not known, f"--data_dir {given.data_dir}: there is no .jsonl file in it"),
        (
            unknown,
            f"--benchmarks: no {', '.join(map(repr, unknown))} among {', '.join(known)}",
        ),
        (len(set(names)) < len(names), "--benchmarks names one twice"),
        (
            smallest < 1 or given.limit < 0,
            "--K, --aime24_runs, --max_new, --tp and --batch must be at least 1, --limit at least "
            "0",
        ),
        (
            not (given.temperature >= 0 and given.top_k >= 0 and shares),
            "--temperature and --top_k must be at least 0, --top_p and --gpu_memory in (0, 1]",
        ),
        (
            given.temperature == 0 and given.K > 1,
            "--temperature 0 gives one completion over and over: it goes with --K 1",
        ),
        (
            not shows_problem or "{solution}" in given.student_prompt,
            "--student_prompt must hold {problem} and not {solution}",
        ),
        (given.paper and not given.compare, "--paper goes with --compare"),
        (0 != given.rank_timeout < 5, "--rank_timeout must be 0, for no limit, or at least 5"),
    ]


# --------------------------------------------------------------------------------------------------
# The engine


def open_engine(
    e: EvalSettings,
    engine: str,
    tp: int,
    eos_ids: list[int],
    longest: int,
    lora_rank: int,
    device: torch.device,
) -> tuple[engines.Generate, engines.Generate]:
    """-> generate with the adapter, and generate without it.

    `longest` is that of prompt and completion, in tokens.
    """
    processes.enter("engine start")
    if engine == "vllm":
        return open_vllm(e, tp, eos_ids, longest, lora_rank, device)
    model = models.load_base(e.model, device, trust_remote_code=e.trust_remote_code)
    without_adapter = contextlib.nullcontext
    if e.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, e.adapter).eval()
        without_adapter = model.disable_adapter

    def plain(prompts: list, seeds: list[int], **sampling) -> Iterator[engines.Completion]:
        with without_adapter():
            yield from engines.hf_generate(model, eos_ids, prompts, seeds, **sampling)

    return functools.partial(engines.hf_generate, model, eos_ids, batch=e.batch), plain


def open_vllm(
    e: EvalSettings,
    tp: int,
    eos_ids: list[int],
    longest: int,
    lora_rank: int,
    device: torch.device,
) -> tuple[engines.Generate, engines.Generate]:
    room = {"kv_cache_memory_bytes": 256 << 20}
    if device.type == "cuda":
        room = {"gpu_memory_utilization": e.gpu_memory}
    llm = start_vllm(
        e.model,
        device,
        tp,
        longest,
        lora_rank,
        trust_remote_code=e.trust_remote_code,
        lora_target_modules=adapters.target_modules(e.adapter),
        **room,
    )
    from vllm.lora.request import LoRARequest

    lora = None
    if e.adapter:
        lora = LoRARequest("adapter", 1, str(Path(e.adapter).resolve()))
    adapted = functools.partial(vllm_generate, llm, lora, eos_ids)
    plain = functools.partial(vllm_generate, llm, None, eos_ids)
    return adapted, plain


def check_engine(
    adapted: engines.Generate, plain: engines.Generate, prompts: list[list[int]]
) -> None:
    """The adapter must move log-probabilities by more than calling the base again does.

    Engines have been seen to ignore an adapter, and to round otherwise in a second call.
    """
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new": 16}
    seeds = [0] * len(prompts)
    drawn = []
    for generate in (plain, plain, plain, adapted):  # the first fills the engine's prefix cache
        drawn.append(sorted(generate(prompts, seeds, **greedy)))
    _, base, again, moved = drawn
    if distance(moved, base) <= distance(again, base):
        fail(
            "the engine ignores the adapter: all log-probabilities are those of the base model. "
            "Try --engine hf"
        )


def distance(a: list[engines.Completion], b: list[engines.Completion]) -> float:
    """Mean difference in nats of completions of the same prompts, up to where they part."""
    total = 0.0
    count = 0
    for (_, ids_a, logps_a), (_, ids_b, logps_b) in zip(a, b):
        for id_a, id_b, logp_a, logp_b in zip(ids_a, ids_b, logps_a, logps_b):
            total += abs(logp_a - logp_b)
            count += 1
            if id_a != id_b:
                break
    return total / count


# --------------------------------------------------------------------------------------------------
# Sampling


def evaluate(e: EvalSettings) -> None:
    """Check all that can be checked before a model is loaded; then sample, grade, save, report."""
    device = processes.start_processes(e.threads, e.rank_timeout)
    rank, world = processes.rank_and_world()
    out = Path(e.out)
    problems = {}
    for name in e.benchmarks.split(","):
        problems[name] = samples.load_benchmark(name, e.data_dir, e.limit)
    tokenizer = models.load_tokenizer(e.model, e.trust_remote_code)
    skeleton = models.load_skeleton(e.model, e.trust_remote_code)
    lora_rank = adapters.check_adapter(e.adapter, e.model, skeleton) if e.adapter else 0
    engine, why = engines.choose_engine(e.engine, device)
    tp = engines.tensor_parallel(e.tp, skeleton.config) if engine == "vllm" else 1
    asked = e.student_prompt, e.thinking, e.K, e.aime24_runs, e.seed
    work = samples.work_list(problems, tokenizer, *asked)
    longest = max(len(item["prompt_ids"]) for item in work) + e.max_new
    refuse_too_long(longest, models.context_of(skeleton.config), e)
    eos_ids = engines.end_tokens(skeleton, tokenizer)
    if rank == 0:
        samples.open_folder(out, what_counts(e, engine, problems, skeleton.config, work, eos_ids))
    processes.barrier()  # nobody reads before the file is whole

    done = samples.read_samples(out)
    samples.refuse_other_samples(out, done, work)
    todo = [item for item in work if sample_key(item) not in done]
    if rank == 0 and todo:
        about = {**versions(), "engine": f"{engine} ({why})", "processes": world}
        write_json(out / "versions.json", about)
    processes.barrier()  # nobody writes before all have read
    if todo:
        say(f"--- first prompt ---\n{tokenizer.decode(work[0]['prompt_ids'])}\n---")
        say(f"{len(work)} samples, {len(done)} of them done; engine {engine} ({why}); in {out}")
        pair = open_engine(e, engine, tp, eos_ids, longest, lora_rank, device)
        sample_missing(e, engine, tp, pair, work, todo, list(done.values()), tokenizer, eos_ids)
    else:
        say(f"all {len(work):,} samples are in {out} already: nothing is sampled")
    processes.barrier()  # all have written
    if rank == 0:
        samples.mend_samples(out)
        report(out)


def sample_missing(
    e: EvalSettings,
    engine: str,
    tp: int,
    pair: tuple[engines.Generate, engines.Generate],
    work: list[dict],
    todo: list[dict],
    done: list[dict],
    tokenizer,
    eos_ids: list[int],
) -> None:
    """This engine's share of `todo`, after a look at whether it uses the adapter."""
    adapted, plain = pair
    if e.adapter:
        few = work[:: math.ceil(len(work) / 8)]
        check_engine(adapted, plain, [item["prompt_ids"] for item in few])
    processes.enter("sampling")
    # Ranks that share an engine draw the same samples, and the first of them writes.
    rank, world = processes.rank_and_world()
    group = rank // tp
    groups = world // tp
    path = Path(e.out) / (f"samples-{group}.jsonl" if group else "samples.jsonl")
    if group and rank % tp == 0:
        files.lock(path)  # rank 0 has the folder's
    generate_samples(
        todo[group::groups],
        done[group::groups],
        adapted,
        tokenizer,
        eos_ids,
        e,
        batch=len(todo) if engine == "vllm" else e.batch,
        path=path if rank % tp == 0 else None,
    )


def refuse_too_long(longest: int, context: float, e: EvalSettings) -> None:
    """`longest` prompt and completion, and the model's context, in tokens."""
    if longest <= context:
        return
    fits = int(context) - longest + e.max_new
    advice = f"--max_new {fits} fits" if fits > 0 else "That prompt fits no --max_new"
    fail(
        f"the longest prompt and --max_new {e.max_new} are {longest} tokens; --model {e.model} has "
        f"a context of {context:.0f}. {advice}"
    )


def what_counts(
    e: EvalSettings,
    engine: str,
    problems: dict[str, list[dict]],
    config,
    work: list[dict],
    eos_ids: list[int],
) -> dict:
    """All that the samples depend on; model, adapter, problems and prompts by their content."""
    weights = []
    if Path(e.model).is_dir():
        weights = sorted(Path(e.model).glob("*.safetensors"))
    revision = getattr(config, "_commit_hash", None)  # of a hub model
    digests = {}
    prompts = {}
    for name, rows in problems.items():
        digests[name] = [len(rows), digest_of(rows)]
        ids = [item["prompt_ids"] for item in work if item["benchmark"] == name]
        prompts[name] = digest_of(ids)  # they tell of tokenizer and template
    return {
        **dataclasses.asdict(e),
        "engine": engine,
        "weights": adapters.fingerprint(weights) if weights else f"{e.model} at {revision}",
        "adapter_weights": adapters.adapter_fingerprint(Path(e.adapter)) if e.adapter else None,
        "training": adapters.training_settings(Path(e.adapter)) if e.adapter else {},
        "problems": digests,
        "prompts": prompts,
        "end_tokens": eos_ids,
    }


def digest_of(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def generate_samples(
    todo: list[dict],
    done: list[dict],
    generate: engines.Generate,
    tokenizer,
    eos_ids: list[int],
    e: EvalSettings,
    batch: int,
    path: Path | None,
) -> None:
    """Sample `todo`, `batch` items at a time; grade each as it ends, and append it to `path`.

    `path` is None where another rank writes the same samples.
    """
    sampling = {"temperature": e.temperature, "top_p": e.top_p, "top_k": e.top_k}
    with progress(
        total=len(done) + len(todo), initial=len(done), desc="evaluate", unit="sample"
    ) as bar:
        show = scoreboard(bar, todo, done)
        append = appender(path) if path else None
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            prompts = [item["prompt_ids"] for item in part]
            seeds = [item["seed"] for item in part]
            waiting = []
            last = time.perf_counter()
            drawn = generate(prompts, seeds, max_new=e.max_new, **sampling)
            for n, (i, ids, _) in enumerate(drawn, 1):
                row = samples.finish_sample(part[i], ids, tokenizer, eos_ids, e.save_ids)
                waiting.append(row)
                if not append:
                    continue
                if n < len(part) and time.perf_counter() - last < 1:  # a kill costs a second's work
                    continue
                samples.grade(waiting, e.grader)
                append(waiting)
                show(waiting)
                waiting = []
                last = time.perf_counter()


def scoreboard(bar, todo: list[dict], done: list[dict]):
    """-> show(rows), which moves the bar on: problems ended, tokens per second, percent right."""
    left = collections.Counter(problem_of(item) for item in todo)  # samples still to come
    problems = len({problem_of(row) for row in [*done, *todo]})
    verdicts = [row["correct"] for row in done]
    tokens = [0]
    began = time.perf_counter()

    def show(rows: list[dict]) -> None:
        for row in rows:
            left[problem_of(row)] -= 1
            verdicts.append(row["correct"])
            tokens[0] += row["tokens"]
        ended = problems - len(+left)  # + keeps what is above 0
        speed = tokens[0] / (time.perf_counter() - began)
        right = statistics.fmean(verdicts)
        bar.update(len(rows))
        bar.set_postfix_str(f"problems {ended}/{problems}, {speed:.0f} tokens/s, right {right:.1%}")

    return show


def problem_of(row: dict) -> tuple[str, str, int]:
    """Benchmark, id and run."""
    return sample_key(row)[:3]


def regrade(out: Path, grader: str) -> None:
    """Grade the saved samples again, with today's code and --grader."""
    files.lock(out)
    samples.mend_samples(out)
    rows = list(samples.read_samples(out, everything=True).values())
    with progress(total=len(rows), desc="grade", unit="sample") as bar:
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            samples.grade(part, grader)
            bar.update(len(part))
    write_text(out / "samples.jsonl", json_lines(rows))
    settings = read_json(out / "settings.json")
    write_json(out / "settings.json", {**settings, "grader": grader})
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
    with processes.ending_together():
        main()
