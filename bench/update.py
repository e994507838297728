"""One whole update, side by side with the peers, on the same completions. Nothing is downloaded.

    python bench/update.py                                # 4 layers, d 512, V 151,936, any CPU
    python bench/update.py --shape qwen3-8b --device cuda --rows 4 --completion 1024
    python bench/update.py --growth                       # by completion length, by vocabulary

An update is the teacher's pass, the student's, clip and optimizer. Weights, adapter and completions
are random and the same for all; each case has a process of its own, at each size of --growth too;
all rows are equally long and go through the layers in one pass, without gradient checkpointing.
float32 on a CPU; on a GPU a bfloat16 base, a float32 adapter and autocast. The cases, and what was
chosen for each:

    ours    egrsd.accumulate_gradient, then clip and AdamW as in train().
    trl     TRL's GRPOTrainer, subclassed to EGRSD. It scores in tiles of 4,096 tokens and 32,768
            rows of the head. On a CPU it would score prompts too; here it scores completions alone,
            as it does on a GPU. Gradient checkpointing, which TRL turns on, is off: it is slower.
            The student's entropy, which TRL computes for its log, stays.
    sdft    TRL's SDFTTrainer as it comes: the teacher's distribution on the student's 100 likeliest
            tokens. Another loss, so another gradient. The teacher is the base, as in ours.
    sdpo    TRL's SDPOTrainer as it comes: log-probabilities of the sampled tokens alone, and a
            teacher that is a moving average of the adapter. Another loss, so another gradient.
    full    What most public scripts do: all logits, log_softmax, gather. Logits of completions
            alone, by transformers' logits_to_keep, which many scripts do not use.

The loss of ours, trl and full is the same, so that their gradient norms must be equal.
Seconds are the median of --repeats updates after one that warms up. Memory is the highest during
all of them, optimizer state included, above the loaded model: of the process on a CPU (Linux), of
torch's allocator on a GPU.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from shapes import SHAPES, config_of  # noqa: E402

import egrsd  # noqa: E402
from support.shared import models  # noqa: E402
from support.shared.options import make_parser, opt  # noqa: E402

SAME_LOSS = ("ours", "trl", "full")
CASES = (*SAME_LOSS, "sdft", "sdpo")
LENGTHS = (64, 256, 1_024, 4_096)
VOCABULARIES = (8_192, 32_768, 151_936)
OWN_TIME = "EGRSD_BENCH_OWN_TIME"  # set for the processes of the cases by --own_time


@dataclasses.dataclass
class Options:
    shape: str = opt("model", "4-layer", "random weights of this shape", *SHAPES)
    vocab: int = opt("model", 151_936, "tokens of the vocabulary, V")
    lora_r: int = opt("model", 64, "rank of the adapter")
    rows: int = opt("tokens", 4, "completions")
    completion: int = opt("tokens", 160, "tokens of each")
    student_prompt: int = opt("tokens", 64, "tokens of the student's prompt")
    teacher_prompt: int = opt("tokens", 128, "tokens of the teacher's, with the reference")
    cases: str = opt("run", ",".join(CASES), "which, separated by commas")
    floor: bool = opt("run", True, "also the bare matrix products of ours")
    growth: bool = opt("run", False, "instead: ours, trl, full by length and by vocabulary")
    device: str = opt("run", "auto", "a GPU if there is one", "auto", "cpu", "cuda")
    threads: int = opt("run", 0, "CPU threads, 0 = torch decides")
    repeats: int = opt("run", 5, "updates that count, after one that does not")
    rounds: int = opt("run", 1, "processes of each case, in turn: for a busy machine")
    own_time: bool = opt("run", False, "CPU seconds of the process: for a busy CPU, --threads 1")
    memory: float = opt("run", 0.0, "GiB that a case may take, 0 = what is free")
    worker: str = opt("inside", "", "the one case that this process runs")


# --------------------------------------------------------------------------------------------------
# What all cases share: the student, the completions, a clock and a meter


def device_of(o: Options) -> torch.device:
    if o.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(o.device)


def settings_of(o: Options) -> egrsd.Settings:
    """Table A2's CL-EGRSD; all rows in one pass, as the peers have them."""
    s = egrsd.parse_settings(["--gamma", "1.0", "--W", "5", "--lora_r", str(o.lora_r)])
    longest = max(o.student_prompt, o.teacher_prompt) + o.completion
    s.micro_batch_tokens = o.rows * longest
    return s


