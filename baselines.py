"""
The methods that the paper compares with, and controls that it lacks, under EGRSD's own trainer.

    torchrun --nproc_per_node 8 baselines.py --method opsd      # with every option of egrsd.py
    python baselines.py --preset tiny --method grpo             # a laptop
    python baselines.py --study --quick                         # the comparison in miniature

The paper's Table 1, extended. Each token of the student's own completion is pushed by

    method    direction             magnitude            confidence
    none      the untouched base
    sft       no rollout: the reference itself is made likelier
    grpo      reward, in the group  1                    1
    rlsd      reward                w                    1                EGRSD with gamma 0
    egrsd     reward                w                    omega            CL-EGRSD where --W > 0
    opsd      whole distribution    KL(p_T || p_S)       1                no reward
    crisp     whole distribution    KL(p_S || p_T)       1                no reward, no reference
    atesd     whole distribution    KL(p_T || p_S)       1                part of the reference

Controls (--control) change one thing about EGRSD, to tell what its gate does:

    shuffled          the gate's own values, at other tokens of the step: no knowledge of where
    inverted          1.1 - omega: most weight where the teacher is least certain (and less of it)
    evidence          the gate scales the evidence alone: A * (1 + omega * (w - 1))
    student_entropy   the gate reads the student's entropy instead of the teacher's
    per_rank          each rank divides by its own highest entropy (against D2; EGRSD on one rank)

A method is a loss of each token and its gradient with respect to the student's hidden state; all
else, from the rollout (but SFT's) to the log, is egrsd.py's. Every loss is a mean over the step's
tokens, 1/M as in Eq. 7, also where the method's own paper takes a sum or a mean per completion.
What the papers leave open is marked "ours".
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import sys
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from egrsd import (
    Settings,
    _logprob_and_gradient,
    _matmul,
    _softmax_of_tile,
    as_teacher,
    completion_hidden,
    confidence_gate,
    deal_out,
    gate_of_step,
    logp_at_one,
    micro_batches,
    parse_settings,
    score_completions,
    sum_gradients_over_ranks,
    train,
    trainable,
    vocab_tiles,
)
from support.comparison import exposure
from support.shared import data, models, processes
from support.shared.console import fail
from support.shared.options import check_rules, opt
from support.training import run_folder
from support.training.check_data import check_data

# --------------------------------------------------------------------------------------------------
# Settings: those of egrsd.py, and what the other methods add

CONCISE_PROMPT = (
    "Problem: {problem}\n\n"
    "Be concise and correct: take the shortest path that leads to the answer, do not repeat "
    "yourself, and check only what is in doubt. Put your final answer within \\boxed{}."
)

METHODS = ("egrsd", "rlsd", "grpo", "sft", "opsd", "crisp", "atesd", "none")
CONTROLS = ("none", "shuffled", "inverted", "evidence", "student_entropy", "per_rank")
TAUGHT = ("egrsd", "rlsd", "opsd", "crisp", "atesd")  # methods with a teacher
DISTILLED = ("opsd", "crisp", "atesd")  # those that match its whole distribution

# What a method sets where the command line does not.
METHOD_OPTIONS = {
    "none": ["--steps", "0"],
    "rlsd": ["--gamma", "0", "--W", "0"],  # section 5.3
    # ours: 4 problems x 8 keep the batch of Table A1, which has one rollout of a problem for every
    # method. With that, and Appendix B's whitening, what is left of GRPO is --method rlsd --eps 0.
    "grpo": ["--rollouts_per_prompt", "8"],
    # CRISP; Table A1's "fixed teacher" for every method would be --teacher frozen.
    "crisp": [
        *("--divergence", "reverse", "--teacher", "copy", "--teacher_every", "50"),
        *("--teacher_prompt", CONCISE_PROMPT),
    ],
}


@dataclasses.dataclass
class ComparisonSettings(Settings):
    method: str = opt("comparison", "egrsd", "what trains", *METHODS)  # ours
    control: str = opt("comparison", "none", "one thing changed about EGRSD", *CONTROLS)  # ours
    gamma_schedule: str = opt(
        "comparison",
        "constant",
        "up: gamma grows from 0; down: it falls to 0",
        "constant",
        "up",
        "down",
    )  # ours: the paper's future work
    gamma_steps: int = opt("comparison", 100, "steps that it takes for that")  # ours
    rlsd_lambda: float = opt(
        "comparison", 0.0, "above 0: w counts by this share, which falls to 0 in 50 steps"
    )  # RLSD: 0.5; the paper's RLSD has none
    divergence: str = opt(
        "comparison", "forward", "of full distillation", "forward", "reverse", "jsd"
    )  # OPSD
    jsd_beta: float = opt("comparison", 0.5, "weight of the teacher in the mixture of jsd")  # OPSD
    kl_clamp: float = opt(
        "comparison",
        0.0,
        "cap on a token's and vocabulary entry's term, 0: none; OPSD's script: 0.05",
    )  # OPSD
    exposure: float = opt(
        "comparison", -1.0, "share of the reference that ATESD's teacher sees; -1: it learns it"
    )  # ATESD

    teacher: str = opt(
        "teacher", "frozen", "the teacher's weights", "frozen", "ema", "copy"
    )  # section 5.4
    teacher_alpha: float = opt("teacher", 0.99, "what an average keeps at each step")  # section 5.4
    teacher_every: int = opt("teacher", 20, "steps between copies of the student")  # section 5.4


def parse_comparison(argv: list[str]) -> ComparisonSettings:
    """Settings as in egrsd.py, with the method's own defaults. Exits with a sentence if wrong."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    first.add_argument("--control", default="none")
    first.add_argument("--preset", default=Settings.preset)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--out", default="")
    seen = first.parse_known_args(argv)[0]
    method = seen.method or ComparisonSettings.method
    name = method if seen.control == "none" else f"{method}-{seen.control}"
    out = seen.out or f"runs/{seen.preset}-{name}"
    defaults = ["--out", out]
    begun = run_folder.method_begun(Path(out)) if seen.resume else None
    if begun and seen.method not in (None, begun):
        fail(
            f"{out} was begun with --method {begun}: --overwrite deletes it, --out names another "
            "folder"
        )
    if not begun:  # else all is the run's own
        defaults += METHOD_OPTIONS.get(method, [])
    s = parse_settings([*defaults, *argv], ComparisonSettings, "baselines.py", __doc__)
    check_rules(rules_of(s), fail)
    return s


