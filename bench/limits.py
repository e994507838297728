"""What a step needs at least: GiB of each GPU, and seconds by bytes and FLOPs. Computed, not run.

    python bench/limits.py --model qwen3-8b --gpu h100 --gpus 8    # the phases of one step
    python bench/limits.py --table                                 # the table of docs/gpu.md

Decoding reads all weights and the cache once for each token; the passes are FLOPs at a share --mfu
of the peak; memory is the program's own estimate. Grading, the push, Python and waiting for the
longest rollout come on top, so that a real step is slower than this.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import egrsd  # noqa: E402
from bench import shapes  # noqa: E402
from support.shared import engines, models, sizes  # noqa: E402
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


@dataclasses.dataclass
class Options:
    model: str = opt("what", "qwen3-8b", "its shape alone is needed", *MODELS)  # section 5.1
    gpu: str = opt("what", "h100", "whose data sheet counts", *GPUS)  # ours
    gpus: int = opt("what", 8, "of one machine")  # Table A1
    table: bool = opt("what", False, "all models and sizes of GPU, as Markdown")  # ours
    student_prompt: int = opt("tokens", 200, "of the student's prompt")  # ours
    teacher_prompt: int = opt("tokens", 900, "of the teacher's, with the reference")  # ours
    completion: int = opt("tokens", 1_024, "of a rollout")  # Table A1
    mfu: float = opt("speed", 0.5, "share of the peak FLOP/s that the passes reach")  # ours


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
    token = max(read / tp / (gpu.tb_s * 1e12), work / tp / peak)
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
    tile = egrsd.VOCAB_TILE
    estimate = sizes.estimator(skeleton, device, targets, s.lora_r, tp, tokens, tile, gpus)
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
    gpu = GPUS[o.gpu]
    chosen = chosen_settings()
    way = opening.find_way(estimate, chosen, gpu.gib)
    if way is not None:
        chosen.update(opening.WAYS_TO_FIT[way])
    print(f"{o.model} on {o.gpus} x {o.gpu}, {tp} of them share an engine. All of it computed.")
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
    way = opening.find_way(estimate, chosen, gpu.gib)
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


def main() -> None:
    parser = make_parser(Options, "bench/limits.py", __doc__)
    o = Options(**vars(parser.parse_args()))
    if o.table:
        show_table(o)
    else:
        show_phases(o)


if __name__ == "__main__":
    main()
