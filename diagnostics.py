"""
See what the gate does, token by token: sections 4.1, 5.5, Figures 3, 4, A1, A3 to A5 of the paper.

    python diagnostics.py --preset tiny                            # sample, measure, draw
    python diagnostics.py --model M --adapter RUN/step_100 --data FILE --gamma 0.3 --W 5 --out DIR
    python diagnostics.py --rollouts RUN/rollouts.jsonl            # what a run trained on
    python diagnostics.py --samples evals/x/samples.jsonl          # of eval.py --save_ids
    python diagnostics.py --tokens DIR/tokens.npz --gamma 1        # other settings, without a model
    python diagnostics.py --selftest                               # Appendix C, numerically

The options of egrsd.py for model, data, method and rollout work here too. In the folder:
report.html and microscope.html (neither needs a network), the figures, summary.json, tokens.npz
(one flat array per quantity over all completion tokens) and context.json (the rest). The gate, the
magnitude and both passes are egrsd.py's own functions: no picture can show a gate that does not
train.

Reference of the teacher (D14): the data's worked solution; else another right completion of the
same problem, without its thinking; else the bare answer. Batch of Eq. 5 (D15): the training step,
or 32 consecutive completions. The student of a run's rollouts is the policy that sampled them, or
a given --adapter. Of the former the run keeps the rollout engine's log-probabilities: with vLLM in
bfloat16 they differ from the trainer's by what the log calls canary.
"""

import argparse
import collections
import dataclasses
import functools
import random
from pathlib import Path

import numpy as np
import torch

from egrsd import (
    Settings,
    add_adapter,
    as_teacher,
    cache_tokens,
    confidence_gate,
    evidence_magnitude,
    hidden_states,
    lookahead_min,
    parse_settings,
    roll_out,
    score_completions,
    shaped_reward,
    start_vllm,
    token_advantages,
    vllm_generate,
)
from support.diagnosis.completions import (
    check_rows,
    eval_rows,
    give_prompts,
    give_references,
    run_rows,
)
from support.diagnosis.figures import draw_all
from support.diagnosis.pages import microscope, verdict_of, write_report
from support.diagnosis.token_stats import (
    MEASURED,
    check_numbers,
    follows,
    number_of,
    reads_reference,
    shown_rollouts,
    summarise_tokens,
    token_texts,
)
from support.shared import adapters, engines, models
from support.shared.console import fail, progress
from support.shared.data import encode_prompt, fill, load_problems
from support.shared.files import make_folder, read_json, write_json, write_text, write_whole
from support.shared.options import check_rules
from support.shared.plots import save_figure
from support.shared.processes import rank_and_world, start_processes

DERIVED = (
    "delta",
    "magnitude",
    "gate",
    "gate_lookahead",
    "entropy_lookahead",
)  # what Eq. 2, 6 and 8 make of them


TAUS = (0.1, 0.3)  # ours: the paper gives no thresholds
IDLE = (  # of egrsd.py: they would do nothing here
    "--resume --overwrite --steps --save_every --wandb --rank_timeout --check_data --shard --lr "
    "--eval_before --rollouts_per_prompt --gradient_checkpointing --curves"
).split()
W_NOTE = "W is 0 here: the lookahead is shown as it would be with W = 5. "
GATED = ("teacher_logp", "student_logp", "entropy", "advantage")  # what these need


