"""
See what the gate does, token by token: sections 4.1 and 5.5, Figures 3, 4, A1 and A3 to A5 of the paper, on any model.

    python diagnostics.py --preset tiny                                             # sample, measure, draw
    python diagnostics.py --model M --adapter RUN/step_100 --data FILE --gamma 0.3 --W 5 --out DIR
    python diagnostics.py --rollouts RUN/rollouts.jsonl                             # what a run trained on
    python diagnostics.py --samples evals/x/samples.jsonl                           # of eval.py --save_ids
    python diagnostics.py --tokens DIR/tokens.npz --gamma 1                         # other settings, without a model
    python diagnostics.py --selftest                                                # Appendix C, numerically

Every option of egrsd.py works here too. In the folder: report.html and microscope.html (neither needs a network), the
figures, summary.json, tokens.npz (one flat array per quantity over all completion tokens) and context.json (the rest).
The gate, the magnitude and both passes are egrsd.py's own functions: no picture can show a gate that does not train.

Reference of the teacher (D14): the data's worked solution; else another right completion of the same problem, without
its thinking; else the bare answer. Batch of Eq. 5 (D15): the training step, or 32 consecutive completions. The
student of a run's rollouts is the policy that sampled them (the run keeps its log-probabilities), or a given --adapter.
"""
import argparse
import collections
import dataclasses
import functools
import random
from pathlib import Path

import numpy as np
import torch

from egrsd import (Settings, completion_hidden, confidence_gate, evidence_magnitude, logprob_and_entropy,
                   lookahead_min, micro_batches, parse_settings, roll_out, shaped_reward, teacher_pass,
                   token_advantages)
from support.basics import (fail, first_wrong, make_folder, progress, rank_and_world, read_json, start_processes,
                            write_json, write_text)
from support.completions import check_rows, eval_rows, give_prompts, give_references, run_rows
from support.data import encode_prompt, fill, load_problems
from support.engines import (choose_engine, end_tokens, hf_generate, kv_cache_bytes, sample, start_vllm,
                             vllm_generate)
from support.figures import draw_all
from support.models import (adapter_fingerprint, add_adapter, check_adapter, check_head, head_of, load_base,
                            load_tokenizer, use_student)
from support.pages import microscope, verdict_of, write_report
from support.plots import save_figure
from support.token_stats import (MEASURED, check_numbers, follows, reads_reference, shown_rollouts, statistics,
                                 token_texts)

DERIVED = ("delta", "magnitude", "gate", "gate_lookahead", "entropy_lookahead")  # what Eq. 2, 6 and 8 make of them


