"""The first hour on GPUs: each part measures one thing, and leaves one line of JSON.

    bench/gpu.sh                # all parts, each with a time limit, then the table
    bench/gpu.sh --rehearse     # the same on a CPU, with tiny shapes: no figures
    python bench/gpu.py --part passes --shapes qwen3-4b
    python bench/gpu.py --table # of what is there

A part that a missing package or GPU forbids is skipped by name; one that fails is named, and its
output is in the same folder. The models are random weights of a given shape.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import egrsd  # noqa: E402
from bench import limits, shapes  # noqa: E402
from support.shared import console, models, sizes  # noqa: E402
from support.shared.options import make_parser, opt  # noqa: E402

Rows = Iterator[tuple[str, str]]  # what, figure: lines of the table, as they come


@dataclasses.dataclass
class Options:
    part: str = opt("what", "", "run this part")
    table: bool = opt("what", False, "print the table of the parts that are there")
    parts: bool = opt("what", False, "print the names of the parts")
    rehearse: bool = opt("what", False, "on a CPU, with tiny shapes")
    shapes: str = opt("what", "qwen3-4b,qwen3-8b", "random models, with commas")
    steps: int = opt("what", 20, "of the loop")
    tflops: float = opt("what", 0.0, "peak of a GPU that bench/limits.py has no data sheet of")
    gbps: float = opt("what", 0.0, "GB/s of its memory")
    out: str = opt("what", "runs/gpu", "models, runs and results")


@dataclasses.dataclass(frozen=True)
class Work:
    """How much is measured: Table A1's share of one of eight GPUs, or next to nothing."""

    shapes: tuple[str, ...]
    rows: int = 4
    prompt: int = 200
    teacher_prompt: int = 900
    completion: int = 1_024
    repeats: int = 5
    steps: int = 20
    batch: int = 32
    chunks: tuple[int, ...] = (1_024, 2_048, 4_096)
    tiles: tuple[int, ...] = (2_048, 4_096, 8_192, 16_384, 32_768, 151_936)
    budgets: tuple[int, ...] = (1_500, 2_048, 4_096, 8_192)


REHEARSAL = Work(
    shapes=("rehearsal",),
    prompt=8,
    teacher_prompt=16,
    completion=16,
    repeats=2,
    steps=3,
    batch=4,
    chunks=(32, 64),
    tiles=(300, 1_000),
    budgets=(64, 128),
)


class Skipped(Exception):
    """What this machine lacks for a part."""


def needs_vllm() -> None:
    if not console.installed("vllm"):
        raise Skipped("vLLM is not installed")


def device_of(o: Options) -> torch.device:
    if o.rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Skipped("there is no GPU")
    return torch.device("cuda", 0)


def work_of(o: Options) -> Work:
    return REHEARSAL if o.rehearse else Work(tuple(o.shapes.split(",")), steps=o.steps)


def model_folder(shape: str, o: Options) -> Path:
    """Made once, by another process: this one would keep 15 GiB of the GPU while others need it."""
    folder = Path(o.out) / "models" / shape
    if not (folder / "config.json").exists():
        options = ["--shape", shape, "--device", device_of(o).type]
        call(o, "bench/shapes.py", *options, "--out", folder)
    return folder


# --------------------------------------------------------------------------------------------------
# Other programs