# --------------------------------------------------------------------------------------------------
# Options: our own, and all of egrsd.py's


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Our options, and Settings from the others.

    Settings: defaults, then those of the run or file that is looked at, then the command line.
    """
    o, rest = make_parser().parse_known_args(argv)
    source = Path(o.tokens or o.rollouts or o.samples)
    saved = saved_settings(o, source)
    if o.rollouts:
        refuse_other_methods(o.rollouts, saved)
    o.drawn_with = None
    if o.adapter is None:
        o.adapter = saved.get("adapter")
        if o.samples:
            o.drawn_with = source.parent / "settings.json"
    o.adapter = o.adapter or ""
    s = parse_settings(as_options(saved) + rest)

    typed = {word.split("=")[0] for word in rest if word.startswith("--")}
    o.note = ""
    if s.W == 0 and "--W" not in typed:
        s.W = 5
        o.note = W_NOTE
    if s.eval_data and "--data" not in typed and not o.rollouts:
        s.data = s.eval_data  # held-out problems where the preset has them
        s.split = s.eval_split
    if o.result_after is None:
        o.result_after = saved.get("result_after", "=" if s.preset == "tiny" else "")
    o.out = o.out or default_folder(o, s, source)
    check_options(o, typed)
    return o, s


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diagnostics.py",
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="and egrsd.py's of model, data, method and rollout: python egrsd.py --help",
    )
    add = parser.add_argument
    add("--out", default="", help="folder; else beside the input, or runs/PRESET/...")
    add("--adapter", help="the student's adapter; else that of --samples, else the base model")
    add("--rollouts", default="", metavar="FILE", help="rollouts.jsonl of a training run")
    add("--samples", default="", metavar="FILE", help="samples.jsonl of eval.py")
    add("--tokens", default="", metavar="FILE", help="tokens.npz of an earlier call")
    add("--limit", default=256, type=int, help="most completions, 0 = all; steps stay whole")
    add("--tau_low", default=TAUS[0], type=float, help="normalised entropy: certain up to")
    add("--tau_high", default=TAUS[1], type=float, help="normalised entropy: uncertain from")
    add("--result_after", metavar="TOKEN", help="a token after it is a result; = for tiny")
    add("--show", type=int, help="the rollout in the traces, the heat map and the microscope")
    windows = "windows of the pivot figure"
    add("--windows", nargs="*", default=[], metavar="ROLLOUT:START", help=windows, type=window)
    add("--log", nargs="*", default=[], metavar="FILE", help="log.jsonl of runs, for Figure A1")
    add("--selftest", action="store_true", help="check Appendix C and end")
    return parser


def window(text: str) -> tuple[int, int]:
    rollout, start = text.split(":")  # a ValueError is argparse's to report
    return int(rollout), int(start)


def saved_settings(o: argparse.Namespace, source: Path) -> dict:
    """The settings of the run, evaluation or earlier call that is looked at."""
    if o.tokens:
        context = read_json(source.parent / "context.json", {})
        kept = {key: context[key] for key in ("result_after",) if key in context}
        return {**context.get("settings", {}), **kept}
    if not o.rollouts and not o.samples:
        return {}
    saved = read_json(source.parent / "settings.json", {})
    if o.samples:  # an evaluation has other options too
        shared = ("preset", "model", "adapter", "student_prompt", "thinking")
        saved = {key: saved[key] for key in shared if key in saved}
    return saved


def refuse_other_methods(rollouts: str, saved: dict) -> None:
    """A run of baselines.py may have had other advantages, no gate, or another teacher."""
    method = adapters.method_name({"gamma": 0.0, "W": 0, **saved})
    if method not in ("EGRSD", "CL-EGRSD", "RLSD"):
        fail(
            f"{rollouts} is of a run of {method}: what is shown here is the gate of EGRSD, with a "
            "frozen teacher. Look at that run's completions with eval.py --save_ids, then --samples"
        )


def as_options(saved: dict) -> list[str]:
    """Settings as command-line options of egrsd.py."""
    options = []
    for field in dataclasses.fields(Settings):
        name = field.name
        if name not in saved or name in ("out", "resume", "overwrite", "wandb"):
            continue
        if name == "trust_remote_code":  # no folder may say that
            continue
        value = saved[name]
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        else:
            options.append(f"--{name}={value}")
    return options


def default_folder(o: argparse.Namespace, s: Settings, source: Path) -> str:
    if o.tokens:
        taus = f"-tau{o.tau_low:g}-{o.tau_high:g}" if (o.tau_low, o.tau_high) != TAUS else ""
        return str(source.parent / f"gamma{s.gamma:g}-W{s.W}-eps{s.eps:g}{taus}")
    if source.name:
        return str(source.parent / "diagnostics")
    return str(Path("runs") / s.preset / "diagnostics-sampled")


def check_options(o: argparse.Namespace, typed: set[str]) -> None:
    """`typed` are egrsd.py's options on the command line."""
    idle = sorted(typed - {"--gamma", "--W", "--eps", "--preset"})
    idle += ["--adapter"] if o.adapter and o.tokens else []
    nothing = sorted(typed & {*IDLE})
    absent = []
    for path in o.log:
        if not Path(path).is_file() and not (Path(path) / "log.jsonl").is_file():
            absent.append(path)
    sources = [path for path in (o.tokens, o.rollouts, o.samples) if path]
    ordered = 0 <= o.tau_low < o.tau_high <= 1
    rules = [
        (
            not ordered,
            f"--tau_low {o.tau_low:g} and --tau_high {o.tau_high:g} must be in order, in [0, 1]",
        ),
        (nothing, f"{', '.join(nothing)}: without effect in diagnostics.py"),
        (len(sources) > 1, "--tokens, --rollouts and --samples: choose one"),
        (rank_and_world()[1] > 1, "diagnostics.py is one process: start it without torchrun"),
        (o.limit < 0, "--limit must be at least 0"),
        (
            o.tokens and idle,
            f"{', '.join(idle)}: with --tokens only --gamma, --W and --eps have an effect",
        ),
        (absent, f"--log {', '.join(absent)}: no log.jsonl there"),
    ]
    check_rules(rules, fail)


