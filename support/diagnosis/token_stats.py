"""Per-token arrays and their statistics, read in pieces of whole rollouts: memory does not grow.

`derive` is diagnostics.gate_quantities under the settings at hand: what egrsd.py's functions make
of whole rollouts.
"""

import argparse
import collections
import contextlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from support.shared.console import fail

Derive = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
MEASURED = {
    "rollout": np.int32,
    "position": np.int32,
    "token_id": np.int32,
    "teacher_logp": np.float32,
    "student_logp": np.float32,
    "entropy": np.float32,
    "max_entropy": np.float32,
    "advantage": np.float32,
}
REGIMES = ("lock", "fork", "pivot", "mid")
# How the shares of the regimes move with the thresholds (tau_low, tau_high).
TAUS = (
    *((0.05, 0.2), (0.05, 0.3), (0.05, 0.4)),
    *((0.1, 0.2), (0.1, 0.3), (0.1, 0.4)),
    *((0.2, 0.3), (0.2, 0.4)),
)


def read_tokens(
    path: Path, names: tuple[str, ...] = tuple(MEASURED), chunk: int = 1 << 19
) -> Iterator[dict[str, np.ndarray]]:
    """Whole rollouts of a tokens.npz, about `chunk` tokens at a time.

    np.load would hold each array as a whole.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        fail(
            f"--tokens {path} cannot be read ({error}): it takes the tokens.npz of an earlier call"
        )
    with archive, contextlib.ExitStack() as stack:
        files, kinds, left = open_arrays(path, archive, stack, names)
        rest = {name: np.empty(0, kinds[name]) for name in names}
        while left:
            now = min(chunk, left)
            left -= now
            for name, file in files.items():
                more = np.frombuffer(file.read(now * kinds[name].itemsize), kinds[name])
                rest[name] = np.concatenate([rest[name], more])
            # What follows the last start may be half a rollout: it waits for the next piece.
            starts = np.flatnonzero(np.diff(rest["rollout"])) + 1
            cut = starts[-1] if len(starts) else 0
            if not left:
                cut = len(rest["rollout"])
            if cut:
                yield {name: values[:cut] for name, values in rest.items()}
                rest = {name: values[cut:] for name, values in rest.items()}


def open_arrays(
    path: Path, archive: zipfile.ZipFile, stack: contextlib.ExitStack, names: tuple[str, ...]
) -> tuple[dict[str, IO[bytes]], dict[str, np.dtype], int]:
    """name -> file behind its header, name -> type, and the length that all arrays share."""
    files = {}
    kinds = {}
    sizes = {}
    for name in names:
        if f"{name}.npy" not in archive.namelist():
            fail(f"--tokens {path} has no array {name}; it needs {', '.join(MEASURED)}")
        file = stack.enter_context(archive.open(f"{name}.npy"))
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, _, kind = read_header(file)
        flat = len(shape) == 1 and not kind.hasobject
        files[name] = file
        kinds[name] = kind
        sizes[name] = shape[0] if flat else None
    if None in sizes.values() or len(set(sizes.values())) > 1:
        fail(f"--tokens {path} must hold flat arrays of numbers, all of one length, not {sizes}")
    if not sizes["rollout"]:
        fail(f"--tokens {path} holds no completions")
    return files, kinds, sizes["rollout"]


def check_numbers(o: argparse.Namespace, R: int) -> None:
    """--show and --windows must name rollouts that are there."""
    asked = [window[0] for window in o.windows]
    if o.show is not None:
        asked.append(o.show)
    for number in asked:
        if not 0 <= number < R:
            fail(f"--show and --windows: there are rollouts 0 to {R - 1}")


# --------------------------------------------------------------------------------------------------
# The summary, in two passes over the file: deciles need all entropies first


def summarise_tokens(
    path: Path, derive: Derive, context: dict, o: argparse.Namespace, W: int
) -> dict:
    """What summary.json holds beside the control; `context` is {} without a context.json."""
    text = {int(i): piece for i, piece in context.get("token_text", {}).items()}
    H, result, R, V = first_pass(path, text, o.result_after, W)
    check_numbers(o, R)
    pairs = [(o.tau_low, o.tau_high)]  # the first is the one asked for
    for pair in TAUS:
        if pair not in pairs:
            pairs.append(pair)
    tables, shares, per_token = second_pass(path, derive, H, result, R, V, pairs)
    count = tables["regime", "count"]  # (R, 4)
    problem = np.arange(R)  # without a context each completion counts as a problem of its own
    if len(context.get("rollouts", [])) == R:
        problem = number_of([about.get("key", about["id"]) for about in context["rollouts"]])
    for name, table in tables.items():
        tables[name] = by_problem(table, problem)

    summary = {
        "tokens": len(H),
        "completions": R,
        "result_tokens": int(result.sum()),
        "mean_entropy": float(H.mean()),
        "decile": decile_summary(tables, "decile"),
    }
    if result.any():
        summary["result decile"] = decile_summary(tables, "result decile")
    mean, low, high, drawn = bootstrap(tables["regime", "increment"], tables["regime", "count"])
    summary["regimes"] = {}
    for g, name in enumerate(REGIMES):
        row = {"share": count[:, g].sum() / len(H)}
        row.update(mean=mean[g], low=low[g], high=high[g])
        for key in ("gate", "gate_CL", "gap"):
            row[key] = tables["regime", key][:, g].sum() / max(1, count[:, g].sum())
        row["tokens"] = commonest(per_token[g], text)
        summary["regimes"][name] = row
    summary["selectivity"] = ratio(mean, drawn, REGIMES.index("pivot"), REGIMES.index("fork"))
    summary["sensitivity"] = []
    for (tau_low, tau_high), counts in zip(pairs, shares):
        row = {"tau_low": tau_low, "tau_high": tau_high}
        row.update(zip(REGIMES, counts / len(H)))
        summary["sensitivity"].append(row)
    summary["shown"] = rollouts_to_show(count, o.show)
    # Plain numbers; what is not finite becomes None.
    plain = json.dumps(summary, default=lambda value: value.tolist())
    return json.loads(plain, parse_constant=lambda name: None)


def first_pass(
    path: Path, text: dict[int, str], result_after: str, W: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(N,) entropies, (N,) is it a result token?, number of rollouts, highest token id + 1."""
    H = []
    result = []
    R = 0
    V = 0
    longest = 0
    for part in read_tokens(path, ("rollout", "position", "token_id", "entropy")):
        steps = np.diff(part["rollout"])
        disordered = part["rollout"][0] != R or not np.isin(steps, (0, 1)).all()
        if disordered or (part["token_id"] < 0).any():
            fail(
                f"--tokens {path}: rollouts must be numbered in order, from 0 and without a gap, "
                "and token ids not be negative"
            )
        H.append(part["entropy"])
        result.append(follows(part, text, result_after))
        R = int(part["rollout"][-1]) + 1
        V = max(V, int(part["token_id"].max()) + 1)
        longest = max(longest, int(part["position"].max()) + 1)
    H = np.concatenate(H)
    if not np.isfinite(H).all():
        fail(f"--tokens {path}: entropy holds values that are not finite")
    if longest <= W:
        fail(
            f"--W {W} is longer than every completion (the longest has {longest} tokens). Lower --W"
        )
    return H, np.concatenate(result), R, V


