"""What stops a run that would go on wrong: an engine with other weights, NaN and infinity."""

import contextlib
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import NoReturn

import torch
from torch import Tensor

from support.shared.console import fail, say
from support.shared.models import head_of
from support.shared.processes import gather, rank_and_world, reduce_
from support.training.run_folder import latest_checkpoint


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


# --------------------------------------------------------------------------------------------------
# NaN and infinity. Once a step, before the update, everything that the next state is made of is
# looked at. What is finite then, and below 1e19, is finite after AdamW's step too.

_own: dict[str, Tensor] = {}  # the norm of this rank's part of the last gradient


def note_gradient(flat: Tensor) -> None:
    """This rank's part of the gradient, before the sum over ranks makes all of them NaN."""
    _own["norm"] = flat.norm()


def look_for_nan(
    norm: Tensor, optimizer: torch.optim.Optimizer, stats: dict[str, float]
) -> tuple[float, bool]:
    """-> the gradient's norm; is it finite on all ranks, as adapter, optimizer and statistics are?

    One synchronisation with the GPU: that which the norm needs anyway.
    """
    kept = []
    for group in optimizer.param_groups:
        kept += map(Tensor.detach, group["params"])
    counts = []
    for slots in optimizer.state.values():
        kept += [value for name, value in slots.items() if name != "step"]
        counts.append(float(slots["step"]))  # which lies on the CPU
    size = torch.nn.utils.get_total_norm(kept)
    norm, size = torch.stack([norm, size]).tolist()
    total = torch.tensor([norm, size, *counts, *stats.values()], dtype=torch.float64).sum()
    return norm, math.isfinite(reduce_(total))


def find_in_state(
    model, optimizer: torch.optim.Optimizer, stats: dict[str, float]
) -> dict[str, list[str]]:
    """kind -> the names of what is not finite on this rank, for the kinds that hold such."""
    kinds = {"base weights": {}, "adapter": {}, "optimizer state": {}}
    for name, p in model.named_parameters():
        kinds["adapter" if p.requires_grad else "base weights"][name] = p
        for slot, value in optimizer.state.get(p, {}).items():
            kinds["optimizer state"][f"{slot} of {name}"] = value
    kinds["reward statistics"] = stats
    found = {}
    for kind, values in kinds.items():
        bad = [name for name, value in values.items() if not is_finite(value)]
        if bad:
            found[kind] = bad
    return found


def is_finite(value: Tensor | float) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


PASSES = {
    "logp_T": "teacher's log p",
    "H": "teacher's entropy",
    "logp": "student's log p",
    "raw_logp": "student's log p at temperature 1",
}
PRODUCT = {"w": "w", "omega": "gate", "loss": "loss"}  # of what the passes give


def find_in_rollouts(
    mine: list[dict], tokens: dict[str, Tensor], keys: dict[str, str]
) -> list[str]:
    """The rollouts for which what was computed of their tokens is not finite, and what that is."""
    lengths = [len(r["completion_ids"]) for r in mine]
    bad = [[] for _ in mine]
    for key in keys.keys() & tokens.keys():
        for place, values in enumerate(tokens[key].split(lengths)):
            if not is_finite(values):
                bad[place].append(keys[key])
    return [f"{name_of(r)} ({', '.join(sorted(what))})" for r, what in zip(mine, bad) if what]


def name_of(r: dict) -> str:
    return f"rollout {r['index']} of problem {r['id']}"


def fail_not_finite(
    step: int,
    run: SimpleNamespace,
    rollouts: list[dict],
    mine: list[dict],
    tokens: dict[str, Tensor],
    values: Callable[[dict], Iterable[Tensor]],
    save: Callable[[], None],
) -> NoReturn:
    """End with what is not finite: which kind, on which rank, in which rollouts.

    `mine` are this rank's rollouts with their `tokens`, [] where it did not come to the passes;
    `values(rollout)` is all that its own passes compute, alone. `save` writes the state before this
    step, and is called where rank 0, which writes, has a state that is finite.
    """
    rank, world = rank_and_world()
    state = find_in_state(run.model, run.optimizer, run.stats.state_dict())
    signs = gather(find_signs(run.model, state, rollouts, mine, tokens))
    first = min(signs, default=(3,))[0]
    culprits = [f"rank {owner}: {text}" for order, owner, text in signs if order == first]
    if first:
        alone = []
        for r in rollouts[rank::world]:
            if not all(map(is_finite, values(r))):
                alone.append(name_of(r))
        culprits.append(f"alone: {some(gather(alone)) or 'no single rollout'}")
    sound = gather([not state.keys() - {"base weights"}])[0]
    if sound:
        save()
        where = f"{run.out} holds the state before this step"
    else:
        last = latest_checkpoint(run.out) or "none, so that it starts over"
        where = f"This state is not saved; the last checkpoint is {last}"
    fail(
        f"step {step}: not finite: {'; '.join(culprits)}. {where}. If --resume comes to the same "
        "end, remove these problems, or start a new run with a lower --lr"
    )


def find_signs(
    model,
    state: dict[str, list[str]],
    rollouts: list[dict],
    mine: list[dict],
    tokens: dict[str, Tensor],
) -> list[tuple[int, int, str]]:
    """(order, this rank, what is not finite). Order 0 is a cause; above: what follows from one."""
    rank = rank_and_world()[0]
    found = []
    for kind, names in state.items():
        found.append((0, rank, f"{kind} ({some(names)})"))
    for r in rollouts:
        if rank == 0 and not is_finite(r["reward"]):  # every rank has them all
            found.append((0, rank, f"the reward of {name_of(r)}, {r['reward']}"))
    for order, keys in enumerate((PASSES, PRODUCT)):
        bad = find_in_rollouts(mine, tokens, keys)
        if bad:
            found.append((order, rank, some(bad)))
    if not is_finite(_own.get("norm", 0.0)):
        found.append((2, rank, "the gradient, before the sum over ranks"))
    for p in model.parameters():
        if p.grad is not None and not is_finite(p.grad):
            found.append((3, rank, "the gradient"))
            break
    return found


def some(names: list[str]) -> str:
    """The first of many."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