def window(text: str) -> tuple[int, int]:
    rollout, start = text.split(":")  # a ValueError is argparse's to report
    return int(rollout), int(start)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Our options, and Settings from the others: defaults, those of the run or file looked at, the command line."""
    parser = argparse.ArgumentParser(prog="diagnostics.py", usage="%(prog)s [options]", allow_abbrev=False,
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="and every option of egrsd.py: python egrsd.py --help")
    for name, default, kind, text in [
        ("out", "", str, "folder; by default `diagnostics` beside the input, or runs/PRESET/diagnostics-sampled"),
        ("adapter", None, str, "folder of the student's adapter; by default that of --samples, else the base model"),
        ("rollouts", "", str, "rollouts.jsonl of a training run"), ("samples", "", str, "samples.jsonl of eval.py"),
        ("tokens", "", str, "tokens.npz of an earlier call"),
        ("limit", 256, int, "most completions, 0 = all; training steps stay whole"),
        ("tau_low", 0.1, float, "normalised entropy up to which the teacher is certain (ours: the paper gives none)"),
        ("tau_high", 0.3, float, "normalised entropy from which it is uncertain (ours)"),
        ("result_after", None, str, "a token after this one is a result; `=` for --preset tiny"),
        ("show", None, int, "number of the rollout in the traces, the heat map and the microscope"),
    ]:
        parser.add_argument(f"--{name}", default=default, type=kind, metavar=kind.__name__, help=text)
    parser.add_argument("--windows", nargs="*", default=[], metavar="ROLLOUT:START", help="windows of the pivot figure",
                        type=window)
    parser.add_argument("--log", nargs="*", default=[], metavar="FILE", help="log.jsonl of runs, for Figure A1")
    parser.add_argument("--selftest", action="store_true", help="check Appendix C and end")
    o, rest = parser.parse_known_args(argv)
    source, saved = Path(o.tokens or o.rollouts or o.samples), {}
    if o.rollouts:
        saved = read_json(source.parent / "settings.json", {})
    elif o.tokens:
        saved = read_json(source.parent / "context.json", {}).get("settings", {})
    elif o.samples:
        saved = read_json(source.parent / "settings.json", {})
        shared = ("preset", "model", "adapter", "student_prompt", "thinking")
        saved = {key: saved[key] for key in shared if key in saved}
    o.drawn_with = source.parent / "settings.json" if o.samples and o.adapter is None else None
    o.adapter = (saved.get("adapter") if o.adapter is None else o.adapter) or ""
    known = {f.name for f in dataclasses.fields(Settings)} - {"out", "resume", "overwrite", "wandb"}
    s = parse_settings([f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k}={v}"
                        for k, v in saved.items() if k in known] + rest)
    typed = {word.split("=")[0] for word in rest}
    o.note = ""
    if s.W == 0 and "--W" not in typed:
        s.W, o.note = 5, "W is 0 here: the lookahead is shown as it would be with W = 5. "
    if s.eval_data and "--data" not in typed and not o.rollouts:
        s.data = s.eval_data  # held-out problems where the preset has them
    if o.result_after is None:
        o.result_after = "=" if s.preset == "tiny" else ""
    beside = source.parent / (f"gamma{s.gamma:g}-W{s.W}-eps{s.eps:g}" if o.tokens else "diagnostics")
    o.out = o.out or str(beside if source.name else Path("runs") / s.preset / "diagnostics-sampled")
    idle = sorted(word for word in typed if word[:2] == "--" and word not in ("--gamma", "--W", "--eps", "--preset"))
    absent = [path for path in o.log if not (Path(path).is_file() or (Path(path) / "log.jsonl").is_file())]
    first_wrong([
        (not 0 <= o.tau_low < o.tau_high <= 1, f"--tau_low {o.tau_low} must be below --tau_high {o.tau_high}"),
        (sum(map(bool, (o.tokens, o.rollouts, o.samples))) > 1, "--tokens, --rollouts and --samples: choose one"),
        (rank_and_world()[1] > 1, "diagnostics.py is one process: start it without torchrun"),
        (o.limit < 0, "--limit must be at least 0"),
        (o.tokens and idle, f"{', '.join(idle)}: with --tokens only --gamma, --W and --eps have an effect"),
        (absent, f"--log {', '.join(absent)}: no log.jsonl there"),
    ], fail)
    return o, s


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: the two passes of training, and a third with the reference of another problem


def sampled_rows(model, tokenizer, o: argparse.Namespace, s: Settings, device: torch.device) -> list[dict]:
    """A completion, now, for each of --limit problems, with the sampling settings of training."""
    problems = load_problems(s.data, s)
    rows = [{**row, "key": row["id"], "prompt_ids": encode_prompt(tokenizer, fill(s.student_prompt, row), s.thinking)}
            for row in random.Random(s.seed).sample(problems, min(o.limit or len(problems), len(problems)))]
    ends, (engine, why) = end_tokens(model, tokenizer), choose_engine(s, device)
    print(f"sampling {len(rows)} completions with {engine} ({why})", flush=True)
    generate = functools.partial(hf_generate, model, ends)
    if engine == "vllm":
        from vllm.lora.request import LoRARequest
        rank = read_json(Path(o.adapter) / "adapter_config.json")["r"] if o.adapter else 0
        llm = start_vllm(s.model, device, 1, s.max_length, rank, gpu_memory_utilization=0.05,
                         kv_cache_memory_bytes=kv_cache_bytes(s, model.config, device, 1))
        lora = LoRARequest("student", 1, o.adapter) if o.adapter else None
        generate = functools.partial(vllm_generate, llm, lora, ends)
    return roll_out(functools.partial(sample, generate, 1), rows, tokenizer, ends, "diagnostics", s,
                    temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)


def give_advantages(rows: list[dict], s: Settings) -> str:
    """Where no run gave any: (r - mean) / std over the set, and batches of 32 (D15); -> where they come from."""
    L_max = max(s.max_completion, *(len(row["completion_ids"]) for row in rows))
    r = np.array([row["reward"] if "reward" in row else
                  shaped_reward(row["correct"], len(row["completion_ids"]), L_max, s.beta_L) for row in rows])
    spread = r.std(ddof=1) if len(r) > 1 else 0.0
    for i, row in enumerate(rows):
        row |= {"advantage": float((r[i] - r.mean()) / (spread if spread >= 1e-6 else 1.0)), "batch": i // 32}
    return f"(r - mean) / std over this set: mean {r.mean():.3f}, std {spread:.3f}, r with L_max {L_max}"


@torch.no_grad()
def student_pass(model, rows: list[dict], s: Settings) -> list[np.ndarray]:
    """log p_S of each row's completion tokens, as in training: adapter on, no reference in sight."""
    logps = [None] * len(rows)
    for group in micro_batches([len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows], s.micro_batch_tokens):
        completions = [rows[i]["completion_ids"] for i in group]
        hidden, y = completion_hidden(model, [rows[i]["prompt_ids"] for i in group], completions)
        logp, _ = logprob_and_entropy(hidden / s.logit_temperature, head_of(model), y, s.head_chunk)
        for i, of_row in zip(group, logp.split([*map(len, completions)])):
            logps[i] = of_row.cpu().numpy()
    return logps


