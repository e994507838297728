"""
See what the gate does, token by token: sections 4.1 and 5.5, Figures 3, 4, A1 and A3 to A5 of the paper, on any model.

    python diagnostics.py --preset tiny                                             # sample, measure, draw
    python diagnostics.py --model M --adapter RUN/step_100 --data FILE --gamma 0.3 --W 5 --out DIR
    python diagnostics.py --rollouts RUN/rollouts.jsonl                             # what a run trained on
    python diagnostics.py --samples samples.jsonl --model M --adapter RUN/step_100  # of eval.py --save_ids
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
import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import html
import json
import math
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import egrsd
from egrsd import (Settings, completion_hidden, confidence_gate, encode_prompt, evidence_magnitude, fail, fill,
                   head_weight, load_problems, logprob_and_entropy, lookahead_min, micro_batches, parse_settings,
                   shaped_reward, teacher_pass, token_advantages, write_json)

MEASURED = {"rollout": np.int32, "position": np.int32, "token_id": np.int32, "teacher_logp": np.float32,
            "student_logp": np.float32, "entropy": np.float32, "max_entropy": np.float32, "advantage": np.float32}
DERIVED = ("delta", "magnitude", "gate", "gate_lookahead", "entropy_lookahead")  # what Eq. 2, 6 and 8 make of them
REGIMES = ("lock", "fork", "pivot", "mid")
COLORS = {"lock": "#0072B2", "fork": "#D55E00", "pivot": "#009E73", "mid": "#767676"}  # Okabe and Ito
TAUS = [(low, high) for low in (0.05, 0.1, 0.2) for high in (0.2, 0.3, 0.4) if low < high]  # how the shares move
WINDOW = 24  # tokens of a window of the pivot figure
HERE = Path(__file__).resolve().parent


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
        ("adapter", "", str, "folder of the student's adapter; without it the student is the base model"),
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
    with contextlib.suppress(FileNotFoundError):
        if o.rollouts:
            saved = json.loads((source.parent / "settings.json").read_text())
        elif o.tokens:
            saved = json.loads((source.parent / "context.json").read_text())["settings"]
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
    beside = source.parent if o.tokens else source.parent / "diagnostics" if source.name else None
    o.out = o.out or str(beside or Path("runs") / s.preset / "diagnostics-sampled")
    absent = [path for path in o.log if not (Path(path).is_file() or (Path(path) / "log.jsonl").is_file())]
    for wrong, sentence in [
        (not 0 <= o.tau_low < o.tau_high <= 1, f"--tau_low {o.tau_low} must be below --tau_high {o.tau_high}"),
        (sum(map(bool, (o.tokens, o.rollouts, o.samples))) > 1, "--tokens, --rollouts and --samples: choose one"),
        (egrsd.rank_and_world()[1] > 1, "diagnostics.py is one process: start it without torchrun"),
        (o.limit < 0, "--limit must be at least 0"),
        (absent, f"--log {', '.join(absent)}: no log.jsonl there"),
    ]:
        if wrong:
            fail(sentence)
    return o, s


# ---------------------------------------------------------------------------------------------------------------------
# Completions and their references. A row: key of its problem, batch, adapter, prompt_ids, completion_ids, correct ...


def read_rows(path: str, keys: tuple[str, ...]) -> list[dict]:
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            fail(f"{path}, line {number} is not JSON: a run that was killed may have left half a line; remove it")
        missing = [key for key in keys if rows[-1].get(key) is None]
        if missing:
            fail(f"{path}, line {number} has no {' and no '.join(missing)}. The passes need the token ids as sampled: "
                 "a samples.jsonl has them if eval.py ran with --save_ids, a rollouts.jsonl of egrsd.py always")
    return rows


def run_rows(path: str, limit: int) -> list[dict]:
    """The first rollouts of a run, in whole steps."""
    rows = read_rows(path, ("step", "prompt_ids", "completion_ids", "engine_logps", "problem", "correct", "advantage"))
    steps = {row["step"] for row in rows[: limit or None]}
    return [{"answer": "", "solution": "", **row, "batch": row["step"], "key": row["id"]}
            for row in rows if row["step"] in steps]


def eval_rows(path: str, limit: int) -> list[dict]:
    """Samples of eval.py --save_ids; the benchmarks' problems are kept apart."""
    rows = read_rows(path, ("id", "gold", "problem", "text", "correct", "prompt_ids", "completion_ids"))
    return [{**row, "key": (row.get("benchmark"), row["id"]), "answer": str(row["gold"]),
             "solution": row.get("solution") or ""} for row in rows[: limit or None]]


def sampled_rows(model, tokenizer, o: argparse.Namespace, s: Settings, device: torch.device) -> list[dict]:
    """A completion, now, for each of --limit problems, with the sampling settings of training."""
    problems = load_problems(s.data, s)
    rows = [{**row, "key": row["id"], "prompt_ids": encode_prompt(tokenizer, fill(s.student_prompt, row), s.thinking)}
            for row in random.Random(s.seed).sample(problems, min(o.limit or len(problems), len(problems)))]
    ends = egrsd.end_tokens(model, tokenizer)
    engine, why = egrsd.choose_engine(s, device)
    print(f"sampling {len(rows)} completions with {engine} ({why})", flush=True)
    generate = functools.partial(egrsd.hf_generate, model, ends)
    if engine == "vllm":
        from vllm.lora.request import LoRARequest
        rank = json.loads((Path(o.adapter) / "adapter_config.json").read_text())["r"] if o.adapter else 0
        llm = egrsd.start_vllm(s.model, device, 1, s.max_length, rank, gpu_memory_utilization=0.05,
                               kv_cache_memory_bytes=egrsd.kv_cache_bytes(s, model.config, device, 1))
        lora = LoRARequest("student", 1, o.adapter) if o.adapter else None
        generate = functools.partial(egrsd.vllm_generate, llm, lora, ends)
    drawn = egrsd.sample(generate, 1, [row["prompt_ids"] for row in rows],
                         [egrsd.rollout_seed(s.seed, "diagnostics", i) for i in range(len(rows))],
                         temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_new=s.max_completion)
    for row, (ids, _) in zip(rows, drawn):
        row |= {"completion_ids": ids, **egrsd.read_completion(tokenizer, row["prompt_ids"], ids, ends)}
    texts, golds = [row["graded_text"] for row in rows], [row["answer"] for row in rows]
    for row, grade in zip(rows, egrsd.grade_completions(texts, golds)):
        row["correct"] = grade.correct
    return rows