def call(o: Options, *command: object, processes: int = 1) -> str:
    """The output of one of our programs; raises with its end where it fails."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if o.rehearse:
        env["EGRSD_REHEARSE"] = "1"
        env.setdefault("OMP_NUM_THREADS", "1")
    lines = []
    with subprocess.Popen(
        [*launch, *map(str, command)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as program:
        for line in program.stdout:  # as it comes: of a part that is cut off, the log tells how far
            print(line, end="", flush=True)
            lines.append(line)
    stop_at_the_limit()
    if program.returncode:
        name = " ".join(map(str, command[:3]))
        raise RuntimeError(f"{name} ended with status {program.returncode}")
    return "".join(lines)


# SIGTERM, once it has come. `timeout` sends it to this process and to the part's programs alike,
# and takes the part for ended when this process ends: so this one waits for its programs.
_signals: list[int] = []


def note_signal(number: int, _: object) -> None:
    _signals.append(number)


def stop_at_the_limit() -> None:
    if _signals:
        raise TimeoutError("it came to its time limit")


def gpus(o: Options) -> int:
    return 1 if o.rehearse else torch.cuda.device_count()


def run_tests(o: Options, file: str) -> str:
    output = call(o, "-m", "pytest", "-m", "gpu", "-rs", f"tests/{file}")
    return re.findall(r"\d+ (?:passed|skipped).* in ", output)[-1][:-4]


def part_tests(o: Options) -> Rows:
    """What one GPU shows, in bfloat16."""
    device_of(o)
    yield "tests with a GPU", run_tests(o, "test_gpu.py")


def part_ranks(o: Options) -> Rows:
    """What several GPUs add: the same step, spread layers, shared engines, a rank that dies."""
    device_of(o)
    if not o.rehearse and gpus(o) < 2:
        raise Skipped("there is one GPU")
    yield "tests with several GPUs", run_tests(o, "test_gpus.py")


def part_engine(o: Options) -> Rows:
    """vLLM starts, and the adapter that is pushed reaches it: a run of no steps."""
    device_of(o)
    needs_vllm()
    for shape in work_of(o).shapes:
        began = time.perf_counter()
        output = call(o, *run_options(shape, o, 0), "--engine", "vllm", processes=gpus(o))
        seconds = time.perf_counter() - began
        yield f"{shape}: imports, load, engine, probe", f"{seconds:.0f} s"
        yield f"{shape}: probe", re.findall(r"reached the engine: (.*)", output)[0]


def run_options(shape: str, o: Options, steps: int) -> list[object]:
    """egrsd.py on the random model and the tiny problems: the real loop, with Table A1's sizes."""
    work = loop_work(o)
    options = ["egrsd.py", "--model", model_folder(shape, o), "--steps", steps]
    options += ["--data", "tiny/train.jsonl", "--batch_size", work.batch]
    options += ["--max_completion", work.completion, "--max_length", work.completion + 1_024]
    return [*options, "--overwrite", "--out", Path(o.out) / f"run-{shape}"]


def loop_work(o: Options) -> Work:
    """Without vLLM shorter: transformers' generate waits for Python at each token."""
    work = work_of(o)
    if o.rehearse or console.installed("vllm"):
        return work
    return dataclasses.replace(work, completion=128, steps=3)


def part_update(o: Options) -> Rows:
    """One update beside the peers': bench/update.py."""
    device = device_of(o)
    if not (ROOT / "bench" / "update.py").exists():
        raise Skipped("bench/update.py is not there")
    for shape in work_of(o).shapes:
        options = ["--device", device.type, "--shape", shape]
        options += ["--completion", 1_024, "--student_prompt", 200, "--teacher_prompt", 900]
        if o.rehearse:
            options = ["--device", "cpu", "--shape", "4-layer", "--vocab", 1_000]
            options += ["--completion", 16, "--repeats", 1]
        output = call(o, "bench/update.py", *options)
        names = []
        for line in output.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if not line.startswith("|"):
                names = []  # a table has ended
            elif not names:
                names = cells
            elif "---" not in line:
                figures = [f"{n} {c}" for n, c in zip(names[1:], cells[1:]) if c]
                if cells[1].startswith("skipped"):
                    figures = cells[1:2]
                yield f"{shape}: {cells[0]}", ", ".join(figures)


def part_rollout(o: Options) -> Rows:
    """bench/rollout.py: start, push, decoding."""
    device_of(o)
    found = Path(o.out) / "rollout.json"
    new = 4 if o.rehearse else 128
    for number, shape in enumerate(work_of(o).shapes):
        options = ["--shapes", shape, "--folder", Path(o.out) / "models"]
        options += ["--new", new, "--repeats", 2, "--json", found]
        if o.rehearse:
            options += ["--ranks", 8, "--tps", "1,2", "--sequences", "1,2"]
        else:
            options += ["--ranks", "64" if number else "16,64"]  # the first shape tells the rest
            options += ["--tps", ",".join(map(str, sorted({1, gpus(o)})))]
        call(o, "bench/rollout.py", *options)
        results = json.loads(found.read_text())
        for r in results["results"]:
            yield from rollout_rows(r, new)
        for reason in results["lacking"]:
            yield reason, "not measured"


def rollout_rows(r: dict, new: int) -> Rows:
    name = f"{r['shape']}, {r['engine']}, rank {r['rank']}, {r['tp']} share"
    yield f"{name}: start", f"{r['start']:.1f} s"
    if "parts" in r:
        yield f"{name}: push of {r['adapter_mb']:.0f} MB", f"{r['push']:.3f} s"
    for how, seconds in r["decode"].items():
        tokens = int(how.split(",")[0]) * new
        yield f"{name}: {how}", f"{tokens / seconds:.0f} tokens/s"