# --------------------------------------------------------------------------------------------------
# Measuring: the two passes of training, and a third with the reference of another problem


def sampled_rows(
    model, tokenizer, o: argparse.Namespace, s: Settings, device: torch.device
) -> list[dict]:
    """A completion, now, for each of --limit problems, with the sampling settings of training."""
    columns = {
        "problem": s.problem_column,
        "solution": s.solution_column,
        "answer": s.answer_column,
    }
    problems = load_problems(s.data, columns, s.split)
    rows = random.Random(s.seed).sample(problems, min(o.limit or len(problems), len(problems)))
    for row in rows:
        row["key"] = row["id"]
        row["prompt_ids"] = encode_prompt(tokenizer, fill(s.student_prompt, row), s.thinking)
    eos_ids = engines.end_tokens(model, tokenizer)
    engine, why = engines.choose_engine(s.engine, device)
    print(f"sampling {len(rows)} completions with {engine} ({why})", flush=True)
    generate = functools.partial(engines.hf_generate, model, eos_ids)
    if engine == "vllm":
        generate = open_vllm(model.config, eos_ids, o.adapter, s, device)
    sampling = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    return roll_out(generate, rows, tokenizer, eos_ids, "diagnostics", s, **sampling)


def open_vllm(
    config, eos_ids: list[int], adapter: str, s: Settings, device: torch.device
) -> engines.Generate:
    """An engine beside the model, with the adapter, which load_student has checked."""
    from vllm.lora.request import LoRARequest

    rank = 0
    lora = None
    if adapter:
        rank = read_json(Path(adapter) / "adapter_config.json")["r"]
        lora = LoRARequest("student", 1, adapter)
    llm = start_vllm(
        s.model,
        device,
        1,
        s.max_length,
        rank,
        trust_remote_code=s.trust_remote_code,
        lora_target_modules=adapters.target_modules(adapter),
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=engines.kv_cache_bytes(config, device, 1, cache_tokens(s, 1)),
    )
    return functools.partial(vllm_generate, llm, lora, eos_ids)


