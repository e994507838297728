"""
EGRSD and CL-EGRSD: Entropy-Guided Reinforced Self-Distillation (arXiv:2605.13255), Algorithm 1 in one file.

A reasoning model samples its own solutions. The same model with its adapter off, shown the reference solution, is the
teacher. Every sampled token is then pushed up or down by the product of three signals:

    A_hat[i,t] = A[i] * w[i,t] * omega[i,t]                loss = -1/M * sum_{i,t} A_hat[i,t] * log p_theta(y[i,t])

    direction   A[i]        did this answer earn more reward than usual?                                Eq. 9
    magnitude   w[i,t]      does the teacher like this token more than the student does?                Eq. 2
    confidence  omega[i,t]  is the teacher's distribution concentrated, by its entropy at t (EGRSD) or
                            by the lowest entropy within the next W tokens (CL-EGRSD)?                  Eq. 6, 8

    python egrsd.py --preset tiny                                   # a laptop, no GPU, no network, minutes
    torchrun --nproc_per_node 8 egrsd.py --gamma 1.0 --W 5          # the paper's CL-EGRSD on Qwen3-8B

Symbols (the paper's)                           Shapes
    x, s*   problem, its reference solution         B   rollouts of this rank; b: of one micro-batch
    y       sampled completion, |y| its length      T   tokens of the longest completion, right-padded
    r, A    reward, advantage; D = sign(A)          N   completion tokens of a micro-batch, without pads
    p_T     teacher: adapter off, sees x and s*     V   vocabulary, d hidden size
    p_S     student: adapter on, sees x             L   tokens of prompt and completion
    H       teacher entropy in nats                 M   completion tokens of the whole step (sum of the masks)
    delta   log p_T(y) - log p_S(y), in nats

Where the paper is silent we had to decide: tags like [D1], explained in README.md, mark where. After the settings and
the mathematics the file follows the data; "Alg. 1, line n" marks each line of Algorithm 1 once. What is not the method
lies in support/: files, loading data and models, vLLM and transformers behind one interface, grading, checkpoints.
"""
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from support.basics import (HERE, barrier, ending_together, fail, first_wrong, gather, installed, make_parser, opt,
                            progress, rank_and_world, read_json, reduce_, say, start_processes, stop_on_signals,
                            write_json, write_text)
from support.data import encode_prompt, epoch_order, fill, load_held_out, load_problems, read_completion
from support.engines import (Draw, choose_engine, end_tokens, hf_generate, kv_cache_bytes, rollout_seed, sample,
                             start_vllm, tensor_parallel, vllm_generate)
from support.grading import Grade, extract_answer, grade_completions  # noqa: F401  extract_answer: for importers
from support.models import (add_adapter, check_head, check_place, head_of, hidden_states, load_base, load_tokenizer,
                            trainable)
from support.runs import (PHASES, clear_run, latest_checkpoint, load_checkpoint, log_row, memory_estimate, open_run,
                          record_step, save_checkpoint, show_start, start_wandb)

# ---------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass, one parser. Each default is followed by where it comes from.

CLOSING = "Reason step by step, and put your final answer within \\boxed{}."
STUDENT_PROMPT = "Problem: {problem}\n\n" + CLOSING
TEACHER_PROMPT = """Problem: {problem}

Here is a reference solution to this problem.
=== Reference solution begins ===
{solution}
=== Reference solution ends ===

Make sure that you understand every step of the reference. Then solve the problem again, and derive the same answer in \
your own words.

""" + CLOSING

PRESETS = {
    "qwen3-8b": {},  # the defaults below; its CL-EGRSD is --gamma 1.0 --W 5 (Table A2)
    "qwen3-4b": {"model": "Qwen/Qwen3-4B"},  # its CL-EGRSD is --gamma 0.3 --W 3 (Table A2)
    "tiny": {  # ours, all of it: a 247k-parameter Qwen3 that tiny/make.py trained on arithmetic
        "model": str(HERE / "tiny"), "data": str(HERE / "tiny" / "train.jsonl"),
        "eval_data": str(HERE / "tiny" / "test.jsonl"), "student_prompt": "{problem}",
        "teacher_prompt": "{problem} Reference : {solution} Solve it in your own way .",
        "gamma": 1.0, "W": 5, "lr": 2e-3, "batch_size": 64, "max_completion": 96, "max_length": 256, "lora_r": 16,
        "lora_alpha": 32, "threads": 1},
}


