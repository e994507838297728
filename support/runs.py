"""The folder of a run: what it starts from, its checkpoints, its log and curves, and what it shows at the start.

Rank 0 writes. A checkpoint is a PEFT adapter that loads anywhere, and the trainer's state; nothing in it is a pickle.
"""
from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import platform
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from support.basics import (append_lines, barrier, fail, first_line, json_lines, make_folder, rank_and_world, read_json,
                            say, versions, write_beside, write_json, write_text)
from support.engines import kv_cache_bytes
from support.models import trainable
from support.plots import canvas, log_scale, save_figure

if TYPE_CHECKING:
    from egrsd import RewardStats, Settings


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def latest_checkpoint(s: Settings) -> Path | None:
    whole = [path for path in Path(s.out).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return max(whole, key=lambda path: int(path.name[5:]), default=None)


def save_checkpoint(model, optimizer: torch.optim.Optimizer, stats: RewardStats, step: int, position: int,
                    s: Settings) -> None:
    """Write step_N beside and rename it: a killed run, or a full disk, leaves the last checkpoint whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, save_embedding_layers=False)
        state = {f"{name}/{key}": value for name, p in trainable(model).items()
                 for key, value in optimizer.state[p].items()}
        save_file({"torch_random_state": torch.get_rng_state(), **state}, folder / "trainer.safetensors")
        state = {"step": step, "position": position, "stats": stats.state_dict(), "settings": dataclasses.asdict(s)}
        (folder / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")

    folder = Path(s.out) / f"step_{step}"
    try:
        if rank_and_world()[0] == 0 and not folder.exists():
            write_beside(folder, write)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder.with_name(f".{folder.name}"), ignore_errors=True)
        fail(f"{folder} could not be written ({first_line(error)}). Make room, then --resume: the last whole "
             f"checkpoint is {latest_checkpoint(s) or 'none, so that it starts over'}")
    barrier()  # nobody leaves before it is whole


def load_checkpoint(folder: Path, model, optimizer: torch.optim.Optimizer, stats: RewardStats) -> tuple[int, int]:
    """Put everything back as it was. -> step and data position"""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        state, tensors = read_json(folder / "trainer.json"), load_file(folder / "trainer.safetensors")
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        torch.set_rng_state(tensors.pop("torch_random_state"))
    except (OSError, KeyError, SafetensorError) as error:
        fail(f"{folder} is damaged ({first_line(error)}). Delete it: --resume goes on from the checkpoint before it")
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        p = trainable(model)[name]
        optimizer.state[p][slot] = value if slot == "step" else value.to(p.device)
    stats.load_state_dict(state["stats"])
    return state["step"], state["position"]


def open_run(s: Settings) -> Path | None:
    """Take the run folder for this process. -> the checkpoint to go on from. Nothing is deleted yet."""
    out = Path(s.out)
    checkpoint = latest_checkpoint(s) if s.resume else None
    files = [out / name for name in ("log.jsonl", "rollouts.jsonl", "summary.json")]
    begun = latest_checkpoint(s) or any(path.exists() and path.stat().st_size for path in files)
    if s.resume and not checkpoint:
        say(f"--resume: {out} holds no checkpoint, so the run starts from the beginning")
    if begun and not (s.resume or s.overwrite):
        fail(f"{out} already holds a run. --resume goes on with it, --overwrite deletes it, --out names another folder")
    barrier()  # every rank has looked
    if rank_and_world()[0] == 0:
        make_folder(out)
        _locks[out] = _locks.get(out) or os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(_locks[out], fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, in whatever way
        except BlockingIOError:
            fail(f"another process is writing to {out}: wait for it, or take another --out")
        except OSError:
            say(f"{out} is on a file system without locks: nothing keeps a second run from writing to it")
        if not begun:  # at once, so that --resume knows them wherever a kill strikes
            write_json(out / "settings.json", dataclasses.asdict(s))
    return checkpoint


_locks: dict[Path, int] = {}  # the folder's open descriptor, which holds the lock


def clear_run(s: Settings, checkpoint: Path | None, step: int) -> list[dict]:
    """Delete what this run does not go on from, once all that it needs is loaded. -> the rows of log.jsonl that stay"""
    out = Path(s.out)
    if not checkpoint:  # all of the old run is out of sight before the slow part: --resume must not go on with a rest
        for path in [path for path in out.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]:
            shutil.rmtree(path.with_name(f".{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f".{path.name}"))
        for name in ("summary.json", "log.jsonl", "rollouts.jsonl", "curves.png"):
            (out / name).unlink(missing_ok=True)
    for path in [path for path in out.glob(".step_*") if re.fullmatch(r"\.step_\d+", path.name)]:
        shutil.rmtree(path)  # half-written ones too
    for path in (out / "rollouts.jsonl", out / "log.jsonl"):  # what was written after the checkpoint, and half a line
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            rows = [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if row["step"] < step]
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path} is damaged: a line is no step ({first_line(error)}). Mend it, or start anew with --overwrite")
        write_text(path, json_lines(rows))
    if len(rows) < step:
        say(f"{path} HAS ONLY {len(rows)} OF THE {step} STEPS of the checkpoint: somebody shortened it")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The log

ROLLOUT_KEYS = ("step", "index", "seed", "id", "problem", "solution", "answer", "prompt_ids", "completion_ids",
                "engine_logps", "text", "extracted", "correct", "status", "truncated", "reward", "advantage")
PHASES = ("rollout", "passes", "update")


def log_row(step: int, rollouts: list[dict], skipped: list[str], figures: dict, clock: list[float],
            device: torch.device) -> dict:
    """One line of log.jsonl: every figure is that of the whole step; what depends on the machine comes last."""
    tokens, n = sum(len(r["completion_ids"]) for r in rollouts), len(rollouts)
    means = {key: sum(r[key] for r in rollouts) / n for key in ("reward", "correct", "truncated", "advantage")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
    return {"step": step, **means, "length": tokens / n, "unboxed": sum(r["extracted"] is None for r in rollouts) / n,
            "timeouts": sum(r["status"] == "timeout" for r in rollouts), **figures,
            "skipped": len(skipped), "skipped_prompts": skipped,
            "seconds": {name: round(b - a, 4) for name, a, b in zip(PHASES, clock, clock[1:])},
            "tokens_per_second": round(tokens / (clock[-1] - clock[0]), 1), "memory_gib": round(peak / 2**30, 2)}


def record_step(row: dict, rollouts: list[dict], log: list[dict], draw: bool, wandb: object, s: Settings) -> None:
    """Add the step to the files of the run and to `log`, and say what a user should not miss."""
    out, step = Path(s.out), row["step"]
    log.append(row)
    append_lines(out / "rollouts.jsonl", [{key: r[key] for key in ROLLOUT_KEYS} for r in rollouts])
    append_lines(out / "log.jsonl", [row])
    if wandb:
        wandb.log(row, step=step)
    curves = out / "curves.png"
    if draw or not curves.exists() or time.time() - curves.stat().st_mtime > 20:
        draw_curves(curves, log, s)
    for name in row["skipped_prompts"]:
        say(f"step {step}: skipped problem {name}, which does not fit into --max_length {s.max_length}")
    if not any(r["reward"] for r in rollouts):  # [D8]
        say(f"step {step}: NOT ONE ROLLOUT EARNED A REWARD ({row['truncated']:.0%} truncated, {row['unboxed']:.0%} "
            "without a boxed answer): try a longer --max_completion, --no-thinking, or easier problems")


def start_wandb(s: Settings):
    """The wandb module, with a run begun; None where nobody asked for it."""
    if not s.wandb or rank_and_world()[0]:
        return None
    import wandb
    wandb.init(project=s.wandb, dir=s.out, config=dataclasses.asdict(s))
    return wandb


def draw_curves(path: Path, log: list[dict], s: Settings) -> None:
    """curves.png: what to watch in a run, redrawn as it goes."""
    figure, axes = canvas(2, 3, 13, 6.5)
    for axis, (title, unit, *keys) in zip(axes.flat, [
        ("rollouts", "share (reward: r)", "correct", "truncated", "reward"), ("completion length", "tokens", "length"),
        ("weights", "mean over tokens", "gate", "magnitude"),
        ("teacher evidence \u03b4 by rollout", "nats a token", "delta_right", "delta_wrong"),
        ("teacher entropy", "nats", "entropy", "entropy_max"), ("gradient before clipping", "norm", "grad_norm"),
    ]):
        for key, color, dash in zip(keys, ("#0072B2", "#D55E00", "#555555"), ("-", "--", ":")):  # Okabe and Ito
            values = [math.nan if row[key] is None else row[key] for row in log]
            axis.plot([row["step"] for row in log], values, dash, color=color, label=key.replace("_", " "))
        if keys == ["grad_norm"]:
            axis.axhline(s.max_grad_norm, color="#D55E00", linestyle="--", linewidth=1, label="clipped to")
            log_scale(axis)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend(fontsize=8)
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# The start


def memory_estimate(model, s: Settings, engine: str, device: torch.device, tp: int, tile: int) -> dict[str, float]:
    """GiB of one process, roughly: as if a layer kept ten d-vectors and six of the MLP's width for each token."""
    c, width = model.config, 2 if device.type == "cuda" else 4
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    layer = c.hidden_size if s.gradient_checkpointing else 10 * c.hidden_size + 6 * c.intermediate_size
    parts = {"base": base, "adapter, gradient, Adam": 16 * sum(p.numel() for p in trainable(model).values()),
             "activations": s.micro_batch_tokens * c.num_hidden_layers * width * layer,
             "head": 4 * s.head_chunk * (3 * tile + 2 * c.hidden_size)}
    if engine == "vllm":
        parts |= {"engine": base / tp, "engine's cache": kv_cache_bytes(s, c, device, tp)}
    return {name: round(size / 2**30, 2) for name, size in [*parts.items(), ("sum", sum(parts.values()))]}


def show_start(s: Settings, row: dict, tokenizer, engine: str, device: torch.device, tp: int,
               memory: dict) -> dict[str, str]:
    """Both decoded prompts, settings, versions, engine, device and estimated memory, on the screen. -> name: file"""
    prompts = "".join(f"--- {who} prompt, {len(row[key])} tokens ---\n{tokenizer.decode(row[key])}\n"
                      for who, key in (("student", "prompt_ids"), ("teacher", "teacher_ids")))
    about = {**versions(), "engine": engine, "tensor_parallel": tp, "processes": rank_and_world()[1],
             "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
             "threads": torch.get_num_threads()}
    say(prompts.rstrip())
    shown = {"settings": dataclasses.asdict(s), "versions": about, "GiB a process, estimated": memory}
    for title, values in shown.items():
        say(f"--- {title} ---\n" + "  ".join(f"{k}={v}" for k, v in values.items() if not k.endswith("_prompt")))
    if device.type == "cuda" and memory["sum"] > torch.cuda.mem_get_info()[1] / 2**30 - 5:  # 5: context, graphs, NCCL
        say("THIS MAY NOT FIT into the GPU's memory: lower --micro_batch_tokens, or add --gradient_checkpointing")
    return {"settings.json": json.dumps(dataclasses.asdict(s), indent=2) + "\n",
            "versions.json": json.dumps(about, indent=2) + "\n", "prompts.txt": prompts}
