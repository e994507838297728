"""The rollout of one step: engine start, push of the adapter, decoding, with random weights.

    python bench/rollout.py                                          # 4 layers, for two CPU cores
    python bench/rollout.py --shapes qwen3-4b,qwen3-8b --engines vllm --ranks 16,64 --tps 1,8

It measures egrsd.start_engine itself, each case in a process of its own (tensor parallel: in
torchrun's processes), and prints tables in Markdown. Decoding is timed on sequences of one length,
as the median of --repeats after one that warms up. A case that cannot run here is named.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import egrsd  # noqa: E402
from bench import shapes  # noqa: E402
from support.shared import console, engines, models, processes  # noqa: E402
from support.shared.options import make_parser, opt  # noqa: E402

MARK = "RESULT "  # before a case's line of JSON


@dataclasses.dataclass
class Options:
    shapes: str = opt("cases", "4-layer", f"of {', '.join(shapes.SHAPES)}, with commas")
    engines: str = opt("cases", "hf,vllm", "hf or vllm or both")
    ranks: str = opt("cases", "16,64", "ranks of the adapter")
    tps: str = opt("cases", "1,2", "GPUs, or CPU processes, that share a vLLM engine")
    sequences: str = opt("work", "1,8,32", "in flight, of all ranks")
    prompt: int = opt("work", 200, "tokens of each prompt")
    new: int = opt("work", 32, "tokens of each completion")
    repeats: int = opt("work", 3, "of each measurement")
    folder: str = opt("run", "", "where the random models are kept; by default nowhere")
    json: str = opt("run", "", "also write the results to this file")
    limit: int = opt("run", 1_200, "seconds that a case may take")
    case: str = opt("run", "", "of this program itself: one case, as shape/engine/rank/tp/folder")


# --------------------------------------------------------------------------------------------------
# One case, in one process or in torchrun's


def measure(o: Options) -> dict:
    """Seconds of start, push and decoding of one case, on rank 0's clock."""
    shape, engine, rank, tp, folder = o.case.split("/", 4)
    sequences = [int(n) for n in o.sequences.split(",")]
    device = processes.start_processes()
    options = ["--model", folder, "--lora_r", rank, "--lora_alpha", str(2 * int(rank))]
    options += ["--batch_size", str(max(sequences)), "--max_completion", str(o.new)]
    options += ["--max_length", str(o.prompt + o.new + 8)]
    options += ["--out", f"{folder}-run"]  # on all ranks the same
    s = egrsd.parse_settings(options)
    base = models.load_base(folder, device)
    model = egrsd.add_adapter(base, s)
    eos_ids = [len(models.head_of(model)) - 1]

    parts = {}
    clock_the_push(parts)
    began = time.perf_counter()
    sample, push = egrsd.start_engine(s, model, eos_ids, device, engine, int(tp))
    found = {"start": time.perf_counter() - began}
    found["push"] = median_of(push, o.repeats, device)
    if parts:
        # But for the first, which warms up, as in the whole.
        found["parts"] = {name: statistics.median(times[1:]) for name, times in parts.items()}
    weights = sum(p.numel() for p in egrsd.trainable(model).values())
    found["adapter_mb"] = weights * models.head_of(model).element_size() / 1e6
    found["decode"] = measure_decoding(sample, sequences, engine, device, s, o)
    found["device"] = name_of(device)
    return {"shape": shape, "engine": engine, "rank": int(rank), "tp": int(tp), **found}


def measure_decoding(
    sample: engines.Generate,
    sequences: list[int],
    engine: str,
    device: torch.device,
    s: egrsd.Settings,
    o: Options,
) -> dict[str, float]:
    """Seconds of each number of sequences, with seeds and (vLLM alone takes that) without."""
    seconds = {}
    how = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "max_new": o.new}
    draw = torch.Generator().manual_seed(0)
    for n in sequences:
        seeded = [engines.rollout_seed(0, 0, i) for i in range(n)]
        for name, seeds in (("seeds", seeded), ("no seeds", [None] * n)):
            if seeds[0] is None and engine == "hf":
                continue

            def roll_out(n: int = n, seeds: list = seeds) -> None:
                # New ones each time: vLLM keeps what it computed for the old ones.
                prompts = torch.randint(3, 72, (n, o.prompt), generator=draw).tolist()
                mine = sum(len(ids) for _, ids, _ in sample(prompts, seeds, **how))
                drawn = sum(processes.gather([mine]))
                if drawn < 0.9 * len(prompts) * o.new:
                    console.fail(f"{drawn} tokens were drawn: another shape, or --new smaller")

            seconds[f"{n}, {name}"] = median_of(roll_out, o.repeats, device)
    return seconds