@dataclasses.dataclass
class Settings:
    preset: str = opt("run", "qwen3-8b", "what goes with a model", *PRESETS)  # ours
    out: str = opt("run", "", "run folder; by default runs/PRESET")  # ours
    resume: bool = opt("run", False, "go on with the run in --out from its last checkpoint, with its settings")  # ours
    overwrite: bool = opt("run", False, "delete the run that --out already holds")  # ours
    steps: int = opt("run", 100, "optimizer steps")  # Table A1
    save_every: int = opt("run", 25, "steps between checkpoints")  # Table A1
    seed: int = opt("run", 0, "seed of the adapter, the data order and every rollout")  # ours
    wandb: str = opt("run", "", "also log to this Weights & Biases project")  # ours

    model: str = opt("model", "Qwen/Qwen3-8B", "hub id or local folder")  # section 5.1
    lora_r: int = opt("model", 64, "rank of the adapter")  # section 5.1
    lora_alpha: int = opt("model", 128, "the adapter is scaled by alpha / r")  # section 5.1
    lora_targets: str = opt("model", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                            "modules with an adapter")  # section 5.1
    attn: str = opt("model", "sdpa", "attention of the two passes", "sdpa", "flash_attention_2", "eager")  # ours
    gradient_checkpointing: bool = opt("model", False, "recompute activations: less memory, slower")  # ours
    trust_remote_code: bool = opt("model", False, "run Python code that comes with the model")  # ours
    threads: int = opt("model", 0, "CPU threads of torch, 0 = torch decides")  # ours

    data: str = opt("data", "siyanzhao/Openthoughts_math_30k_opsd", "hub id, or .json, .jsonl or .parquet file")  # D7
    split: str = opt("data", "train", "split of a hub dataset")  # D7
    problem_column: str = opt("data", "problem", "column with x (names match in any case)")  # D7
    solution_column: str = opt("data", "solution", "column with s*, the teacher's reference")  # D7
    answer_column: str = opt("data", "Answer", "column with the gold answer for the reward")  # D7
    eval_data: str = opt("data", "", "held-out problems, answered before and after training")  # ours
    student_prompt: str = opt("data", STUDENT_PROMPT, "what the student is asked")  # D7
    teacher_prompt: str = opt("data", TEACHER_PROMPT, "what the teacher is asked")  # D7
    thinking: bool = opt("data", False, "both contexts in thinking mode, where the chat template has one")  # D8

    gamma: float = opt("method", 0.3, "gate strength, Eq. 6; 0 is RLSD")  # Table A2
    W: int = opt("method", 0, "lookahead in tokens, Eq. 8; 0 is EGRSD, above 0 CL-EGRSD")  # Table A2
    eps: float = opt("method", 0.2, "clip of the magnitude, Eq. 2")  # Table A1
    beta_L: float = opt("method", 0.5, "bonus of a short right answer")  # Table A1
    logit_temperature: float = opt("method", 1.0, "temperature of log-probabilities and entropies")  # D3

    batch_size: int = opt("step", 32, "rollouts of one step, over all GPUs")  # Table A1
    rollouts_per_prompt: int = opt("step", 1, "rollouts of one problem in a step")  # Table A1
    lr: float = opt("step", 5e-6, "learning rate of AdamW, constant")  # Table A1, D11
    max_grad_norm: float = opt("step", 0.1, "the step's gradient is clipped to this norm")  # Table A1
    max_length: int = opt("step", 20_000, "most tokens of prompt + completion; longer are skipped")  # Table A1, D10
    micro_batch_tokens: int = opt("step", 4_096, "padded tokens of one forward pass; the result is the same")  # ours
    head_chunk: int = opt("step", 4_096, "tokens of one pass over the head; the result is the same")  # ours

    rollout: str = opt("rollout", "auto", "engine; hf is transformers", "auto", "vllm", "hf")  # ours
    rollout_tp: int = opt("rollout", 0, "GPUs that share one vLLM engine, 0 = as many as the heads allow")  # ours
    max_completion: int = opt("rollout", 1_024, "cap of a completion in tokens, L_max")  # Table A1
    temperature: float = opt("rollout", 1.1, "sampling temperature")  # Table A1
    top_p: float = opt("rollout", 0.95, "nucleus of the sampling")  # Table A1
    top_k: int = opt("rollout", 20, "most tokens that the sampling considers, 0 = all")  # Table A1