def make_student(o: Options, s: egrsd.Settings):
    """A Qwen3 with random weights and a random adapter, B included: it differs from its teacher."""
    from transformers import AutoModelForCausalLM

    device = device_of(o)
    config = config_of(o.shape)
    config.vocab_size = o.vocab
    config.eos_token_id = o.vocab - 1
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model = egrsd.add_adapter(base.eval().requires_grad_(False), s)
    for name, p in egrsd.trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


def make_rollouts(o: Options) -> list[dict]:
    """Random token ids; the advantages have both signs."""
    noise = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, o.vocab, (length,), generator=noise).tolist()

    rollouts = []
    for row in range(o.rows):
        rollout = {
            "prompt_ids": ids(o.student_prompt),
            "teacher_prompt_ids": ids(o.teacher_prompt),
            "completion_ids": ids(o.completion),
            "advantage": 1.0 if row % 2 == 0 else -0.5,
        }
        rollouts.append(rollout)
    return rollouts


def as_batch(rollouts: list[dict], device: torch.device) -> dict[str, Tensor]:
    """What the peers take: (B, .) ids and masks, and the advantages (B,)."""
    batch = {"advantages": torch.tensor([r["advantage"] for r in rollouts], device=device)}
    for name in ("prompt", "teacher_prompt", "completion"):
        batch[f"{name}_ids"] = torch.tensor([r[f"{name}_ids"] for r in rollouts], device=device)
        batch[f"{name}_mask"] = torch.ones_like(batch[f"{name}_ids"])
    for name in ("ids", "mask"):
        parts = [batch[f"teacher_prompt_{name}"], batch[f"completion_{name}"]]
        batch[f"teacher_input_{name}"] = torch.cat(parts, 1)
    return batch


def token_weights(
    batch: dict[str, Tensor], logp_T: Tensor, H: Tensor, logp: Tensor, s: egrsd.Settings
) -> Tensor:
    """(B, T) A_hat, from the teacher's log p and entropy and the student's log p, all (B, T)."""
    mask = batch["completion_mask"]
    A = batch["advantages"]
    omega = egrsd.confidence_gate(H, mask, s.gamma, s.W)
    w = egrsd.evidence_magnitude(logp_T, logp.detach(), A.sign(), s.eps)
    return egrsd.token_advantages(A, w, omega, mask)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if OWN_TIME in os.environ else time.perf_counter()


def start_meter(device: torch.device) -> float:
    """Forget the highest memory so far. -> bytes in use"""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what loading freed goes back, and is not used unseen
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: man 5 proc
    return status("VmRSS")


