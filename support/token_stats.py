"""Per-token arrays and their statistics: read in pieces of whole rollouts, so that memory does not grow with the file.

`derive` is diagnostics.gate_quantities under the settings at hand: what egrsd.py's functions make of whole rollouts.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from support.basics import fail

if TYPE_CHECKING:
    from egrsd import Settings

Derive = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
MEASURED = {"rollout": np.int32, "position": np.int32, "token_id": np.int32, "teacher_logp": np.float32,
            "student_logp": np.float32, "entropy": np.float32, "max_entropy": np.float32, "advantage": np.float32}
REGIMES = ("lock", "fork", "pivot", "mid")
TAUS = [(low, high) for low in (0.05, 0.1, 0.2) for high in (0.2, 0.3, 0.4) if low < high]  # how the shares move


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


def check_numbers(o: argparse.Namespace, R: int) -> None:
    if o.show is not None and not 0 <= o.show < R or any(number >= R for number, *_ in o.windows):
        fail(f"--show and --windows: there are rollouts 0 to {R - 1}")


def statistics(path: Path, derive: Derive, context: dict, o: argparse.Namespace, s: Settings) -> dict:
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
        part |= derive(part)
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
    check_numbers(o, R)
    summary["shown"] = shown if o.show is None else [o.show] + [i for i in shown if i != o.show][:1]
    # plain numbers; what is not finite becomes None
    return json.loads(json.dumps(summary, default=lambda value: value.tolist()), parse_constant=lambda name: None)


def shown_rollouts(path: Path, derive: Derive, numbers: set[int], context: dict,
                   o: argparse.Namespace) -> dict[int, dict]:
    """number -> the flat arrays of that rollout, with `text`, `H_hat`, `H_hat_CL` and `regime`."""
    found = {}
    for part in read_tokens(path):
        for number in numbers & set(part["rollout"].tolist()):
            one = {name: values[part["rollout"] == number] for name, values in part.items()}
            one |= derive(one)
            one["H_hat"], one["H_hat_CL"] = normalised(one)
            one["regime"] = regimes(one["H_hat"], one["H_hat_CL"], o.tau_low, o.tau_high)
            one["text"] = [context.get("token_text", {}).get(str(i), f"#{i} ") for i in one["token_id"]]
            found[number] = one
    return found



# ---------------------------------------------------------------------------------------------------------------------
# Does the teacher read the reference?


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
    outcomes exist, right ones must gain more than wrong ones; else the tokens of right completions must gain. The
    verdict is NO where the gain is at most a tenth of mean |delta|, UNDECIDED where the interval is wider than that.
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
    scale = float(np.abs(own[result] if "result" in key else own).mean())  # of the evidence on these tokens
    word = ("YES, the teacher reads the reference" if rows[key]["low"] > 0 else
            "NO, the teacher does not read the reference, and every other figure here is meaningless"
            if rows[key]["high"] < 0.1 * scale else
            f"UNDECIDED: {int(correct.sum())} right and {R - int(correct.sum())} wrong completions do not tell; take "
            "more (--limit)")
    return {"table": rows, "verdict": f"{word}. From another problem's reference to the problem's own, delta moves by "
            f"{rows[key]['mean']:+.3f} nats a token on {key} (95 % interval {rows[key]['low']:+.3f} to "
            f"{rows[key]['high']:+.3f}); a teacher that only notices that there is a reference would show 0."}



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


def normalised(flat: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """H_hat and H_hat_CL: entropy over the batch's maximum, which counts as at least 1 nat. Eq. 5, 8, D1."""
    top = np.maximum(flat["max_entropy"], 1)
    return flat["entropy"] / top, flat["entropy_lookahead"] / top


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