# What --resume may change: how far and how fast a run goes, not what it computes; and an engine that fails.
FREE_ON_RESUME = {"out", "resume", "overwrite", "steps", "save_every", "wandb", "attn", "gradient_checkpointing",
                  "threads", "micro_batch_tokens", "head_chunk", "rollout", "rollout_tp"}


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Settings from the command line: defaults, then the preset, then (with --resume) the run's own, then the options.

    Exits with status 2 and a sentence where an option is unknown or a value makes no sense.
    """
    parser = make_parser(Settings, "egrsd.py", __doc__)
    given = parser.parse_args(argv)  # a first time, for the preset and the run that set the other defaults
    out = given.out or f"runs/{given.preset}"
    saved = Path(out) / "settings.json"
    run = {key: value for key, value in read_json(saved, {}).items() if given.resume and hasattr(given, key)}
    own = {"out": out, "resume": False, "overwrite": False, "wandb": ""}  # of this start, never of the saved run
    parser.set_defaults(**{**PRESETS[given.preset], **run, **own})
    s = Settings(**{**vars(parser.parse_args(argv)), "out": out})
    world = rank_and_world()[1]
    changed = [f"--{key} {getattr(s, key)!r} (it has {value!r})" for key, value in run.items()
               if key not in FREE_ON_RESUME and getattr(s, key) != value and latest_checkpoint(s)]
    first_wrong([
        (changed, f"--resume goes on with the settings of {saved}; these differ: {'; '.join(changed)}. Leave them out, "
                  "or start a new run in another --out"),
        (s.resume and s.overwrite, "--resume keeps the run and --overwrite deletes it: choose one"),
        (s.steps < 0 or s.save_every < 1, "--steps must be at least 0 and --save_every at least 1"),
        (not all(math.isfinite(x) for x in vars(s).values() if isinstance(x, float)), "numbers must be finite"),
        (not (s.lr > 0 and s.max_grad_norm > 0 and s.beta_L >= 0 and 0 <= s.seed < 2**63 and s.threads >= 0
              and s.rollout_tp >= 0), "--lr and --max_grad_norm must be above 0, --beta_L, --seed, --threads and "
         "--rollout_tp at least 0"),
        (not (s.gamma >= 0 and s.W >= 0 and 0 <= s.eps < 1), "--gamma and --W must be at least 0, --eps in [0, 1)"),
        (not (s.temperature > 0 and s.logit_temperature > 0 and 0 < s.top_p <= 1 and s.top_k >= 0),
         "temperatures must be above 0, --top_p in (0, 1] and --top_k at least 0"),
        (min(s.batch_size, s.rollouts_per_prompt, s.max_completion, s.micro_batch_tokens, s.head_chunk, s.lora_r,
             s.lora_alpha) < 1, "sizes must be at least 1"),
        (s.batch_size % max(1, s.rollouts_per_prompt), f"--batch_size {s.batch_size} must be a multiple of "
         f"--rollouts_per_prompt {s.rollouts_per_prompt}"),
        (s.batch_size % world, f"--batch_size {s.batch_size} must be a multiple of the {world} processes"),
        (s.wandb and not installed("wandb"), "--wandb: it is not installed (pip install wandb)"),
        (s.max_completion >= s.max_length, "--max_length must leave room for a prompt beside --max_completion"),
        ("{problem}" not in s.student_prompt or "{solution}" in s.student_prompt
         or "{solution}" not in s.teacher_prompt,
         "--student_prompt must hold {problem} and not {solution}, --teacher_prompt must hold {solution}"),
    ], parser.error)
    return s


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions of (B, T) right-padded tensors and their mask. Entropies and log-ratios are in nats.


def _check(name: str, value: Tensor, shape: tuple[int | str, ...] | torch.Size, mask: Tensor | None = None) -> None:
    """A ValueError that names `value` unless it has this shape ("B" and "T" are any size), and no NaN under `mask`."""
    if value.ndim != len(shape) or any(want not in (n, "B", "T") for want, n in zip(shape, value.shape)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    if (value if mask is None else value[mask.bool()]).isnan().any():
        raise ValueError(f"{name} holds NaN")


def _check_mask(mask: Tensor) -> None:
    _check("mask", mask, ("B", "T"))
    if not mask.bool().any():
        raise ValueError("mask has not a single token")


def shaped_reward(correct: bool, length: int, max_completion: int, beta_L: float = 0.5) -> float:
    """r = 1[correct] * (1 + beta_L * (1 - |y| / L_max)): from 1 for the longest right answer up to 1 + beta_L.

    `length` and `max_completion` (L_max, the completion cap and not the sequence window) are in tokens. Section 3.
    """
    if max_completion < 1:
        raise ValueError(f"max_completion must be at least 1, got {max_completion}")
    if not 0 <= length <= max_completion:
        raise ValueError(f"length must be between 0 and max_completion {max_completion}, got {length}")
    return float(correct) * (1.0 + beta_L * (1.0 - length / max_completion))


class RewardStats:
    """Running mean and sample standard deviation (n - 1) of all rewards so far, by Welford's algorithm. Eq. 9 [D4]."""

    def __init__(self) -> None:
        self.count, self.mean, self._m2 = 0, 0.0, 0.0  # _m2: sum of squared distances from the mean

    @property
    def std(self) -> float:
        return math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, rewards: Iterable[float] | Tensor) -> None:
        rewards = [float(r) for r in rewards]
        if not all(map(math.isfinite, rewards)):
            raise ValueError(f"rewards holds {rewards}, which are not all finite")
        for r in rewards:
            self.count += 1
            distance = r - self.mean
            self.mean += distance / self.count
            self._m2 += distance * (r - self.mean)

    def advantages(self, rewards: Iterable[float] | Tensor, step: int) -> Tensor:
        """(B,) A = (r - mean) / std over EARLIER steps: call before update(). Steps 0..9 use r - 0.5. Eq. 9 [D4].

        While std < 1e-6 (all rewards so far were equal) the difference is divided by 1 instead.
        """
        r = torch.as_tensor(list(rewards), dtype=torch.float64)
        _check("rewards", r, (len(r),))
        if step < 10:  # Appendix B: too little history yet
            return (r - 0.5).float()
        return ((r - self.mean) / (self.std if self.std >= 1e-6 else 1.0)).float()

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self._m2 = int(state["count"]), float(state["mean"]), float(state["m2"])


def lookahead_min(entropy: Tensor, mask: Tensor, W: int) -> Tensor:
    """(B, T) min of the entropy (nats) over [t, min(t+W, end of that completion)], in tokens; 0 on pads. Eq. 8."""
    if not (math.isfinite(W) and W >= 0 and W == int(W)):
        raise ValueError(f"W must be a whole number of tokens and not negative, got {W}")
    _check_mask(mask)
    _check("entropy", entropy, mask.shape, mask)
    if not entropy.is_floating_point():
        raise ValueError(f"entropy must be of a floating-point type, not {entropy.dtype}")
    real = mask.bool()
    padded = entropy.masked_fill(~real, math.inf)  # a pad never is the minimum: windows end with the completion
    lowest = padded.clone()
    for ahead in range(1, min(int(W), entropy.shape[1] - 1) + 1):
        lowest[:, :-ahead] = torch.minimum(lowest[:, :-ahead], padded[:, ahead:])
    return lowest.masked_fill(~real, 0.0)


