"""What a run shows before its first step, and keeps: prompts, settings, versions, memory."""

import json
import platform

import torch

from support.shared.console import say, versions
from support.shared.engines import kv_cache_bytes
from support.shared.processes import rank_and_world


def estimate_memory(
    model,
    device: torch.device,
    micro_batch_tokens: int,
    checkpointing: bool,
    head_floats: int,
    engine_tp: int,
    cache_tokens: int,
) -> dict[str, float]:
    """GiB of one process, roughly: as if a layer kept 10 d-vectors and 6 MLP widths a token.

    `engine_tp` is the number of ranks that share a vLLM engine, 0 where there is none.
    """
    config = model.config
    width = 2 if device.type == "cuda" else 4  # bytes
    base = 0
    adapter = 0
    for p in model.parameters():
        if p.requires_grad:
            adapter += p.numel()
        else:
            base += p.numel() * p.element_size()
    layer = 10 * config.hidden_size + 6 * config.intermediate_size
    if checkpointing:
        layer = config.hidden_size
    parts = {
        "base": base,
        "adapter, gradient, Adam": 16 * adapter,
        "activations": micro_batch_tokens * config.num_hidden_layers * width * layer,
        "head": 4 * head_floats,
    }
    if engine_tp:
        parts["engine"] = base / engine_tp
        parts["engine's cache"] = kv_cache_bytes(config, device, engine_tp, cache_tokens)
    parts["sum"] = sum(parts.values())
    return {name: round(size / 2**30, 2) for name, size in parts.items()}


def show_start(
    settings: dict,
    row: dict,
    tokenizer,
    engine: str,
    tp: int,
    device: torch.device,
    memory: dict[str, float],
) -> dict[str, str]:
    """Both decoded prompts, settings, versions, device and memory, on the screen. -> name: file"""
    prompts = ""
    for who, key in (("student", "prompt_ids"), ("teacher", "teacher_prompt_ids")):
        text = tokenizer.decode(row[key])
        prompts += f"--- {who} prompt, {len(row[key])} tokens ---\n{text}\n"
    about = versions()
    about["engine"] = engine
    about["tensor_parallel"] = tp
    about["processes"] = rank_and_world()[1]
    about["device"] = f"{platform.machine()} CPU"
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name()
    about["threads"] = torch.get_num_threads()

    say(prompts.rstrip())
    show("settings", settings, hidden=("student_prompt", "teacher_prompt"))  # they stand above
    show("versions", about)
    show("GiB a process, estimated", memory)
    if device.type == "cuda":
        spare = 5  # GiB for context, graphs and NCCL
        if memory["sum"] > torch.cuda.mem_get_info()[1] / 2**30 - spare:
            say(
                "THIS MAY NOT FIT into the GPU's memory: lower --micro_batch_tokens, or add "
                "--gradient_checkpointing"
            )
    return {
        "settings.json": json.dumps(settings, indent=2) + "\n",
        "versions.json": json.dumps(about, indent=2) + "\n",
        "prompts.txt": prompts,
    }


def show(title: str, values: dict, hidden: tuple[str, ...] = ()) -> None:
    shown = [f"{name}={value}" for name, value in values.items() if name not in hidden]
    say(f"--- {title} ---\n" + "  ".join(shown))