def rules_of(s: ComparisonSettings) -> list[tuple[object, str]]:
    gated = s.method == "egrsd"
    defaults = ComparisonSettings()
    return [
        (
            s.method == "none" and s.steps,
            "--method none is the untouched base: leave --steps out",
        ),
        (
            s.method == "grpo" and s.rollouts_per_prompt < 2,
            "--method grpo compares the rollouts of one problem: --rollouts_per_prompt must be at "
            "least 2",
        ),
        (
            s.method == "rlsd" and (s.gamma or s.W),
            "--method rlsd is EGRSD without its gate: leave --gamma and --W out, or take --method "
            "egrsd",
        ),
        (
            s.control != "none" and not gated,
            f"--control {s.control} changes EGRSD's gate: --method {s.method} has none",
        ),
        (
            s.gamma_schedule != "constant" and not gated,
            f"--gamma_schedule: --method {s.method} has no gamma",
        ),
        (
            s.gamma_steps < 2,
            f"--gamma_steps {s.gamma_steps} must be at least 2",
        ),
        (
            s.rlsd_lambda and s.method != "rlsd",
            "--rlsd_lambda is for --method rlsd",
        ),
        (
            not 0 <= s.rlsd_lambda <= 1,
            f"--rlsd_lambda {s.rlsd_lambda:g} must be in [0, 1]",
        ),
        (
            s.teacher != "frozen" and s.method not in TAUGHT,
            f"--teacher {s.teacher}: --method {s.method} has no teacher",
        ),
        (
            not 0 <= s.teacher_alpha <= 1 or s.teacher_every < 1,
            "--teacher_alpha must be in [0, 1], and --teacher_every at least 1",
        ),
        (
            s.exposure != -1 and not 0 <= s.exposure <= 1,
            f"--exposure {s.exposure:g} must be in [0, 1], or -1 to learn it",
        ),
        (
            s.exposure != -1 and s.method != "atesd",
            "--exposure is for --method atesd",
        ),
        (
            s.method not in DISTILLED and (s.divergence != "forward" or s.kl_clamp),
            f"--divergence and --kl_clamp are for {', '.join(DISTILLED)}",
        ),
        (
            not 0 < s.jsd_beta < 1 or s.kl_clamp < 0,
            "--jsd_beta must be between 0 and 1, and --kl_clamp not negative",
        ),
        (
            s.jsd_beta != defaults.jsd_beta and s.divergence != "jsd",
            "--jsd_beta is for --divergence jsd",
        ),
        (
            s.gamma_steps != defaults.gamma_steps and s.gamma_schedule == "constant",
            "--gamma_steps is for --gamma_schedule up or down",
        ),
        (
            s.teacher_alpha != defaults.teacher_alpha and s.teacher != "ema",
            "--teacher_alpha is for --teacher ema",
        ),
        (
            s.method == "crisp"
            and ("{problem}" not in s.teacher_prompt or "{solution}" in s.teacher_prompt),
            "--method crisp: --teacher_prompt must hold {problem} and not {solution}",
        ),
    ]