def confidence_gate(entropy: Tensor, mask: Tensor, gamma: float, W: int,
                    max_entropy: float | Tensor | None = None) -> Tensor:
    """(B, T) omega = clip(1 - gamma * H_hat, 0.1, 1) on real tokens, 0 on pads. Eq. 5, 6, 8.

    `entropy` (B, T) is the teacher's, in nats. `max_entropy` is the largest raw entropy of the whole step where that
    spans more than this tensor [D2]. The denominator is the maximum BEFORE the lookahead, at least 1 nat [D1].
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and not negative, got {gamma}")
    ahead = lookahead_min(entropy, mask, W)  # (B, T); Alg. 1, line 11, 12, 13
    raw_max = entropy[mask.bool()].max() if max_entropy is None else torch.as_tensor(max_entropy).to(entropy)  # ()
    _check("max_entropy", raw_max, ())
    if not raw_max.isfinite():
        raise ValueError("entropy or max_entropy is infinite")
    H_hat = ahead / raw_max.clamp(min=1.0)  # (B, T), in [0, 1]; Alg. 1, line 14
    omega = (1.0 - gamma * H_hat).clamp(0.1, 1.0)  # (B, T); Alg. 1, line 15
    return omega.masked_fill(~mask.bool(), 0.0)


def evidence_magnitude(teacher_logp: Tensor, student_logp: Tensor, direction: Tensor, eps: float = 0.2) -> Tensor:
    """(B, T) w = clip(exp(D * delta), 1 - eps, 1 + eps), detached, from two (B, T) log-probabilities in nats. Eq. 2.

    `direction` is D = sign(A), (B,). D = 0 gives w = 1 [D5]. There is no mask here: pads must hold numbers too.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    _check("teacher_logp", teacher_logp, ("B", "T"))
    _check("student_logp", student_logp, teacher_logp.shape)
    _check("direction", direction, teacher_logp.shape[:1])
    D = direction.to(teacher_logp)[:, None]  # (B, 1)
    delta = (teacher_logp - student_logp).detach()  # (B, T); Alg. 1, line 16
    exponent = torch.where(D == 0, 0.0, D * delta)  # not 0 * inf
    return exponent.exp().clamp(1.0 - eps, 1.0 + eps)  # (B, T); Alg. 1, line 17


def token_advantages(advantages: Tensor, magnitude: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
    """(B, T) A_hat = A * w * omega, detached, 0 on pads; `advantages` is (B,), the others (B, T). Eq. 7."""
    _check_mask(mask)
    _check("advantages", advantages, mask.shape[:1])
    _check("magnitude", magnitude, mask.shape, mask)
    _check("gate", gate, mask.shape, mask)
    A_hat = advantages[:, None] * magnitude * gate  # (B, T); Alg. 1, line 18
    return A_hat.masked_fill(~mask.bool(), 0.0).detach()


# The head is most of a naive trainer's memory: [N, V] float32 logits of 4 x 1,024 tokens are 2.5 GB at V = 151,936,
# and autograd keeps several such tensors. Here `chunk` tokens are multiplied by 8,192 rows of the head at a time, and
# only the running sums of an online softmax outlive a tile. The student needs no autograd in here either:
#     d log p(y) / d hidden = head[y] - sum_v p(v) head[v]
VOCAB_TILE = 8_192  # ours: 640 tokens, d 512, V 151,936 on two CPU cores: 2.1 s, all of V at once 2.8 s; GPU unmeasured


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32: logits rounded to bfloat16 would blur each delta by up to 0.1 nat."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _head_pass(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int,
               gradient: bool) -> tuple[Tensor, Tensor]:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be (N, d), head_weight {tuple(head_weight.shape)} (V, d)")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number of tokens, at least 1, got {chunk}")
    (N, d), V = hidden.shape, head_weight.shape[0]
    _check("hidden", hidden, (N, d))
    _check("targets", targets, (N,))
    if targets.is_floating_point() or N and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        raise ValueError(f"targets must be token ids in [0, {V})")
    all_logp = hidden.new_empty(N, dtype=torch.float32)  # (N,)
    extra = hidden.new_empty((N, d) if gradient else (N,), dtype=torch.float32)  # dlogp/dhidden or H
    for rows in torch.arange(N, device=hidden.device).split(chunk):
        h, head_y = hidden[rows], head_weight[targets[rows]].float()  # (n, d), (n, d)
        z_y = (h.float() * head_y).sum(1, keepdim=True)  # (n, 1), the target's logit
        top = h.new_full((len(rows), 1), -1e30, dtype=torch.float32)  # running maximum; finite, as -inf - -inf is NaN
        total = torch.zeros_like(top)  # sum_v e^(z_v - top)
        moment = h.new_zeros(h.shape if gradient else (len(rows), 1), dtype=torch.float32)
        for tile in head_weight.split(VOCAB_TILE):  # (v, d)
            z = _matmul(h, tile.T)  # (n, v)
            new_top = torch.maximum(top, z.amax(1, keepdim=True))
            shift = top - new_top  # <= 0: the old sums shrink by e^shift
            z -= new_top
            e = z.exp()  # (n, v)
            if gradient:  # moment = sum_v e^(z_v - top) head[v]
                moment = moment * shift.exp() + _matmul(e.to(tile.dtype), tile)
            else:  # moment = sum_v e^(z_v - top) (z_v - top)
                moment = (moment + shift * total) * shift.exp() + (z * e).sum(1, keepdim=True)
            total = total * shift.exp() + e.sum(1, keepdim=True)
            top = new_top
        all_logp[rows] = (z_y - top - total.log()).squeeze(1)
        extra[rows] = head_y - moment / total if gradient else (total.log() - moment / total).squeeze(1)
    _check("head_weight or hidden", all_logp, (N,))
    return all_logp, extra


