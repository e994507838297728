"""
EGRSD and CL-EGRSD: Entropy-Guided Reinforced Self-Distillation (arXiv:2605.13255), in one file.

A reasoning model samples its own solutions. The same model with its adapter off, shown the
reference solution, is the teacher. Each sampled token is then pushed up or down by three signals:

    A_hat[i,t] = A[i] * w[i,t] * omega[i,t]
    loss       = -1/M * sum over i, t of A_hat[i,t] * log p_theta(y[i,t])

    direction   A      did this answer earn more reward than usual?                        Eq. 9
    magnitude   w      does the teacher favour that direction more than the student does?  Eq. 2
    confidence  omega  is the teacher's distribution concentrated, by its entropy at t
                       (EGRSD) or by the lowest within the next W tokens (CL-EGRSD)?       Eq. 6, 8

    python egrsd.py --preset tiny                            # a laptop, no GPU, no network, minutes
    torchrun --nproc_per_node 8 egrsd.py --gamma 1.0 --W 5   # the paper's CL-EGRSD on Qwen3-8B

Symbols (the paper's)                          Shapes
    x, s*  problem, its reference solution         B  rollouts
    y      sampled completion, |y| its length      T  tokens of the longest completion
    r, A   reward, advantage; D = sign(A)          N  completion tokens, row after row, without pads
    p_T    teacher: adapter off, sees x and s*     n  those of one micro-batch or chunk
    p_S    student: adapter on, sees x             V  vocabulary, v a tile of it; d hidden size
    H      teacher entropy in nats                 L  tokens of prompt and completion
    delta  log p_T(y) - log p_S(y), in nats        M  completion tokens of the whole step
    gamma  strength of the gate                    W  lookahead in tokens
                                                   U  rows of the head, (V, d)
In code `s` is the settings. A rollout is a dictionary, see roll_out, and often `r`: its reward is
r["reward"].

The file reads as the data flow: settings, problems, rollout, reward, forward pass, head, gate, the
step, training. "Alg. 1, line n" marks each line of Algorithm 1 once, in order. Where the paper is
silent, or says two things, we had to decide. A tag marks where, here, in support/ or in
diagnostics.py (README has the questions):
    D1   the gate divides by the step's highest entropy before the lookahead, at least 1 nat
    D2   a "batch" is the whole optimizer step: all ranks, all micro-batches
    D3   log-probabilities and entropies are at temperature 1, whatever the sampling
    D4   rewards are whitened by all earlier ones; steps 0 to 9 use r - 0.5; sigma < 1e-6 means 1
    D5   sign(0) = 0: no update
    D6   p_S inside w is that of the same forward pass, detached; no importance ratio
    D7   one user turn for each role; the teacher's adds the reference and a transition
    D8   training does not think by default, eval.py does
    D9   a sampled end token is a completion token
    D10  a problem that does not fit is skipped and named, never cut
    D11  AdamW, constant rate, no decay; float32 adapter, bfloat16 base; pushed, never merged
    D12  the last box after the final </think> is graded
    D13  logits must be hidden @ U.T: another head is refused
    D14  diagnostics.py: the reference is the worked solution, else a right completion, else the
         bare answer
    D15  diagnostics.py: a "batch" is the training step, or else 32 completions

What is not the method is in support/: processes, files, loading, grading, the run's folder and log.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.shared import console, data, engines, models, processes, sizes
from support.shared.grading import Grade, grade_completions
from support.shared.options import make_parser, opt
from support.training import guards, journal, opening, rules, run_folder, tensors

ROOT = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# Settings: one dataclass, one parser. Each default is followed by where it comes from.

CLOSING = "Reason step by step, and put your final answer within \\boxed{}."
STUDENT_PROMPT = "Problem: {problem}\n\n" + CLOSING
TEACHER_PROMPT = (
    "Problem: {problem}\n\n"
    "Here is a reference solution to this problem.\n"
    "=== Reference solution begins ===\n"
    "{solution}\n"
    "=== Reference solution ends ===\n\n"
    "Make sure that you understand every step of the reference. Then solve the problem again, and "
    "derive the same answer in your own words.\n\n" + CLOSING
)

PRESETS = {
    "qwen3-8b": {},  # the defaults below; its CL-EGRSD is --gamma 1.0 --W 5 (Table A2)
    "qwen3-4b": {"model": "Qwen/Qwen3-4B"},  # its CL-EGRSD is --gamma 0.3 --W 3 (Table A2)
    # gamma: Table A4, which names no W; Appendix J names neither. The rest is Qwen3-8B's, so ours.
    "acereason-7b": {"model": "nvidia/AceReason-Nemotron-7B", "gamma": 0.5, "W": 5},
    "olmo3-7b": {"model": "allenai/Olmo-3-1025-7B", "gamma": 1.0, "W": 5},
    "tiny": {  # ours, all of it: a 247k-parameter Qwen3 that tiny/make.py trained on arithmetic
        "model": str(ROOT / "tiny"),
        "data": str(ROOT / "tiny" / "train.jsonl"),
        "eval_data": str(ROOT / "tiny" / "test.jsonl"),
        "student_prompt": "{problem}",
        "teacher_prompt": "{problem} Reference : {solution} Solve it in your own way .",
        "gamma": 1.0,
        "W": 5,
        "lr": 2e-3,
        "batch_size": 64,
        "max_completion": 96,
        "max_length": 256,
        "lora_r": 16,
        "lora_alpha": 32,
        "threads": 1,
    },
}


@dataclasses.dataclass
class Settings:
    preset: str = opt("run", "qwen3-8b", "what goes with a model", *PRESETS)  # ours
    out: str = opt("run", "", "run folder; by default runs/PRESET")  # ours
    resume: bool = opt("run", False, "go on with the run in --out, with its settings")  # ours
    overwrite: bool = opt("run", False, "delete the run that --out already holds")  # ours
    steps: int = opt("run", 100, "optimizer steps")  # Table A1
    save_every: int = opt("run", 25, "steps between checkpoints")  # Table A1
    seed: int = opt("run", 0, "seed of adapter, data order and rollouts")  # ours
    curves: bool = opt("run", True, "draw curves.png")  # ours
    wandb: str = opt("run", "", "also log to this Weights & Biases project")  # ours
    rank_timeout: int = opt("run", 1_800, "seconds that a rank may hang, 0 = no limit")  # ours

    model: str = opt("model", "Qwen/Qwen3-8B", "hub id or local folder")  # section 5.1
    lora_r: int = opt("model", 64, "rank of the adapter")  # section 5.1
    lora_alpha: int = opt("model", 128, "the adapter is scaled by alpha / r")  # section 5.1
    lora_targets: str = opt(
        "model",
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "modules with an adapter",
    )  # section 5.1
    attn: str = opt("model", "sdpa", "attention", "sdpa", "flash_attention_2", "eager")  # ours
    gradient_checkpointing: bool = opt("model", False, "less memory, slower")  # ours
    shard: bool = opt("model", False, "frozen layers spread over a machine's GPUs")  # ours
    trust_remote_code: bool = opt("model", False, "run Python code that comes with it")  # ours
    threads: int = opt("model", 0, "CPU threads of torch, 0 = torch decides")  # ours

    data: str = opt(
        "data", "siyanzhao/Openthoughts_math_30k_opsd", "hub id, or .json, .jsonl or .parquet file"
    )  # Appendix D
    split: str = opt("data", "train", "its split, if it is on the hub")  # ours: it has no other
    problem_column: str = opt("data", "problem", "column with x (in any case)")  # Appendix D
    solution_column: str = opt("data", "solution", "column with s*, the reference")  # Appendix D
    answer_column: str = opt("data", "Answer", "column with the answer for the reward")  # ours
    eval_data: str = opt("data", "", "held-out problems, answered before and after")  # ours
    eval_split: str = opt("data", "test", "their split, if they are on the hub")  # ours
    eval_before: bool = opt("data", True, "answer them before training too")  # ours
    check_data: bool = opt("data", False, "report on the data, and end: no model, no run")  # ours
    student_prompt: str = opt("data", STUDENT_PROMPT, "what the student is asked")  # D7
    teacher_prompt: str = opt("data", TEACHER_PROMPT, "what the teacher is asked")  # D7
    thinking: bool = opt("data", False, "both contexts in thinking mode, if there is one")  # D8

    gamma: float = opt("method", 0.3, "gate strength, Eq. 6; 0 is RLSD")  # Table A2
    W: int = opt("method", 0, "lookahead in tokens; 0: EGRSD, above: CL-EGRSD")  # Table A2
    eps: float = opt("method", 0.2, "clip of the magnitude, Eq. 2")  # Table A1
    beta_L: float = opt("method", 0.5, "bonus of a short right answer")  # Table A1
    logit_temperature: float = opt("method", 1.0, "that of log p and entropy")  # D3

    batch_size: int = opt("step", 32, "rollouts of one step, over all GPUs")  # Table A1
    rollouts_per_prompt: int = opt("step", 1, "rollouts of one problem")  # Table A1
    lr: float = opt("step", 5e-6, "learning rate of AdamW, constant")  # Table A1, D11
    max_grad_norm: float = opt("step", 0.1, "the gradient is clipped to this norm")  # Table A1
    max_length: int = opt("step", 20_000, "tokens; longer problems are skipped")  # Table A1, D10
    micro_batch_tokens: int = opt("step", 4_096, "padded tokens of one forward pass")  # ours
    head_chunk: int = opt("step", 1_024, "tokens of one pass over the head")  # ours

    engine: str = opt(
        "rollout", "auto", "hf is transformers' generate", "auto", "vllm", "hf"
    )  # ours
    rollout_tp: int = opt("rollout", 0, "GPUs that share an engine, 0 = most that fit")  # ours
    max_completion: int = opt("rollout", 1_024, "cap in tokens, L_max")  # Table A1
    temperature: float = opt("rollout", 1.1, "sampling temperature")  # Table A1
    top_p: float = opt("rollout", 0.95, "nucleus of the sampling")  # Table A1
    top_k: int = opt("rollout", 20, "most tokens that it considers, 0 = all")  # Table A1


# What --resume may change: how far and how fast a run goes. Attention, threads, sizes and sharding
# change rounding alone; another engine also draws other completions from the same seed.
FREE_ON_RESUME = (
    "out resume overwrite steps save_every curves wandb rank_timeout attn gradient_checkpointing "
    "shard threads micro_batch_tokens head_chunk engine rollout_tp check_data trust_remote_code"
).split()


def parse_settings(
    argv: list[str] | None = None, kind: type = Settings, prog: str = "egrsd.py", doc: str = __doc__
) -> Settings:
    """Settings: defaults, then the preset, then (with --resume) the run's own, then the options.

    `kind` is Settings, or a dataclass that adds to it. Exits with status 2 and a sentence where an
    option is unknown or a value makes no sense.
    """
    parser = make_parser(kind, prog, doc)
    # Parsed twice. The first time tells the preset and the run, whose values then become the
    # defaults of the second time, so that an option on the command line always wins.
    first = parser.parse_args(argv)
    out = first.out or f"runs/{first.preset}"
    saved = {}
    if first.resume:
        saved = run_folder.saved_settings(Path(out), vars(kind()), FREE_ON_RESUME)
    parser.set_defaults(**PRESETS[first.preset])
    parser.set_defaults(**saved)
    # These hold for one start: they are not taken over from the run that goes on. No folder may
    # say that its model's code is to be trusted.
    parser.set_defaults(resume=False, overwrite=False, check_data=False, wandb="")
    parser.set_defaults(trust_remote_code=False)
    given = parser.parse_args(argv)
    given.out = out
    fixed = {}
    if run_folder.latest_checkpoint(Path(out)):
        fixed = {name: value for name, value in saved.items() if name not in FREE_ON_RESUME}
    sentence = rules.find_broken_rule(given, fixed, world=processes.rank_and_world()[1])
    if sentence:
        parser.error(sentence)
    return kind(**vars(given))


# --------------------------------------------------------------------------------------------------
# Problems: what student and teacher are asked in one step


def next_problems(
    problems: list[dict], tokenizer, s: Settings, position: int
) -> tuple[list[dict], int, list[str]]:
    """The problems of one step with both prompts, the position after them, the ids of the skipped.

    `position` counts rows since the start of the run; each epoch has an order of its own.
    """
    batch = []
    skipped = []
    while len(batch) < s.batch_size // s.rollouts_per_prompt:  # Alg. 1, line 1
        epoch, place = divmod(position, len(problems))
        order = data.epoch_order(s.seed, epoch, len(problems))
        row = dict(problems[order[place]])
        position += 1
        # The two contexts differ in what is asked, and in nothing else: one user turn in the same
        # chat template, with the same generation prefix. So delta shows what the reference adds
        # (and, as training goes on, what the student's adapter has learned). [D7]
        student = data.fill(s.student_prompt, row)
        teacher = data.fill(s.teacher_prompt, row)
        row["prompt_ids"] = data.encode_prompt(tokenizer, student, s.thinking)
        row["teacher_prompt_ids"] = data.encode_prompt(tokenizer, teacher, s.thinking)
        longest = max(len(row["prompt_ids"]), len(row["teacher_prompt_ids"]))
        if longest + s.max_completion <= s.max_length:
            batch.append(row)
            continue
        # Never cut, since a cut reference is a different experiment. The next one takes its
        # place: a step always has its full batch. [D10]
        skipped.append(row["id"])
        if not batch and len(skipped) >= 2 * len(problems):  # at least one whole epoch
            console.fail(
                f"no problem fits: prompt and --max_completion {s.max_completion} exceed "
                f"--max_length {s.max_length}"
            )
    return batch, position, skipped


# --------------------------------------------------------------------------------------------------
# Rollout: vLLM inside the training process (colocated), with the adapter of the moment
#
# The engine has a copy of the base weights, and after each step the adapter is pushed to it. It is
# not merged into them: in bfloat16 a change of 5e-6 would round away in the sum, and the rounding
# of each merge and unmerge would pile up in the base. The copy that is pushed has the engine's
# dtype, to which autocast rounds it in the passes too. The float32 adapter itself loses nothing.
# [D11]


def roll_out(
    sample: engines.Generate,
    batch: list[dict],
    tokenizer,
    eos_ids: list[int],
    step: int | str,
    s: Settings,
    offset: int = 0,
    **sampling: float,
) -> list[dict]:
    """Sample and grade a completion for each row of `batch`. -> rollouts of all ranks, in order.

    A rollout is its row (id, problem, solution, answer, prompt_ids, teacher_prompt_ids) and step,
    index (from `offset` on), seed, completion_ids, engine_logps (nats), text, graded_text,
    truncated, reward, correct, extracted, status. train() adds its advantage.
    """
    prompts = [row["prompt_ids"] for row in batch]  # Alg. 1, line 2
    seeds = [engines.rollout_seed(s.seed, step, offset + i) for i in range(len(batch))]
    drawn = list(sample(prompts, seeds, max_new=s.max_completion, **sampling))  # Alg. 1, line 3
    mine = []  # of this rank
    for i, ids, logps in drawn:
        rollout = {**batch[i], "step": step, "index": offset + i, "seed": seeds[i]}
        rollout["completion_ids"] = ids  # with the end token, if it was sampled [D9]
        rollout["engine_logps"] = logps
        # text, graded_text (which begins with <think> if the prompt ended with it), truncated
        rollout.update(data.read_completion(tokenizer, prompts[i], ids, eos_ids))
        mine.append(rollout)
    processes.enter("grading")
    for rollout, (reward, grade) in zip(mine, compute_rewards(mine, s)):
        rollout["reward"] = reward
        rollout["correct"] = grade.correct
        rollout["extracted"] = grade.answer
        rollout["status"] = grade.status
    return sorted(processes.gather(mine), key=lambda rollout: rollout["index"])


def start_engine(
    s: Settings, model, eos_ids: list[int], device: torch.device, engine: str, tp: int
) -> tuple[engines.Generate, Callable[[], None]]:
    """-> sample(prompts, seeds, temperature=, top_p=, top_k=, max_new=), and push().

    Each rank passes the prompts of all ranks and gets (index, ids, log-probabilities) of its own
    share. push() makes the engine use the adapter as it is now.
    """
    if engine == "vllm":
        generate, push = start_colocated_vllm(s, model, eos_ids, device, tp)
    else:
        generate = functools.partial(engines.hf_generate, model, eos_ids, together=s.shard)

        def push() -> None:
            """transformers' generate runs the very model that is trained."""

    def sample(prompts: list, seeds: list[int], **sampling) -> Iterable[engines.Completion]:
        # The `tp` ranks of one engine draw the same completions, and each keeps its part of them.
        rank, world = processes.rank_and_world()
        share = range(rank // tp, len(prompts), world // tp)
        work = [prompts[i] for i in share], [seeds[i] for i in share]
        for k, ids, logps in generate(*work, **sampling):
            if k % tp == rank % tp:
                yield share[k], ids, logps

    return sample, push


def start_colocated_vllm(
    s: Settings, model, eos_ids: list[int], device: torch.device, tp: int
) -> tuple[engines.Generate, Callable[[], None]]:
    """-> generate(prompts, seeds, ...) with the adapter, and push(), which loads it anew."""
    cache = engines.kv_cache_bytes(model.config, device, tp, cache_tokens(s, tp))
    llm = start_vllm(
        s.model,
        device,
        tp,
        s.max_length,
        s.lora_r,
        trust_remote_code=s.trust_remote_code,
        max_num_seqs=s.batch_size,
        max_num_batched_tokens=max(8_192, s.batch_size),  # ours; vLLM's own depends on the GPU
        lora_target_modules=models.layer_names(s.lora_targets),  # else it wraps the head too
        kv_cache_memory_bytes=cache,
        gpu_memory_utilization=0.05,  # ours: the line above decides, and so much must be free
    )
    from vllm.lora.request import LoRARequest

    # From here on vLLM loads the trainer's adapter as it is at that moment, from memory: the path
    # of a request is never opened.
    engines.lend_adapter(llm, model)

    def push() -> None:
        new = llm.llm_engine.add_lora(LoRARequest("student", 1, "memory", load_inplace=True))
        # Without this the engine would serve what older weights computed: the prefix cache is
        # keyed by the adapter's name and path, which stay.
        if not (new and llm.reset_prefix_cache()):
            console.fail("the rollout engine kept its old adapter, or what that one had computed")

    # Without load_inplace, which would fetch the adapter again for every token.
    lora = LoRARequest("student", 1, "memory")
    return functools.partial(vllm_generate, llm, lora, eos_ids), push


def cache_tokens(s: Settings, tp: int) -> int:
    """Tokens that one vLLM engine's cache has room for.

    Its rollouts of a step and as much again for their prompts, or one sequence of full length. No
    more, since training needs the memory.
    """
    world = processes.rank_and_world()[1]
    in_flight = s.batch_size * tp // world * 2 * s.max_completion
    return max(s.max_length, in_flight)


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as the largest rank


def start_vllm(
    model: str, device: torch.device, tp: int, max_length: int, lora_r: int = 0, **options: object
):
    """A vLLM engine inside this process, tensor-parallel over `tp` of torchrun's ranks."""
    if lora_r > LORA_RANKS[-1]:
        console.fail(f"an adapter of rank {lora_r}: vLLM serves ranks up to {LORA_RANKS[-1]}")
    on_gpu = device.type == "cuda"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of what we ask for
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else it reports to its authors
    # Kernels of FlashInfer are compiled on the spot, which needs nvcc. Of its sampler, which takes
    # no seeds, no request of ours would make use; its all-reduce has equals in vLLM.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    if not on_gpu:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes longer than it saves
    from vllm import LLM

    if lora_r:
        options["enable_lora"] = True
        options["max_loras"] = 1
        options["max_lora_rank"] = min(r for r in LORA_RANKS if r >= lora_r)
    if processes.rank_and_world()[1] > 1:
        options["distributed_executor_backend"] = "external_launcher"  # torchrun's ranks
    return LLM(
        model=model,
        dtype="bfloat16" if on_gpu else "float32",
        tensor_parallel_size=tp,
        max_model_len=max_length,
        enforce_eager=not on_gpu,
        skip_tokenizer_init=True,  # token ids go in and come out
        seed=0,  # each request brings its own
        load_format="safetensors",  # no pickle is loaded
        logprobs_mode="raw_logprobs",  # comparable with the trainer's, whatever the sampling
        hf_overrides={"head_dtype": "float32"},  # bfloat16 logits near 20 are steps of 1/8
        **options,
    )


def vllm_generate(
    llm,
    lora,
    eos_ids: list[int],
    prompts: list[list[int]],
    seeds: list[int],
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new: int,
) -> Iterable[engines.Completion]:
    """Yield (index, completion ids, raw log-probabilities in nats) as completions end.

    vLLM sees the whole work list at once. A completion depends on its own seed, not on the others.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for index, (prompt, seed) in enumerate(zip(prompts, seeds)):
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k or -1,
            max_tokens=max_new,
            seed=seed,
            stop_token_ids=eos_ids,
            logprobs=0,  # that of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = {"prompt_token_ids": prompt}
        engine.add_request(str(index), tokens, sampling, lora_request=lora)
    while engine.has_unfinished_requests():
        processes.note_progress()
        for done in engine.step():
            ids = list(done.outputs[0].token_ids)
            logps = [at[i].logprob for at, i in zip(done.outputs[0].logprobs, ids)]
            yield int(done.request_id), ids, logps


# --------------------------------------------------------------------------------------------------
# Reward and direction: was this answer better than usual?


def compute_rewards(rollouts: list[dict], s: Settings) -> list[tuple[float, Grade]]:
    """THE PLACE TO SWAP THE REWARD: rollouts -> (reward, what to log) of each.

    A rollout has problem, answer, graded_text, completion_ids, ... Only the reward trains; the
    Grade (correct, answer, status) is for the log. Steps 0 to 9 subtract 0.5 from it, which suits
    rewards between 0 and 1.5: see RewardStats.advantages. For plain correctness --beta_L 0 is
    enough.
    """
    # Right: the last box after the final </think> equals the gold, as math-verify sees it. [D12]
    texts = [r["graded_text"] for r in rollouts]
    golds = [r["answer"] for r in rollouts]
    rewards = []
    for r, grade in zip(rollouts, grade_completions(texts, golds)):
        length = len(r["completion_ids"])
        reward = shaped_reward(grade.correct, length, s.max_completion, s.beta_L)
        rewards.append((reward, grade))
    return rewards


def shaped_reward(correct: bool, length: int, max_completion: int, beta_L: float = 0.5) -> float:
    """r = 1[correct] * (1 + beta_L * (1 - |y| / L_max)), so 1 for a right answer at the cap.

    `length` and `max_completion` (L_max, the completion cap, not the sequence window) are in
    tokens. Section 3.
    """
    if max_completion < 1:
        raise ValueError(f"max_completion must be at least 1, got {max_completion}")
    if not 0 <= length <= max_completion:
        raise ValueError(f"length must be from 0 to max_completion {max_completion}, got {length}")
    return float(correct) * (1.0 + beta_L * (1.0 - length / max_completion))  # Alg. 1, line 4


class RewardStats:
    """Running mean and sample standard deviation (n - 1) of all rewards so far. Eq. 9 [D4]

    Welford's algorithm: one reward at a time, and no difference of two large sums.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._m2 = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        if self.count < 2:
            return 0.0
        return math.sqrt(self._m2 / (self.count - 1))

    def advantages(self, rewards: Iterable[float] | Tensor, step: int) -> Tensor:
        """(B,) A = (r - mean) / std over EARLIER steps: call before update(). Eq. 9 [D4]

        Steps 0..9 use r - 0.5: too little history yet (Appendix B). While std < 1e-6, which means
        that all rewards so far were equal, the difference is divided by 1 instead.
        """
        r = torch.as_tensor(list(rewards), dtype=torch.float64)
        tensors.refuse_nan("rewards", r)
        if step < 10:
            return (r - 0.5).float()
        sigma = self.std if self.std >= 1e-6 else 1.0
        return ((r - self.mean) / sigma).float()  # Alg. 1, line 5, 6

    def update(self, rewards: Iterable[float] | Tensor) -> None:
        rewards = [float(r) for r in rewards]
        if not all(map(math.isfinite, rewards)):
            raise ValueError(f"rewards holds {rewards}, which are not all finite")
        for r in rewards:
            self.count += 1
            distance = r - self.mean
            self.mean += distance / self.count
            self._m2 += distance * (r - self.mean)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self._m2 = float(state["m2"])


# --------------------------------------------------------------------------------------------------
# One model, two roles: with its adapter it is the student, without it the teacher


def add_adapter(base, s: Settings):
    """The student: the frozen base and a fresh LoRA adapter, which PEFT makes float32. [D11]

    Its B is 0, so that student and base start equal. Section 5.1.
    """
    torch.manual_seed(s.seed)  # the same on every rank
    from peft import LoraConfig, get_peft_model

    targets = [name.strip() for name in s.lora_targets.split(",")]
    models.check_targets(base, targets, s.model)
    config = LoraConfig(
        r=s.lora_r, lora_alpha=s.lora_alpha, lora_dropout=0.0, target_modules=targets
    )
    model = models.take_input_as_it_is(get_peft_model(base, config))
    if s.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def as_teacher(model) -> contextlib.AbstractContextManager:
    """Inside `with as_teacher(model):` the adapter is off, and the model is the frozen teacher."""
    return model.disable_adapter()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """The student's own parameters: those of its adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_student(model, folder: Path) -> None:
    """A plain PEFT adapter, which loads anywhere."""
    model.save_pretrained(folder, save_embedding_layers=False)


def load_student(model, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def teacher_state(model) -> dict[str, Tensor]:
    """What a checkpoint must keep of the teacher: nothing, since it is frozen.

    A fork whose teacher moves returns its tensors here.
    """
    return {}


def hidden_states(model, ids: Tensor) -> Tensor:
    """(B, L, d) last hidden states of (B, L) right-padded ids: everything but the head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(base, base.base_model_prefix)
    # No attention mask: attention is causal, so that no token sees the pads, which come after it.
    with models.autocast(ids.device):
        return backbone(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state


def completion_hidden(model, rollouts: list[dict], prompts: str) -> tuple[Tensor, Tensor]:
    """(N, d) hidden states and the (N,) completion tokens that they predict, row after row.

    `prompts` is the key of the prompt ids: "prompt_ids" is what the student sees,
    "teacher_prompt_ids" what the teacher sees. Prompts and pads never reach the head.
    """
    processes.note_progress()
    device = models.head_of(model).device
    sequences = [torch.tensor(r[prompts] + r["completion_ids"]) for r in rollouts]
    ids = pad_sequence(sequences, batch_first=True).to(device)  # (B, L)
    hidden = hidden_states(model, ids)  # (B, L, d)
    kept = []
    targets = []
    for h, row, r in zip(hidden, ids, rollouts):
        start = len(r[prompts])
        end = start + len(r["completion_ids"])
        kept.append(h[start - 1 : end - 1])  # position t predicts token t + 1
        targets.append(row[start:end])
    return torch.cat(kept), torch.cat(targets)


def micro_batches(rollouts: list[dict], prompts: str, budget: int) -> list[list[dict]]:
    """Consecutive groups of at most `budget` padded tokens, but for a single longer row.

    Every rank makes the same number of groups: the ranks of a sharded base gather each layer
    together, so that one with fewer groups would leave the others waiting.
    """
    groups = []
    width = 0  # of the group's longest row
    for r in rollouts:
        length = len(r[prompts]) + len(r["completion_ids"])
        width = max(width, length)
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = length
        groups[-1].append(r)
    most = processes.reduce_(torch.tensor(len(groups)), "MAX").item()
    while len(groups) < min(most, len(rollouts)):  # a rank with fewer splits its largest
        largest = max(groups, key=len)
        i = groups.index(largest)
        half = len(largest) // 2
        groups[i : i + 1] = [largest[:half], largest[half:]]
    return groups


# --------------------------------------------------------------------------------------------------
# The head: from (N, d) hidden states to log-probabilities, without their (N, V) logits
#
# The logits are most of a naive trainer's memory: in float32 those of 4 x 1,024 tokens are 2.5 GB
# at V = 151,936, and autograd keeps several such tensors. Here `chunk` tokens meet a tile of the
# head at a time, and only sums over the vocabulary outlive a tile. The student needs no autograd in
# here either, since with U, the head's rows, the gradient is known in closed form:
#
#     d log p(y) / d hidden = U[y] - sum over k of p(k) U[k]
#
# Two tiles are put together by the share of the second, q = Z_tile / (Z + Z_tile):
#
#     a mean      (1 - q) mean + q mean_tile
#     an entropy  (1 - q) H + q H_tile - q log q - (1 - q) log(1 - q)    (its chain rule)

# Rows of a tile; ours. From 32 MiB on a tile costs a CPU new pages each time: here it is 16 with
# the default chunk. On a GPU each tile costs time of its own: for 4,096 tokens of Qwen3-8B, with
# that chunk, an H100 takes 43 ms with these, 182 with 2,048 rows, 40 with the whole vocabulary.
VOCAB_TILE = {"cpu": 4_096, "cuda": 32_768}


def vocab_tiles(head_weight: Tensor) -> tuple[Tensor, ...]:
    """The (V, d) head in tiles of (v, d)."""
    return head_weight.split(VOCAB_TILE[head_weight.device.type])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32: bfloat16 logits would blur delta by 0.1 nat."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _softmax_of_tile(hidden: Tensor, tile: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, v) logits minus the largest, (n, v) their exponentials, (n,) sums; (n,) log-sum-exp."""
    z = _matmul(hidden, tile.T)
    top = z.amax(1, keepdim=True)
    z -= top
    z.clamp_(min=-80.0)  # e^-80 counts for nothing, and below e^-87 a CPU is 20 times slower
    e = z.exp()
    total = e.sum(1)
    return z, e, total, top.squeeze(1) + total.log()


@torch.no_grad()
def _logprob_and_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(N,) log p(y), (N,) entropy, in nats: the teacher's pass. Without checks; see below."""
    logps = []
    entropies = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):  # (n, d), (n,)
        log_Z = h.new_full((len(h),), -math.inf, dtype=torch.float32)  # (n,) over all tiles so far
        H = torch.zeros_like(log_Z)  # (n,) likewise
        for tile in vocab_tiles(head_weight):  # (v, d)
            z, e, total, log_Z_tile = _softmax_of_tile(h, tile)
            H_tile = total.log() - z.mul_(e).sum(1) / total
            q = torch.sigmoid(log_Z_tile - log_Z)  # 1 for the first tile
            inside = (1 - q) * H + q * H_tile
            H = inside + torch.special.entr(q) + torch.special.entr(1 - q)
            log_Z = torch.logaddexp(log_Z, log_Z_tile)
        z_y = (h.float() * head_weight[y].float()).sum(1)  # (n,) the target's logit
        logps.append(z_y - log_Z)
        entropies.append(H)
    return torch.cat(logps), torch.cat(entropies)


@torch.no_grad()
def _logprob_and_gradient(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(N,) log p(y), (N, d) gradient of it: the student's pass. Without checks; see below."""
    logps = []
    gradients = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):  # (n, d), (n,)
        log_Z = h.new_full((len(h),), -math.inf, dtype=torch.float32)  # (n,) over all tiles so far
        mean_row = torch.zeros_like(h, dtype=torch.float32)  # (n, d) likewise: sum of p(k) U[k]
        for tile in vocab_tiles(head_weight):  # (v, d)
            _, e, total, log_Z_tile = _softmax_of_tile(h, tile)
            mean_of_tile = _matmul(e.to(tile.dtype), tile) / total[:, None]  # (n, d)
            q = torch.sigmoid(log_Z_tile - log_Z)[:, None]  # (n, 1)
            mean_row = (1 - q) * mean_row + q * mean_of_tile
            log_Z = torch.logaddexp(log_Z, log_Z_tile)
        row_y = head_weight[y].float()  # (n, d)
        logps.append((h.float() * row_y).sum(1) - log_Z)
        gradients.append(row_y - mean_row)
    return torch.cat(logps), torch.cat(gradients)


def logprob_and_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(N,) log p(target), (N,) entropy, in nats, of softmax(hidden @ head_weight.T). Eq. 4

    `hidden` (N, d), `head_weight` (V, d), `targets` (N,) token ids; `chunk` tokens at a time. For
    tests and forks: with checks, which the step does without.
    """
    tensors.check_head_input(hidden, head_weight, targets, chunk)
    logp, H = _logprob_and_entropy(hidden, head_weight, targets, chunk)
    tensors.refuse_nan("head_weight or hidden", logp)
    return logp, H


def logprob_and_gradient(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(N,) log p(target) and its (N, d) gradient with respect to `hidden`, float32.

    Shapes and checks as above. Eq. 7 is then hidden.backward(-(A_hat / M)[:, None] * gradient).
    """
    tensors.check_head_input(hidden, head_weight, targets, chunk)
    logp, gradient = _logprob_and_gradient(hidden, head_weight, targets, chunk)
    tensors.refuse_nan("head_weight or hidden", logp)
    return logp, gradient


@torch.no_grad()
def score_completions(
    model, rollouts: list[dict], prompts: str, s: Settings
) -> tuple[Tensor, Tensor]:
    """(N,) log p(y) and (N,) entropy, in nats, of all completion tokens, row after row. [D3]

    `prompts` is the key of the prompt ids, see completion_hidden. NaN and infinity raise nothing
    here: an exception on one rank would leave the others waiting.
    """
    head = models.head_of(model)
    logps = []
    entropies = []
    for part in micro_batches(rollouts, prompts, s.micro_batch_tokens):
        hidden, y = completion_hidden(model, part, prompts)  # (n, d), (n,)
        hidden = hidden / s.logit_temperature  # divides the logits
        # The teacher's half of line 7; the student's is the pass that trains. [D6]
        logp, H = _logprob_and_entropy(hidden, head, y, s.head_chunk)  # Alg. 1, line 7, 8, 9, 10
        logps.append(logp)
        entropies.append(H)
    return torch.cat(logps), torch.cat(entropies)


def logp_at_one(logp: Tensor, hidden: Tensor, head: Tensor, y: Tensor, s: Settings) -> Tensor:
    """(n,) log p(y) at temperature 1, of hidden states (n, d) divided by --logit_temperature."""
    if s.logit_temperature == 1:
        return logp
    return _logprob_and_entropy(hidden.detach() * s.logit_temperature, head, y, s.head_chunk)[0]


# --------------------------------------------------------------------------------------------------
# Confidence: functions of (B, T) right-padded tensors and their mask


def lookahead_min(entropy: Tensor, mask: Tensor, W: int) -> Tensor:
    """(B, T) lowest entropy (nats) over [t, min(t + W, end of that completion)]; 0 on pads. Eq. 8

    W in tokens; W = 0 is the identity. A long uncertain stretch (a fork) stays high, a moment of
    doubt that resolves within W tokens (a pivot) becomes low.
    """
    tensors.check_lookahead_input(entropy, mask, W)
    real = mask.bool()
    padded = entropy.masked_fill(~real, math.inf)  # a pad is never the minimum
    lowest = padded.clone()
    for ahead in range(1, min(int(W), entropy.shape[1] - 1) + 1):  # Alg. 1, line 11, 12, 13
        lowest[:, :-ahead] = torch.minimum(lowest[:, :-ahead], padded[:, ahead:])
    return lowest.masked_fill(~real, 0.0)


def confidence_gate(
    entropy: Tensor,
    mask: Tensor,
    gamma: float,
    W: int,
    max_entropy: float | Tensor | None = None,
) -> Tensor:
    """(B, T) omega = clip(1 - gamma * H_hat, 0.1, 1) on real tokens, 0 on pads. Eq. 5, 6, 8

    `entropy` (B, T) is the teacher's, in nats. `max_entropy` is the highest raw entropy of the
    whole step, where that spans more than this tensor [D2].
    """
    lowest = lookahead_min(entropy, mask, W)  # (B, T)
    if max_entropy is None:
        max_entropy = entropy[mask.bool()].max()
    H_max = torch.as_tensor(max_entropy).to(entropy)  # (), BEFORE the lookahead [D1]
    tensors.check_gate_input(gamma, H_max)
    H_hat = lowest / H_max.clamp(min=1.0)  # (B, T), in [0, 1]; Alg. 1, line 14
    omega = (1.0 - gamma * H_hat).clamp(0.1, 1.0)  # (B, T); Alg. 1, line 15
    return omega.masked_fill(~mask.bool(), 0.0)


# Magnitude and product in the same shape, for tests and diagnostics. The step has its own two lines
# for them, on flat tensors.


def evidence_magnitude(
    teacher_logp: Tensor, student_logp: Tensor, direction: Tensor, eps: float = 0.2
) -> Tensor:
    """(B, T) w = clip(exp(D * delta), 1 - eps, 1 + eps), detached, from log-probabilities. Eq. 2

    Both are (B, T), in nats. `direction` is D = sign(A), (B,). D = 0 gives w = 1 [D5]. There is no
    mask here: pads must hold numbers too.
    """
    tensors.check_magnitude_input(teacher_logp, student_logp, direction, eps)
    D = direction.to(teacher_logp)[:, None]  # (B, 1)
    delta = (teacher_logp - student_logp).detach()  # (B, T)
    exponent = torch.where(D == 0, 0.0, D * delta)  # not 0 * inf
    return exponent.exp().clamp(1.0 - eps, 1.0 + eps)


def token_advantages(advantages: Tensor, magnitude: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
    """(B, T) A_hat = A * w * omega, detached, 0 on pads; `advantages` is (B,). Eq. 7"""
    tensors.check_product_input(advantages, magnitude, gate, mask)
    A_hat = advantages[:, None] * magnitude * gate
    return A_hat.masked_fill(~mask.bool(), 0.0).detach()


# --------------------------------------------------------------------------------------------------
# The step: Algorithm 1 from line 7 to line 19


def deal_out(rollouts: list[dict]) -> list[dict]:
    """This rank's share of the step's rollouts, longest first.

    Dealt out in turn: no rank gets all the long ones, and neighbours need few pads.
    """
    rank, world = processes.rank_and_world()
    by_length = sorted(rollouts, key=lambda r: len(r["prompt_ids"]) + len(r["completion_ids"]))
    return by_length[::-1][rank::world]


def gate_of_step(H: Tensor, lengths: Tensor, gamma: float, W: int) -> Tensor:
    """(N,) omega of this rank's tokens, from their (N,) entropies and the (B,) lengths of the rows.

    One maximum for the whole step, over all ranks and micro-batches [D2].
    """
    # NaN counts as infinite: a maximum over ranks may lose a NaN, and all ranks must stop together.
    H_max = processes.reduce_(H.nan_to_num(nan=math.inf, posinf=math.inf).max(), "MAX")  # ()
    if not H_max.isfinite():
        return torch.full_like(H, math.nan)  # train() sees a loss of NaN, and stops
    H_rows = pad_sequence(H.split(lengths.tolist()), batch_first=True)  # (B, T)
    mask = torch.arange(H_rows.shape[1], device=H.device) < lengths[:, None]  # (B, T)
    return confidence_gate(H_rows, mask, gamma, W, H_max)[mask]


def sum_gradients_over_ranks(model) -> None:
    """One flat all-reduce of the adapter's gradient. No DDP: switching adapters would upset it."""
    if processes.rank_and_world()[1] == 1:
        return
    grads = [p.grad for p in trainable(model).values()]
    flat = torch.cat([g.flatten() for g in grads])
    guards.note_gradient(flat)  # whose was it, if the sum is not finite?
    flat = processes.reduce_(flat)
    for g, whole in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(whole.view_as(g))


def accumulate_gradient(
    model, rollouts: list[dict], s: Settings
) -> tuple[list[dict], dict[str, Tensor]]:
    """Leave the gradient of the whole step in .grad, on every rank.

    `rollouts` are those of all ranks, in the same order on each, with prompt_ids,
    teacher_prompt_ids, completion_ids and advantage. What it leaves depends on them alone: ranks
    and micro-batches change nothing but rounding [D2].
    -> this rank's share of the rollouts, and flat (N,) tensors over their completion tokens, row
    after row: logp_T, H, omega, logp, w, loss, raw_logp (at temperature 1). For the log.
    """
    mine = deal_out(rollouts)
    M = sum(len(r["completion_ids"]) for r in rollouts)  # tokens of all ranks
    head = models.head_of(model)  # (V, d)
    lengths = torch.tensor([len(r["completion_ids"]) for r in mine], device=head.device)  # (B,)
    A = torch.tensor([r["advantage"] for r in mine], device=head.device)  # (B,)
    A = A.repeat_interleave(lengths)  # (N,), a rollout's own at each of its tokens

    # Lines 7 to 10. The teacher reads every completion, with the reference in its prompt: what does
    # it think of each token (log p_T), and how sure is it of what comes next (H)?
    with as_teacher(model):
        logp_T, H = score_completions(model, mine, "teacher_prompt_ids", s)  # (N,), (N,)

    # Lines 11 to 15. Its entropies become the gate: low where it does not know what comes next.
    omega = gate_of_step(H, lengths, s.gamma, s.W)  # (N,)

    # Lines 16 to 19. The student reads the same completions without the reference, one micro-batch
    # at a time, and each token's gradient is weighed by what the three signals say of it.
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)  # not None: every rank has a gradient to reduce
    models.checkpoint_layers(model, True)  # with --gradient_checkpointing
    done = {"logp": [], "w": [], "loss": [], "raw_logp": []}
    start = 0
    for part in micro_batches(mine, "prompt_ids", s.micro_batch_tokens):
        hidden, y = completion_hidden(model, part, "prompt_ids")  # (n, d), (n,)
        hidden = hidden / s.logit_temperature  # divides the logits, and scales the gradient [D3]
        logp, dlogp = _logprob_and_gradient(hidden.detach(), head, y, s.head_chunk)  # (n,), (n, d)
        span = slice(start, start + len(y))  # of this micro-batch, among the rank's N tokens
        start = span.stop

        # log p_S is this very pass, detached: each rollout is used once, so that there is no older
        # policy and no importance ratio [D6]. Where A = 0 the direction is 0, and so w = 1 [D5].
        delta = logp_T[span] - logp  # Alg. 1, line 16
        w = (A[span].sign() * delta).exp().clamp(1 - s.eps, 1 + s.eps)  # Alg. 1, line 17
        A_hat = A[span] * w * omega[span]  # Alg. 1, line 18
        loss = -(A_hat * logp) / M  # (n,), summed over the step; Alg. 1, line 19

        # The loss is for the log. Its gradient dL/dhidden is a known multiple of dlogp/dhidden,
        # since A_hat is a constant, and is applied here.
        hidden.backward((-(A_hat / M)[:, None] * dlogp).to(hidden.dtype))

        done["logp"].append(logp)
        done["w"].append(w)
        done["loss"].append(loss)
        # For the canary: at temperature 1 it should be what the rollout engine said of the same
        # tokens. A jump in the distance means that the engine runs other weights.
        done["raw_logp"].append(logp_at_one(logp, hidden, head, y, s))
    models.checkpoint_layers(model, False)
    sum_gradients_over_ranks(model)
    student = {name: torch.cat(values) for name, values in done.items()}
    return mine, {"logp_T": logp_T, "H": H, "omega": omega, **student}


# --------------------------------------------------------------------------------------------------
# Training: the loop; below it what comes before it (load_run, set_up) and after it (finish)


def train(s: Settings, method: Callable[[SimpleNamespace, Settings], None] | None = None) -> None:
    """The whole run. What it leaves is in the folder --out: adapter, log, rollouts, curves.

    Another method comes in through `method(run, s)`: it may put functions of its own in the place
    of run.roll_out and run.accumulate_gradient, tensors that checkpoints hold into run.kept, and
    figures for the log into run.figures. See baselines.py.
    """
    run = load_run(s, method)
    if is_finished(run, s):
        return
    set_up(run, s)
    model = run.model
    # run.roll_out and run.accumulate_gradient are those above, unless a method changed them.
    # processes.enter(phase) is the clock, and tells the other ranks where this one is.
    for step in range(run.start, s.steps):
        clock = [processes.enter("rollout")]
        batch, position, skipped = next_problems(run.problems, run.tokenizer, s, run.position)
        batch = [row for row in batch for _ in range(s.rollouts_per_prompt)]

        # The policy of the moment answers, and is told how well: every rank gets all rollouts.
        rollouts = run.roll_out(
            run.sample, batch, run.tokenizer, run.eos_ids, step, s, **run.sampling
        )
        rewards = [r["reward"] for r in rollouts]
        if not all(map(math.isfinite, rewards)):
            stop_not_finite(run, rollouts, step, s)
        advantages = run.stats.advantages(rewards, step)  # (B,)
        for r, A in zip(rollouts, advantages.tolist()):
            r["advantage"] = A
        clock.append(processes.enter("passes"))

        # Teacher, gate, student: lines 7 to 19 of Algorithm 1. Fills p.grad.
        mine, tokens = run.accumulate_gradient(model, rollouts, s)
        norm = torch.nn.utils.clip_grad_norm_(trainable(model).values(), s.max_grad_norm)
        norm, sound = guards.look_for_nan(norm, run.optimizer, run.stats.state_dict())
        clock.append(processes.enter("update"))

        figures = journal.step_figures(mine, tokens, s.eps)
        if not (sound and math.isfinite(figures["loss"])):
            stop_not_finite(run, rollouts, step, s, mine, tokens)
        guards.check_canary(figures["canary"], model, step)
        figures.update(running_mean=run.stats.mean, running_std=run.stats.std, grad_norm=norm)
        figures.update(run.figures)

        run.optimizer.step()  # Alg. 1, line 20
        run.stats.update(rewards)  # Alg. 1, line 21
        run.push()  # the next rollout is of the new policy
        run.position = position
        clock.append(processes.enter("saving"))

        halt = bool(processes.gather(run.stopped))  # the ranks may see a signal in different steps
        last = halt or step + 1 == s.steps
        save = last or (step + 1) % s.save_every == 0
        row = journal.log_row(step, rollouts, skipped, figures, clock, run.device)
        journal.record_step(run.journal, row, rollouts, redraw=last)
        if save:
            save_run(run, step + 1, s)
        if halt and (step + 1 < s.steps or run.held_out):  # else there is but a summary to write
            console.say(f"stopped and saved after step {step}: --resume --out {s.out} goes on")
            return
    finish(run, s)


def load_run(s: Settings, method: Callable | None = None) -> SimpleNamespace:
    """The run folder, data, model, optimizer and statistics, as its last checkpoint left them.

    All that the loop needs; set_up() adds the last two lines:
        problems, held_out    rows of --data and --eval_data
        tokenizer, eos_ids    and the token ids that end a completion
        model, optimizer      base with adapter; AdamW
        stats                 running mean and deviation of the rewards
        start, position       first step to come; rows of the data gone through
        sampling              temperature, top_p, top_k of training
        roll_out, accumulate_gradient, kept, figures    see train()
        roles                 whose prompts are shown at the start, and their keys
        out, checkpoint       the folder; what it goes on from, or None
        device, memory, began, stopped    this rank's; an estimate; when it began; signals that came
        fingerprints          of data, model and tokenizer, so that --resume goes on with the same
        summary               what summary.json will say
        sample, push          the engine: completions from it, the adapter to it
        journal               log, curves and bar
    """
    run = SimpleNamespace(began=time.perf_counter(), stopped=processes.stop_on_signals())
    run.out = Path(s.out)
    run.device = processes.start_processes(s.threads, s.rank_timeout)
    run.sampling = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    models.refuse_big_model_on_cpu(s.model, run.device)
    run.memory = estimate_memory(s, run.device)
    settings = dataclasses.asdict(s)
    run.checkpoint = run_folder.open_run(run.out, s.resume, s.overwrite, settings)

    columns = {
        "problem": s.problem_column,
        "solution": s.solution_column,
        "answer": s.answer_column,
    }
    run.problems = data.load_problems(s.data, columns, s.split)
    run.tokenizer = models.load_tokenizer(s.model, s.trust_remote_code)
    run.held_out = load_held_out(run.tokenizer, columns, s) if s.eval_data else []

    base = models.load_base(s.model, run.device, s.attn, s.trust_remote_code, s.shard)
    run.eos_ids = engines.end_tokens(base, run.tokenizer)
    if not run.eos_ids:
        console.fail(f"--model {s.model} has no end token (eos_token_id in generation_config.json)")
    rows = {"--data": run.problems, "--eval_data": run.held_out}
    run.fingerprints = run_folder.fingerprints(rows, s.model)
    run_folder.compare_fingerprints(run.fingerprints)
    run.model = add_adapter(base, s)
    run.optimizer = torch.optim.AdamW(
        trainable(run.model).values(), lr=s.lr, betas=(0.9, 0.999), weight_decay=0.0
    )  # betas: Table A1; constant rate, no decay [D11]; eps is torch's
    run.stats = RewardStats()
    run.roll_out = roll_out
    run.accumulate_gradient = accumulate_gradient
    run.kept = teacher_state(run.model)
    run.figures = {}
    run.roles = {"student": "prompt_ids", "teacher": "teacher_prompt_ids"}
    if method:
        method(run, s)
    if s.shard:
        models.shard_layers(run.model, run.device)
    models.check_head(run.model, s.model, hidden_states)
    restore(run)
    return run


def restore(run: SimpleNamespace) -> None:
    """Go on from the run's last checkpoint, or begin at step 0."""
    run.start = 0
    run.position = 0
    run.summary = {}
    if run.checkpoint is None:
        return
    run_folder.check_fingerprints(run.checkpoint, run.fingerprints)
    run.start, run.position, stats = run_folder.load_checkpoint(
        run.checkpoint,
        trainable(run.model),
        run.optimizer,
        run.kept,
        functools.partial(load_student, run.model),
    )
    run.stats.load_state_dict(stats)
    # Rank 0's: other machines need not have the file.
    run.summary = processes.gather([journal.read_summary(run.out)])[0]


def is_finished(run: SimpleNamespace, s: Settings) -> bool:
    """Whether nothing is left to do, which it then says."""
    summed_up = run.summary.get("steps") == run.start  # which comes last
    if run.checkpoint is None or run.start < s.steps or not summed_up:
        return False
    console.say(
        f"{run.out} is finished, with {run.start} steps. --steps N goes further, another --out "
        "starts anew"
    )
    return True


def set_up(run: SimpleNamespace, s: Settings) -> None:
    """Start the engine, show what it will do, evaluate before.

    An earlier run in --out is deleted only once this one has its data, model and engine.
    """
    settings = dataclasses.asdict(s)
    engine, why = engines.choose_engine(s.engine, run.device)
    tp = 1
    if engine == "vllm":
        tp = engines.tensor_parallel(s.rollout_tp, run.model.config)
    # To show and to probe with; the loop draws these problems again.
    batch, _, _ = next_problems(run.problems, run.tokenizer, s, run.position)
    prompts = {role: batch[0][key] for role, key in run.roles.items()}
    files = opening.show_start(
        settings, prompts, run.tokenizer, f"{engine} ({why})", tp, run.device, run.memory
    )
    processes.enter("engine start")
    run.sample, run.push = start_engine(s, run.model, run.eos_ids, run.device, engine, tp)
    if engine == "vllm":
        enough = max(8, processes.rank_and_world()[1])  # ours: for a mean, and one for each rank
        probe(run, [batch[i % len(batch)] for i in range(enough)], s)

    wandb = journal.start_wandb(s.wandb, run.out, settings)
    rows = run_folder.clear_run(run.out, run.checkpoint, run.start, files)
    run.journal = journal.open_journal(run.out, rows, settings, run.start, wandb)
    run.push()  # what step `start` rolls out with
    # Not after a resume: then it would be the trained adapter's. Nor where nothing is trained.
    wanted = s.eval_before and s.steps and not run.start
    if run.held_out and wanted and "before" not in run.summary:
        run.summary["before"] = evaluate("before", run, s)
        journal.write_summary(run.journal, run.summary)


EVALUATED_AT_ONCE = 256  # ours: problems, over all ranks; the bar moves after each batch
PROMPT = 256  # ours: tokens of a prompt, where memory is estimated before any is known


def generate_tokens(s: Settings) -> int:
    """Tokens in the cache of transformers' generate, while it rolls out or evaluates."""
    most = s.batch_size
    if s.eval_data:
        most = max(most, EVALUATED_AT_ONCE)
    rows = math.ceil(most / processes.rank_and_world()[1])  # of one rank
    return min(rows, engines.AT_ONCE) * (PROMPT + s.max_completion)


def estimate_memory(s: Settings, device: torch.device) -> dict[str, float]:
    """GiB of one process, from the model's configuration; exits if its GPU has less free."""
    skeleton = models.load_skeleton(s.model, s.trust_remote_code)
    models.refuse_other_decoders(skeleton, s.model)
    context = models.context_of(skeleton.config)
    if s.max_length > context:
        console.fail(f"--max_length {s.max_length}: --model {s.model} reads {context:.0f} tokens")
    tp = 0
    if engines.choose_engine(s.engine, device)[0] == "vllm":
        tp = engines.tensor_parallel(s.rollout_tp, skeleton.config)
    here = processes.ranks_here()
    estimate = sizes.estimator(
        skeleton,
        device,
        models.layer_names(s.lora_targets),
        s.lora_r,
        engine_tp=tp,
        cache_tokens=cache_tokens(s, max(tp, 1)),
        tile=VOCAB_TILE[device.type],
        gpus=here,
        longest=PROMPT + s.max_completion,
        generate_tokens=generate_tokens(s),
    )
    chosen = s.micro_batch_tokens, s.gradient_checkpointing, s.head_chunk, s.shard
    return opening.check_memory(estimate, *chosen, opening.free_memory(device), here)


def load_held_out(tokenizer, columns: dict[str, str], s: Settings) -> list[dict]:
    """The problems of --eval_data with the student's prompts; all must count, so all must fit."""
    rows = data.load_problems(s.eval_data, columns, s.eval_split, "--eval_data")
    too_long = []
    for row in rows:
        prompt = data.fill(s.student_prompt, row)
        row["prompt_ids"] = data.encode_prompt(tokenizer, prompt, s.thinking)
        if len(row["prompt_ids"]) + s.max_completion > s.max_length:
            too_long.append(row["id"])
    if too_long:
        console.fail(
            f"--eval_data {s.eval_data}: {len(too_long)} problems (the first: "
            f"{', '.join(too_long[:5])}) and --max_completion {s.max_completion} exceed "
            f"--max_length {s.max_length}: remove them, or raise it"
        )
    return rows


def evaluate(name: str, run: SimpleNamespace, s: Settings) -> dict[str, float]:
    """Accuracy in % and mean length in tokens on held-out rows: a sample each, T 1, top-p 0.95.

    With training's --thinking and --max_completion: eval.py is for figures beside the paper's.
    {} where the evaluation after training is told to stop.
    """
    sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 0}  # section 5.1, which names no top-k
    rows = run.held_out
    right = 0
    tokens = 0
    with console.progress(total=len(rows), desc=f"evaluate {name}", unit="problem") as bar:
        for start in range(0, len(rows), EVALUATED_AT_ONCE):
            processes.enter("evaluation")
            if name == "after" and processes.gather(run.stopped):
                return {}  # the adapter is saved; "before" goes on: there is nothing to resume yet
            batch = rows[start : start + EVALUATED_AT_ONCE]
            answers = roll_out(
                run.sample,
                batch,
                run.tokenizer,
                run.eos_ids,
                "evaluation",
                s,
                offset=start,
                **sampling,
            )
            for r in answers:
                right += r["correct"]
                tokens += len(r["completion_ids"])
            bar.update(len(batch))
            bar.set_postfix(right=f"{right / bar.n:.1%}" if bar.n else "")
    n = len(rows)
    return {"accuracy": round(100 * right / n, 2), "length": round(tokens / n, 2), "samples": n}