def use_method(run: SimpleNamespace, s: ComparisonSettings) -> None:
    """Put the method into `run`, for egrsd.train(). Algorithm 1 itself stays as it is."""
    if s.method not in TAUGHT:
        del run.roles["teacher"]
    if s.teacher != "frozen":
        # A second adapter on the same backbone. At first it is the student's: both are the base.
        for name, p in trainable(run.model).items():
            run.kept[f"teacher/{name}"] = p.detach().clone()
        run.kept["teacher_step"] = torch.zeros((), dtype=torch.int64)
    if s.method == "atesd":
        # Its teacher always sees the boxed answer. A reference without one gets it here, so that
        # next_problems knows the longest that can be shown.
        for row in run.problems:
            row["solution"] = exposure.expose(row["solution"], row["answer"], 1.0)
    if s.method == "atesd" and s.exposure == -1:
        run.kept.update(exposure.new_controller(s.seed))
    if s.method == "sft":
        run.roll_out = references
        run.accumulate_gradient = imitate
    elif s.method in DISTILLED:
        run.accumulate_gradient = functools.partial(distil, run)
    elif s.method == "grpo":
        run.accumulate_gradient = reinforce_groups
    elif not is_algorithm_1(s):
        run.accumulate_gradient = functools.partial(weigh_tokens, run)


def is_algorithm_1(s: ComparisonSettings) -> bool:
    """With gamma 0 too, which is RLSD."""
    plain = s.control == "none" and s.gamma_schedule == "constant" and not s.rlsd_lambda
    return s.method in ("egrsd", "rlsd") and plain and s.teacher == "frozen"


# --------------------------------------------------------------------------------------------------
# The student's pass, which all share


def student_pass(
    model, mine: list[dict], s: Settings, loss_of: Callable[..., tuple[dict, Tensor]]
) -> dict[str, Tensor]:
    """Leave the gradient of the whole step in .grad. -> what loss_of says of all tokens, (N,) each.

    loss_of(hidden (n, d), y (n,), span) of one micro-batch, whose tokens are the slice `span` of
    the rank's, gives figures of its tokens, among them loss and logp, and dL/dhidden (n, d).
    """
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)
    head = models.head_of(model)
    models.checkpoint_layers(model, True)
    done = defaultdict(list)
    start = 0
    for part in micro_batches(mine, "prompt_ids", s.micro_batch_tokens):
        hidden, y = completion_hidden(model, part, "prompt_ids")  # (n, d), (n,)
        hidden = hidden / s.logit_temperature
        tokens, gradient = loss_of(hidden.detach(), y, slice(start, start + len(y)))
        start += len(y)
        hidden.backward(gradient.to(hidden.dtype))
        tokens["raw_logp"] = logp_at_one(tokens["logp"], hidden, head, y, s)
        for name, value in tokens.items():
            done[name].append(value)
    models.checkpoint_layers(model, False)
    sum_gradients_over_ranks(model)
    return {name: torch.cat(values) for name, values in done.items()}


def lengths_of(rollouts: list[dict], device: torch.device) -> Tensor:
    return torch.tensor([len(r["completion_ids"]) for r in rollouts], device=device)  # (B,)


def advantages_of(rollouts: list[dict], device: torch.device) -> Tensor:
    """(N,) a rollout's own at each of its tokens."""
    A = torch.tensor([r["advantage"] for r in rollouts], device=device)  # (B,)
    return A.repeat_interleave(lengths_of(rollouts, device))


def tokens_of_step(rollouts: list[dict]) -> int:
    """M, of all ranks."""
    return sum(len(r["completion_ids"]) for r in rollouts)