def status(field: str) -> float:
    """Bytes, from Linux's account of this process; NaN elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return 1024 * float(line.split()[1])
    return float("nan")


def highest(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return status("VmHWM")


# --------------------------------------------------------------------------------------------------
# The cases. Each is made from the student and the completions, and gives a function that runs
# `count` updates. -> seconds and gradient norm, before the clip, of each

Run = Callable[[int], tuple[list[float], list[float]]]


def repeated(update: Callable[[], float], device: torch.device) -> Run:
    """Runs an update that gives its gradient norm."""

    def run(count: int) -> tuple[list[float], list[float]]:
        seconds = []
        norms = []
        for _ in range(count):
            began = now(device)
            norms.append(update())
            seconds.append(now(device) - began)
        return seconds, norms

    return run


def adamw(model, s: egrsd.Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(egrsd.trainable(model).values(), lr=s.lr, weight_decay=0.0)


def ours(model, rollouts: list[dict], s: egrsd.Settings) -> Run:
    optimizer = adamw(model, s)
    parameters = egrsd.trainable(model).values()

    def update() -> float:
        egrsd.accumulate_gradient(model, rollouts, s)
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm).item()
        optimizer.step()
        return norm

    return repeated(update, models.head_of(model).device)


def full(model, rollouts: list[dict], s: egrsd.Settings) -> Run:
    device = models.head_of(model).device
    optimizer = adamw(model, s)
    parameters = egrsd.trainable(model).values()
    batch = as_batch(rollouts, device)
    y = batch["completion_ids"]  # (B, T)

    def logps_of(prompt: str) -> Tensor:
        """(B, T, V) float32 log-probabilities."""
        ids = torch.cat([batch[prompt], y], 1)
        with models.autocast(device):
            logits = model(ids, use_cache=False, logits_to_keep=y.shape[1] + 1).logits[:, :-1]
        return logits.float().log_softmax(-1)

    def update() -> float:
        with torch.no_grad(), egrsd.as_teacher(model):
            logps = logps_of("teacher_prompt_ids")
            logp_T = logps.gather(-1, y[..., None])[..., 0]
            H = -(logps.exp() * logps).sum(-1)
            del logps
        logp = logps_of("prompt_ids").gather(-1, y[..., None])[..., 0]
        A_hat = token_weights(batch, logp_T, H, logp, s)
        loss = -(A_hat * logp).sum() / y.numel()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm).item()
        optimizer.step()
        return norm

    return repeated(update, device)


def trainer_options(rollouts: list[dict], s: egrsd.Settings, device: torch.device) -> dict:
    """What TRL's trainers are told; the rest is their default."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": len(rollouts),
        "gradient_checkpointing": False,
        "learning_rate": s.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": s.max_grad_norm,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "logging_steps": 1,  # for the gradient norm
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def tokenizer_and_data() -> dict[str, object]:
    """What TRL's constructors ask for; the completions are ours, so nothing is made of them."""
    from datasets import Dataset

    prompts = Dataset.from_dict({"prompt": ["1"] * 64, "privileged_context": ["1"] * 64})
    tokenizer = models.load_tokenizer(str(ROOT / "tiny"))
    return {"train_dataset": prompts, "processing_class": tokenizer}


def trained(trainer, device: torch.device) -> Run:
    """Runs a trainer of TRL: a step is timed from its beginning to the end of its callbacks."""
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            self.began = now(device)

        def on_step_end(self, *args, **kwargs) -> None:
            seconds.append(now(device) - self.began)

    trainer.add_callback(Clock())

    def run(count: int) -> tuple[list[float], list[float]]:
        trainer.args.max_steps = count
        with contextlib.redirect_stdout(sys.stderr):  # its log
            trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        return seconds, norms

    return run


