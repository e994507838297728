"""What a run shows before its first step, and keeps: prompts, settings, versions, memory."""

import json
import math
import platform
from collections.abc import Callable

import torch

from support.shared.console import fail, say, versions
from support.shared.processes import rank_and_world

SPARE = 5.0  # GiB for the CUDA context, vLLM's graphs, NCCL, and what the estimate leaves out

SMALL = {"checkpointing": True, "micro_batch_tokens": 2_048}
HF = {"engine_tp": 0}
WAYS_TO_FIT = {  # the cheapest first; they change time and memory, --engine hf the draws as well
    "": {},
    "--micro_batch_tokens 2048": {"micro_batch_tokens": 2_048},
    "--gradient_checkpointing": {"checkpointing": True},
    "--gradient_checkpointing --micro_batch_tokens 2048": SMALL,
    "--shard": {"shard": True},
    "--shard --gradient_checkpointing": {"shard": True, "checkpointing": True},
    "--shard --gradient_checkpointing --micro_batch_tokens 2048": {"shard": True, **SMALL},
    "--engine hf": HF,
    "--gradient_checkpointing --engine hf": {"checkpointing": True, **HF},
    "--gradient_checkpointing --micro_batch_tokens 2048 --engine hf": {**SMALL, **HF},
    "--shard --gradient_checkpointing --micro_batch_tokens 2048 --engine hf": {
        "shard": True,
        **SMALL,
        **HF,
    },
}


def check_memory(
    estimate: Callable[..., dict[str, float]],
    micro_batch_tokens: int,
    checkpointing: bool,
    head_chunk: int,
    shard: bool,
    free: float,
    gpus: int,
) -> dict[str, float]:
    """The estimate; exits where it is above the `free` GiB of the GPU, warns where it is near.

    `estimate` is what sizes.estimator gives: nothing needs to be loaded for it. `gpus` are those
    that --shard could spread layers over.
    """
    chosen = {
        "micro_batch_tokens": micro_batch_tokens,
        "checkpointing": checkpointing,
        "head_chunk": head_chunk,
        "shard": shard,
    }
    memory = estimate(**chosen)
    if memory["sum"] + SPARE <= free:
        return memory
    way = find_way(estimate, chosen, free, gpus)
    advice = "No option makes it fit: take larger GPUs, more of them, or a smaller model"
    if way is not None:
        advice = f"This makes it fit: {way}"
    parts = ", ".join(f"{name} {size:.1f}" for name, size in memory.items() if name != "sum")
    sentence = (
        f"one process needs about {memory['sum']:.1f} GiB ({parts}) and {SPARE:.0f} more for CUDA, "
        f"and {free:.1f} GiB of its GPU are free. {advice}"
    )
    if memory["sum"] > free:
        fail(sentence)
    say(f"THIS MAY NOT FIT: {sentence}")
    return memory


def find_way(
    estimate: Callable[..., dict[str, float]], chosen: dict[str, object], free: float, gpus: int
) -> str | None:
    """The first options with which it fits, "" for none; None if it fits with none."""
    for options, changes in WAYS_TO_FIT.items():
        if "shard" in changes and gpus == 1:  # there is nobody to share with
            continue
        if estimate(**{**chosen, **changes})["sum"] + SPARE <= free:
            return options
    return None


def free_memory(device: torch.device) -> float:
    """GiB that this process can still take of its GPU; a CPU is not asked."""
    if device.type == "cpu":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] / 2**30


def show_start(
    settings: dict,
    prompts: dict[str, list[int]],
    tokenizer,
    engine: str,
    tp: int,
    device: torch.device,
    memory: dict[str, float],
) -> dict[str, str]:
    """Prompts, settings, versions, device and memory, on the screen. -> name: file

    `prompts` are token ids by role.
    """
    shown = ""
    for role, ids in prompts.items():
        shown += f"--- {role} prompt, {len(ids)} tokens ---\n{tokenizer.decode(ids)}\n"
    about = versions()
    about["engine"] = engine
    about["tensor_parallel"] = tp
    about["processes"] = rank_and_world()[1]
    about["device"] = f"{platform.machine()} CPU"
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name()
    about["threads"] = torch.get_num_threads()

    say(shown.rstrip())
    # The prompts in use stand above.
    show("settings", settings, hidden=("student_prompt", "teacher_prompt"))
    show("versions", about)
    show("GiB a process, estimated", memory)
    return {
        "settings.json": json.dumps(settings, indent=2) + "\n",
        "versions.json": json.dumps(about, indent=2) + "\n",
        "prompts.txt": shown,
    }


def show(title: str, values: dict, hidden: tuple[str, ...] = ()) -> None:
    shown = [f"{name}={value}" for name, value in values.items() if name not in hidden]
    say(f"--- {title} ---\n" + "  ".join(shown))
