"""What stops a run that would go on wrong: an engine with other weights, NaN and infinity."""

import contextlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from support.shared.console import fail, say
from support.shared.models import head_of
from support.shared.processes import gather, rank_and_world


def probe_engine(
    sample: Callable,
    push: Callable[[], None],
    model,
    adapter: dict[str, torch.nn.Parameter],
    as_base: Callable[..., contextlib.AbstractContextManager],
    logp_of: Callable[[list[dict]], Tensor],
    rows: list[dict],
    seed: int,
) -> None:
    """Prove that pushes arrive: with a random adapter the engine agrees with the trainer alone.

    The canary compares the two in each step, but early updates are tiny: a push that gets lost
    would show there only many steps later.
    """
    kept = {name: p.detach().clone() for name, p in adapter.items()}
    noise = torch.Generator().manual_seed(seed)
    # What the adapter adds is then 0.6 of its input's root mean square, at any rank and alpha: a
    # third or so of what a layer makes itself, and far above the rounding of bfloat16.
    lora = next(iter(model.peft_config.values()))
    spread = math.sqrt(lora.r) / lora.lora_alpha
    for name, p in adapter.items():
        if "lora_B" in name:
            p.data.copy_(spread * torch.randn(p.shape, generator=noise))
    push()
    prompts = [row["prompt_ids"] for row in rows]
    seeds = list(range(len(prompts)))
    drawn = list(sample(prompts, seeds, temperature=1.0, top_p=1.0, top_k=0, max_new=16))
    rollouts = []
    engine_logps = []
    for index, ids, logps in sorted(gather(drawn)):
        rollouts.append({"prompt_ids": prompts[index], "completion_ids": ids})
        engine_logps += logps
    engine_logp = torch.tensor(engine_logps, device=head_of(model).device)  # (N,)
    to_trainer = (logp_of(rollouts) - engine_logp).abs().mean().item()
    with as_base(model):
        to_base = (logp_of(rollouts) - engine_logp).abs().mean().item()
    for name, p in adapter.items():
        p.data.copy_(kept[name])
    if not to_trainer < 0.5 * to_base:
        fail(
            "the rollout engine does not use the adapter that was pushed: with a random one its "
            f"log-probabilities are {to_trainer:.2g} nats from the trainer's and {to_base:.2g} "
            "from the base model's. Try --engine hf"
        )
    say(
        f"a random adapter reached the engine: {to_trainer:.0e} nats from trainer, {to_base:.0e} "
        "from base"
    )


def check_canary(canary: float | None, model, step: int) -> None:
    """End where engine and trainer disagree on the tokens that were sampled (nats, mean).

    None: nothing was sampled. float32 agrees to 1e-6. In bfloat16 others see 0.01 to 0.04, and 0.2
    to 0.4 where weights did not arrive: docs/gpu.md.
    """
    if canary is None:
        return
    limit = 1e-3 if head_of(model).dtype == torch.float32 else 0.1
    if not canary <= limit:  # NaN too
        fail(
            f"step {step}: the rollout engine's log-probabilities are {canary:.2g} nats a token "
            f"from the trainer's (limit {limit}): it runs other weights. The checkpoints are "
            "sound; try --engine hf"
        )


def fail_not_finite(
    step: int, out: Path, rollouts: list[dict], values: Callable[[dict], Iterable[Tensor]]
) -> NoReturn:
    """End with the names of the rollouts whose own two passes, alone, are not finite.

    `values(rollout)` are all that these passes compute.
    """
    rank, world = rank_and_world()
    bad = []
    for r in rollouts[rank::world]:
        if not all(value.isfinite().all() for value in values(r)):
            bad.append(f"rollout {r['index']} of problem {r['id']}")
    culprits = ", ".join(gather(bad)) or "no single rollout"
    fail(
        f"step {step}: the loss or its gradient is not finite. Not finite alone: {culprits}. {out} "
        "holds the state before this step. Remove these problems, or start a new run with a lower "
        "--lr"
    )