def trl(model, rollouts: list[dict], s: egrsd.Settings) -> Run:
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    device = models.head_of(model).device
    batch = as_batch(rollouts, device)
    length = batch["completion_ids"].shape[1]
    utils._use_triton = lambda device: True  # completions alone; its kernels ask another module

    class Egrsd(GRPOTrainer):
        """The teacher's pass in the place of the rollout, Eq. 7 in the place of the loss."""

        def score(self, model, prompt: str) -> tuple[Tensor, Tensor]:
            ids = torch.cat([batch[f"{prompt}_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch[f"{prompt}_mask"], batch["completion_mask"]], 1)
            return self._get_per_token_logps_and_entropies(
                model, ids, mask, length, compute_entropy=True
            )[:2]

        def _prepare_inputs(self, generation_batch):
            with torch.no_grad(), egrsd.as_teacher(self.accelerator.unwrap_model(self.model)):
                logp_T, H = self.score(self.model, "teacher_prompt")
            return {"logp_T": logp_T, "H": H}

        def _compute_loss(self, model, inputs):
            logp, _ = self.score(model, "prompt")
            A_hat = token_weights(batch, inputs["logp_T"], inputs["H"], logp, s)
            return -(A_hat * logp).sum() / logp.numel()

    options = trainer_options(rollouts, s, device)
    if len(rollouts) == 1:  # GRPO asks for groups of two, of which we make no use
        options["steps_per_generation"] = 2
    config = GRPOConfig(**options, num_generations=max(2, len(rollouts)))
    trainer = Egrsd(model, lambda completions, **_: [0.0], config, **tokenizer_and_data())
    return trained(trainer, device)


def sdft(model, rollouts: list[dict], s: egrsd.Settings) -> Run:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    return self_distilled(SDFTTrainer, SDFTConfig, model, rollouts, s)


def sdpo(model, rollouts: list[dict], s: egrsd.Settings) -> Run:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    return self_distilled(SDPOTrainer, SDPOConfig, model, rollouts, s)


def self_distilled(trainer_of, arguments_of, model, rollouts: list[dict], s: egrsd.Settings) -> Run:
    """SDFT or SDPO with their own loss and teacher; the batch comes in the rollout's place."""
    device = models.head_of(model).device
    batch = as_batch(rollouts, device)
    batch["teacher_attention_mask"] = batch["teacher_input_mask"]
    batch["self_distillation_mask"] = torch.ones_like(batch["advantages"])

    class OnOurCompletions(trainer_of):
        def _prepare_inputs(self, generation_batch):
            return batch

    options = trainer_options(rollouts, s, device)
    config = arguments_of(**options, num_generations=len(rollouts))
    more = tokenizer_and_data()
    if trainer_of.__name__ == "SDPOTrainer":
        more["reward_funcs"] = lambda completions, **_: [0.0]
    return trained(OnOurCompletions(model, args=config, **more), device)


# --------------------------------------------------------------------------------------------------
# The floor: each part of ours beside the matrix products that it cannot do without

Products = Counter[tuple[int, int, int]]  # how many of (m, k) @ (k, n)


def head_products(head: Tensor, tokens: int, gradient: bool) -> Products:
    """The logits, and the mean of the head's rows under them."""
    V, d = head.shape
    products = Counter((tokens, d, len(tile)) for tile in egrsd.vocab_tiles(head))
    if gradient:
        products += Counter({(tokens, k, d): count for (_, _, k), count in products.items()})
    return products


def layer_products(model, tokens: int, student: bool) -> Products:
    """Forward; for the student the adapter's too, and what passes the gradient on or makes it."""
    products = Counter()
    head = models.head_of(model)
    for name, module in model.named_modules():
        adapter = "lora_" in name
        linear = isinstance(module, torch.nn.Linear) and module.weight is not head
        if not linear or (adapter and not student):
            continue
        n, k = module.weight.shape
        products[tokens, k, n] += 1
        if student:
            products[tokens, n, k] += 1
        if adapter:
            products[n, tokens, k] += 1
    return products


def time_products(products: Products, like: Tensor) -> float:
    """Seconds of all of them, one of each shape measured, into memory that is there already."""
    seconds = 0.0
    for (m, k, n), count in products.items():
        if m * k * n:
            a = torch.randn(m, k, device=like.device, dtype=like.dtype)
            b = torch.randn(n, k, device=like.device, dtype=like.dtype)
            out = torch.empty(m, n, device=like.device, dtype=like.dtype)
            calls = 20 if like.is_cuda else 1  # else launching is most of a small one's time

            def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out, calls: int = calls):
                for _ in range(calls):
                    torch.mm(a, b.T, out=out)

            seconds += count * time_of(multiply, like.device, 3) / calls
    return seconds


def time_attention(model, o: Options, length: int, student: bool) -> float:
    """Seconds of the attention itself in all layers, with its gradient for the student."""
    head = models.head_of(model)
    config = model.config
    shape = (o.rows, length, config.head_dim)
    heads = config.num_attention_heads, config.num_key_value_heads
    q, k = (
        torch.randn(shape[0], h, *shape[1:], device=head.device, dtype=head.dtype) for h in heads
    )
    q.requires_grad_(student)
    k.requires_grad_(student)
    attend = torch.nn.functional.scaled_dot_product_attention

    def work() -> None:
        out = attend(q, k, k, is_causal=True, enable_gqa=True)
        if student:
            out.backward(out.detach())

    return config.num_hidden_layers * time_of(work, head.device, 3)


def time_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        began = now(device)
        work()
        seconds.append(now(device) - began)
    return median(seconds[1:])


def measure_floor(model, rollouts: list[dict], s: egrsd.Settings, o: Options) -> dict:
    """Part of the update -> seconds of ours, seconds of its products."""
    head = models.head_of(model)
    hidden, y = egrsd.completion_hidden(model, rollouts, "prompt_ids")
    hidden = hidden.detach()
    # Each row points at one token, 95 nats above most others: there exp would be slow on a CPU.
    U = head[y].float()
    far = (95 * U / U.square().sum(1, keepdim=True)).to(hidden.dtype)
    optimizer = adamw(model, s)
    parameters = egrsd.trainable(model).values()

    @torch.no_grad()
    def teacher() -> None:
        with egrsd.as_teacher(model):
            egrsd.completion_hidden(model, rollouts, "teacher_prompt_ids")

    def student() -> None:
        states, _ = egrsd.completion_hidden(model, rollouts, "prompt_ids")
        states.backward(torch.ones_like(states))

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm).item()
        optimizer.step()

    def entropy(states: Tensor) -> Callable[[], object]:
        return lambda: egrsd._logprob_and_entropy(states, head, y, s.head_chunk)

    def gradient(states: Tensor) -> Callable[[], object]:
        return lambda: egrsd._logprob_and_gradient(states, head, y, s.head_chunk)

    def layers(prompt: int, adapted: bool) -> Callable[[], float]:
        products = layer_products(model, o.rows * (prompt + o.completion), adapted)
        return lambda: (
            time_products(products, head) + time_attention(model, o, prompt + o.completion, adapted)
        )

    def bare(with_gradient: bool) -> Callable[[], float]:
        products = head_products(head, len(y), with_gradient)
        return lambda: time_products(products, head)

    parts = {
        "teacher, layers": (teacher, layers(o.teacher_prompt, False)),
        "teacher, head": (entropy(hidden), bare(False)),
        "teacher, head, far logits": (entropy(far), bare(False)),
        "student, layers": (student, layers(o.student_prompt, True)),
        "student, head": (gradient(hidden), bare(True)),
        "student, head, far logits": (gradient(far), bare(True)),
        "clip and AdamW": (update, lambda: 0.0),
    }
    measured = {}
    for name, (work, products) in parts.items():
        # Before and after, so that both meet the same machine.
        before = products()
        seconds = time_of(work, head.device, o.repeats)
        measured[name] = seconds, (before + products()) / 2
    return measured


# --------------------------------------------------------------------------------------------------
# A process for each case, and the tables


def work(o: Options) -> None:
    """Inside the process of one case: run it, and print a line of JSON."""
    if o.threads:
        torch.set_num_threads(o.threads)
    print(json.dumps(run_case(o)))


def run_case(o: Options) -> dict | str:
    """What --worker measures at this size, or why not."""
    why = why_not(o.worker, o)
    if why:
        return why
    s = settings_of(o)
    device = device_of(o)
    model = make_student(o, s)
    rollouts = make_rollouts(o)
    if o.worker == "floor":
        return measure_floor(model, rollouts, s, o)
    run = globals()[o.worker](model, rollouts, s)
    before = start_meter(device)
    try:
        seconds, norms = run(1 + o.repeats)
    except torch.OutOfMemoryError:
        return "out of memory"
    return {
        "seconds": seconds[1:],
        "norm": norms[0],
        "gib": (highest(device) - before) / 2**30,
    }


def growth_sizes(o: Options) -> list[Options]:
    """One row at these lengths, then at these vocabularies."""
    sizes = [(length, o.vocab) for length in LENGTHS]
    sizes += [(1_024, vocab) for vocab in VOCABULARIES if vocab != o.vocab]
    one = dataclasses.replace(o, rows=1, growth=False)
    return [dataclasses.replace(one, completion=n, vocab=vocab) for n, vocab in sizes]


def start(case: str, o: Options) -> dict | str:
    """Run a case in a process of its own. -> what it measured, or why not"""
    given = {**dataclasses.asdict(o), "worker": case}
    command = [sys.executable, __file__]
    for name, value in given.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        else:
            command.append(f"--{name}={value}")
    env = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    # A Trainer takes all GPUs that its process sees: TRL's GRPOTrainer refuses to have several, the
    # others split the rows over them.
    env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if o.own_time:
        env[OWN_TIME] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"failed ({done.returncode}): {lines[-1] if lines else 'no message'}"
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{case}: {result}", file=sys.stderr)  # a long run shows that it goes on
    return result


def why_not(case: str, o: Options) -> str:
    """Why a case cannot run here; empty if it can."""
    if case in ("trl", "sdft", "sdpo") and importlib.util.find_spec("trl") is None:
        return "skipped: trl is not installed (pip install -r bench/requirements.txt)"
    need = LOGITS[case] * 4 * o.rows * o.completion * o.vocab / 2**30
    free = o.memory or free_gib(device_of(o))
    if need > free:
        return f"skipped: {need:.0f} GiB of logits, {free:.0f} are free"
    return ""


# Float32 tensors of tokens by vocabulary that a case holds at once, about.
LOGITS = {"ours": 0, "trl": 0, "full": 6, "sdft": 8, "sdpo": 6, "floor": 0}


def free_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) / 2**20
    return float("inf")