def give_advantages(rows: list[dict], s: Settings) -> str:
    """Where no run gave any: (r - mean) / std over the set, batches of 32 (D15). -> their origin"""
    L_max = max(s.max_completion, *(len(row["completion_ids"]) for row in rows))
    rewards = []
    for row in rows:
        reward = row.get("reward")
        if reward is None:
            reward = shaped_reward(row["correct"], len(row["completion_ids"]), L_max, s.beta_L)
        rewards.append(reward)
    r = np.array(rewards)
    spread = r.std(ddof=1) if len(r) > 1 else 0.0
    advantages = (r - r.mean()) / (spread if spread >= 1e-6 else 1.0)
    for i, row in enumerate(rows):
        row["advantage"] = float(advantages[i])
        row["batch"] = i // 32
    figures = f"mean {r.mean():.3f}, std {spread:.3f}, r with L_max {L_max}"
    return f"(r - mean) / std over this set: {figures}"


def rows_of_file(o: argparse.Namespace) -> list[dict]:
    """The completions of --rollouts or --samples, without empty ones; [] where neither is given."""
    if o.rollouts:
        rows = run_rows(o.rollouts, o.limit)
    elif o.samples:
        rows = eval_rows(o.samples, o.limit)
    else:
        return []
    rows = [row for row in rows if row["completion_ids"]]
    if not rows:
        fail(f"{o.rollouts or o.samples} holds no completions")
    return rows


def refuse_other_adapter(o: argparse.Namespace) -> None:
    """The adapter must be the one that drew --samples."""
    saved = read_json(o.drawn_with, {}) if o.drawn_with else {}
    drawn = (saved.get("adapter_weights") or "").split()[:1]
    if drawn and drawn != adapters.adapter_fingerprint(Path(o.adapter)).split()[:1]:
        fail(
            f"{o.adapter} is not the adapter that drew {o.samples} ({o.drawn_with}): name that one "
            "with --adapter"
        )


def load_student(o: argparse.Namespace, s: Settings, device: torch.device):
    """The model with the adapter looked at, or with a fresh one, which changes nothing."""
    base = models.load_base(s.model, device, s.attn, s.trust_remote_code)
    models.check_head(base, s.model, hidden_states)
    if o.adapter:
        adapters.check_adapter(o.adapter, s.model, base)
        refuse_other_adapter(o)
    model = add_adapter(base, s)
    adapters.use_student(model, o.adapter)
    return model


def measure(o: argparse.Namespace, s: Settings, out: Path) -> dict:
    """Completions, references, passes: tokens.npz. -> the context, which its arrays do not hold"""
    rows = rows_of_file(o)
    device = start_processes(s.threads)
    tokenizer = models.load_tokenizer(s.model, s.trust_remote_code)
    model = load_student(o, s, device)
    rows = rows or sampled_rows(model, tokenizer, o, s, device)
    check_numbers(o, len(rows))
    origin = "the run's own (Eq. 9; r - 0.5 in its first ten steps)"
    if not o.rollouts:
        origin = give_advantages(rows, s)
    references = give_references(rows)
    o.note += give_prompts(rows, tokenizer, s.student_prompt, s.teacher_prompt, s.thinking)
    check_rows(rows, model, s.model, s.W)
    # A run keeps the log-probabilities of the policy that sampled: the student, if none is given.
    kept = bool(o.rollouts and not o.adapter)
    if kept and s.logit_temperature != 1:
        fail("the run kept log p at temperature 1, not at --logit_temperature: give --adapter")
    rows, flat, other_logp = run_passes(model, rows, kept, s)
    flat.update(gate_quantities(flat, s))
    arrays = {name: flat[name] for name in (*MEASURED, *DERIVED)}
    write_whole(out / "tokens.npz", lambda beside: np.savez(beside, **arrays))
    text = token_texts(tokenizer, np.unique(flat["token_id"]).tolist())
    student = "the policy that sampled them" if kept else o.adapter or "the base model"
    source = o.rollouts or o.samples or f"sampled now, with the problems of {Path(s.data).name}"
    context = {
        "settings": {**dataclasses.asdict(s), "W": 0 if W_NOTE in o.note else s.W},
        "advantages": origin,
        "references": references,
        "note": o.note.replace(W_NOTE, ""),  # each call says it, or has a --W
        "result_after": o.result_after,
        "source": source,
        "model": s.model,
        "student": student,
        "control": control_of(rows, flat, other_logp, text, o.result_after),
        "token_text": {str(i): piece for i, piece in text.items()},
        "rollouts": [about_rollout(row) for row in rows],
    }
    write_json(out / "context.json", context)
    return {**context, "note": o.note}