def probe(run: SimpleNamespace, rows: list[dict], s: Settings) -> None:
    """Refuse an engine that does not use the adapter that is pushed to it; see guards."""
    at_one = dataclasses.replace(s, logit_temperature=1.0)

    def logp_of(rollouts: list[dict]) -> Tensor:
        return score_completions(run.model, rollouts, "prompt_ids", at_one)[0]

    guards.probe_engine(
        run.sample, run.push, run.model, trainable(run.model), as_teacher, logp_of, rows, s.seed
    )


def stop_not_finite(
    run: SimpleNamespace,
    rollouts: list[dict],
    step: int,
    s: Settings,
    mine: list[dict] | None = None,
    tokens: dict[str, Tensor] | None = None,
) -> None:
    """Name what is not finite, on which rank, in which rollouts; save the state before. Exits."""

    def values(r: dict) -> list[Tensor]:
        hidden, _ = completion_hidden(run.model, [r], "prompt_ids")
        run.model.zero_grad()
        hidden.sum().backward()
        gradients = [p.grad for p in trainable(run.model).values()]
        with as_teacher(run.model):
            teacher = score_completions(run.model, [r], "teacher_prompt_ids", s)
        return [hidden, *teacher, *gradients]

    save = functools.partial(save_run, run, step, s)
    guards.fail_not_finite(step, run, rollouts, mine or [], tokens or {}, values, save)