def part_canary(o: Options) -> Rows:
    """Engine against trainer on a trained model, the tiny one, in the GPU's precision."""
    device_of(o)
    needs_vllm()
    out = Path(o.out) / "run-tiny"
    steps = 2 if o.rehearse else 20
    options = ["--preset", "tiny", "--eval_data=", "--steps", steps, "--engine", "vllm"]
    call(o, "egrsd.py", *options, "--overwrite", "--out", out)
    canaries = [row["canary"] for row in limits.rows_of(out / "log.jsonl")]
    spread = f"{statistics.median(canaries):.1e} nats, at most {max(canaries):.1e}"
    yield f"tiny, {steps} steps", spread


def part_loop(o: Options) -> Rows:
    """Twenty steps of the real loop, and its phases beside their limits."""
    device_of(o)
    work = loop_work(o)
    for shape in work.shapes:
        call(o, *run_options(shape, o, work.steps), processes=gpus(o))
        out = Path(o.out) / f"run-{shape}"
        log = limits.rows_of(out / "log.jsonl")
        about = json.loads((out / "versions.json").read_text())
        size = f"{work.batch} rollouts of {work.completion} tokens, {about['engine']}"
        yield f"{shape}: {work.steps} steps", size
        for phase in ("rollout", "passes", "update"):
            seconds = statistics.median(r["seconds"][phase] for r in log[1:] or log)
            yield f"{shape}: {phase}", f"{seconds:.3f} s"
        yield f"{shape}: peak memory", f"{max(r['memory_gib'] for r in log):.1f} GiB"
        yield f"{shape}: canary", f"{statistics.median(r['canary'] for r in log):.1e} nats"
        if limits.find_gpu(card_options(o), about["device"]):
            yield from beside_limits(shape, limits.analyse_run(out, card_options(o)))
        else:
            yield f"{shape}: MFU", f"{NO_SHEET} bench/limits.py --run {out} {GIVE_IT}"


def beside_limits(shape: str, found: dict) -> Rows:
    for phase in ("rollout", "passes", "update"):
        yield f"{shape}: {phase}, at least", f"{found[f'{phase}_least']:.2g} s"
    yield f"{shape}: MFU of the passes", f"{found['mfu']:.1%}"
    yield f"{shape}: bandwidth while rolling out", f"{found['decode_share']:.1%}"
    yield f"{shape}: what first", found["advice"]


NO_SHEET = "no data sheet of this GPU: python"
GIVE_IT = "--tflops X --gbps Y"


def card_options(o: Options) -> limits.Options:
    if o.rehearse:
        return limits.Options(tflops=0.05, gbps=10)  # two cores, about
    return limits.Options(tflops=o.tflops, gbps=o.gbps)


# --------------------------------------------------------------------------------------------------
# The passes and the head, in this process


def fixed_rollouts(shape: str, work: Work) -> list[dict]:
    """Random tokens, and advantages of both signs."""
    draw = torch.Generator().manual_seed(0)
    vocab = shapes.SHAPES[shape][6]
    rollouts = []
    for index in range(work.rows):
        r = {"index": index, "advantage": 1.0 - 2.0 * (index % 2)}
        for key, length in (
            ("prompt_ids", work.prompt),
            ("teacher_prompt_ids", work.teacher_prompt),
            ("completion_ids", work.completion),
        ):
            r[key] = torch.randint(3, vocab, (length,), generator=draw).tolist()
        rollouts.append(r)
    return rollouts


def student_of(shape: str, device: torch.device, s: egrsd.Settings):
    """A random model with an adapter whose B is random, so that student and teacher differ."""
    base = shapes.random_model(shape, device)
    base.set_attn_implementation(s.attn)
    model = egrsd.add_adapter(base, s)
    for name, p in egrsd.trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return model


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Once to warm up, then the median."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measure_passes(model, rollouts: list[dict], s: egrsd.Settings, o: Options) -> tuple:
    """-> seconds (None: out of memory), peak in GiB, the adapter's gradient, flat"""
    device = device_of(o)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = median_seconds(
            lambda: egrsd.accumulate_gradient(model, rollouts, s), work_of(o).repeats, device
        )
    except torch.OutOfMemoryError:
        return None, 0.0, None
    peak = torch.cuda.max_memory_allocated() / sizes.GIB if device.type == "cuda" else 0.0
    gradient = torch.cat([p.grad.flatten() for p in egrsd.trainable(model).values()])
    return seconds, peak, gradient


def settings(*options: object) -> egrsd.Settings:
    return egrsd.parse_settings(list(map(str, options)))