def second_pass(
    path: Path,
    derive: Derive,
    H: np.ndarray,
    result: np.ndarray,
    R: int,
    V: int,
    pairs: list[tuple[float, float]],
) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray, np.ndarray]:
    """(R, G) sums by rollout and group, (pairs, 4) counts of regimes, (4, V) counts of token ids.

    The sums go by (kind of group, quantity): deciles of all and of result tokens, and regimes.
    """
    decile = deciles(H)
    result_decile = np.zeros(len(H), np.uint8)
    result_decile[result] = deciles(H[result])
    tables = collections.defaultdict(float)
    shares = np.zeros((len(pairs), 4), np.int64)
    per_token = np.zeros((4, V), np.int64)
    start = 0
    for part in read_tokens(path):
        part.update(derive(part))
        rollout = part["rollout"]
        here = slice(start, start + len(rollout))
        start = here.stop
        H_hat, H_hat_CL = normalised(part)
        regime = regimes(H_hat, H_hat_CL, *pairs[0])
        for k, pair in enumerate(pairs):
            shares[k] += np.bincount(regimes(H_hat, H_hat_CL, *pair), minlength=4)
        for g in range(4):
            per_token[g] += np.bincount(part["token_id"][regime == g], minlength=V)
        picked = result[here]
        for name, value in quantities(part).items():
            tables["decile", name] += table_of(rollout, decile[here], value, R, 10)
            tables["regime", name] += table_of(rollout, regime, value, R, 4)
            tables["result decile", name] += table_of(
                rollout[picked], result_decile[here][picked], value[picked], R, 10
            )
    return tables, shares, per_token