def by_likelihood(
    model, mine: list[dict], M: int, s: Settings, weight_of: Callable[..., tuple[Tensor, dict]]
) -> dict[str, Tensor]:
    """Loss -1/M * sum of A_hat * log p(y), with (A_hat, figures) = weight_of(logp, span)."""
    head = models.head_of(model)

    def loss_of(hidden: Tensor, y: Tensor, span: slice) -> tuple[dict, Tensor]:
        logp, dlogp = _logprob_and_gradient(hidden, head, y, s.head_chunk)  # (n,), (n, d)
        A_hat, figures = weight_of(logp, span)  # (n,)
        loss = -(A_hat * logp) / M
        return {"loss": loss, "logp": logp, **figures}, -(A_hat / M)[:, None] * dlogp

    return student_pass(model, mine, s, loss_of)


# --------------------------------------------------------------------------------------------------
# Without a teacher: SFT and GRPO


def references(
    sample: Callable, batch: list[dict], tokenizer, eos_ids: list[int], step: int, s: Settings, **_
) -> list[dict]:
    """SFT's "rollouts": the references themselves, as if the student had said them."""
    rollouts = []
    for index, row in enumerate(batch):
        ids = data.encode_text(tokenizer, row["solution"])
        rollout = {**row, "step": step, "index": index, "seed": 0, "text": row["solution"]}
        rollout["completion_ids"] = [*ids, eos_ids[0]]
        rollout["engine_logps"] = []
        rollout.update(truncated=False, reward=1.0, correct=True, extracted="", status="reference")
        rollouts.append(rollout)
    return rollouts


def imitate(model, rollouts: list[dict], s: Settings) -> tuple[list[dict], dict[str, Tensor]]:
    """SFT: -1/M * sum of log p(s*)."""
    for r in rollouts:
        r["advantage"] = 1.0
    mine = deal_out(rollouts)
    M = tokens_of_step(rollouts)
    return mine, by_likelihood(model, mine, M, s, lambda logp, span: (torch.ones_like(logp), {}))


def group_advantages(rewards: Tensor, size: int) -> Tensor:
    """(B,) (r - mean) / (std + 1e-4) among the `size` rollouts of each problem; std with n - 1.

    As TRL has it.
    """
    r = rewards.view(-1, size)
    mean = r.mean(1, keepdim=True)
    std = r.std(1, keepdim=True)
    return ((r - mean) / (std + 1e-4)).flatten()


def reinforce_groups(
    model, rollouts: list[dict], s: ComparisonSettings
) -> tuple[list[dict], dict[str, Tensor]]:
    """GRPO: direction alone. No ratio and no clip, as each rollout is used once; no KL (ours)."""
    rewards = torch.tensor([r["reward"] for r in rollouts])  # in the order of the problems
    for r, A in zip(rollouts, group_advantages(rewards, s.rollouts_per_prompt).tolist()):
        r["advantage"] = A
    mine = deal_out(rollouts)
    A = advantages_of(mine, models.head_of(model).device)  # (N,)
    M = tokens_of_step(rollouts)
    return mine, by_likelihood(model, mine, M, s, lambda logp, span: (A[span], {}))


# --------------------------------------------------------------------------------------------------
# The teacher's weights: frozen, an average of the student's, or a copy of them (section 5.4)


@contextlib.contextmanager
def teaching(run: SimpleNamespace, s: ComparisonSettings, step: int) -> Iterator[None]:
    """Inside, the model is the teacher of this step: adapter off, or the teacher's own adapter."""
    if s.teacher == "frozen":
        with as_teacher(run.model):
            yield
        return
    advance_teacher(run.kept, trainable(run.model), s, step)
    student = {}
    for name, p in trainable(run.model).items():
        student[name] = p.data
        p.data = run.kept[f"teacher/{name}"].to(p.device)
    try:
        yield
    finally:
        for name, p in trainable(run.model).items():
            p.data = student[name]


def advance_teacher(
    kept: dict[str, Tensor], student: dict[str, Tensor], s: ComparisonSettings, step: int
) -> None:
    """Let the teacher follow the student, whose weights have gone through `step` updates.

    Once a step, also where a step is done again after a stop. An average of the factors A and B is
    not exactly one of their product.
    """
    if kept["teacher_step"] >= step:
        return
    kept["teacher_step"].fill_(step)
    for name, p in student.items():
        teacher = kept[f"teacher/{name}"]
        if s.teacher == "ema":
            teacher.lerp_(p.data.to(teacher.device), 1 - s.teacher_alpha)
        elif step % s.teacher_every == 0:
            teacher.copy_(p.data)