def give_references(rows: list[dict]) -> dict[str, int]:
    """D14: fill in each row's solution; -> how many rows have which kind. A completion is never its own reference."""
    right, kinds = collections.defaultdict(list), collections.Counter()
    for row in rows:
        if row["correct"]:
            right[row["key"]].append(row)
    for row in rows:
        others = [r["text"] for r in right[row["key"]] if r["completion_ids"] != row["completion_ids"]]
        texts = {"worked solution": row["solution"],
                 "a right completion": (others or [""])[0].rsplit("</think>", 1)[-1], "bare answer": row["answer"]}
        kind = next((kind for kind, text in texts.items() if text and text.strip()), None)
        if kind is None:
            fail(f"problem {row['key']} has an empty reference: no solution, no other right completion and no answer. "
                 "The teacher would be shown nothing: remove it, or give --data with solutions or answers")
        row["reference"] = texts[kind].strip()
        kinds[kind] += 1
    return dict(kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: the two passes of training, and a third with the reference of another problem


def use_student(model, folder: str) -> None:
    """Make the adapter in `folder` the student; '' is the base model (a fresh adapter, which changes nothing)."""
    name = re.sub(r"\W", "_", folder) or "default"
    if name not in model.peft_config:
        if not (Path(folder) / "adapter_config.json").exists():
            fail(f"--adapter {folder}: no adapter_config.json there. It takes a folder like RUN/step_100")
        model.load_adapter(folder, name)
        if not any(p.any() for key, p in model.named_parameters() if "lora_B" in key and f".{name}." in key):
            fail(f"--adapter {folder} is empty: its student is the base model. If you want that, leave --adapter out")
    model.set_adapter(name)


@torch.no_grad()
def student_pass(model, rows: list[dict], s: Settings) -> list[np.ndarray]:
    """log p_S of each row's completion tokens, as in training: adapter on, no reference in sight."""
    logps = [None] * len(rows)
    for group in micro_batches([len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows], s.micro_batch_tokens):
        y = [rows[i]["completion_ids"] for i in group]
        hidden = completion_hidden(model, [rows[i]["prompt_ids"] for i in group], y) / s.logit_temperature
        targets = torch.tensor(sum(y, []), device=hidden.device)
        logp, _ = logprob_and_entropy(hidden, head_weight(model), targets, s.head_chunk)
        for i, of_row in zip(group, logp.split([*map(len, y)])):
            logps[i] = of_row.cpu().numpy()
    return logps


def give_prompts(rows: list[dict], tokenizer, s: Settings) -> str:
    """teacher_ids, and other_ids with the reference of another problem; -> a note for the report, '' for none.

    Both contexts need the generation prefix that the samples were drawn with (D7): it tells whether thinking was on.
    """
    matches = [thinking for thinking in (s.thinking, not s.thinking)
               if encode_prompt(tokenizer, fill(s.student_prompt, rows[0]), thinking) == rows[0]["prompt_ids"]]
    s.thinking = matches[0] if matches else s.thinking
    reference = {str(row["key"]): row["reference"] for row in rows}
    keys = random.Random(0).sample(sorted(reference), len(reference))
    following = dict(zip(keys, keys[1:] + keys[:1]))
    for row in rows:
        for name, text in (("teacher_ids", row["reference"]), ("other_ids", reference[following[str(row["key"])]])):
            row[name] = encode_prompt(tokenizer, fill(s.teacher_prompt, {**row, "solution": text}), s.thinking)
    return "" if matches else ("The student prompts in the file are not what --student_prompt makes now: delta "
                               "measures that difference too. ")


def give_advantages(rows: list[dict], s: Settings) -> str:
    """Where no run gave any: (r - mean) / std over the set, and batches of 32 (D15); -> where they come from."""
    L_max = max(s.max_completion, *(len(row["completion_ids"]) for row in rows))
    r = np.array([shaped_reward(row["correct"], len(row["completion_ids"]), L_max, s.beta_L) for row in rows])
    spread = r.std(ddof=1) if len(r) > 1 else 0.0
    for i, row in enumerate(rows):
        row |= {"advantage": float((r[i] - r.mean()) / (spread if spread >= 1e-6 else 1.0)), "batch": i // 32}
    return f"(r - mean) / std over this set: mean {r.mean():.3f}, std {spread:.3f}, r with L_max {L_max}"


def check_rows(rows: list[dict], model, s: Settings) -> None:
    V, longest = head_weight(model).shape[0], getattr(model.config, "max_position_embeddings", math.inf)
    ids = [i for row in rows for i in (*row["prompt_ids"], *row["completion_ids"])]
    if not 0 <= min(ids) <= max(ids) < V:
        fail(f"the completions hold token id {max(ids)}, but {s.model} has {V} tokens: they come from another model")
    if s.W >= max(len(row["completion_ids"]) for row in rows):
        fail(f"--W {s.W} is longer than every completion: no token would have a whole window. Lower --W")
    long = [row["key"] for row in rows
            if max(len(row["prompt_ids"]), len(row["teacher_ids"])) + len(row["completion_ids"]) > longest]
    if long:
        fail(f"{len(long)} completions do not fit, with their reference, into the {longest} positions of {s.model} "
             f"(the first: problem {long[0]}): remove them")


def measure(o: argparse.Namespace, s: Settings, out: Path) -> dict:
    """Completions, references and passes -> tokens.npz; -> the context, which is what its arrays do not hold."""
    from tqdm import tqdm
    if s.threads:
        torch.set_num_threads(s.threads)
    rows = run_rows(o.rollouts, o.limit) if o.rollouts else eval_rows(o.samples, o.limit) if o.samples else None
    rows = rows and [row for row in rows if row["completion_ids"]]
    if rows is not None and not rows:
        fail(f"{o.rollouts or o.samples} holds no completions")
    device = egrsd.start_processes()
    tokenizer, base = egrsd.load_tokenizer(s), egrsd.load_base(s, device)
    egrsd.check_head(base, s)
    model = egrsd.add_adapter(base, s)
    use_student(model, o.adapter)
    rows = rows or sampled_rows(model, tokenizer, o, s, device)
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
    for batch in tqdm(batches.values(), desc="passes", unit="batch"):
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


def token_texts(tokenizer, ids: list[int]) -> dict[int, str]:
    """The text of each token inside a sentence, with the space that belongs to it."""
    anchor = tokenizer("." if tokenizer.unk_token is None else "check", add_special_tokens=False).input_ids[-1:]
    before = tokenizer.decode(anchor)
    inside = {i: tokenizer.decode([*anchor, i]) for i in ids}
    return {i: text[len(before):] if text.startswith(before) else tokenizer.decode([i]) for i, text in inside.items()}


def follows(flat: dict[str, np.ndarray], text: dict[int, str], marker: str) -> np.ndarray:
    """(N,) is this the first token after `marker`, in the same completion? '' marks nothing."""
    markers = [i for i, piece in text.items() if marker and piece.strip() == marker]
    after = np.zeros(len(flat["token_id"]), bool)
    after[1:] = np.isin(flat["token_id"][:-1], markers) & (flat["position"][1:] > 0)
    return after


def reads_reference(own: np.ndarray, other: np.ndarray, rollout: np.ndarray, correct: np.ndarray,
                    result: np.ndarray) -> dict:
    """The control: (N,) delta under the own and under another problem's reference, on the same tokens, and a verdict.

    What only the presence of a reference changes cancels in own - other. Where result tokens are known and both
    outcomes exist, right ones must gain more than wrong ones; else the tokens of right completions must gain.
    """
    rows, R = {}, len(correct)
    for name, chosen in (("result tokens", result), ("all tokens", np.ones(len(own), bool))):
        group = 1 - correct[rollout[chosen]]  # 0: of a right completion, 1: of a wrong one
        count, *sums = (table_of(rollout[chosen], group, values[chosen], R, 2)
                        for values in (np.ones(len(own)), own, other, own - other))
        mean, low, high, drawn = bootstrap(sums[2], count)
        for g, outcome in enumerate(("right", "wrong")):
            if count[:, g].any():
                means = {key: float(of[:, g].sum() / count[:, g].sum()) for key, of in zip(("own", "other"), sums)}
                rows[f"{name} of {outcome} completions"] = {
                    "tokens": int(count[:, g].sum()), **means, "mean": float(mean[g]), "low": float(low[g]),
                    "high": float(high[g])}
        if count.any(0).all():
            low, high = np.nanpercentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
            rows[f"{name}: right minus wrong"] = {
                "tokens": int(count.sum()), "own": None, "other": None, "mean": float(mean[0] - mean[1]),
                "low": float(low), "high": float(high)}
    keys = ("result tokens: right minus wrong", "all tokens of right completions")
    key = next((key for key in keys if key in rows), None)
    if key is None:
        return {"table": rows, "verdict": "UNDECIDED: not one completion is right, so that none must gain."}
    word = ("YES, the teacher reads the reference" if rows[key]["low"] > 0 else
            "NO, the teacher does not read the reference, and every other figure here is meaningless")
    return {"table": rows, "verdict": f"{word}. From another problem's reference to the problem's own, delta moves by "
            f"{rows[key]['mean']:+.3f} nats a token on {key} (95 % interval {rows[key]['low']:+.3f} to "
            f"{rows[key]['high']:+.3f}); a teacher that only notices that there is a reference would show 0."}


# ---------------------------------------------------------------------------------------------------------------------
# Per-token arrays, read in pieces of whole rollouts: memory does not grow with the file


def read_tokens(path: Path, names: tuple[str, ...] = tuple(MEASURED),
                chunk: int = 1 << 19) -> Iterator[dict[str, np.ndarray]]:
    """Whole rollouts of a tokens.npz, about `chunk` tokens at a time; np.load would hold each array as a whole."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        fail(f"--tokens {path} cannot be read ({error}): it takes the tokens.npz of an earlier call")
    with archive, contextlib.ExitStack() as stack:
        files, kinds, sizes = {}, {}, {}
        for name in names:
            if f"{name}.npy" not in archive.namelist():
                fail(f"--tokens {path} has no array {name}; it needs {', '.join(MEASURED)}")
            files[name] = stack.enter_context(archive.open(f"{name}.npy"))
            version = np.lib.format.read_magic(files[name])
            shape, _, kinds[name] = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(files[name])
            sizes[name] = shape[0] if len(shape) == 1 and not kinds[name].hasobject else None
        if None in sizes.values() or len({*sizes.values()}) > 1:
            fail(f"--tokens {path} must hold flat arrays of numbers, all of one length, not {sizes}")
        left, rest = sizes["rollout"], {name: np.empty(0, kinds[name]) for name in names}
        if not left:
            fail(f"--tokens {path} holds no completions")
        while left:
            now, left = min(chunk, left), max(0, left - chunk)
            for name, file in files.items():
                more = np.frombuffer(file.read(now * kinds[name].itemsize), kinds[name])
                rest[name] = np.concatenate([rest[name], more])
            starts = np.flatnonzero(np.diff(rest["rollout"])) + 1
            cut = len(rest["rollout"]) if not left else starts[-1] if len(starts) else 0
            if cut:
                yield {name: values[:cut] for name, values in rest.items()}
                rest = {name: values[cut:] for name, values in rest.items()}


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
# Statistics: pure numpy


def table_of(rollout: np.ndarray, group: np.ndarray, values: np.ndarray, R: int, G: int) -> np.ndarray:
    """(R, G) sums of the (N,) values by rollout and group."""
    return np.bincount(rollout.astype(np.int64) * G + group, values, R * G).reshape(R, G)


def bootstrap(sums: np.ndarray, counts: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(G,) means sum / count of (R, G) tables, their lower and upper 95 % bounds, and the (draws, G) resampled means.

    Whole rollouts are resampled: the tokens of one are not independent. NaN where a group is empty.
    """
    rng, R, drawn = np.random.default_rng(seed), len(sums), np.empty((draws, sums.shape[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        for rows in np.array_split(np.arange(draws), 1 + draws * R // 10**7):
            picks = rng.multinomial(R, np.full(R, 1 / R), size=len(rows))
            drawn[rows] = (picks @ sums) / (picks @ counts)
        mean = sums.sum(0) / counts.sum(0)
    bounds, filled = np.full((2, len(mean)), np.nan), np.isfinite(drawn).any(0)
    bounds[:, filled] = np.nanpercentile(drawn[:, filled], [2.5, 97.5], axis=0)
    return mean, *bounds, drawn


def ratio(mean: np.ndarray, drawn: np.ndarray, a: int, b: int) -> dict[str, float]:
    """mean[a] / mean[b] with its 95 % interval; NaN where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = drawn[:, a] / drawn[:, b]
        low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (math.nan, math.nan)
        return {"mean": float(mean[a] / mean[b]), "low": float(low), "high": float(high)}


def deciles(values: np.ndarray) -> np.ndarray:
    """(N,) 0..9 by rank: ten groups of equal size (to one), even where many values are equal, which go by position."""
    group = np.empty(len(values), np.uint8)
    group[np.argsort(values, kind="stable")] = np.arange(len(values)) * 10 // max(1, len(values))
    return group


def regimes(H_hat: np.ndarray, H_hat_CL: np.ndarray, tau_low: float, tau_high: float) -> np.ndarray:
    """(N,) index into REGIMES, from normalised entropies. Section 5.5."""
    high = H_hat >= tau_high
    return np.select([H_hat <= tau_low, high & (H_hat_CL >= tau_high), high & (H_hat_CL <= tau_low)], [0, 1, 2], 3)


def local_peaks(values: np.ndarray, k: int) -> np.ndarray:
    """Positions, in order, of the k highest local maxima; of a plateau the first token."""
    padded = np.concatenate([[-np.inf], values, [-np.inf]])
    tops = np.flatnonzero((padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:]))
    return np.sort(tops[np.argsort(-values[tops], kind="stable")[:k]])


def envelope(values: np.ndarray, width: int) -> np.ndarray:
    """Moving maximum over `width` tokens, smoothed by a moving mean of the same width; shorter at both ends."""
    half = width // 2
    highest = np.array([values[max(0, t - half) : t + half + 1].max() for t in range(len(values))])
    return np.array([highest[max(0, t - half) : t + half + 1].mean() for t in range(len(values))])


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of each maximal run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def normalised(flat: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """H_hat and H_hat_CL: entropy over the batch's maximum, which counts as at least 1 nat. Eq. 5, 8, D1."""
    top = np.maximum(flat["max_entropy"], 1)
    return flat["entropy"] / top, flat["entropy_lookahead"] / top


def statistics(path: Path, context: dict, o: argparse.Namespace, s: Settings) -> dict:
    """What summary.json holds beside the control, in two passes over the file. Without context.json `context` is {}."""
    text = {int(i): piece for i, piece in context.get("token_text", {}).items()}
    H, result, R, longest, V = [], [], 0, 0, 0
    for part in read_tokens(path, ("rollout", "position", "token_id", "entropy")):
        if part["rollout"][0] < R or (np.diff(part["rollout"]) < 0).any() or (part["token_id"] < 0).any():
            fail(f"--tokens {path}: rollouts must be numbered in order, from 0, and token ids not be negative")
        H.append(part["entropy"])
        result.append(follows(part, text, o.result_after))
        R, V = int(part["rollout"][-1]) + 1, max(V, int(part["token_id"].max()) + 1)
        longest = max(longest, int(part["position"].max()) + 1)
    H, result = np.concatenate(H), np.concatenate(result)
    if not np.isfinite(H).all():
        fail(f"--tokens {path}: entropy holds values that are not finite")
    if s.W >= longest:
        fail(f"--W {s.W} is longer than every completion (the longest has {longest} tokens). Lower --W")
    decile, result_decile = deciles(H), np.zeros(len(H), np.uint8)
    result_decile[result] = deciles(H[result])

    pairs = [(o.tau_low, o.tau_high)] + [pair for pair in TAUS if pair != (o.tau_low, o.tau_high)]
    tables, shares = collections.defaultdict(float), np.zeros((len(pairs), 4), np.int64)
    per_token, end = np.zeros((4, V), np.int64), 0
    for part in read_tokens(path):
        part |= gate_quantities(part, s)
        here = slice(end, end := end + len(part["rollout"]))
        codes = [regimes(*normalised(part), *pair) for pair in pairs]
        shares += [np.bincount(code, minlength=4) for code in codes]
        per_token += [np.bincount(part["token_id"][codes[0] == g], minlength=V) for g in range(4)]
        values = {"count": np.ones(len(codes[0])), "gap": np.abs(part["delta"]), "w": part["magnitude"],
                  "gate": part["gate"], "gate_CL": part["gate_lookahead"],
                  "increment": part["gate_lookahead"] - part["gate"]}
        every = np.ones(len(codes[0]), bool)
        for kind, group, rows in [("decile", decile[here], every), ("result decile", result_decile[here], result[here]),
                                  ("regime", codes[0], every)]:
            for name, value in values.items():
                G = 4 if kind == "regime" else 10
                tables[kind, name] += table_of(part["rollout"][rows], group[rows], value[rows], R, G)

    summary = {"tokens": len(H), "completions": R, "result_tokens": int(result.sum()), "mean_entropy": float(H.mean())}
    for kind in ("decile", "result decile") if result.any() else ("decile",):
        count = tables[kind, "count"]
        boot = {name: bootstrap(tables[kind, name], count) for name in ("gap", "gate", "gate_CL", "w")}
        gap, _, _, drawn = boot["gap"]
        summary[kind] = {name: dict(zip(("mean", "low", "high"), parts)) for name, parts in boot.items()} | {
            "count": count.sum(0).astype(int), "top_to_bottom": ratio(gap, drawn, 9, 0),
            "highest": int(gap.argmax()) + 1, "monotone": bool((np.diff(gap) >= 0).all())}
    count = tables["regime", "count"]
    mean, low, high, drawn = bootstrap(tables["regime", "increment"], count)
    summary["regimes"] = {name: {
        "share": count[:, g].sum() / len(H), "mean": mean[g], "low": low[g], "high": high[g],
        **{key: tables["regime", key][:, g].sum() / max(1, count[:, g].sum()) for key in ("gate", "gate_CL", "gap")},
        "tokens": [[text.get(int(i), f"#{i}"), int(per_token[g, i])]
                   for i in np.argsort(-per_token[g], kind="stable")[:12] if per_token[g, i]]}
        for g, name in enumerate(REGIMES)}
    summary["selectivity"] = ratio(mean, drawn, 2, 1)
    summary["sensitivity"] = [{"tau_low": pair[0], "tau_high": pair[1], **dict(zip(REGIMES, row / len(H)))}
                              for pair, row in zip(pairs, shares)]
    # to show: the two rollouts of readable length in which the rarest of lock, fork and pivot is most frequent
    shown = np.argsort(-count[:, :3].min(1) * (count.sum(1) <= 1024), kind="stable")[:2].tolist()
    if o.show is not None and not 0 <= o.show < R or any(number >= R for number, *_ in o.windows):
        fail(f"--show and --windows: there are rollouts 0 to {R - 1}")
    summary["shown"] = shown if o.show is None else [o.show] + [i for i in shown if i != o.show][:1]
    # plain numbers; what is not finite becomes None
    return json.loads(json.dumps(summary, default=lambda value: value.tolist()), parse_constant=lambda name: None)


# ---------------------------------------------------------------------------------------------------------------------
# Figures. A rollout to show is a dictionary of its flat arrays, with `text`, `H_hat`, `H_hat_CL` and `regime`


def shown_rollouts(path: Path, numbers: set[int], context: dict, o: argparse.Namespace, s: Settings) -> dict[int, dict]:
    found = {}
    for part in read_tokens(path):
        for number in numbers & set(part["rollout"].tolist()):
            one = {name: values[part["rollout"] == number] for name, values in part.items()}
            one |= gate_quantities(one, s)
            one["H_hat"], one["H_hat_CL"] = normalised(one)
            one["regime"] = regimes(one["H_hat"], one["H_hat_CL"], o.tau_low, o.tau_high)
            one["text"] = [context.get("token_text", {}).get(str(i), f"#{i} ") for i in one["token_id"]]
            found[number] = one
    return found


def canvas(rows: int, columns: int, width: float, height: float, **how: object):
    """-> a matplotlib Figure of that many inches and its (rows, columns) axes; it needs no display."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                                "legend.fontsize": 9, "text.parse_math": False})  # a $ in a completion is a dollar
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def label(text: str, longest: int = 12) -> str:
    """A token as a label: line breaks visible, unprintable characters replaced."""
    text = "".join(c if c.isprintable() else {"\n": "\u21b5", "\t": "\u21e5"}.get(c, "\ufffd") for c in text.strip(" "))
    return text[: longest - 1] + "\u2026" if len(text) > longest else text or "\u2423"


def with_errors(rows: dict | list[dict]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(G,) means and lengths of their error bars, from {"mean": [...], "low": ..., "high": ...} or a list of such."""
    rows = {key: [row[key] for row in rows] for key in ("mean", "low", "high")} if isinstance(rows, list) else rows
    mean, low, high = (np.array(rows[key], float) for key in ("mean", "low", "high"))  # None becomes NaN
    return mean, [mean - low, high - mean]


def draw_deciles(summary: dict, s: Settings):
    """Figure 4a."""
    kinds, xs = [kind for kind in ("decile", "result decile") if kind in summary], np.arange(1, 11)
    figure, axes = canvas(1, len(kinds), 6.5 * len(kinds), 4)
    for axis, kind in zip(axes.flat, kinds):
        right = axis.twinx()
        for place, at, key, color, style, name in [
                (axis, 0, "gap", "fork", "o-", "mean |\u03b4| (left)"),
                (right, 0.08, "gate", "lock", "s--", "\u03c9 of EGRSD (right)"),
                (right, -0.08, "gate_CL", "pivot", "^:", "\u03c9 of CL-EGRSD (right)")]:
            mean, errors = with_errors(summary[kind][key])
            place.errorbar(xs + at, mean, errors, fmt=style, color=COLORS[color], capsize=3, label=name)
        right.axhline(max(0.1, 1 - s.gamma), color="#999999", linewidth=1, label="lowest \u03c9 there can be (right)")
        axis.set(xlabel="decile of the teacher's entropy (1 = most certain)", ylabel="mean |\u03b4| (nats)", xticks=xs,
                 title=f"{kind.replace('decile', '') or 'all '}tokens: {sum(summary[kind]['count']):,}", ylim=(0, None))
        right.set(ylabel="mean gate \u03c9", ylim=(0, 1.05))
        right.spines["right"].set_visible(True)
    handles = [pair for a in (axis, right) for pair in zip(*a.get_legend_handles_labels())]
    figure.legend(*zip(*handles), loc="outside lower center", ncols=4 if len(kinds) > 1 else 2)
    return figure


def draw_regimes(summary: dict, s: Settings):
    """Figure 4b, and how the shares depend on the thresholds."""
    figure, axes = canvas(1, 2, 10.5, 3.6)
    left, right = axes[0]
    mean, errors = with_errors(list(summary["regimes"].values()))
    names = [f"{name}\n{row['share']:.1%}" for name, row in summary["regimes"].items()]
    left.bar(names, mean, yerr=errors, capsize=4, color=[*COLORS.values()])
    left.set(ylabel="mean \u03c9_CL \u2212 \u03c9", xlabel="regime and share of the tokens",
             title=f"weight that the lookahead restores (\u03b3 {s.gamma:g}, W {s.W})")
    pairs, bottom = summary["sensitivity"], np.zeros(len(summary["sensitivity"]))
    for name, color in COLORS.items():
        height, names = np.array([row[name] for row in pairs]), [f"{r['tau_low']:g}\n{r['tau_high']:g}" for r in pairs]
        right.bar(names, height, bottom=bottom, color=color, label=name)
        bottom += height
    right.set(xlabel="\u03c4_low (above) and \u03c4_high (below); the first pair is used elsewhere",
              ylabel="share of the tokens", title="how the shares move with the thresholds")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def shade(axis, one: dict, a: int, b: int, names: tuple[str, ...]) -> None:
    """Colour the spans of these regimes between tokens a and b, with a legend entry for each."""
    for name in names:
        how = {"color": COLORS[name], "alpha": 0.25, "linewidth": 0, "hatch": "//" if name == "fork" else None}
        axis.fill_between([], [], [], label=name, **how)
        for start, end in runs_of(one["regime"][a:b] == REGIMES.index(name)):
            axis.axvspan(a + start - 0.5, a + end - 0.5, **how)


def token_ticks(axis, one: dict, a: int, b: int) -> None:
    words = [label(text) for text in one["text"][a:b]]
    axis.set_xticks(range(a, b), words, rotation=90, fontsize=8, family="monospace")
    axis.set(xlim=(a - 0.5, b - 0.5), xlabel="token")


def draw_trace(one: dict, number: int):
    """Figure A3: the whole completion, and three zooms into it: the longest certain span, two steep pivots."""
    figure, axes = canvas(2, 1, 12, 6.4)
    T, rise = len(one["H_hat"]), (one["H_hat"] - one["H_hat_CL"]) * (one["regime"] == REGIMES.index("pivot"))
    certain = max(runs_of(one["regime"] == 0), key=lambda run: run[1] - run[0], default=(0, 0))
    first = int(rise.argmax())
    second = int(np.where(np.abs(np.arange(T) - first) > 16, rise, -1).argmax())
    top = axes[0, 0]
    top.plot(one["H_hat"], color="#222222", linewidth=0.9, label="entropy / batch maximum")
    top.plot(envelope(one["H_hat"], max(5, T // 40)), color="#E69F00", linewidth=2, label="smoothed envelope")
    shade(top, one, 0, T, ("lock", "pivot"))
    top.set(xlabel="token", ylabel="normalised entropy", xlim=(-0.5, T - 0.5), ylim=(0, 1.02))
    top.set_title(f"rollout {number}", loc="left")
    top.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    below = figure.add_subfigure(axes[1, 0].get_subplotspec()).subplots(1, 3, sharey=True)
    axes[1, 0].remove()
    for axis, (name, t) in zip(below, [("lock", sum(certain) // 2), ("pivot", first), ("pivot", second)]):
        a = max(0, min(t - 8, T - 17))
        b = min(T, a + 17)
        axis.plot(range(a, b), one["H_hat"][a:b], color="#222222", marker="o", markersize=3)
        shade(axis, one, a, b, ("lock", "pivot"))
        token_ticks(axis, one, a, b)
        axis.set(ylim=(0, 1.02), title=f"{name}: tokens {a} to {b - 1}")
    below[0].set_ylabel("normalised entropy")
    return figure


def draw_peaks(shown: dict[int, dict], o: argparse.Namespace, s: Settings, k: int = 7):
    """Figure A5: the k highest local peaks with their left context; below, the lookahead entropy at the same tokens."""
    figure, axes = canvas(2, len(shown), 8 * len(shown), 7.5, sharey="row", sharex="col", height_ratios=[1.7, 1])
    for (above, below), (number, one) in zip(axes.T, shown.items()):
        peaks = local_peaks(one["H_hat"], k)
        for axis, key, name in ((above, "H_hat", "entropy"), (below, "H_hat_CL", f"lookahead entropy (W {s.W})")):
            axis.plot(one[key], color="#222222" if axis is above else COLORS["lock"], linewidth=1)
            axis.plot(peaks, one[key][peaks], "o", color=COLORS["fork"], markersize=5)
            axis.set_ylabel(f"{name}\n/ batch maximum")
        above.set(ylim=(0, 2.6), yticks=np.arange(0, 1.1, 0.25))
        below.set(xlabel="token", ylim=(-0.05, 1.05))
        for place, t in enumerate(peaks):  # the labels stand in a row above the curve, and a line leads to each peak
            context = label("".join(one["text"][max(0, t - 4) : t]), 26)
            above.annotate(f"{context} [{label(one['text'][t])}]", (t, one["H_hat"][t]),
                           ((place + 0.5) / len(peaks) * len(one["H_hat"]), 1.12), rotation=90, fontsize=8, ha="center",
                           family="monospace", arrowprops={"arrowstyle": "-", "color": "#999999", "relpos": (0.5, 0)})
        low = f"the lookahead is at most {o.tau_low:g} at {(one['H_hat_CL'][peaks] <= o.tau_low).sum()}"
        above.set_title(f"rollout {number}: {low} of {len(peaks)} peaks", fontsize=10)
    return figure


def pivot_windows(shown: dict[int, dict], asked: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(rollout, start) of the windows asked for; else of the three, apart, in which most weight is restored."""
    for window in asked:
        if len(window) != 2 or not 0 <= window[1] < len(shown[window[0]]["text"]):
            fail(f"--windows {':'.join(map(str, window))}: it takes ROLLOUT:START, with a START inside that rollout")
    restored = [(-float((one["gate_lookahead"] - one["gate"])[a : a + WINDOW].sum()), number, a)
                for number, one in shown.items() for a in range(max(1, len(one["text"]) - WINDOW + 1))]
    chosen = list(asked)
    for _, number, a in sorted(restored) if not asked else ():
        if len(chosen) < 3 and all(number != other or abs(a - b) >= WINDOW for other, b in chosen):
            chosen.append((number, a))
    return chosen


def draw_rescue(shown: dict[int, dict], windows: list[tuple[int, int]]):
    """Figure A4."""
    figure, axes = canvas(2, len(windows), 5 * len(windows) + 1.5, 6, sharex="col", sharey="row")
    for column, (number, a) in zip(axes.T, windows):
        one, b = shown[number], min(len(shown[number]["text"]), a + WINDOW)
        for axis, lines in zip(column, ([("H_hat", "entropy"), ("H_hat_CL", "lookahead entropy")],
                                        [("gate", "\u03c9 of EGRSD"), ("gate_lookahead", "\u03c9 of CL-EGRSD")])):
            shade(axis, one, a, b, ("pivot", "fork"))
            for (key, name), color, dash in zip(lines, ("#222222", COLORS["lock"]), ("-", "--")):
                axis.plot(range(a, b), one[key][a:b], dash, color=color, marker=".", label=name)
            axis.set_ylim(0, 1.05)
        token_ticks(axis, one, a, b)
        column[0].set_title(f"rollout {number}, tokens {a} to {b - 1}", fontsize=10)
    for axis, name, last in zip(axes[:, 0], ("normalised entropy", "weight"), axes[:, -1]):
        axis.set_ylabel(name)
        last.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_heat_map(one: dict, number: int, columns: int = 100, most: int = 1200):
    """Figure 3: the completion on a grid of characters, coloured by entropy; its most uncertain 35 % bold."""
    from matplotlib import cm, colormaps, patches
    cells, x, y = [], 0, 0
    for t, piece in enumerate(one["text"][:most]):
        for line in re.findall(r"[^\n]+|\n", piece):
            line = " " * line.startswith(" ") + label(line, columns - 1)
            if x + len(line) > columns:
                x, y = 0, y + 1
            cells.append((t, x, y, line))
            x, y = (0, y + 1) if line == "\u21b5" else (x + len(line), y)
    figure, axes = canvas(1, 1, 12, 1.1 + 0.29 * (y + 1))
    axis, bold = axes[0, 0], one["entropy"] >= np.quantile(one["entropy"], 0.65)
    part = f" (the first {most:,} of {len(bold):,} tokens)" if len(bold) > most else ""
    axis.set(xlim=(0, columns), ylim=(y + 1, 0), title=f"rollout {number}: teacher entropy; the top 35 % in bold{part}")
    axis.axis("off")
    for t, x, y, line in cells:
        rgba = colormaps["cividis"](one["H_hat"][t])
        axis.add_patch(patches.Rectangle((x, y + 0.05), len(line), 0.9, color=rgba, linewidth=0))
        axis.text(x + len(line) / 2, y + 0.52, line, ha="center", va="center", family="monospace", fontsize=12.5,
                  weight="bold" if bold[t] else "normal", color="white" if sum(rgba[:3]) < 1.5 else "black")
    figure.colorbar(cm.ScalarMappable(cmap="cividis"), ax=axis, orientation="horizontal", aspect=60, shrink=0.5,
                    label="entropy / batch maximum")
    return figure


def draw_dynamics(paths: list[str]):
    """Figure A1: the gradient's norm before clipping, and what goes with it, of one or more runs."""
    figure, axes = canvas(2, 3, 13, 6.4)
    panels = {"grad_norm": "gradient norm before clipping", "reward": "mean reward r", "length": "mean length (tokens)",
              "gate": "mean gate \u03c9", "running_std": "\u03c3 of the rewards of earlier steps"}
    limits = set()
    for number, path in enumerate(Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path) for path in paths):
        rows, settings = read_rows(str(path), ("step",)), path.parent / "settings.json"
        limits.add(json.loads(settings.read_text())["max_grad_norm"] if settings.exists() else Settings.max_grad_norm)
        color = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")[number % 6]
        for axis, (key, name) in zip(axes.flat, panels.items()):
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            axis.plot([row["step"] for row in rows], values, ("-", "--", "-.", ":")[number % 4], color=color,
                      linewidth=1.4, label=path.parent.name)
            axis.set(xlabel="step", ylabel=name)
    for limit in limits:
        axes[0, 0].axhline(limit, color="#B00020", linestyle="-.", linewidth=1.2, label=f"clipped to {limit:g}")
    axes[0, 0].set_yscale("log")
    for set_formatter in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
        set_formatter("{x:g}")  # the default writes mathematics, which is off
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The page of one rollout, and the report


def microscope(one: dict, number: int, problem: str, o: argparse.Namespace, s: Settings) -> str:
    """microscope.html with the numbers of one rollout. Its JSON cannot leave its <script>; no other script may run."""
    exact = lambda values: [float(f"{v:.9g}") for v in values.tolist()]  # noqa: E731  nine digits give float32 back
    data = {"rollout": number, "problem": problem, "text": one["text"], "token_id": one["token_id"].tolist(),
            **{name: getattr(s, name) for name in ("gamma", "W", "eps")}, "tau_low": o.tau_low, "tau_high": o.tau_high,
            **{name: exact(one[name]) for name in ("teacher_logp", "student_logp", "entropy")},
            **{name: exact(one[name][:1])[0] for name in ("advantage", "max_entropy")}}
    text = json.dumps(data, allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = (HERE / "microscope.html").read_text()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("SCRIPT_HASH", f"'sha256-{digest}'").replace("DATA", text, 1)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>What the gate does</title><style>body{font:17px/1.5 sans-serif;max-width:70rem;margin:auto;padding:1rem}
img{max-width:100%}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:16px;margin:.5rem 0}
td,th{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #ccc;vertical-align:top}
.verdict{border-left:.4rem solid #0072B2;padding:.5rem 1rem;background:#eef4f8}</style><h1>What the gate does</h1>"""


def shorten(value: object) -> str:
    """A number in four digits; {"mean", "low", "high"} with its interval."""
    if isinstance(value, dict):
        return f"{shorten(value['mean'])} ({shorten(value['low'])} to {shorten(value['high'])})"
    return "\u2013" if value is None else f"{value:.4g}" if isinstance(value, float) else \
        f"{value:,}" if isinstance(value, int) else str(value)


def table(head: list[str], rows: list[list]) -> str:
    lines = ("".join(f"<{tag}>{html.escape(shorten(cell))}</{tag}>" for cell in row)
             for tag, row in [("th", head), *(("td", row) for row in rows)])
    return "<div class=wide><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def write_report(out: Path, summary: dict, context: dict, pictures: list[tuple], s: Settings) -> None:
    """report.html: the verdict first, then where the numbers come from, then each figure with its table."""
    control, tables = context.get("control", {}), collections.defaultdict(str)
    for kind in ("decile", "result decile") if "result decile" in summary else ("decile",):
        d, quantities = summary[kind], ("gap", "gate", "gate_CL", "w")
        tables["deciles.png"] += (
            f"<p>{kind.replace('decile', '').capitalize() or 'All '}tokens, top to bottom decile: "
            f"{shorten(d['top_to_bottom'])}. The gap is {'' if d['monotone'] else 'not '}monotone in the entropy, and "
            f"highest in decile {d['highest']}. (Paper, Qwen3-8B: ratio 139, highest in decile 10.)</p>") + table(
            ["decile", "tokens", "mean |\u03b4| (95 %)", "\u03c9 (95 %)", "\u03c9_CL (95 %)", "w (95 %)"],
            [[g + 1, d["count"][g], *({key: of[g] for key, of in d[name].items()} for name in quantities)]
             for g in range(10)])
    words = f"<p>Selectivity, pivot to fork: {shorten(summary['selectivity'])}. (Paper, Qwen3-8B: 2.1.)</p>"
    tables["regimes.png"] = words + table(
        ["regime", "share", "\u03c9_CL \u2212 \u03c9 (95 %)", "\u03c9", "\u03c9_CL", "mean |\u03b4|",
         "commonest tokens"],
        [[name, f"{r['share']:.1%}", r, r["gate"], r["gate_CL"], r["gap"],
          ", ".join(f"{label(text)} {n:,}" for text, n in r["tokens"])] for name, r in summary["regimes"].items()])
    tables["regimes.png"] += table(["\u03c4_low", "\u03c4_high", *REGIMES], [
        [r["tau_low"], r["tau_high"], *(f"{r[name]:.1%}" for name in REGIMES)] for r in summary["sensitivity"]])
    facts = [[name, summary[name.replace(" ", "_")]]
             for name in ("completions", "tokens", "result tokens", "mean entropy")]
    context = {**context, "references": ", ".join(f"{k}: {n:,}" for k, n in context.get("references", {}).items())}
    facts += [[name, str(context[name])] for name in ("source", "model", "student", "advantages", "references")
              if name in context] + [["\u03b3, W, \u03b5", f"{s.gamma:g}, {s.W}, {s.eps:g}"]]
    parts = [PAGE, "<h2>Does the teacher read the reference?</h2><p class=verdict>", html.escape(verdict_of(context)),
             "</p>", table(["\u03b4 on", "tokens", "own reference", "another problem's", "difference (95 %)"],
                           [[k, r["tokens"], r["own"], r["other"], r] for k, r in control.get("table", {}).items()]),
             "<h2>What was measured</h2><p>", html.escape(context.get("note", "")), "</p>",
             table(["what", "value"], facts),
             "<p><a href=microscope.html>The microscope: one rollout, token by token</a></p>"]
    for name, title, words, _ in pictures:
        image = base64.b64encode((out / name).read_bytes()).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(words)}</p><img alt=\"{html.escape(title)}\" "
                     f"src=\"data:image/png;base64,{image}\">{tables[name]}")
    (out / "report.html").write_text("\n".join([*parts, "</html>\n"]))


def verdict_of(context: dict) -> str:
    return context.get("control", {}).get("verdict", "NOT MEASURED: no context.json lies beside these arrays.")


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
    egrsd.make_folder(out)
    if o.tokens:
        beside = path.parent / "context.json"
        context = json.loads(beside.read_text()) if beside.exists() else {}
        context["note"] = context.get("note", "") + "Computed again from saved arrays. "
    else:
        context = measure(o, s, out)
    print(verdict_of(context), flush=True)
    summary = statistics(path, context, o, s)
    shown = shown_rollouts(path, {*summary["shown"], *(n for n, *_ in o.windows)}, context, o, s)
    both, number = {n: shown[n] for n in summary["shown"]}, summary["shown"][0]
    beside = [str(path) for path in [Path(o.rollouts).parent / "log.jsonl"] if o.rollouts and path.is_file()]
    logs = o.log or beside  # the rollouts alone are enough for all else
    pictures = [
        ("deciles.png", "Evidence by entropy decile (Figure 4a)", "Where the teacher is uncertain, how far apart are "
         "teacher and student, and how much weight is left? 95 % bars, resampling rollouts.", draw_deciles(summary, s)),
        ("regimes.png", "Lock, fork, pivot, mid (Figure 4b)", f"Lock: entropy at most {o.tau_low:g} of the batch's "
         f"maximum. Fork: at least {o.tau_high:g}, and so for the next {s.W} tokens. Pivot: at least {o.tau_high:g}, "
         f"but at most {o.tau_low:g} within {s.W} tokens. Mid: the rest. The thresholds are ours.",
         draw_regimes(summary, s)),
        ("trace.png", "Entropy along one completion (Figure A3)", "Blue: lock. Green: pivot.",
         draw_trace(shown[number], number)),
        ("peaks.png", "The highest peaks and their left context (Figure A5)", "A peak that the lookahead resolves lies "
         "near 0 in the lower row.", draw_peaks(both, o, s)),
        ("rescue.png", "Pivot rescue (Figure A4)", "Green: pivots, whose weight the lookahead restores. Red and "
         "hatched: forks, which stay attenuated.", draw_rescue(shown, pivot_windows(shown, o.windows))),
        ("heatmap.png", "The completion as text (Figure 3)", "Yellow: the teacher is uncertain.",
         draw_heat_map(shown[number], number))]
    if logs:
        pictures.append(("dynamics.png", "Training dynamics (Figure A1)", "What log.jsonl says.", draw_dynamics(logs)))
    for name, _, _, figure in pictures:
        figure.savefig(out / name, dpi=110)
    write_report(out, summary, context, pictures, s)
    problem = context["rollouts"][number]["problem"] if "rollouts" in context else ""
    (out / "microscope.html").write_text(microscope(shown[number], number, problem, o, s))
    write_json(out / "summary.json", {"control": context.get("control"), "advantages": context.get("advantages"),
                                      "settings": dataclasses.asdict(s), **summary})
    print(f"report: {out}/report.html   microscope: {out}/microscope.html   arrays: {path}")


if __name__ == "__main__":
    main()