def measure(cases: list[str], o: Options) -> dict[str, dict | str]:
    """All cases in turn, --rounds times. A case's seconds are those of all its processes."""
    found = {}
    for _ in range(o.rounds):
        for case in cases:
            result = start(case, o)
            earlier = found.get(case)
            if isinstance(result, dict) and isinstance(earlier, dict):
                result["seconds"] += earlier["seconds"]
                result["gib"] = max(result["gib"], earlier["gib"])
            found[case] = result
    return found


def show_cases(found: dict[str, dict | str]) -> None:
    """A row for each case; the ratios are what ours takes of it."""
    print("| case | seconds, median | least | ours takes | GiB | ours takes | gradient norm |")
    print("|---" * 7 + "|")
    mine = found.get("ours")
    for case, result in found.items():
        if isinstance(result, str):
            print(f"| {case} | {result} | | | | | |")
            continue
        seconds = median(result["seconds"])
        ratios = ["", ""]
        if isinstance(mine, dict):
            ratios[0] = f"{median(mine['seconds']) / seconds:.2f}x"
            ratios[1] = f"{mine['gib'] / result['gib']:.2f}x"
        norm = f"{result['norm']:.6g}"
        if case not in SAME_LOSS:
            norm += " (another loss)"
        print(
            f"| {case} | {seconds:.3f} | {min(result['seconds']):.3f} | {ratios[0]} | "
            f"{result['gib']:.2f} | {ratios[1]} | {norm} |"
        )