# --------------------------------------------------------------------------------------------------
# Direction x magnitude x confidence, with one thing changed


def weigh_tokens(
    run: SimpleNamespace, model, rollouts: list[dict], s: ComparisonSettings
) -> tuple[list[dict], dict[str, Tensor]]:
    """EGRSD and RLSD with a control, a schedule of gamma, RLSD's mixing or a moving teacher."""
    step = rollouts[0]["step"]
    mine = deal_out(rollouts)
    device = models.head_of(model).device
    lengths = lengths_of(mine, device)  # (B,)
    A = advantages_of(mine, device)  # (N,)
    with teaching(run, s, step):
        logp_T, H = score_completions(model, mine, "teacher_prompt_ids", s)  # (N,), (N,)

    gamma = gamma_of_step(s, step)
    run.figures["gamma"] = gamma
    if s.control == "student_entropy":
        _, H = score_completions(model, mine, "prompt_ids", s)
    omega = gate_of_control(H, lengths, gamma, s)  # (N,)
    if s.control == "shuffled":
        omega = shuffle_over_step(omega, mine, lengths, s.seed, step)

    def weight_of(logp: Tensor, span: slice) -> tuple[Tensor, dict]:
        delta = logp_T[span] - logp
        w = (A[span].sign() * delta).exp().clamp(1 - s.eps, 1 + s.eps)
        if s.rlsd_lambda:
            share = s.rlsd_lambda * max(0.0, 1 - step / 50)
            w = (1 - share) + share * w
        if s.control == "evidence":
            return A[span] * (1 + omega[span] * (w - 1)), {"w": w}
        return A[span] * w * omega[span], {"w": w}

    tokens = by_likelihood(model, mine, tokens_of_step(rollouts), s, weight_of)
    return mine, {"logp_T": logp_T, "H": H, "omega": omega, **tokens}


def gamma_of_step(s: ComparisonSettings, step: int) -> float:
    progress = min(1.0, step / (s.gamma_steps - 1))
    share = {"constant": 1.0, "up": progress, "down": 1 - progress}
    return s.gamma * share[s.gamma_schedule]


def gate_of_control(H: Tensor, lengths: Tensor, gamma: float, s: ComparisonSettings) -> Tensor:
    """(N,) omega: divided by which maximum, and which way round?"""
    if s.control == "per_rank":
        if not H.isfinite().all():
            return torch.full_like(H, math.nan)  # train() sees a loss of NaN, and stops
        rows = []
        for h in H.split(lengths.tolist()):
            real = torch.ones_like(h)[None].bool()  # (1, T)
            rows.append(confidence_gate(h[None], real, gamma, s.W, H.max())[0])
        return torch.cat(rows)
    omega = gate_of_step(H, lengths, gamma, s.W)
    if s.control == "inverted":
        return 1.1 - omega  # 0.1 where the teacher is certain, at most 0.1 + gamma where it is not
    return omega