def measure(o: argparse.Namespace, s: Settings, out: Path) -> dict:
    """Completions, references and passes -> tokens.npz; -> the context, which is what its arrays do not hold."""
    rows = run_rows(o.rollouts, o.limit) if o.rollouts else eval_rows(o.samples, o.limit) if o.samples else None
    rows = rows and [row for row in rows if row["completion_ids"]]
    if rows is not None and not rows:
        fail(f"{o.rollouts or o.samples} holds no completions")
    device = start_processes(s.threads)
    tokenizer, base = load_tokenizer(s), load_base(s, device)
    check_head(base, s)
    if o.adapter:
        check_adapter(o.adapter, s.model, base)
        drawn = (o.drawn_with and read_json(o.drawn_with, {}).get("adapter_weights") or "").split()[:1]
        if drawn and drawn != adapter_fingerprint(Path(o.adapter)).split()[:1]:
            fail(f"{o.adapter} is not the adapter that drew {o.samples} ({o.drawn_with}): name that one with --adapter")
    model = add_adapter(base, s)
    use_student(model, o.adapter)
    rows = rows or sampled_rows(model, tokenizer, o, s, device)
    check_numbers(o, len(rows))
    origin = "the run's own (Eq. 9; r - 0.5 in its first ten steps)" if o.rollouts else give_advantages(rows, s)
    references = give_references(rows)
    o.note += give_prompts(rows, tokenizer, s)
    check_rows(rows, model, s)

    kept = bool(o.rollouts and not o.adapter)
    if kept and s.logit_temperature != 1:
        fail("the run kept log-probabilities at temperature 1 and had another --logit_temperature: give --adapter")
    columns, other, batches = collections.defaultdict(list), [], collections.defaultdict(list)
    for row in rows:
        batches[row["batch"]].append(row)
    rows = sum(batches.values(), [])
    for batch in progress(batches.values(), desc="passes", unit="batch"):
        student = [np.asarray(row["engine_logps"]) for row in batch] if kept else student_pass(model, batch, s)
        teacher_logp, H = (part.cpu().numpy() for part in teacher_pass(model, batch, s))  # (B, T), (B, T)
        misled = [{**row, "teacher_ids": row["other_ids"]} for row in batch]
        other_logp = teacher_pass(model, misled, s)[0].cpu().numpy()  # (B, T)
        lengths = [len(row["completion_ids"]) for row in batch]
        H_max = np.max([H[i, :n].max() for i, n in enumerate(lengths)])
        if not np.isfinite(H_max):
            fail(f"the teacher's entropies in batch {batch[0]['batch']} are not finite: the model is broken")
        for i, (row, n) in enumerate(zip(batch, lengths)):
            for name, value in {"rollout": len(other), "position": np.arange(n), "token_id": row["completion_ids"],
                                "teacher_logp": teacher_logp[i, :n], "student_logp": student[i], "entropy": H[i, :n],
                                "max_entropy": H_max, "advantage": row["advantage"]}.items():
                columns[name].append(np.broadcast_to(np.asarray(value, MEASURED[name]), n))
            other.append(other_logp[i, :n])
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    flat |= gate_quantities(flat, s)
    np.savez(out / "tokens.npz", **{name: flat[name] for name in (*MEASURED, *DERIVED)})
    text = token_texts(tokenizer, np.unique(flat["token_id"]).tolist())
    control = {"verdict": "NOT MEASURED: the control needs completions of at least two problems."}
    if len({str(row["key"]) for row in rows}) > 1:
        control = reads_reference(flat["delta"], np.concatenate(other) - flat["student_logp"], flat["rollout"],
                                  np.array([row["correct"] for row in rows]), follows(flat, text, o.result_after))
    context = {"settings": dataclasses.asdict(s), "advantages": origin, "references": references, "note": o.note,
               "source": o.rollouts or o.samples or f"sampled now, with the problems of {Path(s.data).name}",
               "model": s.model, "student": "the policy that sampled them" if kept else o.adapter or "the base model",
               "control": control, "token_text": {str(i): piece for i, piece in text.items()},
               "rollouts": [{key: row.get(key) for key in ("id", "batch", "correct", "problem")} for row in rows]}
    write_json(out / "context.json", context)
    return context