def save_run(run: SimpleNamespace, step: int, s: Settings) -> None:
    run_folder.save_checkpoint(
        run.out,
        step,
        run.position,
        run.stats.state_dict(),
        dataclasses.asdict(s),
        run.fingerprints,
        parameters=trainable(run.model),
        optimizer=run.optimizer,
        others=run.kept,
        save_student=functools.partial(save_student, run.model),
    )


def finish(run: SimpleNamespace, s: Settings) -> None:
    """Evaluate after, and say where everything is."""
    run.journal.bar.close()
    if run.held_out:
        after = evaluate("after", run, s)
        if not after:
            console.say(f"stopped in the last evaluation: --resume --out {s.out} begins it again")
            return
        run.summary["after"] = after
    journal.write_summary(run.journal, run.summary, steps=max(run.start, s.steps), began=run.began)
    if s.steps:
        left = f"adapter {run_folder.latest_checkpoint(run.out)}, log {run.out / 'log.jsonl'}"
        curves = run.out / "curves.png"
        console.say(f"{left}, curves {curves}" if curves.exists() else left)


if __name__ == "__main__":
    with processes.ending_together():
        s = parse_settings()
        if s.check_data:
            from support.training.check_data import check_data

            check_data(dataclasses.asdict(s))
        else:
            train(s)