def shuffle_over_step(
    omega: Tensor, mine: list[dict], lengths: Tensor, seed: int, step: int
) -> Tensor:
    """(N,) the values of all ranks' gates, dealt out anew over all tokens of the step."""
    rows = []
    for r, values in zip(mine, omega.cpu().split(lengths.tolist())):
        rows.append((r["index"], values))
    rows = sorted(processes.gather(rows), key=lambda row: row[0])  # not by rank: D2 holds here too
    digest = hashlib.sha256(f"shuffle/{seed}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    values = torch.cat([values for _, values in rows])
    values = values[torch.randperm(len(values), generator=generator)]
    dealt = {}
    for (index, _), new in zip(rows, values.split([len(row) for _, row in rows])):
        dealt[index] = new
    return torch.cat([dealt[r["index"]] for r in mine]).to(omega)


# --------------------------------------------------------------------------------------------------
# Full distillation: OPSD, CRISP and ATESD match the teacher's whole distribution
#
# A divergence is a sum over the vocabulary of f(log p_T(k), log p_S(k)). With its derivative
# g = df / d log p_S(k), the gradient with respect to the student's hidden state is
#
#     sum over k of g(k) U[k]  -  (sum over k of g(k)) * sum over k of p_S(k) U[k]
#
# so that here, too, the head is walked in tiles and no (N, V) tensor is kept.


def exp(logp: Tensor) -> Tensor:
    """Of log-probabilities: e^-80 counts for nothing, and below e^-87 a CPU is slow."""
    return logp.clamp(min=-80.0).exp()


def forward_kl(logp_T: Tensor, logp_S: Tensor) -> tuple[Tensor, Tensor]:
    """f and g of KL(p_T || p_S): be wherever the teacher is."""
    p_T = exp(logp_T)
    return p_T * (logp_T - logp_S), -p_T


def reverse_kl(logp_T: Tensor, logp_S: Tensor) -> tuple[Tensor, Tensor]:
    """f and g of KL(p_S || p_T): be nowhere that the teacher is not."""
    p_S = exp(logp_S)
    f = p_S * (logp_S - logp_T)
    return f, f + p_S


def jsd(logp_T: Tensor, logp_S: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """f and g of beta KL(p_T || m) + (1 - beta) KL(p_S || m), with m = beta p_T + (1 - beta) p_S.

    The derivatives through m cancel.
    """
    p_T = exp(logp_T)
    p_S = exp(logp_S)
    log_m = (beta * p_T + (1 - beta) * p_S).log()
    g = (1 - beta) * p_S * (logp_S - log_m)
    return beta * p_T * (logp_T - log_m) + g, g


def divergence_terms(s: ComparisonSettings) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The method's f and g, each term capped at --kl_clamp, beyond which it has no gradient."""
    plain = {
        "forward": forward_kl,
        "reverse": reverse_kl,
        "jsd": functools.partial(jsd, beta=s.jsd_beta),
    }[s.divergence]
    # A multiple of p_S may be added to g, since the gradient's two terms then cancel. With this one
    # g is small wherever teacher and student agree, so that rounding it to bfloat16 does no harm.
    multiple = {"forward": 1.0, "reverse": -1.0, "jsd": 0.0}[s.divergence]

    def terms(logp_T: Tensor, logp_S: Tensor) -> tuple[Tensor, Tensor]:
        f, g = plain(logp_T, logp_S)
        if s.kl_clamp:
            g = g.masked_fill(f > s.kl_clamp, 0.0)
            f = f.clamp(max=s.kl_clamp)
        return f, g + multiple * exp(logp_S)

    return terms


@torch.no_grad()
def divergence_and_gradient(
    hidden_T: Tensor,
    hidden_S: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    chunk: int,
    terms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N,) divergence in nats, (N, d) its gradient for `hidden_S`, (N,) log p_T(y), log p_S(y).

    `hidden_T` and `hidden_S` (N, d), `head_weight` (V, d), `targets` (N,) token ids y; `terms` is
    f and g of (n, v) log-probabilities.
    """
    done = [], [], [], []
    chunks = zip(hidden_T.split(chunk), hidden_S.split(chunk), targets.split(chunk))
    for h_T, h_S, y in chunks:  # (n, d), (n, d), (n,)
        # First the two normalisers, since f and g are functions of probabilities.
        log_Z_T = h_T.new_full((len(y),), float("-inf"), dtype=torch.float32)  # (n,)
        log_Z_S = log_Z_T.clone()
        for tile in vocab_tiles(head_weight):  # (v, d)
            log_Z_T = torch.logaddexp(log_Z_T, _softmax_of_tile(h_T, tile)[-1])
            log_Z_S = torch.logaddexp(log_Z_S, _softmax_of_tile(h_S, tile)[-1])
        value = torch.zeros_like(log_Z_S)  # (n,)
        sum_g = torch.zeros_like(log_Z_S)  # (n,)
        sum_gU = torch.zeros_like(h_S, dtype=torch.float32)  # (n, d)
        mean_U = torch.zeros_like(sum_gU)  # (n, d), under the student
        for tile in vocab_tiles(head_weight):
            logp_T = _matmul(h_T, tile.T) - log_Z_T[:, None]  # (n, v)
            logp_S = _matmul(h_S, tile.T) - log_Z_S[:, None]
            f, g = terms(logp_T, logp_S)
            value += f.sum(1)
            sum_g += g.sum(1)
            sum_gU += _matmul(g.to(tile.dtype), tile)
            mean_U += _matmul(exp(logp_S).to(tile.dtype), tile)
        row_y = head_weight[y].float()  # (n, d)
        done[0].append(value)
        done[1].append(sum_gU - sum_g[:, None] * mean_U)
        done[2].append((h_T.float() * row_y).sum(1) - log_Z_T)
        done[3].append((h_S.float() * row_y).sum(1) - log_Z_S)
    return tuple(map(torch.cat, done))


def distil(
    run: SimpleNamespace, model, rollouts: list[dict], s: ComparisonSettings
) -> tuple[list[dict], dict[str, Tensor]]:
    """1/M * sum over tokens of the divergence between teacher and student. No reward."""
    step = rollouts[0]["step"]
    mine = deal_out(rollouts)
    M = tokens_of_step(rollouts)
    head = models.head_of(model)
    terms = divergence_terms(s)
    if s.method == "atesd":
        expose_references(run, mine, s, step)
    hiddens = []
    with torch.no_grad(), teaching(run, s, step):
        for part in micro_batches(mine, "teacher_prompt_ids", s.micro_batch_tokens):
            hiddens.append(completion_hidden(model, part, "teacher_prompt_ids")[0])
    hidden_T = torch.cat(hiddens) / s.logit_temperature  # (N, d): small beside its (N, V) logits

    def loss_of(hidden: Tensor, y: Tensor, span: slice) -> tuple[dict, Tensor]:
        value, gradient, logp_T, logp = divergence_and_gradient(
            hidden_T[span], hidden, head, y, s.head_chunk, terms
        )
        tokens = {"loss": value / M, "divergence": value, "logp": logp, "logp_T": logp_T}
        return tokens, gradient / M

    tokens = student_pass(model, mine, s, loss_of)
    if s.method == "atesd":
        learn_exposure(run, mine, tokens, s, step)
    return mine, tokens


def expose_references(
    run: SimpleNamespace, mine: list[dict], s: ComparisonSettings, step: int
) -> None:
    """Put into teacher_prompt_ids what ATESD's teacher sees: a part of the reference."""
    share = s.exposure
    if share == -1:
        share = exposure.choose(run.kept, s.seed, step)
    run.figures["exposure"] = share
    for r in mine:
        part = exposure.expose(r["solution"], r["answer"], share)
        text = data.fill(s.teacher_prompt, {**r, "solution": part})
        r["teacher_prompt_ids"] = data.encode_prompt(run.tokenizer, text, s.thinking)
        if len(r["teacher_prompt_ids"]) + s.max_completion > s.max_length:
            fail(
                f"problem {r['id']}: a part of its reference exceeds --max_length {s.max_length}, "
                "which the whole does not: raise it, or leave the problem out"
            )


def learn_exposure(
    run: SimpleNamespace,
    mine: list[dict],
    tokens: dict[str, Tensor],
    s: ComparisonSettings,
    step: int,
) -> None:
    """Tell ATESD's controller how the step went: means over the tokens of all ranks [D2]."""
    if s.exposure != -1:
        return
    values = {
        "loss": tokens["divergence"],
        "mismatch": (tokens["logp_T"] - tokens["logp"]).abs(),
        "confidence": tokens["logp"].exp(),
    }
    if exposure.decides(step + 1):  # a forward pass each, so only when it is about to choose
        known = []
        for r in mine:
            room = s.max_length - len(r["teacher_prompt_ids"])
            ids = data.encode_text(run.tokenizer, r["solution"])[:room]
            known.append({**r, "completion_ids": ids})
        with teaching(run, s, step):
            values["teacher"], _ = score_completions(run.model, known, "teacher_prompt_ids", s)
        values["probe"] = -score_completions(run.model, known, "prompt_ids", s)[0]
    means = {}
    for name, value in values.items():
        total = torch.stack([value.double().sum(), value.new_tensor(len(value)).double()]).cpu()
        total = processes.reduce_(total)
        means[name] = (total[0] / total[1]).item()
    exposure.learn(run.kept, means, step)


def train_method(argv: list[str]) -> None:
    """One whole run; the study calls it once for each of its own."""
    s = parse_comparison(argv)
    if s.check_data:
        check_data(dataclasses.asdict(s))
    else:
        train(s, use_method)


def see_reference(options: list[str]) -> dict[str, float]:
    """For the study: how good a base is as the teacher, with the reference in view."""
    from tiny.measure import measure

    return measure(parse_settings(options), only="with reference")["with reference"]


if __name__ == "__main__":
    if "--study" in sys.argv[1:]:
        from support.comparison import study

        study.main(sys.argv[1:], train_method, see_reference)
    else:
        with processes.ending_together():
            train_method(sys.argv[1:])