def gate_quantities(flat: dict[str, np.ndarray], s: Settings) -> dict[str, np.ndarray]:
    """What egrsd.py's own functions make of whole rollouts: flat DERIVED and token_advantage. Eq. 2 and 5 to 8."""
    starts = np.flatnonzero(np.diff(flat["rollout"], prepend=-1))
    lengths = np.diff(starts, append=len(flat["rollout"]))
    made = {name: np.empty(len(flat["rollout"]), np.float32) for name in (*DERIVED, "token_advantage")}
    for H_max in np.unique(flat["max_entropy"][starts]):  # a batch of Eq. 5, or several that share their maximum
        same = np.flatnonzero(flat["max_entropy"][starts] == H_max)
        for group in micro_batches(lengths[same].tolist(), 1 << 20):
            first, n = starts[same[group]][:, None], lengths[same[group]][:, None]  # (B, 1)
            real = np.arange(n.max()) < n  # (B, T)
            at = first + np.arange(n.max()) * real  # (B, T) where each token stands in the flat arrays
            teacher, student, H, A = (torch.from_numpy(flat[name][at])
                                      for name in ("teacher_logp", "student_logp", "entropy", "advantage"))  # (B, T)
            mask, A = torch.from_numpy(real), A[:, 0]  # (B, T), (B,)
            w = evidence_magnitude(teacher, student, A.sign(), s.eps)  # (B, T)
            omega, omega_CL = (confidence_gate(H, mask, s.gamma, W, float(H_max)) for W in (0, s.W))  # (B, T)
            for name, value in {"delta": teacher - student, "magnitude": w, "gate": omega, "gate_lookahead": omega_CL,
                                "entropy_lookahead": lookahead_min(H, mask, s.W),
                                "token_advantage": token_advantages(A, w, omega_CL, mask)}.items():
                made[name][at[real]] = value.numpy()[real]
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Appendix C, and main