def about_rollout(row: dict) -> dict:
    about = {key: row.get(key) for key in ("id", "batch", "correct", "problem")}
    return {**about, "key": str(row["key"])}


def control_of(
    rows: list[dict],
    flat: dict[str, np.ndarray],
    other_logp: np.ndarray,
    text: dict[int, str],
    result_after: str,
) -> dict:
    """Does the teacher read the reference? `other_logp` is under that of another problem."""
    if len({str(row["key"]) for row in rows}) < 2:
        return {"verdict": "NOT MEASURED: the control needs completions of at least two problems."}
    correct = np.array([row["correct"] for row in rows])
    problem = number_of([str(row["key"]) for row in rows])
    result = follows(flat, text, result_after)
    other = other_logp - flat["student_logp"]
    return reads_reference(flat["delta"], other, flat["rollout"], correct, result, problem)


def run_passes(
    model, rows: list[dict], kept: bool, s: Settings
) -> tuple[list[dict], dict[str, np.ndarray], np.ndarray]:
    """-> the rows by batch, the flat MEASURED arrays, (N,) log p under other_prompt_ids.

    `kept`: the rows bring the student's log-probabilities.
    """
    batches = collections.defaultdict(list)
    for row in rows:
        batches[row["batch"]].append(row)
    ordered = []
    columns = collections.defaultdict(list)
    other = []
    for batch in progress(batches.values(), desc="passes", unit="batch"):
        with as_teacher(model):
            logp_T, H = score_completions(model, batch, "teacher_prompt_ids", s)  # (N,), (N,)
            misled, _ = score_completions(model, batch, "other_prompt_ids", s)  # (N,)
        if kept:
            logp_S = np.concatenate([row["engine_logps"] for row in batch])  # (N,)
        else:
            logp_S = score_completions(model, batch, "prompt_ids", s)[0].cpu().numpy()
        H_max = highest(H, batch[0]["batch"])
        sizes = [len(row["completion_ids"]) for row in batch]
        numbers = np.arange(len(ordered), len(ordered) + len(batch))
        columns["rollout"].append(np.repeat(numbers, sizes))
        columns["position"].append(np.concatenate([np.arange(n) for n in sizes]))
        columns["token_id"].append(np.concatenate([row["completion_ids"] for row in batch]))
        columns["teacher_logp"].append(logp_T.cpu().numpy())
        columns["student_logp"].append(logp_S)
        columns["entropy"].append(H.cpu().numpy())
        columns["max_entropy"].append(np.full(len(H), H_max))
        columns["advantage"].append(np.repeat([row["advantage"] for row in batch], sizes))
        other.append(misled.cpu().numpy())
        ordered += batch
    flat = {}
    for name, parts in columns.items():
        flat[name] = np.concatenate(parts).astype(MEASURED[name])
    return ordered, flat, np.concatenate(other)


def highest(H: torch.Tensor, batch: object) -> float:
    """The batch's highest entropy, in nats."""
    H_max = H.max().item()
    if not np.isfinite(H_max):
        fail(f"the teacher's entropies in batch {batch} are not finite: the model is broken")
    return H_max