def clock_the_push(parts: dict[str, list[float]]) -> None:
    """Around the two things that a push to vLLM does."""

    def timed(name: str, work: Callable) -> Callable:
        def measured(*args, **options):
            began = time.perf_counter()
            result = work(*args, **options)
            parts.setdefault(name, []).append(time.perf_counter() - began)
            return result

        return measured

    start_vllm = egrsd.start_vllm

    def start(*args, **options):
        llm = start_vllm(*args, **options)
        llm.llm_engine.add_lora = timed("load", llm.llm_engine.add_lora)
        llm.reset_prefix_cache = timed("reset", llm.reset_prefix_cache)
        return llm

    egrsd.start_vllm = start


def median_of(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds, once it has run once; all ranks begin together."""
    times = []
    for _ in range(repeats + 1):
        processes.barrier()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads a process"


# --------------------------------------------------------------------------------------------------
# All cases


def cases_of(o: Options) -> list[tuple[str, str, str, str]]:
    """Shape, engine, rank, tp; transformers' generate shares nothing, and no rank changes it."""
    cases = []
    for shape in o.shapes.split(","):
        for engine in o.engines.split(","):
            ranks = o.ranks.split(",")
            tps = o.tps.split(",")
            if engine == "hf":
                ranks = ranks[-1:]
                tps = ["1"]
            for rank in ranks:
                for tp in tps:
                    cases.append((shape, engine, rank, tp))
    return cases


def why_not(engine: str, tp: int) -> str:
    """What this machine lacks for a case; "" for nothing."""
    if engine == "vllm" and not console.installed("vllm"):
        return "vLLM is not installed"
    if torch.cuda.is_available() and tp > torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs"
    return ""


def make_model(shape: str, folder: Path) -> None:
    """In a process of its own: this one would keep the GPU's memory while the cases need it."""
    if (folder / "config.json").exists():
        return
    program = [sys.executable, str(ROOT / "bench" / "shapes.py")]
    done = subprocess.run([*program, "--shape", shape, "--out", str(folder)])
    if done.returncode:
        console.fail(f"the random model {shape} could not be made: the lines above say why")


def run_case(case: tuple[str, str, str, str], folder: Path, argv: list[str], limit: int) -> dict:
    """What the case's process printed; {"failed": why} where it printed nothing."""
    launch = [sys.executable]
    tp = int(case[3])
    if tp > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(tp)]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launch += [str(Path(__file__).resolve()), *argv, "--case", "/".join((*case, str(folder)))]
    try:
        done = subprocess.run(launch, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    print(done.stdout[-2_000:], done.stderr[-2_000:], file=sys.stderr)
    return {"failed": f"ended with status {done.returncode}"}


def show(results: list[dict], o: Options) -> None:
    print(f"\n{results[0]['device']}; prompts of {o.prompt} tokens, {o.new} new ones\n")
    print("| shape | engine | rank | shared by | start, s | push, s | load + reset | MB |")
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        parts = "nothing to push"
        if "parts" in r:
            parts = " + ".join(f"{r['parts'].get(k, 0):.3f}" for k in ("load", "reset"))
        first = f"| {r['shape']} | {r['engine']} | {r['rank']} | {r['tp']} | {r['start']:.1f} "
        print(first + f"| {r['push']:.3f} | {parts} | {r['adapter_mb']:.1f} |")
    names = list(dict.fromkeys(name for r in results for name in r["decode"]))
    print("\nms for each new token (prefill included), tokens/s:\n")
    print("| shape | engine | rank | shared by | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    for r in results:
        cells = [r["shape"], r["engine"], str(r["rank"]), str(r["tp"])]
        for name in names:
            seconds = r["decode"].get(name)
            if seconds is None:
                cells.append("")
                continue
            tokens = int(name.split(",")[0]) * o.new
            cells.append(f"{1000 * seconds / o.new:.1f} ms, {tokens / seconds:.0f}/s")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    o = Options(**vars(make_parser(Options, "bench/rollout.py", __doc__).parse_args()))
    if o.case:
        with processes.ending_together():
            found = measure(o)
            if processes.rank_and_world()[0] == 0:
                print(MARK + json.dumps(found), flush=True)
        return
    results = []
    lacking = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases_of(o):  # one after another: vLLM's CPU processes share names in /dev/shm
            name = "/".join(case)
            reason = why_not(case[1], int(case[3]))
            if not reason:
                folder = Path(o.folder or temporary) / case[0]
                make_model(case[0], folder)
                found = run_case(case, folder, sys.argv[1:], o.limit)
                reason = found.get("failed", "")
            if reason:
                lacking.append(f"{name}: {reason}")
                print(f"{name}: {reason}", flush=True)
            else:
                results.append(found)
                print(f"{name}: {json.dumps(found)}", flush=True)
            if o.json:  # after each case: what is there stays, whatever comes
                both = {"results": results, "lacking": lacking}
                Path(o.json).write_text(json.dumps(both) + "\n")
    if not results:
        console.fail("no case could be measured: the lines above say why")
    show(results, o)


if __name__ == "__main__":
    main()