def show_floor(found: dict[str, list[float]], whole: float) -> None:
    """A row for each part of ours, and their sum without the far logits."""
    print("\n| part of ours | seconds | its products, bare | ratio |\n|---|---|---|---|")
    total = [0.0, 0.0]
    for name, (seconds, products) in found.items():
        ratio = f"{seconds / products:.2f}x" if products else ""
        print(f"| {name} | {seconds:.3f} | {products:.3f} | {ratio} |")
        if "far" not in name:
            total[0] += seconds
            total[1] += products
    print(f"| all but far logits | {total[0]:.3f} | {total[1]:.3f} | {total[0] / total[1]:.2f}x |")
    if whole:
        print(f"| the whole update | {whole:.3f} | {total[1]:.3f} | {whole / total[1]:.2f}x |")


def show_growth(o: Options) -> None:
    """Seconds and GiB of one row, by completion length, then by vocabulary."""
    print("| completion | V | " + " | ".join(f"{c}, s | {c}, GiB" for c in SAME_LOSS) + " |")
    print("|---" * (2 + 2 * len(SAME_LOSS)) + "|")
    for at in growth_sizes(o):
        cells = [f"{at.completion:,}", f"{at.vocab:,}"]
        for case in SAME_LOSS:
            result = start(case, at)
            if isinstance(result, str):
                cells += [result, ""]
            else:
                cells += [f"{median(result['seconds']):.3f}", f"{result['gib']:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def machine(o: Options) -> str:
    if device_of(o).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{o.threads or torch.get_num_threads()} CPU threads"


def main() -> None:
    parser = make_parser(Options, "bench/update.py", __doc__)
    o = Options(**vars(parser.parse_args()))
    if o.worker:
        work(o)
        return
    cases = o.cases.split(",")
    if not set(cases) <= set(CASES):
        parser.error(f"--cases {o.cases}: they are {', '.join(CASES)}")
    print(
        f"{o.shape}, V {o.vocab:,}, adapter of rank {o.lora_r}, {o.rows} completions of "
        f"{o.completion} tokens, prompts of {o.student_prompt} and {o.teacher_prompt}; "
        f"{machine(o)}, torch {torch.__version__}\n"
    )
    if o.growth:
        show_growth(o)
        return
    found = measure(cases, o)
    show_cases(found)
    if o.floor:
        result = start("floor", o)
        if isinstance(result, str):
            print(f"\nthe floor {result}")
        else:
            mine = found.get("ours")
            show_floor(result, median(mine["seconds"]) if isinstance(mine, dict) else 0.0)


if __name__ == "__main__":
    main()