def gate_quantities(flat: dict[str, np.ndarray], s: Settings) -> dict[str, np.ndarray]:
    """What egrsd.py's own functions make of whole rollouts: flat DERIVED and token_advantage."""
    N = len(flat["rollout"])
    starts = np.flatnonzero(np.diff(flat["rollout"], prepend=-1))  # of each rollout
    lengths = np.diff(starts, append=N)
    made = {}
    for name in (*DERIVED, "token_advantage"):
        made[name] = np.empty(N, np.float32)
    for H_max in np.unique(
        flat["max_entropy"][starts]
    ):  # a batch of Eq. 5, or several that share it
        same = np.flatnonzero(flat["max_entropy"][starts] == H_max)
        for group in rectangles(lengths[same]):
            first = starts[same[group]][:, None]  # (B, 1)
            n = lengths[same[group]][:, None]  # (B, 1)
            real = np.arange(n.max()) < n  # (B, T)
            at = (
                first + np.arange(n.max()) * real
            )  # (B, T) where each token stands in the flat arrays
            padded = {name: torch.from_numpy(flat[name][at]) for name in GATED}  # (B, T) each
            for name, value in gate_rectangle(
                padded, torch.from_numpy(real), float(H_max), s
            ).items():
                made[name][at[real]] = value.numpy()[real]
    return made