@torch.no_grad()
def logprob_and_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(N,) log p(target) and (N,) entropy in nats, float32, of softmax(hidden @ head_weight.T). Eq. 4.

    `hidden` (N, d), `head_weight` (V, d), `targets` (N,) token ids; `chunk` tokens are treated at a time.
    """
    return _head_pass(hidden, head_weight, targets, chunk, gradient=False)


@torch.no_grad()
def logprob_and_gradient(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(N,) log p(target) and its (N, d) gradient with respect to `hidden`, head[y] - E_softmax[head]; float32.

    Shapes as in logprob_and_entropy. Eq. 7 is then one call: hidden.backward(-(A_hat / M)[:, None] * gradient).
    """
    return _head_pass(hidden, head_weight, targets, chunk, gradient=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: the step's problems, an engine with the current adapter, completions, rewards


def next_problems(problems: list[dict], tokenizer, s: Settings, position: int) -> tuple[list[dict], int, list[str]]:
    """The problems of one step with their prompts, the data position after them, the ids of those that do not fit."""
    batch, skipped = [], []
    while len(batch) < s.batch_size // s.rollouts_per_prompt:
        epoch, place = divmod(position, len(problems))
        row = problems[epoch_order(s.seed, epoch, len(problems))[place]]
        position += 1
        row = {**row, "prompt_ids": encode_prompt(tokenizer, fill(s.student_prompt, row), s.thinking),
               "teacher_ids": encode_prompt(tokenizer, fill(s.teacher_prompt, row), s.thinking)}
        if max(len(row["prompt_ids"]), len(row["teacher_ids"])) + s.max_completion <= s.max_length:
            batch.append(row)
            continue
        skipped.append(row["id"])  # [D10] never cut, since a cut reference is a different experiment
        if not batch and len(skipped) >= 2 * len(problems):  # a whole epoch at least, wherever this step began
            fail(f"no problem fits: prompt and --max_completion {s.max_completion} exceed --max_length {s.max_length}")
    return batch, position, skipped


def start_engine(s: Settings, model, ends: list[int], device: torch.device, engine: str,
                 tp: int) -> tuple[Draw, Callable[[], None]]:
    """-> draw(prompts, seeds, temperature=, top_p=, top_k=, max_new=), and push(), which loads the current adapter.

    vLLM runs inside this process (colocated) and reads the adapter from a folder, in memory where there is a RAM disk.
    It is never merged: bfloat16 would round the update away. The prefix cache goes with each push, or the engine would
    serve what older weights computed.
    """
    if engine == "hf":
        return functools.partial(sample, functools.partial(hf_generate, model, ends), tp), lambda: None
    llm = start_vllm(s.model, device, tp, s.max_length, s.lora_r, trust_remote_code=s.trust_remote_code,
                     kv_cache_memory_bytes=kv_cache_bytes(s, model.config, device, tp), max_num_seqs=s.batch_size,
                     gpu_memory_utilization=0.05)  # the line above decides, but this share must be free at the start
    from vllm.lora.request import LoRARequest
    need = 8 * sum(p.numel() for p in trainable(model).values())  # twice its size: a container may have only 64 MB
    in_ram = os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > need
    shelf, name = Path("/dev/shm") if all(gather([in_ram])) else Path(s.out).resolve(), str(Path(s.out).resolve())
    folder = shelf / f".egrsd-{hashlib.sha256(name.encode()).hexdigest()[:12]}-{os.environ.get('GROUP_RANK', 0)}"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def push() -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            model.save_pretrained(folder, save_embedding_layers=False)
        barrier()  # written before anyone reads
        llm.llm_engine.add_lora(LoRARequest("student", 1, str(folder), load_inplace=True))
        if not llm.reset_prefix_cache():
            fail("the rollout engine kept its prefix cache, which older weights computed")
        barrier()  # read before anyone writes again

    # without load_inplace, which would read the folder again for every token
    generate = functools.partial(vllm_generate, llm, LoRARequest("student", 1, str(folder)), ends)
    return functools.partial(sample, generate, tp), push


def roll_out(draw: Draw, batch: list[dict], tokenizer, ends: list[int], step: int | str, s: Settings,
             offset: int = 0, **how: object) -> list[dict]:
    """Sample and grade a completion for each row of `batch`. -> rollouts, on every rank, numbered from `offset` on.

    A rollout is its row (id, problem, solution, answer, prompt_ids, teacher_ids) and step, index, seed, completion_ids,
    engine_logps (nats), text, graded_text, truncated, reward, correct, extracted, status; train() adds advantage.
    """
    seeds = [rollout_seed(s.seed, step, offset + i) for i in range(len(batch))]
    drawn = draw([row["prompt_ids"] for row in batch], seeds, max_new=s.max_completion, **how)  # Alg. 1, line 3
    rollouts = [{**row, "step": step, "index": index, "seed": seed, "completion_ids": ids, "engine_logps": logps,
                 **read_completion(tokenizer, row["prompt_ids"], ids, ends)}
                for index, (row, seed, (ids, logps)) in enumerate(zip(batch, seeds, drawn), offset)]
    rank, world = rank_and_world()
    mine = range(rank, len(rollouts), world)  # each rank grades its share
    for i, (reward, grade) in gather(list(zip(mine, compute_rewards([rollouts[i] for i in mine], s)))):
        rollouts[i] |= {"reward": reward, "correct": grade.correct, "extracted": grade.answer, "status": grade.status}
    return rollouts


def compute_rewards(rollouts: list[dict], s: Settings) -> list[tuple[float, Grade]]:
    """THE PLACE TO SWAP THE REWARD: rollouts (graded_text, answer, completion_ids, ...) -> (r, what to log) of each.

    Only r trains; the Grade (correct, answer, status) is for the log. Steps 0 to 9 subtract 0.5 from r, which suits
    rewards between 0 and 1.5: see RewardStats.advantages. For plain correctness --beta_L 0 is enough.
    """
    grades = grade_completions([r["graded_text"] for r in rollouts], [r["answer"] for r in rollouts])
    return [(shaped_reward(grade.correct, len(r["completion_ids"]), s.max_completion, s.beta_L), grade)
            for r, grade in zip(rollouts, grades)]  # Alg. 1, line 4


def evaluate(name: str, rows: list[dict], draw: Draw, tokenizer, ends: list[int], s: Settings) -> dict[str, float]:
    """Accuracy in % and mean length in tokens on held-out rows, one sample each at temperature 1, top-p 0.95."""
    done = []
    with progress(total=len(rows), desc=f"evaluate {name}", unit="problem") as bar:
        for start in range(0, len(rows), 256):
            done += roll_out(draw, rows[start : start + 256], tokenizer, ends, "evaluation", s, start,
                             temperature=1.0, top_p=0.95, top_k=0)
            bar.update(len(done) - bar.n)
            bar.set_postfix(right=f"{sum(r['correct'] for r in done) / len(done):.1%}")
    return {"accuracy": round(100 * sum(r["correct"] for r in done) / len(done), 2),
            "length": round(sum(len(r["completion_ids"]) for r in done) / len(done), 2), "samples": len(done)}


# ---------------------------------------------------------------------------------------------------------------------
# The two passes: teacher without gradient, student with. What a step computes depends on its rollouts alone.


def pad(rows: list, device: torch.device | str = "cpu") -> Tensor:
    """(B, T) from B lists or 1-D tensors, right-padded with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True).to(device)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Row indices, longest first, in groups whose padded tokens stay within the budget, but for a single longer row."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def completion_hidden(model, prompts: list[list[int]], completions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(N, d) hidden states and the (N,) completion tokens that they predict, row after row: only these reach the head.

    Right padding and no attention mask: attention is causal, so that no token sees the pads, which come after it.
    """
    ids = pad([p + y for p, y in zip(prompts, completions)], head_of(model).device)  # (b, L)
    rows = list(zip(hidden_states(model, ids), ids, map(len, prompts), map(len, completions)))  # of (L, d), (L,), ...
    return torch.cat([h[p - 1 : p + n - 1] for h, _, p, n in rows]), torch.cat([i[p : p + n] for _, i, p, n in rows])


@torch.no_grad()
def teacher_pass(model, rollouts: list[dict], s: Settings) -> tuple[Tensor, Tensor]:
    """(B, T) log p_T(y) and H, in nats, of the frozen teacher: adapter off, reference shown. NaN where not finite."""
    head, logps, entropies = head_of(model), [None] * len(rollouts), [None] * len(rollouts)
    lengths = [len(r["teacher_ids"]) + len(r["completion_ids"]) for r in rollouts]
    with model.disable_adapter():
        for rows in micro_batches(lengths, s.micro_batch_tokens):
            completions = [rollouts[i]["completion_ids"] for i in rows]
            hidden, y = completion_hidden(model, [rollouts[i]["teacher_ids"] for i in rows], completions)  # (N, d)
            if hidden.isfinite().all():
                logp, H = logprob_and_entropy(hidden / s.logit_temperature, head, y, s.head_chunk)  # (N,), (N,) [D3]
            else:  # no exception, which would leave the other ranks waiting: train() looks for NaN
                logp = H = hidden.new_full((len(y),), math.nan, dtype=torch.float32)
            sizes = [len(completion) for completion in completions]
            for i, row_logp, row_H in zip(rows, logp.split(sizes), H.split(sizes)):
                logps[i], entropies[i] = row_logp, row_H
    return pad(logps, head.device), pad(entropies, head.device)


def accumulate_gradient(model, rollouts: list[dict], s: Settings) -> dict[str, float | None]:
    """Leave the gradient of the whole step in .grad, on every rank; -> the whole step's figures. Alg. 1, lines 7 to 19.

    `rollouts` are those of all ranks, in the same order on each, with prompt_ids, teacher_ids, completion_ids,
    engine_logps, correct and advantage. Each rank takes an equal share of them. The maximum of Eq. 5 and the token
    count of Eq. 7 span the step [D2], so that ranks and micro-batches change nothing but rounding.
    """
    rank, world = rank_and_world()
    mine = sorted(rollouts, key=lambda r: len(r["completion_ids"]))[rank::world]  # no rank gets all the long ones
    head = head_of(model)
    lengths = torch.tensor([len(r["completion_ids"]) for r in mine], device=head.device)  # (B,)
    mask = torch.arange(int(lengths.max()), device=head.device) < lengths[:, None]  # (B, T)
    M = sum(len(r["completion_ids"]) for r in rollouts)
    A = torch.tensor([r["advantage"] for r in mine], device=head.device)  # (B,)

    model.eval()
    teacher_logp, H = teacher_pass(model, mine, s)  # (B, T); Alg. 1, line 7, 8, 9, 10 (p_S of line 7 is below)
    H_max = reduce_(H[mask].nan_to_num(math.inf, math.inf).max(), "MAX")  # () over all ranks [D2]
    if not H_max.isfinite():  # the same on every rank, so that none is left waiting
        return {"loss": math.nan}
    omega = confidence_gate(H, mask, s.gamma, s.W, H_max)  # (B, T)

    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)  # not None: every rank joins the reduction, even one whose passes all fail
    model.train(s.gradient_checkpointing)  # transformers checkpoints only in training mode
    sums = dict.fromkeys(("loss", "magnitude", "clipped", "delta_right", "delta_wrong", "right", "canary"), 0.0)
    for rows in micro_batches([len(r["prompt_ids"]) + len(r["completion_ids"]) for r in mine], s.micro_batch_tokens):
        part, real = [mine[i] for i in rows], mask[rows]  # real: (b, T)
        hidden, y = completion_hidden(model, [r["prompt_ids"] for r in part], [r["completion_ids"] for r in part])
        hidden = hidden / s.logit_temperature  # (N, d): divides the logits and scales the gradient [D3]
        if not hidden.isfinite().all():
            sums["loss"] = math.nan  # train() sees it on every rank
            continue
        logp, dlogp = logprob_and_gradient(hidden.detach(), head, y, s.head_chunk)  # (N,), (N, d); log p_S [D6]
        student_logp = torch.zeros_like(H[rows]).masked_scatter_(real, logp)  # (b, T)
        w = evidence_magnitude(teacher_logp[rows], student_logp, A[rows].sign(), s.eps)  # (b, T) [D5]
        A_hat = token_advantages(A[rows], w, omega[rows], real)[real]  # (N,)
        loss = -A_hat * logp / M  # (N,), its sum over the step is the loss; Alg. 1, line 19
        hidden.backward((-(A_hat / M)[:, None] * dlogp).to(hidden.dtype))  # dL/dhidden, with A_hat a constant

        # the rest of this loop only fills the log
        raw = logp  # (N,) at temperature 1, as the engine's
        if s.logit_temperature != 1:
            raw, _ = logprob_and_entropy(hidden.detach() * s.logit_temperature, head, y, s.head_chunk)
        engine_logp = torch.tensor(sum((r["engine_logps"] for r in part), []), device=head.device)  # (N,)
        right = torch.tensor([r["correct"] for r in part], device=head.device)[:, None].expand_as(real)[real]  # (N,)
        delta, w = teacher_logp[rows][real] - logp, w[real]
        for name, value in {"loss": loss, "magnitude": w, "clipped": (w <= 1 - s.eps) | (w >= 1 + s.eps),
                            "delta_right": delta * right, "delta_wrong": delta * ~right, "right": right,
                            "canary": (raw - engine_logp).abs()}.items():
            sums[name] += value.double().sum().item()
    model.eval()
    if world > 1:  # one flat all-reduce of the adapter's gradient; no DDP, which switching adapters would upset
        grads = [p.grad for p in trainable(model).values()]
        flat = reduce_(torch.cat([g.flatten() for g in grads]))
        for g, whole in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(whole.view_as(g))
    sums |= {"entropy": H[mask].double().sum().item(), "gate": omega[mask].double().sum().item()}
    total = dict(zip(sums, reduce_(torch.tensor([*sums.values()], dtype=torch.float64)).tolist()))
    right = total.pop("right")  # tokens of right rollouts
    figures = {name: value / M for name, value in total.items()}
    figures["delta_right"] = total["delta_right"] / right if right else None  # None: there is no such token
    figures["delta_wrong"] = total["delta_wrong"] / (M - right) if right < M else None
    return {**figures, "loss": total["loss"], "entropy_max": H_max.item()}