def in_words(seconds: float | None, peak: float = 0.0) -> str:
    """Milliseconds, and where it was measured the peak in GiB."""
    if seconds is None:
        return "out of memory"
    return f"{1000 * seconds:.1f} ms" + (f", peak {peak:.1f} GiB" if peak else "")


def part_passes(o: Options) -> Rows:
    """Both passes of one GPU's share of a step: seconds, MFU, peak memory and its estimate."""
    device = device_of(o)
    work = work_of(o)
    card = limits.find_gpu(card_options(o), console_name(device))
    for shape in work.shapes:
        rollouts = fixed_rollouts(shape, work)
        lengths = [(work.prompt, work.teacher_prompt, work.completion)] * work.rows
        for name, options in (("", []), (", checkpointing", ["--gradient_checkpointing"])):
            s = settings(*options)
            model = None  # before the next one is made
            model = student_of(shape, device, s)
            seconds, peak = measure_passes(model, rollouts, s, o)[:2]  # the gradient goes
            yield f"{shape}{name}: passes", in_words(seconds)
            if seconds is None:
                continue
            targets = models.layer_names(s.lora_targets)
            skeleton = limits.skeleton_of(shape)
            m = sizes.sizes_of(skeleton, targets, s.lora_r)
            figure = f"{NO_SHEET} bench/gpu.py --part passes {GIVE_IT}"
            if card:
                mfu = limits.passes_flops(m, lengths) / seconds / (card[1].tflops * 1e12)
                figure = f"{mfu:.1%}"
            yield f"{shape}{name}: MFU", figure
            tile = egrsd.VOCAB_TILE[device.type]
            estimate = sizes.estimator(skeleton, device, targets, s.lora_r, 0, 0, tile, gpus=1)
            options = s.micro_batch_tokens, s.gradient_checkpointing, s.head_chunk, s.shard
            expected = estimate(*options)["sum"]
            figure = f"{peak:.1f} GiB; with Adam estimated {expected:.1f}"
            yield f"{shape}{name}: peak", figure
            del model


def console_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def head_input(shape: str, work: Work, device: torch.device) -> tuple:
    """Hidden states, head and targets of one micro-batch, as large as the shape's."""
    hidden, vocab = shapes.SHAPES[shape][0], shapes.SHAPES[shape][6]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    N = work.rows * work.completion
    h = torch.randn(N, hidden, device=device, dtype=dtype)
    U = (0.02 * torch.randn(vocab, hidden, device=device)).to(dtype)
    return h, U, torch.randint(0, vocab, (N,), device=device)


@contextlib.contextmanager
def attribute(name: str, value: object):
    """egrsd.NAME is another one inside of the block."""
    kept = getattr(egrsd, name)
    setattr(egrsd, name, value)
    try:
        yield
    finally:
        setattr(egrsd, name, kept)


def both_heads(head: tuple, chunk: int) -> tuple:
    logp, H = egrsd._logprob_and_entropy(*head, chunk)
    _, gradient = egrsd._logprob_and_gradient(*head, chunk)
    return logp, H, gradient


def part_sweep(o: Options) -> Rows:
    """Sizes that change time and memory alone: chunk and tile of the head, micro-batch."""
    device = device_of(o)
    work = work_of(o)
    for shape in work.shapes:
        head = head_input(shape, work, device)
        for tile in work.tiles:
            figures = []
            for chunk in work.chunks:
                with attribute("VOCAB_TILE", {device.type: tile}):
                    one = median_seconds(
                        lambda c=chunk, h=head: both_heads(h, c), work.repeats, device
                    )
                figures.append(f"{chunk}: {in_words(one)}")
            yield f"{shape}: both heads, tile {tile}, by chunk", "; ".join(figures)
        del head
        rollouts = fixed_rollouts(shape, work)
        model = student_of(shape, device, settings())
        for budget in work.budgets:
            s = settings("--micro_batch_tokens", budget)
            seconds, peak = measure_passes(model, rollouts, s, o)[:2]  # the gradient goes
            figure = in_words(seconds, peak)
            yield f"{shape}: passes, micro_batch_tokens {budget}", figure
        del model


def part_attention(o: Options) -> Rows:
    """The implementations of attention: seconds, and how far their gradients lie apart."""
    device = device_of(o)
    work = work_of(o)
    shape = work.shapes[0]
    rollouts = fixed_rollouts(shape, work)
    first = None
    for attn in ("sdpa", "eager", "flash_attention_2"):
        if attn == "flash_attention_2" and not console.installed("flash_attn"):
            yield f"{shape}: {attn}", "skipped: flash-attn is not installed"
            continue
        s = settings("--attn", attn)
        model = student_of(shape, device, s)
        seconds, peak, gradient = measure_passes(model, rollouts, s, o)
        figure = in_words(seconds, peak)
        if first is None:
            first = gradient
        elif gradient is not None:
            figure += (
                f", gradient {((gradient - first).norm() / first.norm()).item():.1e} from sdpa"
            )
        yield f"{shape}: {attn}", figure
        del model