def selftest(windows: int = 20_000, W: int = 5) -> list[str]:
    """Appendix C with numbers: Lemma 1, Proposition 1 and the chord, through the gate that trains. -> what holds."""
    h = torch.rand(windows, W + 1, generator=torch.Generator().manual_seed(0)) ** 2 * 3  # (windows, W + 1) nats
    h0, rest, lowest, top, lines = h[:, 0], h[:, 1:], h.min(1).values, float(h.max()), []
    gate = lambda H, W: confidence_gate(H, torch.ones_like(H), gamma, W, top)[:, 0].double()  # noqa: E731
    filters = {"min": lowest, "no lookahead": h0, "min of half the window": h[:, : W // 2 + 1].min(1).values,
               "min(h0, mean)": torch.minimum(h0, h.mean(1)), "min(h0, median)": torch.minimum(h0, h.median(1).values),
               "min(h0, max of the rest)": torch.minimum(h0, rest.max(1).values), "sqrt(h0 min)": (h0 * lowest).sqrt(),
               "h0/3 + 2 min/3": h0 / 3 + 2 * lowest / 3}  # all monotone, at most h0, and c where every h is c
    for gamma in (0.3, 0.6, 0.9):
        least = gate(h, W) - gate(h, 0)  # what the minimum recovers
        for name, phi in filters.items():
            if not ((phi <= h0 + 1e-6) & (phi >= lowest - 1e-6)).all():
                fail(f"selftest: Lemma 1 fails for {name}")
            free = gate(phi[:, None], 0) > 0.1  # not saturated by the lower clip
            more = (gate(phi[:, None], 0) - gate(h, 0) - least)[free]
            if more.max() > 1e-6 or (name == "min") != bool(more.min() > -1e-6):  # equality for the minimum alone
                fail(f"selftest: Proposition 1 fails for {name} at gamma {gamma}")
        lines.append(f"Proposition 1, gamma {gamma}: of {len(filters)} admissible filters on {windows:,} windows none "
                     f"recovers more weight than the minimum ({least.mean():.3f}), and no other as much everywhere")
    x = torch.linspace(0, 1, 1001)
    for gamma in (0.1, 0.3, 0.5, 0.9, 0.99):
        a = gamma / (1 - gamma)  # Eq. 13
        over = confidence_gate(2 * x[None], torch.ones(1, 1001), gamma, 0, 2.0)[0].double() - 1 / (1 + a * x.double())
        met = gamma > 0.9 or over[-1].abs() < 1e-6 and over[1:-1].min() > 0  # above 0.9 the floor binds at H = 1
        if over.min() < -1e-6 or over[0].abs() > 1e-6 or not met:
            fail(f"selftest: the gate is not the chord at gamma {gamma}")
        lines.append(f"chord, gamma {gamma}: the gate is on or above 1 / (1 + {a:.3g} H), by {over.max():.3f} at most, "
                     + ("and meets it at both ends" if gamma <= 0.9 else "and meets it at 0; at 1 the floor 0.1 binds"))
    return lines


def main(argv: list[str] | None = None) -> None:
    o, s = parse(argv)
    if o.selftest:
        return print("\n".join(selftest()))
    out, path = Path(o.out), Path(o.tokens or Path(o.out) / "tokens.npz")
    make_folder(out)
    if o.tokens:
        context = read_json(path.parent / "context.json", {})
        context["note"] = context.get("note", "") + "Computed again from saved arrays. "
    else:
        context = measure(o, s, out)
    print(verdict_of(context), flush=True)
    derive = functools.partial(gate_quantities, s=s)
    summary = statistics(path, derive, context, o, s)
    shown = shown_rollouts(path, derive, {*summary["shown"], *(n for n, *_ in o.windows)}, context, o)
    number = summary["shown"][0]
    beside = [str(path) for path in [Path(o.rollouts).parent / "log.jsonl"] if o.rollouts and path.is_file()]
    logs = o.log or beside  # the rollouts alone are enough for all else
    pictures = draw_all(summary, shown, logs, o, s)
    for name, _, _, figure in pictures:
        save_figure(out / name, figure)
    write_report(out, summary, context, pictures, s)
    problem = context["rollouts"][number]["problem"] if "rollouts" in context else ""
    write_text(out / "microscope.html", microscope(shown[number], number, problem, o, s))
    write_json(out / "summary.json", {"control": context.get("control"), "advantages": context.get("advantages"),
                                      "settings": dataclasses.asdict(s), **summary})
    print(f"report: {out}/report.html   microscope: {out}/microscope.html   arrays: {path}")


if __name__ == "__main__":
    main()