def probe_engine(draw: Draw, push: Callable[[], None], model, prompts: list[list[int]], s: Settings) -> str:
    """Prove that pushes arrive: with a random adapter the engine must agree with the trainer, and not with the base.

    train() compares the engine's log-probabilities with the trainer's at each step (the canary), but early updates are
    tiny: a push that gets lost would show there only many steps later.
    """
    kept = {name: p.detach().clone() for name, p in trainable(model).items()}
    noise = torch.Generator().manual_seed(s.seed)
    for name, p in trainable(model).items():
        if "lora_B" in name:
            p.data.copy_(0.02 * torch.randn(p.shape, generator=noise))
    push()
    drawn = draw(prompts, [*range(len(prompts))], temperature=1.0, top_p=1.0, top_k=0, max_new=16)
    engine_logp = torch.tensor(sum((logps for _, logps in drawn), []), device=model.device)  # (N,)
    distance = []
    for adapter in (contextlib.nullcontext(), model.disable_adapter()):
        with torch.no_grad(), adapter:
            hidden, y = completion_hidden(model, prompts, [ids for ids, _ in drawn])
        logp, _ = logprob_and_entropy(hidden, head_of(model), y, s.head_chunk)
        distance.append((logp - engine_logp).abs().mean().item())
    for name, p in trainable(model).items():
        p.data.copy_(kept[name])
    if not distance[0] < 0.5 * distance[1]:
        fail("the rollout engine does not use the adapter that was pushed: with a random one its log-probabilities are "
             f"{distance[0]:.2g} nats from the trainer's and {distance[1]:.2g} from the base model's. Try --rollout hf")
    return f"a random adapter reached the engine: {distance[0]:.0e} nats from trainer, {distance[1]:.0e} from base"