def rectangles(lengths: np.ndarray, most: int = 1 << 20) -> list[np.ndarray]:
    """Indices of rollouts, longest first, in groups of at most `most` padded tokens."""
    groups = []
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        width = max(1, int(lengths[order[0]]))
        count = max(1, most // width)
        groups.append(order[:count])
        order = order[count:]
    return groups


def gate_rectangle(
    padded: dict[str, torch.Tensor], mask: torch.Tensor, H_max: float, s: Settings
) -> dict[str, torch.Tensor]:
    """The same for one (B, T) batch of right-padded rollouts."""
    teacher = padded["teacher_logp"]
    student = padded["student_logp"]
    H = padded["entropy"]
    A = padded["advantage"][:, 0]  # (B,)
    w = evidence_magnitude(teacher, student, A.sign(), s.eps)
    omega_CL = confidence_gate(H, mask, s.gamma, s.W, H_max)
    return {
        "delta": teacher - student,
        "magnitude": w,
        "gate": confidence_gate(H, mask, s.gamma, 0, H_max),
        "gate_lookahead": omega_CL,
        "entropy_lookahead": lookahead_min(H, mask, s.W),
        "token_advantage": token_advantages(A, w, omega_CL, mask),
    }


# --------------------------------------------------------------------------------------------------
# Appendix C, and main


def selftest(windows: int = 20_000, W: int = 5) -> list[str]:
    """Appendix C with numbers, through the gate that trains. -> what holds

    Exits with a sentence where Lemma 1, Proposition 1 or the chord does not hold.
    """
    h = torch.rand(windows, W + 1, generator=torch.Generator().manual_seed(0)) ** 2 * 3  # nats
    lines = []
    for gamma in (0.3, 0.6, 0.9):
        lines.append(check_proposition_1(h, gamma))
    for gamma in (0.1, 0.3, 0.5, 0.9, 0.99):
        lines.append(check_chord(gamma))
    return lines


def admissible_filters(h: torch.Tensor) -> dict[str, torch.Tensor]:
    """(windows,) of (windows, W + 1) entropies: monotone, at most h0, and c where every h is c."""
    h0 = h[:, 0]
    lowest = h.min(1).values
    return {
        "min": lowest,
        "no lookahead": h0,
        "min of half the window": h[:, : (h.shape[1] - 1) // 2 + 1].min(1).values,
        "min(h0, mean)": torch.minimum(h0, h.mean(1)),
        "min(h0, median)": torch.minimum(h0, h.median(1).values),
        "min(h0, max of the rest)": torch.minimum(h0, h[:, 1:].max(1).values),
        "sqrt(h0 min)": (h0 * lowest).sqrt(),
        "h0/3 + 2 min/3": h0 / 3 + 2 * lowest / 3,
    }


def check_proposition_1(h: torch.Tensor, gamma: float) -> str:
    """No admissible filter recovers more weight than the minimum, and none other as much."""
    top = float(h.max())
    W = h.shape[1] - 1

    def first_gate(H: torch.Tensor, W: int) -> torch.Tensor:
        return confidence_gate(H, torch.ones_like(H), gamma, W, top)[:, 0].double()

    instant = first_gate(h, 0)
    least = first_gate(h, W) - instant  # what the minimum recovers
    filters = admissible_filters(h)
    for name, phi in filters.items():
        if not ((phi <= h[:, 0] + 1e-6) & (phi >= h.min(1).values - 1e-6)).all():
            fail(f"selftest: Lemma 1 fails for {name}")
        gate = first_gate(phi[:, None], 0)
        more = (gate - instant - least)[gate > 0.1]  # not saturated by the lower clip
        as_much = bool(more.min() > -1e-6)
        if more.max() > 1e-6 or as_much != (name == "min"):
            fail(f"selftest: Proposition 1 fails for {name} at gamma {gamma}")
    return (
        f"Proposition 1, gamma {gamma}: of {len(filters)} admissible filters on {len(h):,} windows "
        f"none recovers more weight than the minimum ({least.mean():.3f}), and no other as much "
        "everywhere"
    )


def check_chord(gamma: float) -> str:
    """The linear gate is the chord of the shrinkage curve 1 / (1 + a H). Eq. 11, 13"""
    a = gamma / (1 - gamma)
    x = torch.linspace(0, 1, 1001)
    gate = confidence_gate(2 * x[None], torch.ones(1, 1001), gamma, 0, 2.0)[0].double()
    over = gate - 1 / (1 + a * x.double())
    wrong = over.min() < -1e-6 or over[0].abs() > 1e-6
    meets = "and meets it at 0; at 1 the floor 0.1 binds"
    if gamma <= 0.9:
        wrong = wrong or over[-1].abs() >= 1e-6 or over[1:-1].min() <= 0
        meets = "and meets it at both ends"
    if wrong:
        fail(f"selftest: the gate is not the chord at gamma {gamma}")
    return (
        f"chord, gamma {gamma}: the gate is on or above 1 / (1 + {a:.3g} H), by {over.max():.3f} "
        f"at most, {meets}"
    )


def main(argv: list[str] | None = None) -> None:
    o, s = parse(argv)
    if o.selftest:
        print("\n".join(selftest()))
        return
    out = Path(o.out)
    make_folder(out)
    path = out / "tokens.npz"
    if o.tokens:
        path = Path(o.tokens)
        context = read_json(path.parent / "context.json", {})
        note = context.get("note", "") + o.note
        context["note"] = note + "Computed again from saved arrays. "
    else:
        context = measure(o, s, out)
    print(verdict_of(context), flush=True)
    derive = functools.partial(gate_quantities, s=s)
    summary = summarise_tokens(path, derive, context, o, s.W)

    numbers = set(summary["shown"])
    for number, _ in o.windows:
        numbers.add(number)
    text = context.get("token_text", {})
    shown = shown_rollouts(path, derive, numbers, text, o.tau_low, o.tau_high)
    pictures = draw_all(summary, shown, logs_to_draw(o), o, s.gamma, s.W, s.max_grad_norm)
    for name, _, _, figure in pictures:
        save_figure(out / name, figure)
    write_report(out, summary, context, pictures, f"{s.gamma:g}, {s.W}, {s.eps:g}")
    number = summary["shown"][0]
    problem = context["rollouts"][number]["problem"] if "rollouts" in context else ""
    sliders = {"gamma": s.gamma, "W": s.W, "eps": s.eps}
    sliders.update(tau_low=o.tau_low, tau_high=o.tau_high)
    write_text(out / "microscope.html", microscope(shown[number], number, problem, sliders))
    about = {"control": context.get("control"), "advantages": context.get("advantages")}
    write_json(out / "summary.json", {**about, "settings": dataclasses.asdict(s), **summary})
    print(f"report: {out}/report.html   microscope: {out}/microscope.html   arrays: {path}")


def logs_to_draw(o: argparse.Namespace) -> list[str]:
    """--log; else the log beside --rollouts, which alone are enough for all else."""
    if o.log or not o.rollouts:
        return o.log
    beside = Path(o.rollouts).parent / "log.jsonl"
    return [str(beside)] if beside.is_file() else []


if __name__ == "__main__":
    main()
