"""What a step needs at least: GiB of each GPU, and seconds by bytes and FLOPs. Computed, not run.

    python bench/limits.py --model qwen3-8b --gpu h100 --gpus 8    # the phases of one step
    python bench/limits.py --table                                 # the table of docs/gpu.md
    python bench/limits.py --run runs/qwen3-8b                     # what a run took, beside that
    python bench/limits.py --run runs/tiny --tflops 0.1 --gbps 20  # on a CPU

Decoding reads all weights and the cache once for each token, and spends a measured time on each
layer, however few sequences there are; the passes are FLOPs at a share --mfu of the peak;
memory is the program's own estimate. Grading, the push, Python and waiting for the longest rollout
come on top, so that a real step is slower than this.
"""

import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import egrsd  # noqa: E402
from bench import shapes  # noqa: E402
from support.shared import console, data, engines, models, sizes  # noqa: E402
from support.shared.options import make_parser, opt  # noqa: E402
from support.training import opening  # noqa: E402

MODELS = ("qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """By the vendor's data sheets, but for the last, which is ours."""

    gib: float  # what a process can take
    tflops: float  # bfloat16, dense
    tb_s: float  # of its memory
    link_gb_s: float  # to the others, in one direction
    all_reduce_us: float  # of one small all-reduce: an assumption


GPUS = {
    "rtx4090": Gpu(23.5, 165, 1.01, 25, 30),
    "l40s": Gpu(44.5, 362, 0.86, 25, 30),
    "a100": Gpu(79.2, 312, 2.04, 300, 9),
    "h100": Gpu(79.2, 989, 3.35, 450, 9),
    "h200": Gpu(139.8, 989, 4.80, 450, 9),
}

# Of a layer with an adapter, for each token, beyond its bytes: an H200 took 6.5 ms for the 36 of
# Qwen3-4B with 1 sequence, 6.6 with 8 and 7.0 with 32 short ones; their bytes take 1.7 to 2.3.
# That other GPUs and depths do so is an assumption.
LAYER_SECONDS = 0.13e-3


@dataclasses.dataclass
class Options:
    model: str = opt("what", "qwen3-8b", "its shape alone is needed", *MODELS)  # section 5.1
    gpu: str = opt("what", "", "whose data sheet counts; h100, or the run's own", *GPUS)  # ours
    gpus: int = opt("what", 8, "of one machine")  # Table A1
    run: str = opt("what", "", "a run's folder: what it took, beside its limits")  # ours
    tflops: float = opt("what", 0.0, "peak of another device, for --run; with --gbps")  # ours
    gbps: float = opt("what", 0.0, "GB/s of its memory")  # ours
    table: bool = opt("what", False, "all models and sizes of GPU, as Markdown")  # ours
    student_prompt: int = opt("tokens", 200, "of the student's prompt")  # ours
    teacher_prompt: int = opt("tokens", 900, "of the teacher's, with the reference")  # ours
    completion: int = opt("tokens", 1_024, "of a rollout")  # Table A1
    mfu: float = opt("speed", 0.25, "share of the peak that the passes reach")  # measured: an H100


def skeleton_of(name: str):
    """The model on the meta device: shapes, no numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shapes.config_of(name))


# --------------------------------------------------------------------------------------------------
# FLOPs of one row of `length` tokens, as torch.utils.flop_counter counts them: a product of
# (a, b) and (b, c) is 2abc, and attention is counted whole although half of it is masked.


def forward_flops(m: sizes.Sizes, length: int, adapted: bool) -> int:
    """Of the layers; the adapter's products come on top where it is on."""
    weights = m.linear + (m.adapter if adapted else 0)
    return 2 * length * weights + 4 * m.layers * m.queries * length**2


def backward_flops(m: sizes.Sizes, length: int) -> int:
    """Frozen weights pass the gradient on, the adapter's get one too; attention takes 2.5 times."""
    return 2 * length * (m.linear + 2 * m.adapter) + 10 * m.layers * m.queries * length**2


def head_flops(m: sizes.Sizes, tokens: int, products: int) -> int:
    """One product with the head for log p and entropy; a second one for the gradient."""
    return 2 * tokens * m.vocab * m.hidden * products


# --------------------------------------------------------------------------------------------------
# Seconds of one step


def phases(
    m: sizes.Sizes, gpu: Gpu, gpus: int, tp: int, o: Options, checkpointing: bool
) -> dict[str, float]:
    """Seconds of each phase, on each of the `gpus`; `tp` of them share an engine."""
    rows = egrsd.Settings().batch_size / gpus  # of one GPU's passes
    together = rows * tp  # of one engine
    peak = gpu.tflops * 1e12

    read = 2 * (m.base - m.embedding + m.adapter)
    context = o.student_prompt + o.completion / 2  # on average
    read += together * context * 2 * 2 * m.layers * m.keys
    work = 2 * together * (m.linear + m.adapter + m.vocab * m.hidden)
    token = max(read / tp / (gpu.tb_s * 1e12), work / tp / peak) + m.layers * LAYER_SECONDS
    if tp > 1:  # two a layer: after attention and after the MLP
        token += 2 * m.layers * gpu.all_reduce_us * 1e-6
    prefill = together / tp * forward_flops(m, o.student_prompt, True)

    teacher = forward_flops(m, o.teacher_prompt + o.completion, False)
    teacher += head_flops(m, o.completion, 1)
    length = o.student_prompt + o.completion
    student = forward_flops(m, length, True) * (2 if checkpointing else 1)
    student += backward_flops(m, length) + head_flops(m, o.completion, 2)

    update = 7 * 4 * m.adapter / (gpu.tb_s * 1e12)  # AdamW reads four numbers, writes three
    if gpus > 1:
        sent = 2 * (gpus - 1) / gpus * 4 * m.adapter
        update += sent / (gpu.link_gb_s * 1e9)
    seconds = {
        "prefill": prefill / peak / o.mfu,
        "decode": o.completion * token,
        "teacher": rows * teacher / peak / o.mfu,
        "student": rows * student / peak / o.mfu,
        "update": update,
    }
    seconds["step"] = sum(seconds.values())
    return seconds


def estimator_of(name: str, gpus: int):
    """-> Sizes, ranks of an engine, and the program's estimate with Table A1's settings."""
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # as torchrun would
        os.environ[variable] = str(gpus)
    s = egrsd.Settings()
    skeleton = skeleton_of(name)
    targets = models.layer_names(s.lora_targets)
    tp = engines.tensor_parallel(0, skeleton.config)
    tokens = egrsd.cache_tokens(s, tp)
    device = torch.device("cuda")
    tile = egrsd.VOCAB_TILE["cuda"]
    work = tp, tokens, tile, gpus, s.max_completion, egrsd.generate_tokens(s)
    estimate = sizes.estimator(skeleton, device, targets, s.lora_r, *work)
    return sizes.sizes_of(skeleton, targets, s.lora_r), tp, estimate


def chosen_settings() -> dict[str, object]:
    s = egrsd.Settings()
    return {
        "micro_batch_tokens": s.micro_batch_tokens,
        "checkpointing": s.gradient_checkpointing,
        "head_chunk": s.head_chunk,
        "shard": s.shard,
    }


def show_phases(o: Options) -> None:
    m, tp, estimate = estimator_of(o.model, o.gpus)
    card = o.gpu or "h100"
    gpu = GPUS[card]
    chosen = chosen_settings()
    way = opening.find_way(estimate, chosen, gpu.gib, o.gpus)
    if way is not None:
        chosen.update(opening.WAYS_TO_FIT[way])
    print(f"{o.model} on {o.gpus} x {card}, {tp} of them share an engine. All of it computed.")
    print(f"options that make it fit: {'none does' if way is None else way or 'none needed'}")
    print("GiB a GPU:")
    for name, size in estimate(**chosen).items():
        print(f"  {name:24} {size:7.1f}")
    checkpointing = bool(chosen["checkpointing"])
    print(f"seconds, at {o.mfu:.0%} of the peak in the passes:")
    for name, value in phases(m, gpu, o.gpus, tp, o, checkpointing).items():
        print(f"  {name:24} {value:7.2f}")


def show_table(o: Options) -> None:
    """A row for each model, a column for each size of GPU."""
    columns = ("rtx4090", "l40s", "h100", "h200")
    print("| model | " + " | ".join(f"{o.gpus} x {name}" for name in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in MODELS:
        m, tp, estimate = estimator_of(name, o.gpus)
        cells = [table_cell(m, tp, estimate, GPUS[column], o) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def table_cell(m: sizes.Sizes, tp: int, estimate, gpu: Gpu, o: Options) -> str:
    chosen = chosen_settings()
    way = opening.find_way(estimate, chosen, gpu.gib, o.gpus)
    if way is None:
        least = estimate(**{**chosen, **list(opening.WAYS_TO_FIT.values())[-1]})
        return f"no: {least['sum']:.0f} GiB at least"
    chosen.update(opening.WAYS_TO_FIT[way])
    cell = f"{estimate(**chosen)['sum']:.0f} GiB"
    if way:
        cell += f" with `{way}`"
    if "engine_tp" in opening.WAYS_TO_FIT[way]:
        return cell  # transformers' generate is bound by Python, not by the memory
    seconds = phases(m, gpu, o.gpus, tp, o, bool(chosen["checkpointing"]))
    return f"{cell}, {seconds['step']:.1f} s"


# --------------------------------------------------------------------------------------------------
# A run that was measured, beside what it needed at least


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def find_gpu(o: Options, device: str) -> tuple[str, Gpu] | None:
    """By --tflops and --gbps, by --gpu, or by the name of the device; None: no sheet is here."""
    if o.tflops and o.gbps:
        return f"{o.tflops} TFLOP/s, {o.gbps} GB/s", Gpu(0, o.tflops, o.gbps / 1e3, 0, 0)
    words = device.lower().replace("rtx 4090", "rtx4090").replace("-", " ").split()
    other = {"pcie", "nvl", "40gb"} & {*words}  # slower ones of the same name
    found = o.gpu or next((gpu for gpu in GPUS if gpu in words and not other), "")
    return (found, GPUS[found]) if found else None


def gpu_of(o: Options, device: str) -> tuple[str, Gpu]:
    found = find_gpu(o, device)
    if not found:
        console.fail(
            f"the run's device is {device!r}, which has no data sheet here: name one with --gpu, "
            "or its peak and its memory's bandwidth with --tflops X --gbps Y"
        )
    return found


def lengths_of(run: Path, settings: dict) -> dict[int, list[tuple[int, int, int]]]:
    """step -> (student's prompt, teacher's prompt, completion) of each rollout, in tokens."""
    tokenizer = models.load_tokenizer(settings["model"])
    teacher = {}  # problem id -> tokens
    steps = {}
    for r in rows_of(run / "rollouts.jsonl"):
        if r["id"] not in teacher:
            text = data.fill(settings["teacher_prompt"], r)
            teacher[r["id"]] = len(data.encode_prompt(tokenizer, text, settings["thinking"]))
        lengths = len(r["prompt_ids"]), teacher[r["id"]], len(r["completion_ids"])
        steps.setdefault(r["step"], []).append(lengths)
    return steps


def decode_work(
    m: sizes.Sizes, rows: list[tuple[int, int, int]], engines_there: int, width: int
) -> tuple[float, float]:
    """Bytes and FLOPs of the engine with most of them: what its ranks read and do together.

    Each token of the longest rollout reads all weights once; each row, at each of its tokens, its
    own cache up to there. A number is `width` bytes.
    """
    each = []
    for first in range(engines_there):
        mine = rows[first::engines_there]
        longest = max(completion for _, _, completion in mine)
        read = longest * width * (m.base - m.embedding + m.adapter)
        work = 0
        for prompt, _, completion in mine:
            seen = completion * prompt + completion * (completion - 1) / 2
            read += seen * width * 2 * m.layers * m.keys
            work += 2 * completion * (m.linear + m.adapter + m.vocab * m.hidden)
            work += forward_flops(m, prompt, True)
        each.append((read, work))
    return max(each)


def passes_flops(m: sizes.Sizes, rows: list[tuple[int, int, int]]) -> int:
    """Model FLOPs of both passes: without pads, and without what checkpointing does again."""
    total = 0
    for prompt, teacher_prompt, completion in rows:
        total += forward_flops(m, teacher_prompt + completion, False)
        total += forward_flops(m, prompt + completion, True)
        total += backward_flops(m, prompt + completion)
        total += head_flops(m, completion, 3)  # the teacher's product and the student's two
    return total


def analyse_run(run: Path, o: Options) -> dict[str, float | str]:
    """Medians over the steps, but for the first: seconds, the least seconds, and their shares."""
    for name in ("settings.json", "versions.json", "log.jsonl", "rollouts.jsonl"):
        if not (run / name).exists():
            console.fail(f"--run {run}: there is no {name} in it; it takes the folder of a run")
    settings = json.loads((run / "settings.json").read_text())
    about = json.loads((run / "versions.json").read_text())
    method = settings.get("method", "egrsd")
    if method not in ("egrsd", "rlsd"):
        console.fail(f"--run {run}: its method is {method}, whose passes are not counted here")
    card, gpu = gpu_of(o, about["device"])
    on_cpu = about["device"].endswith("CPU")
    targets = models.layer_names(settings["lora_targets"])
    skeleton = models.load_skeleton(settings["model"])
    m = sizes.sizes_of(skeleton, targets, settings["lora_r"])
    world = about["processes"]
    tp = about["tensor_parallel"]
    lengths = lengths_of(run, settings)

    columns = {}
    log = rows_of(run / "log.jsonl")
    for row in log[1:] or log:  # the first step compiles and allocates
        rows = lengths[row["step"]]
        read, work = decode_work(m, rows, world // tp, 4 if on_cpu else 2)
        # Both are the sum over the engine's `tp` ranks.
        bytes_least = read / tp / (gpu.tb_s * 1e12)
        work_least = work / tp / (gpu.tflops * 1e12)
        flops = passes_flops(m, rows) / world
        values = {
            "rollout": row["seconds"]["rollout"],
            "passes": row["seconds"]["passes"],
            "update": row["seconds"]["update"],
            "rollout_least": max(bytes_least, work_least),
            "passes_least": flops / (gpu.tflops * 1e12),
            "update_least": 7 * 4 * m.adapter / (gpu.tb_s * 1e12),
            "decode_share": bytes_least / row["seconds"]["rollout"],
            "mfu": flops / row["seconds"]["passes"] / (gpu.tflops * 1e12),
            "longest": max(c for _, _, c in rows) / statistics.mean(c for _, _, c in rows),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    found = {name: statistics.median(column) for name, column in columns.items()}
    found.update(steps=len(log), card=card, device=about["device"], world=world, tp=tp)
    found["advice"] = what_first(found, settings, about["engine"])
    return found


def what_first(found: dict, settings: dict, engine: str) -> str:
    """A sentence for the phase that loses most against its limit."""
    losses = {
        name: found[name] - found[f"{name}_least"] for name in ("rollout", "passes", "update")
    }
    worst = max(losses, key=losses.get)
    share = losses[worst] / sum(found[name] for name in losses)
    sentence = f"The {worst} could lose {losses[worst]:.2g} s, {share:.0%} of the step: "
    if worst == "update":
        return sentence + "see bench/rollout.py for the push of the adapter, then lower --lora_r"
    if worst == "passes":
        if settings["gradient_checkpointing"]:
            return sentence + "leave --gradient_checkpointing off if the memory allows it"
        return sentence + (
            "raise --micro_batch_tokens as far as the memory allows, then try --attn "
            "flash_attention_2"
        )
    if engine.startswith("hf"):
        return sentence + "transformers' generate waits for Python: install vLLM, --engine vllm"
    if found["longest"] > 2:
        return sentence + (
            f"the longest rollout is {found['longest']:.1f} times the mean, and all wait for it: "
            "lower --max_completion, or take a larger --batch_size"
        )
    if settings["rollout_tp"] and found["tp"] < found["world"]:
        return sentence + "let more GPUs share an engine: --rollout_tp 0 takes the most that fit"
    return sentence + (
        "with so few sequences the engine waits for its launches. Take a larger --batch_size, and "
        "see bench/overheads.py for what is no decoding"
    )


def show_run(o: Options) -> None:
    found = analyse_run(Path(o.run), o)
    print(f"{o.run}: {found['steps']} steps on {found['world']} x {found['device']}")
    print(f"against {found['card']}; medians over the steps but the first\n")
    print("| phase | s | at least, s | share |")
    print("|---|---|---|---|")
    for name in ("rollout", "passes", "update"):
        least = found[f"{name}_least"]
        print(f"| {name} | {found[name]:.3f} | {least:.3g} | {least / found[name]:.1%} |")
    print(f"\nmodel FLOP utilisation of the passes: {found['mfu']:.1%}")
    print(f"share of the memory's bandwidth while rolling out: {found['decode_share']:.1%}")
    print("(the rollout's seconds hold the data and the grading, the update's the push)")
    print(f"\n{found['advice']}")


def main() -> None:
    parser = make_parser(Options, "bench/limits.py", __doc__)
    o = Options(**vars(parser.parse_args()))
    if o.run:
        show_run(o)
    elif o.table:
        show_table(o)
    else:
        show_phases(o)


if __name__ == "__main__":
    main()