def find_culprits(model, rollouts: list[dict], s: Settings) -> list[str]:
    """The rollouts whose own two passes, alone, are not finite."""
    rank, world = rank_and_world()
    bad = []
    for r in rollouts[rank::world]:
        model.zero_grad()
        hidden, _ = completion_hidden(model, [r["prompt_ids"]], [r["completion_ids"]])
        hidden.sum().backward()
        values = [*teacher_pass(model, [r], s), hidden, *(p.grad for p in trainable(model).values())]
        if not all(value.isfinite().all() for value in values):
            bad.append(f"rollout {r['index']} of problem {r['id']}")
    return gather(bad)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(s: Settings) -> None:
    """The whole run: load, show, evaluate, Algorithm 1 step by step, evaluate."""
    began, stopped = time.perf_counter(), stop_on_signals()
    out, rank0 = Path(s.out), rank_and_world()[0] == 0
    device = start_processes(s.threads)
    check_place(s, device)
    checkpoint = open_run(s)  # deletes nothing yet
    problems, tokenizer = load_problems(s.data, s), load_tokenizer(s)
    held_out = load_held_out(tokenizer, s) if s.eval_data else []
    base = load_base(s, device)
    check_head(base, s)
    ends, model = end_tokens(base, tokenizer), add_adapter(base, s)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=s.lr, betas=(0.9, 0.999), weight_decay=0.0)  # [D11]
    stats, log = RewardStats(), []
    start, position = load_checkpoint(checkpoint, model, optimizer, stats) if checkpoint else (0, 0)
    summary = read_json(out / "summary.json", {}) if checkpoint else {}
    if checkpoint and start >= s.steps and (summary.get("steps") == start or not held_out):
        say(f"{out} is finished, with {start} steps. --steps N goes further, another --out starts anew")
        return

    engine, why = choose_engine(s, device)
    tp = tensor_parallel(s, model.config) if engine == "vllm" else 1
    batch, _, _ = next_problems(problems, tokenizer, s, position)  # to show and to probe with; the loop draws it again
    files = show_start(s, batch[0], tokenizer, f"{engine} ({why})", device, tp,
                       memory_estimate(model, s, engine, device, tp, VOCAB_TILE)) if rank0 else {}
    draw, push = start_engine(s, model, ends, device, engine, tp)
    if engine == "vllm":
        few = [row["prompt_ids"] for row in batch[: max(8, rank_and_world()[1])]]
        say(probe_engine(draw, push, model, few, s))
    if rank0:  # not before: an engine that does not start must not cost the run that was there
        log = clear_run(s, checkpoint, start)
        for name, text in files.items():
            write_text(out / name, text)
    push()  # what step `start` rolls out with
    if held_out and "before" not in summary and not start:  # later it would be the trained adapter's
        summary["before"] = evaluate("before", held_out, draw, tokenizer, ends, s)
        if rank0:
            write_json(out / "summary.json", summary)

    bar, wandb = progress(total=s.steps, initial=start, desc="train", unit="step"), start_wandb(s)
    limit = 1e-3 if head_of(model).dtype == torch.float32 else 0.1  # float32 agrees to 1e-6; bfloat16 rounds
    how = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    for step in range(start, s.steps):
        clock, position_before = [time.perf_counter()], position
        batch, position, skipped = next_problems(problems, tokenizer, s, position)  # Alg. 1, line 1
        batch = [row for row in batch for _ in range(s.rollouts_per_prompt)]  # Alg. 1, line 2
        rollouts = roll_out(draw, batch, tokenizer, ends, step, s, **how)  # every rank gets all of them
        rewards = [r["reward"] for r in rollouts]
        for r, A in zip(rollouts, stats.advantages(rewards, step).tolist()):  # Alg. 1, line 5, 6
            r["advantage"] = A
        clock.append(time.perf_counter())
        figures = accumulate_gradient(model, rollouts, s)  # fills p.grad: Algorithm 1 from line 7 to line 19
        norm = torch.nn.utils.clip_grad_norm_(trainable(model).values(), s.max_grad_norm).item()
        clock.append(time.perf_counter())
        if not math.isfinite(norm + figures["loss"]):
            save_checkpoint(model, optimizer, stats, step, position_before, s)
            culprits = ", ".join(find_culprits(model, rollouts, s)) or "no single rollout"
            fail(f"step {step}: the loss or its gradient is not finite. Not finite alone: {culprits}. {out} holds the "
                 "state before this step. Remove these problems, or start a new run with a lower --lr")
        if not figures["canary"] <= limit:  # NaN too
            fail(f"step {step}: the rollout engine's log-probabilities are {figures['canary']:.2g} nats a token from "
                 f"the trainer's (limit {limit}): it runs other weights. The checkpoints are sound; try --rollout hf")
        optimizer.step()  # Alg. 1, line 20
        figures |= {"running_mean": stats.mean, "running_std": stats.std, "grad_norm": norm}
        stats.update(rewards)  # Alg. 1, line 21
        push()
        clock.append(time.perf_counter())

        row = log_row(step, rollouts, skipped, figures, clock, device)
        halt = int(reduce_(torch.tensor(len(stopped)), "MAX")) > 0  # the ranks may see a signal in different steps
        save = halt or (step + 1) % s.save_every == 0 or step + 1 == s.steps
        if rank0:
            record_step(row, rollouts, log, save, wandb, s)
        bar.update()
        bar.set_postfix(reward=f"{row['reward']:.2f}", right=f"{row['correct']:.0%}", length=f"{row['length']:.0f}")
        if save:
            save_checkpoint(model, optimizer, stats, step + 1, position, s)
        if halt:
            say(f"stopped and saved after step {step}, in {out}/step_{step + 1}; --resume goes on from here")
            return
    bar.close()

    if held_out:
        summary["after"] = evaluate("after", held_out, draw, tokenizer, ends, s)
        say("\n          accuracy   length")
        for when in [when for when in ("before", "after") if when in summary]:
            say(f"{when:<8} {summary[when]['accuracy']:>7.1f} % {summary[when]['length']:>8.1f}")
    if rank0:
        phases = {name: round(sum(row["seconds"][name] for row in log), 1) for name in PHASES}
        write_json(out / "summary.json", {**summary, "steps": max(start, s.steps),
                                          "seconds": {**phases, "total": round(time.perf_counter() - began, 1)}})
    if s.steps:
        say(f"adapter {latest_checkpoint(s)}, log {out}/log.jsonl, curves {out}/curves.png")


if __name__ == "__main__":
    with ending_together():
        train(parse_settings())