def part_compile(o: Options) -> Rows:
    """torch.compile of the head's inner function: what it saves, what it changes."""
    device = device_of(o)
    work = work_of(o)
    shape = work.shapes[0]
    head = head_input(shape, work, device)
    chunk = max(work.chunks)
    plain = median_seconds(lambda: both_heads(head, chunk), work.repeats, device)
    want = both_heads(head, chunk)
    # In a rehearsal no compiler is needed, but all of the tracing.
    options = {"backend": "eager"} if o.rehearse else {}
    with attribute("_softmax_of_tile", torch.compile(egrsd._softmax_of_tile, **options)):
        compiled = median_seconds(lambda: both_heads(head, chunk), work.repeats, device)
        got = both_heads(head, chunk)
    apart = max((a - b).abs().max().item() for a, b in zip(got, want))
    figure = f"{in_words(plain)}, compiled {in_words(compiled)}, {apart:.0e} apart"
    yield f"{shape}: both heads of {len(head[0])} tokens", figure


PARTS = {  # in the order of gpu.sh: what everything else needs comes first
    "tests": part_tests,
    "engine": part_engine,
    "canary": part_canary,
    "passes": part_passes,
    "ranks": part_ranks,
    "loop": part_loop,
    "rollout": part_rollout,
    "update": part_update,
    "sweep": part_sweep,
    "attention": part_attention,
    "compile": part_compile,
}


# --------------------------------------------------------------------------------------------------
# Results


def run_part(o: Options) -> None:
    """Do it, and leave a line; what fails has its traceback on the screen."""
    began = time.perf_counter()
    cut = "it did not end: the time limit, or a kill"
    result = {"part": o.part, "status": "failed", "why": cut, "rows": []}
    write_result(o, result)
    try:
        for row in PARTS[o.part](o):
            result["rows"].append(row)
            write_result(o, result)  # what comes after may fail, or take too long
            stop_at_the_limit()
        result.update(status="done", why="")
    except Skipped as reason:
        result.update(status="skipped", why=str(reason))
    except (Exception, SystemExit) as error:
        import traceback

        traceback.print_exc()
        result.update(status="failed", why=f"{type(error).__name__}: {console.first_line(error)}")
    result["seconds"] = round(time.perf_counter() - began, 1)
    with contextlib.suppress(Skipped):
        result["device"] = console_name(device_of(o))
    write_result(o, result)
    print(f"{o.part}: {result['status']} {result['why']}".rstrip())
    if result["status"] == "failed":
        raise SystemExit(1)


def write_result(o: Options, result: dict) -> None:
    folder = Path(o.out) / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['part']}.json").write_text(json.dumps(result) + "\n")


def show_table(o: Options) -> None:
    """Markdown for README, with the device's name and the versions."""
    found = {}
    asked = os.environ.get("PARTS", "").split() or PARTS  # of gpu.sh
    for name in PARTS:
        path = Path(o.out) / "results" / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
        elif name in asked:
            found[name] = {"status": "failed", "why": "it left no result: time limit, or killed"}
    devices = {r["device"] for r in found.values() if "device" in r}
    title = ", ".join(sorted(devices)) or "no device"
    if o.rehearse:
        title = f"A REHEARSAL, no figures for anybody ({title})"
    about = console.versions()
    pins = [
        f"{name} {about[name]}"
        for name in ("torch", "transformers", "peft", "vllm", "commit")
        if name in about
    ]
    print(f"\n{title}; {', '.join(pins)}\n")
    print("| part | what | figure |")
    print("|---|---|---|")
    for name, result in found.items():
        for what, figure in result.get("rows", []):
            print(f"| {name} | {what} | {figure} |")
        if result["status"] != "done":
            print(f"| {name} | {result['status']} | {result['why']} |")


def main() -> None:
    parser = make_parser(Options, "bench/gpu.py", __doc__)
    o = Options(**vars(parser.parse_args()))
    if o.parts:
        print(" ".join(PARTS))
    elif o.table:
        show_table(o)
    elif o.part in PARTS:
        signal.signal(signal.SIGTERM, note_signal)
        run_part(o)
    else:
        parser.error(f"--part is one of {', '.join(PARTS)}; or --table")


if __name__ == "__main__":
    main()