def quantities(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(N,) what is averaged over groups of tokens."""
    return {
        "count": np.ones(len(part["delta"])),
        "gap": np.abs(part["delta"]),
        "w": part["magnitude"],
        "gate": part["gate"],
        "gate_CL": part["gate_lookahead"],
        "increment": part["gate_lookahead"] - part["gate"],
    }


def decile_summary(tables: dict[tuple[str, str], np.ndarray], kind: str) -> dict:
    """Means by decile of the entropy, with 95 % bounds."""
    count = tables[kind, "count"]
    row = {}
    for name in ("gap", "gate", "gate_CL", "w"):
        mean, low, high, drawn = bootstrap(tables[kind, name], count)
        row[name] = {"mean": mean, "low": low, "high": high}
        if name == "gap":
            row["top_to_bottom"] = ratio(mean, drawn, 9, 0)
            filled = np.flatnonzero(count.sum(0))  # below ten tokens not all ten
            row["highest"] = int(filled[mean[filled].argmax()]) + 1
            row["monotone"] = bool((np.diff(mean[filled]) >= 0).all())
    row["count"] = count.sum(0).astype(int)
    return row


def commonest(counts: np.ndarray, text: dict[int, str], most: int = 12) -> list[list]:
    """[token, how often] of the commonest tokens, by their ids' counts."""
    tokens = []
    for i in np.argsort(-counts, kind="stable")[:most]:
        if counts[i]:
            tokens.append([text.get(int(i), f"#{i}"), int(counts[i])])
    return tokens


def rollouts_to_show(count: np.ndarray, wanted: int | None) -> list[int]:
    """The two readable rollouts in which the rarest of lock, fork, pivot is most frequent.

    `count` (R, 4) tokens by regime. A wanted one comes first.
    """
    rarest = count[:, :3].min(1) * (count.sum(1) <= 1024)
    shown = np.argsort(-rarest, kind="stable")[:2].tolist()
    if wanted is None:
        return shown
    others = [number for number in shown if number != wanted]
    return [wanted, *others[:1]]


def shown_rollouts(
    path: Path,
    derive: Derive,
    numbers: set[int],
    text: dict[str, str],
    tau_low: float,
    tau_high: float,
) -> dict[int, dict]:
    """number -> the flat arrays of that rollout, with `text`, `H_hat`, `H_hat_CL` and `regime`.

    `text` gives the words of token ids, which are text here.
    """
    found = {}
    for part in read_tokens(path):
        for number in numbers & set(part["rollout"].tolist()):
            mine = part["rollout"] == number
            one = {name: values[mine] for name, values in part.items()}
            one.update(derive(one))
            one["H_hat"], one["H_hat_CL"] = normalised(one)
            one["regime"] = regimes(one["H_hat"], one["H_hat_CL"], tau_low, tau_high)
            one["text"] = [text.get(str(i), f"#{i} ") for i in one["token_id"]]
            found[number] = one
    return found


# --------------------------------------------------------------------------------------------------
# Does the teacher read the reference?


def token_texts(tokenizer, ids: list[int]) -> dict[int, str]:
    """The text of each token inside a sentence, with the space that belongs to it."""
    word = "." if tokenizer.unk_token is None else "check"
    anchor = tokenizer(word, add_special_tokens=False).input_ids[-1:]
    before = tokenizer.decode(anchor)
    texts = {}
    for i in ids:
        inside = tokenizer.decode([*anchor, i])
        if inside.startswith(before):
            texts[i] = inside[len(before) :]
        else:
            texts[i] = tokenizer.decode([i])
    return texts


def follows(flat: dict[str, np.ndarray], text: dict[int, str], marker: str) -> np.ndarray:
    """(N,) is this the first token after `marker`, in the same completion? '' marks nothing."""
    markers = [i for i, piece in text.items() if marker and piece.strip() == marker]
    after = np.zeros(len(flat["token_id"]), bool)
    after[1:] = np.isin(flat["token_id"][:-1], markers) & (flat["position"][1:] > 0)
    return after


def reads_reference(
    own: np.ndarray,
    other: np.ndarray,
    rollout: np.ndarray,
    correct: np.ndarray,
    result: np.ndarray,
    problem: np.ndarray,
) -> dict:
    """The control: (N,) delta under the own and under another problem's reference, and a verdict.

    `rollout` and `result` are (N,); `correct` and `problem`, its number, are of each rollout, (R,).
    What only the presence of a reference changes cancels in own - other. Where result tokens are
    known and both outcomes exist, right ones must gain more than wrong ones; else the tokens of
    right completions must gain. The verdict is YES where the interval is above 0 (it names mean
    |delta| beside the gain), NO where it holds 0 and ends below a tenth of mean |delta|, UNDECIDED
    where it is wider than that.
    """
    every = np.ones(len(own), bool)
    rows = control_rows("result tokens", result, own, other, rollout, correct, problem)
    rows.update(control_rows("all tokens", every, own, other, rollout, correct, problem))
    if "result tokens: right minus wrong" in rows:
        key = "result tokens: right minus wrong"
        scale = float(np.abs(own[result]).mean())  # of the evidence on these tokens
    elif "all tokens of right completions" in rows:
        key = "all tokens of right completions"
        scale = float(np.abs(own).mean())
    else:
        verdict = "UNDECIDED: not one completion is right, so that none must gain."
        return {"table": rows, "verdict": verdict}
    return {"table": rows, "verdict": verdict_on(key, rows[key], scale, correct)}


def control_rows(
    name: str,
    chosen: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    rollout: np.ndarray,
    correct: np.ndarray,
    problem: np.ndarray,
) -> dict[str, dict]:
    """Means over the chosen tokens of right and of wrong completions, and their difference."""
    rollout = rollout[chosen]
    own = own[chosen]
    other = other[chosen]
    group = 1 - correct[rollout]  # 0: of a right completion, 1: of a wrong one
    P = problem.max() + 1
    problem = problem[rollout]  # of each token
    count = table_of(problem, group, np.ones(len(own)), P, 2)
    gain = table_of(problem, group, own - other, P, 2)
    mean, low, high, drawn = bootstrap(gain, count)
    rows = {}
    for g, outcome in enumerate(("right", "wrong")):
        tokens = int(count[:, g].sum())
        if tokens:
            rows[f"{name} of {outcome} completions"] = {
                "tokens": tokens,
                "own": float(own[group == g].mean()),
                "other": float(other[group == g].mean()),
                "mean": float(mean[g]),
                "low": float(low[g]),
                "high": float(high[g]),
            }
    if count.any(0).all():
        low, high = np.nanpercentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
        rows[f"{name}: right minus wrong"] = {
            "tokens": int(count.sum()),
            "own": None,
            "other": None,
            "mean": float(mean[0] - mean[1]),
            "low": float(low),
            "high": float(high),
        }
    return rows


def verdict_on(key: str, row: dict, scale: float, correct: np.ndarray) -> str:
    right = int(correct.sum())
    if row["low"] > 0:
        word = "YES, the teacher reads the reference"
    elif row["high"] < 0.1 * scale:
        word = (
            "NO, the teacher does not read the reference, and every other figure here is "
            "meaningless"
        )
    else:
        word = (
            f"UNDECIDED: {right} right and {len(correct) - right} wrong completions do not tell; "
            "take more (--limit)"
        )
    return (
        f"{word}. From another problem's reference to the problem's own, delta moves by "
        f"{row['mean']:+.3f} nats a token on {key} (95 % interval {row['low']:+.3f} to "
        f"{row['high']:+.3f}), where |delta| is {scale:.3f} in the mean; a teacher that only "
        "notices that there is a reference would show 0."
    )


# --------------------------------------------------------------------------------------------------
# Statistics: pure numpy


def number_of(keys: list[str]) -> np.ndarray:
    """Numbers from 0 in the place of keys, by first appearance: equal ones for equal keys."""
    numbers = {}
    for key in keys:
        numbers.setdefault(key, len(numbers))
    return np.array([numbers[key] for key in keys])


def by_problem(table: np.ndarray, problem: np.ndarray) -> np.ndarray:
    """(P, G) sums of an (R, G) table over the rollouts of each problem, by its (R,) number."""
    summed = np.zeros((problem.max() + 1, table.shape[1]))
    np.add.at(summed, problem, table)
    return summed


def table_of(
    rollout: np.ndarray, group: np.ndarray, values: np.ndarray, R: int, G: int
) -> np.ndarray:
    """(R, G) sums of the (N,) values by rollout (or problem) and group."""
    return np.bincount(rollout.astype(np.int64) * G + group, values, R * G).reshape(R, G)


def bootstrap(
    sums: np.ndarray, counts: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """(G,) means sum / count of (R, G) tables, their 95 % bounds, the (draws, G) resampled means.

    Rows are problems: neither the tokens of a completion nor the completions of a problem are
    independent. NaN where a group is empty.
    """
    rng = np.random.default_rng(seed)
    R, G = sums.shape
    drawn = np.empty((draws, G))
    with np.errstate(invalid="ignore", divide="ignore"):
        for rows in np.array_split(np.arange(draws), 1 + draws * R // 10**7):
            picks = rng.multinomial(R, np.full(R, 1 / R), size=len(rows))
            drawn[rows] = (picks @ sums) / (picks @ counts)
        mean = sums.sum(0) / counts.sum(0)
    bounds = np.full((2, G), np.nan)
    filled = np.isfinite(drawn).any(0)
    bounds[:, filled] = np.nanpercentile(drawn[:, filled], [2.5, 97.5], axis=0)
    return mean, *bounds, drawn


def ratio(mean: np.ndarray, drawn: np.ndarray, a: int, b: int) -> dict[str, float]:
    """mean[a] / mean[b] with its 95 % interval; NaN where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = drawn[:, a] / drawn[:, b]
        low = high = math.nan
        if np.isfinite(draws).any():
            low, high = np.nanpercentile(draws, [2.5, 97.5])
        return {"mean": float(mean[a] / mean[b]), "low": float(low), "high": float(high)}


def deciles(values: np.ndarray) -> np.ndarray:
    """(N,) 0..9 by rank: ten groups of equal size (to one); equal values go by position."""
    group = np.empty(len(values), np.uint8)
    group[np.argsort(values, kind="stable")] = np.arange(len(values)) * 10 // max(1, len(values))
    return group


def regimes(H_hat: np.ndarray, H_hat_CL: np.ndarray, tau_low: float, tau_high: float) -> np.ndarray:
    """(N,) index into REGIMES, from normalised entropies. Section 5.5."""
    high = H_hat >= tau_high
    return np.select(
        [H_hat <= tau_low, high & (H_hat_CL >= tau_high), high & (H_hat_CL <= tau_low)],
        [0, 1, 2],
        3,
    )


def normalised(flat: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """H_hat and H_hat_CL: entropy over the batch's maximum, at least 1 nat. Eq. 5, 8 [D1]"""
    top = np.maximum(flat["max_entropy"], 1)
    return flat["entropy"] / top, flat["entropy_lookahead"] / top


def local_peaks(values: np.ndarray, k: int) -> np.ndarray:
    """Positions, in order, of the k highest local maxima; of a plateau the first token."""
    padded = np.concatenate([[-np.inf], values, [-np.inf]])
    tops = np.flatnonzero((padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:]))
    return np.sort(tops[np.argsort(-values[tops], kind="stable")[:k]])


def envelope(values: np.ndarray, width: int) -> np.ndarray:
    """Moving maximum over `width` tokens, smoothed by a moving mean; both shorter at the ends."""
    half = width // 2
    highest = np.empty(len(values))
    smooth = np.empty(len(values))
    for t in range(len(values)):
        highest[t] = values[max(0, t - half) : t + half + 1].max()
    for t in range(len(values)):
        smooth[t] = highest[max(0, t - half) : t + half + 1].mean()
    return smooth


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of each maximal run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
