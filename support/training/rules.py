"""What the options of egrsd.py must satisfy: a sentence for each rule that can be broken."""

import argparse
import math
from pathlib import Path

from support.shared.console import installed
from support.shared.options import Rule, check_rules

SIZES = (
    "batch_size",
    "rollouts_per_prompt",
    "max_completion",
    "micro_batch_tokens",
    "head_chunk",
    "lora_r",
    "lora_alpha",
)


def find_broken_rule(given: argparse.Namespace, fixed: dict[str, object], world: int) -> str:
    """The sentence of the first rule that the options break, "" for none.

    `fixed` are the settings that a run which is resumed must keep, `world` the number of processes.
    """
    found = []
    rules = [
        *rules_of_the_run(given, fixed),
        *rules_of_numbers(given),
        *rules_of_the_step(given, world),
        *rules_of_prompts(given),
    ]
    check_rules(rules, found.append)
    return found[0] if found else ""


def rules_of_the_run(given: argparse.Namespace, fixed: dict[str, object]) -> list[Rule]:
    changed = []
    for name, value in fixed.items():
        now = getattr(given, name)
        if now != value:
            changed.append(f"--{name} {now!r} (it has {value!r})")
    return [
        (
            changed,
            f"--resume goes on with the settings of {Path(given.out) / 'settings.json'}; these "
            f"differ: {'; '.join(changed)}. Leave them out, or start a new run in another --out",
        ),
        (
            given.resume and given.overwrite,
            "--resume keeps the run and --overwrite deletes it: choose one",
        ),
        (
            given.steps < 0 or given.save_every < 1,
            "--steps must be at least 0 and --save_every at least 1",
        ),
        (0 != given.rank_timeout < 5, "--rank_timeout must be 0, for no limit, or at least 5"),
        (
            given.wandb and not installed("wandb"),
            "--wandb: it is not installed (pip install wandb)",
        ),
    ]


def rules_of_numbers(given: argparse.Namespace) -> list[Rule]:
    finite = True
    for value in vars(given).values():
        if isinstance(value, float) and not math.isfinite(value):
            finite = False
    above_zero = given.lr > 0 and given.max_grad_norm > 0
    not_negative = min(given.beta_L, given.threads, given.rollout_tp) >= 0
    seed_fits = 0 <= given.seed < 2**63
    gate_fits = given.gamma >= 0 and given.W >= 0 and 0 <= given.eps < 1
    warm = given.temperature > 0 and given.logit_temperature > 0
    return [
        (not finite, "numbers must be finite"),
        (
            not (above_zero and not_negative and seed_fits),
            "--lr and --max_grad_norm must be above 0, --beta_L, --seed, --threads and "
            "--rollout_tp at least 0",
        ),
        (not gate_fits, "--gamma and --W must be at least 0, --eps in [0, 1)"),
        (
            not (warm and 0 < given.top_p <= 1 and given.top_k >= 0),
            "temperatures must be above 0, --top_p in (0, 1] and --top_k at least 0",
        ),
    ]


def rules_of_the_step(given: argparse.Namespace, world: int) -> list[Rule]:
    smallest = min(getattr(given, name) for name in SIZES)
    return [
        (smallest < 1, "sizes must be at least 1"),
        (
            given.shard and world == 1,
            "--shard spreads the model over several GPUs: start it with torchrun, or give "
            "--no-shard",
        ),
        (given.check_data and world > 1, "--check_data needs one process: python, not torchrun"),
        (
            given.batch_size % max(1, given.rollouts_per_prompt),
            f"--batch_size {given.batch_size} must be a multiple of --rollouts_per_prompt "
            f"{given.rollouts_per_prompt}",
        ),
        (
            given.batch_size % world,
            f"--batch_size {given.batch_size} must be a multiple of the {world} processes",
        ),
        (
            given.max_completion >= given.max_length,
            "--max_length must leave room for a prompt beside --max_completion",
        ),
    ]


def rules_of_prompts(given: argparse.Namespace) -> list[Rule]:
    student_asks = "{problem}" in given.student_prompt
    student_sees = "{solution}" in given.student_prompt
    # CRISP's teacher (baselines.py) has an instruction in the place of the reference.
    instructed = vars(given).get("method") == "crisp"
    teacher_sees = instructed or "{solution}" in given.teacher_prompt
    return [
        (
            not student_asks or student_sees or not teacher_sees,
            "--student_prompt must hold {problem} and not {solution}, --teacher_prompt must hold "
            "{solution}",
        ),
    ]
