"""diagnostics.py: each statistic against a slow loop, a real tiny run, the page in a browser."""

import argparse
import contextlib
import functools
import html
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import diagnostics as D
from egrsd import ROOT, add_adapter, parse_settings
from support.diagnosis import completions, figures, pages, token_stats
from support.diagnosis.token_stats import reads_reference
from support.shared.adapters import adapter_fingerprint
from support.shared.data import encode_prompt
from support.shared.engines import end_tokens, hf_generate
from support.shared.models import load_base

ARRAYS = (
    "rollout position token_id teacher_logp student_logp entropy entropy_lookahead max_entropy "
    "delta magnitude "
    "gate gate_lookahead advantage"
).split()
FIGURES = ["deciles.png", "regimes.png", "trace.png", "peaks.png", "rescue.png", "heatmap.png"]
needs_tiny = pytest.mark.skipif(
    not (ROOT / "tiny" / "model.safetensors").exists(), reason="run tiny/make.py first"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium (apt-get install chromium)"
)


def call(*argv: object) -> str:
    """What main() prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        D.main([str(a) for a in argv])
    return said.getvalue()


def refused(*argv: object) -> str:
    with pytest.raises(SystemExit) as error:
        call(*argv)
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# A small file of random tokens, and everything about it computed again with loops


def random_tokens(R: int = 40, seed: int = 0, V: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = {name: [] for name in token_stats.MEASURED}
    for i in range(R):
        n = int(rng.integers(1, 30))
        H = (
            rng.choice([rng.random(n) ** 3 * 3, np.zeros(n), np.full(n, 0.5)])
            if i % 7 == 0
            else rng.random(n) ** 3 * 3
        )
        for name, value in {
            "rollout": i,
            "position": np.arange(n),
            "token_id": rng.integers(0, V, n),
            "entropy": H,
            "teacher_logp": -rng.random(n) * 3,
            "student_logp": -rng.random(n) * 3,
            "max_entropy": 3.0 + (i // 16) if i // 16 != 1 else 0.7,
            "advantage": rng.choice([-1.2, 0.0, 0.8]),
        }.items():
            columns[name].append(np.broadcast_to(np.asarray(value, token_stats.MEASURED[name]), n))
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    flat["entropy"] = np.minimum(flat["entropy"], flat["max_entropy"])
    return flat


CONTEXT = {"token_text": {str(i): f" {'=' if i == 3 else chr(97 + i)}" for i in range(12)}}


def options(**changed: object) -> argparse.Namespace:
    usual = {"tau_low": 0.1, "tau_high": 0.3, "result_after": "=", "show": None, "windows": []}
    return argparse.Namespace(**usual | changed)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> tuple[Path, dict, dict]:
    """-> tokens.npz, its arrays as a list of plain dicts per token, and statistics() of it."""
    flat, path = random_tokens(), tmp_path_factory.mktemp("synthetic") / "tokens.npz"
    np.savez(path, **flat)
    s = parse_settings(["--gamma", "0.6", "--W", "4", "--eps", "0.3"])
    tokens = [{name: flat[name][k].item() for name in flat} for k in range(len(flat["rollout"]))]
    for t in tokens:
        mine = [u for u in tokens if u["rollout"] == t["rollout"]]
        at, top = t["position"], max(t["max_entropy"], 1.0)
        t["lowest"] = min(u["entropy"] for u in mine[at : at + 5])
        t["H_hat"], t["H_hat_CL"] = t["entropy"] / top, t["lowest"] / top
        t["gate"], t["gate_lookahead"] = (
            min(1.0, max(0.1, 1 - 0.6 * h)) for h in (t["H_hat"], t["H_hat_CL"])
        )
        sign = (t["advantage"] > 0) - (t["advantage"] < 0)
        t["delta"] = t["teacher_logp"] - t["student_logp"]
        t["magnitude"] = min(1.3, max(0.7, math.exp(sign * t["delta"])))
        t["token_advantage"] = t["advantage"] * t["magnitude"] * t["gate_lookahead"]
        t["result"] = at > 0 and mine[at - 1]["token_id"] == 3
        t["regime"] = (
            "lock"
            if t["H_hat"] <= 0.1
            else "mid"
            if t["H_hat"] < 0.3
            else "fork"
            if t["H_hat_CL"] >= 0.3
            else "pivot"
            if t["H_hat_CL"] <= 0.1
            else "mid"
        )
    return (
        path,
        tokens,
        token_stats.summarise_tokens(
            path, functools.partial(D.gate_quantities, s=s), CONTEXT, options(), s.W
        ),
    )


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_reading_in_pieces_gives_whole_rollouts_and_every_token_once(synthetic, chunk: int) -> None:
    path, tokens, _ = synthetic
    parts = list(token_stats.read_tokens(path, chunk=chunk))
    for name in token_stats.MEASURED:
        assert np.concatenate([part[name] for part in parts]).tolist() == [t[name] for t in tokens]
    seen = [set(part["rollout"].tolist()) for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen)), "a rollout was cut in two"
    assert chunk > 7 or len(parts) > 30


def test_gate_quantities_equal_loops_and_do_not_cross_rollouts(synthetic) -> None:
    path, tokens, _ = synthetic
    s = parse_settings(["--gamma", "0.6", "--W", "4", "--eps", "0.3"])
    made = D.gate_quantities(next(token_stats.read_tokens(path)), s)
    for name, key in {
        "delta": "delta",
        "magnitude": "magnitude",
        "gate": "gate",
        "gate_lookahead": "gate_lookahead",
        "entropy_lookahead": "lowest",
        "token_advantage": "token_advantage",
    }.items():
        np.testing.assert_allclose(
            made[name], [t[key] for t in tokens], rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("kind", ["decile", "result decile"])
def test_deciles_against_a_loop(synthetic, kind: str) -> None:
    _, tokens, summary = synthetic
    chosen = [t for t in tokens if kind == "decile" or t["result"]]
    ranked = sorted(range(len(chosen)), key=lambda k: (chosen[k]["entropy"], k))
    groups = [
        [chosen[k] for place, k in enumerate(ranked) if place * 10 // len(ranked) == g]
        for g in range(10)
    ]
    sizes = [len(group) for group in groups]
    assert summary[kind]["count"] == sizes and max(sizes) - min(sizes) <= 1
    for name, value in {
        "gap": lambda t: abs(t["delta"]),
        "gate": lambda t: t["gate"],
        "w": lambda t: t["magnitude"],
        "gate_CL": lambda t: t["gate_lookahead"],
    }.items():
        by_loop = [mean(map(value, group)) for group in groups]
        np.testing.assert_allclose(summary[kind][name]["mean"], by_loop, rtol=1e-5)
    gaps = [mean(abs(t["delta"]) for t in group) for group in groups]
    assert summary[kind]["top_to_bottom"]["mean"] == pytest.approx(gaps[9] / gaps[0], rel=1e-5)
    assert summary[kind]["highest"] == gaps.index(max(gaps)) + 1 and summary[kind]["monotone"] == (
        gaps == sorted(gaps)
    )


def test_regimes_against_a_loop(synthetic) -> None:
    _, tokens, summary = synthetic
    increments = {}
    for name in token_stats.REGIMES:
        mine = [t for t in tokens if t["regime"] == name]
        row = summary["regimes"][name]
        increments[name] = mean(t["gate_lookahead"] - t["gate"] for t in mine)
        assert len(mine) > 5 and row["share"] == pytest.approx(len(mine) / len(tokens))
        assert row["mean"] == pytest.approx(increments[name], rel=1e-4, abs=1e-7)
        assert row["low"] <= row["mean"] <= row["high"]
        for key, value in (("gate", "gate"), ("gate_CL", "gate_lookahead")):
            assert row[key] == pytest.approx(mean(t[value] for t in mine), rel=1e-5)
        assert row["gap"] == pytest.approx(mean(abs(t["delta"]) for t in mine), rel=1e-5)
        ids = [t["token_id"] for t in mine]
        common = sorted(set(ids), key=lambda i: (-ids.count(i), i))[:12]
        assert row["tokens"] == [[CONTEXT["token_text"][str(i)], ids.count(i)] for i in common]
    assert summary["selectivity"]["mean"] == pytest.approx(
        increments["pivot"] / increments["fork"], rel=1e-4
    )
    assert (
        summary["sensitivity"][0]["tau_low"] == 0.1 and summary["sensitivity"][0]["tau_high"] == 0.3
    )
    for row in summary["sensitivity"]:
        low, high = row["tau_low"], row["tau_high"]
        assert row["lock"] == pytest.approx(mean(t["H_hat"] <= low for t in tokens))
        assert row["fork"] == pytest.approx(
            mean(t["H_hat"] >= high and t["H_hat_CL"] >= high for t in tokens)
        )
        assert row["pivot"] == pytest.approx(
            mean(t["H_hat"] >= high and t["H_hat_CL"] <= low for t in tokens)
        )
        assert sum(row[name] for name in token_stats.REGIMES) == pytest.approx(1)


def test_what_is_shown_has_most_of_the_rarest_regime(synthetic) -> None:
    _, tokens, summary = synthetic
    rarest = {
        i: min(
            sum(t["regime"] == name for t in tokens if t["rollout"] == i)
            for name in token_stats.REGIMES[:3]
        )
        for i in range(40)
    }
    assert summary["shown"] == sorted(rarest, key=lambda i: (-rarest[i], i))[:2]


def test_bootstrap_resamples_rows() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, (30, 2)).astype(float)
    sums = counts * rng.normal(1, 0.5, (30, 1)) + rng.normal(
        0, 0.1, (30, 2)
    )  # tokens of a rollout resemble each other
    middle, low, high, drawn = token_stats.bootstrap(sums, counts)
    by_hand, pick = [], random.Random(5)
    for _ in range(4000):
        rows = [pick.randrange(30) for _ in range(30)]
        by_hand.append(
            [sum(sums[r, g] for r in rows) / sum(counts[r, g] for r in rows) for g in (0, 1)]
        )
    assert drawn.shape == (1000, 2)
    np.testing.assert_allclose(middle, sums.sum(0) / counts.sum(0))
    np.testing.assert_allclose([low, high], np.quantile(by_hand, [0.025, 0.975], axis=0), atol=0.03)
    empty = token_stats.bootstrap(np.zeros((5, 1)), np.zeros((5, 1)))
    assert all(np.isnan(part).all() for part in empty[:3])


def test_peaks_envelope_and_runs_against_loops() -> None:
    rng = random.Random(0)
    for _ in range(200):
        x = [float(rng.randint(0, 4)) for _ in range(rng.randint(1, 25))]
        tops = [
            t
            for t in range(len(x))
            if (t == 0 or x[t - 1] < x[t]) and (t + 1 == len(x) or x[t + 1] <= x[t])
        ]
        best = sorted(sorted(tops, key=lambda t: (-x[t], t))[:3])
        assert token_stats.local_peaks(np.array(x), 3).tolist() == best
        window = lambda values, t: [values[j] for j in range(len(values)) if abs(j - t) <= 2]  # noqa: E731
        highest = [max(window(x, t)) for t in range(len(x))]
        smooth = [mean(window(highest, t)) for t in range(len(x))]
        np.testing.assert_allclose(token_stats.envelope(np.array(x), 5), smooth)
        flags = [v > 2 for v in x]
        runs = token_stats.runs_of(np.array(flags))
        assert [t for a, b in runs for t in range(a, b)] == [
            t for t, flag in enumerate(flags) if flag
        ]
        assert all(b1 < a2 for (_, b1), (a2, _) in zip(runs, runs[1:]))


def test_the_control_tells_a_reader_from_one_who_does_not_read() -> None:
    rng = np.random.default_rng(0)
    rollout = np.repeat(np.arange(60), 8)
    correct, result = np.arange(60) % 2 == 0, np.tile(np.arange(8) == 5, 60)
    other = rng.normal(0, 0.3, 480)
    reader = (
        other + np.where(result, np.where(correct[rollout], 0.5, -1.0), 0) + rng.normal(0, 0.1, 480)
    )
    problem = np.arange(60)
    seen = reads_reference(reader, other, rollout, correct, result, problem)
    assert seen["verdict"].startswith("YES")
    row = seen["table"]["result tokens of wrong completions"]
    picked = [k for k in range(480) if result[k] and not correct[rollout[k]]]
    assert row["tokens"] == len(picked) and row["own"] == pytest.approx(
        mean(reader[k] for k in picked)
    )
    assert row["other"] == pytest.approx(mean(other[k] for k in picked))
    assert row["mean"] == pytest.approx(mean(reader[k] - other[k] for k in picked))
    assert seen["table"]["result tokens: right minus wrong"]["mean"] == pytest.approx(1.5, abs=0.1)
    # the same with any reference; everything likelier with its own; right ones likelier by chance
    by_chance = other + np.where(rollout % 4 < 2, 0.3, -0.3) + 0.02 * correct[rollout]
    for blind in (other, other + 0.7):
        seen = reads_reference(blind, other, rollout, correct, result, problem)
        assert seen["verdict"].startswith("NO")
    seen = reads_reference(by_chance, other, rollout, correct, result, problem)
    assert seen["verdict"].startswith("UNDECIDED: 30 right and")
    few = rollout < 6  # a teacher that does read, and too few completions to know it
    seen = reads_reference(
        np.where(result, other + rng.normal(0.2, 1, 480), other)[few],
        other[few],
        rollout[few],
        correct[:6],
        result[few],
        problem[:6],
    )
    assert seen["verdict"].startswith("UNDECIDED")
    seen = reads_reference(other + 0.3, other, rollout, correct, result & False, problem)
    assert seen["verdict"].startswith("YES")
    seen = reads_reference(reader, other, rollout, correct & False, result, problem)
    assert seen["verdict"].startswith("UNDECIDED")


def test_intervals_hold_the_truth_where_completions_of_a_problem_resemble_each_other() -> None:
    """30 problems with a gain of their own, 0 in the mean, 20 completions of each."""
    rng = np.random.default_rng(0)
    R, T = 600, 10
    problem = np.repeat(np.arange(30), 20)
    rollout = np.repeat(np.arange(R), T)
    correct, result = np.ones(R, bool), np.zeros(R * T, bool)
    covered = {"by problem": 0, "by completion": 0}
    for _ in range(40):
        gain = rng.normal(0, 1, 30)[problem][rollout] + rng.normal(0, 0.3, R * T)
        other = np.zeros(R * T)
        for name, cluster in (("by problem", problem), ("by completion", np.arange(R))):
            seen = reads_reference(gain, other, rollout, correct, result, cluster)
            row = seen["table"]["all tokens of right completions"]
            covered[name] += row["low"] <= 0 <= row["high"]
    assert covered["by problem"] >= 34 and covered["by completion"] < 28, covered


# --------------------------------------------------------------------------------------------------
# The tiny model, for real


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("tiny")
    return out, call("--preset", "tiny", "--limit", 70, "--out", out)


@pytest.fixture(scope="module")
def tiny_model():
    s = parse_settings(["--preset", "tiny"])
    from transformers import AutoTokenizer

    return load_base(s.model, torch.device("cpu")), AutoTokenizer.from_pretrained(s.model), s


@needs_tiny
def test_a_tiny_run_makes_everything_and_the_verdict_comes_first(tiny_run) -> None:
    out, said = tiny_run
    verdict = json.loads((out / "summary.json").read_text())["control"]["verdict"]
    assert re.match("(YES|NO), the teacher", verdict) and said.index(verdict) < said.index(
        "report:"
    )
    report = (out / "report.html").read_text()
    assert html.escape(verdict) in report and report.index(html.escape(verdict)) < report.index(
        "<img"
    )
    assert (
        report.count('src="data:image/png;base64,') == len(FIGURES)
        and "(r - mean) / std over this set" in report
    )
    assert not re.search(
        r"(src|href)=[\"']?(https?:|//)", report + (out / "microscope.html").read_text()
    )
    from matplotlib import image

    for name in FIGURES:
        assert image.imread(out / name)[..., :3].std() > 0.05, f"{name} is blank"


@needs_tiny
def test_the_control_shows_each_completion_the_reference_of_another_problem(
    tiny_run, tiny_model
) -> None:
    _, tokenizer, s = tiny_model
    rows = [
        {
            "key": str(i // 2),
            "problem": f"Compute {i // 2} .",
            "reference": f"#1 {i // 2}",
            "prompt_ids": [],
        }
        for i in range(8)
    ]
    completions.give_prompts(rows, tokenizer, s.student_prompt, s.teacher_prompt, s.thinking)
    seen = {}
    for row in rows:
        own, other = (
            re.search(r"Compute (\d) \. Reference : #1 (\d) ", tokenizer.decode(row[name])).groups()
            for name in ("teacher_prompt_ids", "other_prompt_ids")
        )
        assert own == (row["key"], row["key"]) and other[0] == row["key"] != other[1]
        seen[row["key"]] = other[1]
    assert sorted(seen.values()) == sorted(seen), "each reference misleads once"
    flat, context = (
        np.load(tiny_run[0] / "tokens.npz"),
        json.loads((tiny_run[0] / "context.json").read_text()),
    )
    right = [row["correct"] for row in context["rollouts"]]
    row = context["control"]["table"]["all tokens of right completions"]
    assert row["own"] == pytest.approx(
        flat["delta"][np.array(right)[flat["rollout"]]].mean(dtype=float), rel=1e-4
    )
    assert abs(row["own"] - row["other"]) > 0.01


@needs_tiny
def test_tokens_npz_holds_the_named_flat_arrays(tiny_run) -> None:
    with np.load(tiny_run[0] / "tokens.npz", allow_pickle=False) as file:
        assert sorted(file.files) == sorted(ARRAYS)
        assert {file[name].shape for name in ARRAYS} == {file["rollout"].shape} and file[
            "rollout"
        ].ndim == 1
        flat = {name: file[name] for name in ARRAYS}
    s = parse_settings(["--preset", "tiny"])
    for name, value in D.gate_quantities(flat, s).items():
        if name in flat:
            np.testing.assert_array_equal(flat[name], value)
    for first in range(0, 70, 32):  # D15
        batch = (flat["rollout"] >= first) & (flat["rollout"] < first + 32)
        assert set(flat["max_entropy"][batch].tolist()) == {flat["entropy"][batch].max()}


@needs_tiny
def test_passes_against_a_full_softmax_of_the_models_own_logits(tiny_run, tiny_model) -> None:
    out, (model, tokenizer, s) = tiny_run[0], tiny_model
    flat, context = np.load(out / "tokens.npz"), json.loads((out / "context.json").read_text())
    problems = {
        row["problem"]: row for row in map(json.loads, Path(s.eval_data).read_text().splitlines())
    }
    for i in (0, 40):
        here = flat["rollout"] == i
        ids, row = flat["token_id"][here].tolist(), problems[context["rollouts"][i]["problem"]]
        shown = f"{row['problem']} Reference : {row['solution']} Solve it in your own way ."
        for name, prompt in (("student_logp", row["problem"]), ("teacher_logp", shown)):
            before = encode_prompt(tokenizer, prompt, False)
            with torch.no_grad():
                logp = (
                    model(torch.tensor([before + ids]))
                    .logits[0, len(before) - 1 : -1]
                    .double()
                    .log_softmax(-1)
                )
            np.testing.assert_allclose(flat[name][here], logp[range(len(ids)), ids], atol=2e-4)
        np.testing.assert_allclose(flat["entropy"][here], -(logp.exp() * logp).sum(-1), atol=2e-4)
    A = np.array([flat["advantage"][flat["rollout"] == i][0] for i in range(70)])
    lengths = np.bincount(flat["rollout"])
    r = [row["correct"] * (1 + 0.5 * (1 - n / 96)) for row, n in zip(context["rollouts"], lengths)]
    np.testing.assert_allclose(
        A, (np.array(r) - mean(r)) / (sum((x - mean(r)) ** 2 for x in r) / 69) ** 0.5, rtol=1e-5
    )


@needs_tiny
def test_saved_arrays_give_what_a_run_with_other_settings_gives(tiny_run, tmp_path) -> None:
    changed = ("--gamma", 0.3, "--W", 2, "--tau_high", 0.4)
    call("--tokens", tiny_run[0] / "tokens.npz", *changed, "--out", tmp_path / "again")
    call("--preset", "tiny", "--limit", 70, *changed, "--out", tmp_path / "anew")
    again, anew = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("again", "anew")
    )
    assert again == anew and again["settings"]["gamma"] == 0.3
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_run[0] / "tokens.npz", tmp_path / "bare")
    assert "NOT MEASURED" in call("--tokens", tmp_path / "bare" / "tokens.npz", *changed)
    folder = tmp_path / "bare" / "gamma0.3-W2-eps0.2-tau0.1-0.4"
    bare = json.loads((folder / "summary.json").read_text())
    assert (
        bare["decile"] == anew["decile"]
        and "result decile" not in bare
        and bare["result_tokens"] == 0
    )


@pytest.fixture(scope="module")
def rollouts(tiny_model, tmp_path_factory) -> list[dict]:
    """Completions with token ids, as a run writes them: two steps of 6."""
    model, tokenizer, s = tiny_model
    rows = [json.loads(line) for line in Path(s.data).read_text().splitlines()[:12]]
    prompts = [encode_prompt(tokenizer, row["problem"], False) for row in rows]
    drawn = sorted(
        hf_generate(
            model,
            end_tokens(model, tokenizer),
            prompts,
            [*range(12)],
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new=60,
        )
    )
    return [
        {
            **row,
            "step": 3 + i // 6,
            "index": i % 6,
            "id": str(i),
            "prompt_ids": prompt,
            "completion_ids": ids,
            "engine_logps": logps,
            "correct": i % 3 > 0,
            "text": tokenizer.decode(ids),
            "advantage": [-0.5, 0.0, 0.75][i % 3],
            "benchmark": "tiny",
            "gold": row["answer"],
        }
        for i, (row, prompt, (_, ids, logps)) in enumerate(zip(rows, prompts, drawn))
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_tiny
def test_a_runs_rollouts_keep_their_log_probabilities_and_advantages(
    rollouts, tiny_model, tmp_path
) -> None:
    _, _, s = tiny_model
    (tmp_path / "settings.json").write_text(json.dumps({**vars(s), "gamma": 0.7, "W": 0}))
    write_rows(
        tmp_path / "log.jsonl",
        [{"step": k, "grad_norm": 0.1 * (k + 1), "reward": k} for k in range(5)],
    )
    path = write_rows(tmp_path / "rollouts.jsonl", rollouts)
    said = call("--rollouts", path, "--limit", 7)  # the second step stays whole
    out = tmp_path / "diagnostics"
    flat, context = np.load(out / "tokens.npz"), json.loads((out / "context.json").read_text())
    assert (
        "report:" in said
        and context["settings"]["gamma"] == 0.7
        and "the run's own" in context["advantages"]
    )
    for i, row in enumerate(rollouts):
        here = flat["rollout"] == i
        assert flat["token_id"][here].tolist() == row["completion_ids"]
        assert set(flat["advantage"][here]) == {row["advantage"]}
        np.testing.assert_allclose(flat["student_logp"][here], row["engine_logps"], rtol=1e-6)
    for step in (0, 1):
        batch = flat["rollout"] // 6 == step
        assert set(flat["max_entropy"][batch]) == {flat["entropy"][batch].max()}
    assert (out / "dynamics.png").exists()
    for folder, more, told in (
        (out, (), True),
        (tmp_path / "again", ("--tokens", out / "tokens.npz"), True),
        (tmp_path / "longer", ("--tokens", out / "tokens.npz", "--W", 5), False),
    ):
        if more:
            call(*more, "--out", folder)
        assert (D.W_NOTE in (folder / "report.html").read_text()) == told


@needs_tiny
def test_an_adapter_given_with_a_run_is_the_student(rollouts, tiny_model, tmp_path) -> None:
    _, _, s = tiny_model
    torch.manual_seed(0)
    student = add_adapter(load_base(s.model, torch.device("cpu")), s)
    for name, p in student.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05)
    student.save_pretrained(tmp_path / "other")
    path = write_rows(tmp_path / "rollouts.jsonl", rollouts)
    call("--preset", "tiny", "--rollouts", path, "--adapter", tmp_path / "other")
    flat = np.load(tmp_path / "diagnostics" / "tokens.npz")
    for i, row in enumerate(rollouts):
        with torch.no_grad():
            logits = student(
                input_ids=torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            ).logits[0]
        logp = logits[len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
        logp = logp[range(len(row["completion_ids"])), row["completion_ids"]]
        np.testing.assert_allclose(flat["student_logp"][flat["rollout"] == i], logp, atol=2e-4)


@needs_tiny
def test_samples_of_an_evaluation_and_their_references(rollouts, tmp_path) -> None:
    rows = [
        {
            **{
                key: value
                for key, value in row.items()
                if key not in ("step", "answer", "advantage")
            },
            "solution": row["solution"] if i == 2 else "",
        }
        for i, row in enumerate(rollouts)
    ]
    rows[1] |= {key: rows[0][key] for key in ("id", "prompt_ids", "problem", "gold")} | {
        "correct": True
    }
    call("--preset", "tiny", "--samples", write_rows(tmp_path / "samples.jsonl", rows))
    context = json.loads((tmp_path / "diagnostics" / "context.json").read_text())
    assert context["references"] == {
        "a right completion": 1,
        "worked solution": 1,
        "bare answer": 10,
    }
    given = [
        {"key": 0, "correct": c, "solution": "", "answer": "7", "text": text, "completion_ids": [k]}
        for k, (c, text) in enumerate(
            [(True, "<think> a </think> b"), (False, "x"), (True, "</think> d")]
        )
    ]
    completions.give_references(given)
    assert [row["reference"] for row in given] == ["d", "b", "b"], (
        "its own text must never be a rollout's reference"
    )


@needs_tiny
@pytest.mark.parametrize(
    "sentence, spoil",
    [
        ("holds no completions", lambda rows: rows.clear()),
        ("come from another model", lambda rows: rows[3]["completion_ids"].append(151_000)),
        ("no completion_ids.*--save_ids", lambda rows: rows[2].pop("completion_ids")),
        ("no prompt_ids.*--save_ids", lambda rows: rows[2].pop("prompt_ids")),
        (
            "empty reference",
            lambda rows: [
                row.update(solution="", answer="", gold="", correct=False) for row in rows[4:5]
            ],
        ),
        (
            "than every completion",
            lambda rows: [row.update(completion_ids=row["completion_ids"][:5]) for row in rows],
        ),
        ("no list of token ids", lambda rows: rows[1].update(completion_ids=["7", "8"])),
        ("no list of token ids", lambda rows: rows[1]["completion_ids"].append(-1)),
        ("no list of token ids", lambda rows: rows[1].update(prompt_ids=[])),
        ("line 3 has no id", lambda rows: rows[2].pop("id")),
        (
            "empty reference|has no text",
            lambda rows: [
                (row.update(id="0", solution="", answer="", gold="", correct=True), row.pop("text"))
                for row in rows
            ],
        ),
        (
            "do not fit, with their reference",
            lambda rows: rows[0].update(completion_ids=rows[0]["completion_ids"] * 99),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["--rollouts", "--samples"])
def test_bad_completions_are_refused_with_a_sentence(
    rollouts, tmp_path, kind: str, sentence: str, spoil
) -> None:
    rows = json.loads(json.dumps(rollouts))
    spoil(rows)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert re.search(
        sentence, refused("--preset", "tiny", "--W", 5, kind, path, "--out", tmp_path / "out")
    )


@needs_tiny
def test_samples_bring_their_adapter_and_another_in_its_place_is_refused(
    rollouts, tiny_model, tmp_path
) -> None:
    student = add_adapter(load_base(tiny_model[2].model, torch.device("cpu")), tiny_model[2])
    for p in (p for name, p in student.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(p, std=0.1)
    student.save_pretrained(tmp_path / "adapter")
    path = write_rows(tmp_path / "samples.jsonl", rollouts)
    mark, settings = adapter_fingerprint(tmp_path / "adapter"), tmp_path / "settings.json"
    for weights in (mark, "0123456789abcdef r 16"):
        settings.write_text(
            json.dumps(
                {"preset": "tiny", "adapter": str(tmp_path / "adapter"), "adapter_weights": weights}
            )
        )
        if weights == mark:
            call("--samples", path)
            context = json.loads((tmp_path / "diagnostics" / "context.json").read_text())
            assert (
                context["student"] == str(tmp_path / "adapter")
                and context["settings"]["preset"] == "tiny"
            )
        else:
            assert "is not the adapter that drew" in refused("--samples", path)


@pytest.mark.parametrize(
    "sentence, argv",
    [
        ("must be in order", ["--tau_low", 0.4, "--tau_high", 0.3]),
        ("must be in order", ["--tau_low", 0.3, "--tau_high", 0.3]),
        ("choose one", ["--samples", "a", "--rollouts", "b"]),
        ("no such file", ["--rollouts", "nowhere.jsonl"]),
        ("cannot be read", ["--tokens", "nowhere.npz"]),
        ("must be in order, in [0, 1]", ["--tau_high", 2]),
        ("--model: with --tokens", ["--tokens", "a", "--model", "b"]),
        ("--adapter: with --tokens", ["--tokens", "a", "--adapter", "b"]),
        ("--check_data, --steps: without effect", ["--steps", 7, "--check_data"]),
    ],
)
def test_bad_options_are_refused_with_a_sentence(tmp_path, sentence: str, argv: list) -> None:
    assert sentence in refused("--preset", "tiny", "--out", tmp_path, *argv)


@pytest.mark.parametrize(
    "saved, method",
    [
        ({"method": "grpo"}, "GRPO"),
        ({"control": "shuffled", "gamma": 1.0}, "EGRSD, shuffled"),
        ({"teacher": "ema", "gamma": 1.0, "W": 5}, "CL-EGRSD, ema teacher"),
    ],
)
def test_rollouts_of_another_method_are_refused(tmp_path, saved: dict, method: str) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"preset": "tiny", "W": 0, **saved}))
    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    assert f"is of a run of {method}: " in refused("--rollouts", tmp_path / "rollouts.jsonl")


@needs_tiny
@pytest.mark.parametrize(
    "adapter, sentence", [("nowhere", "are not both in it"), ("empty", "is all zeros")]
)
def test_a_missing_or_empty_adapter_is_refused(
    tiny_model, tmp_path, adapter: str, sentence: str
) -> None:
    if adapter == "empty":
        add_adapter(
            load_base(tiny_model[2].model, torch.device("cpu")), tiny_model[2]
        ).save_pretrained(tmp_path / "empty")
    assert sentence in refused(
        "--preset", "tiny", "--adapter", tmp_path / adapter, "--out", tmp_path
    )


@pytest.mark.parametrize(
    "sentence, spoil",
    [
        ("holds no completions", lambda flat: {name: values[:0] for name, values in flat.items()}),
        (
            "no array entropy",
            lambda flat: {name: values for name, values in flat.items() if name != "entropy"},
        ),
        ("all of one length", lambda flat: {**flat, "entropy": flat["entropy"][1:]}),
        (
            "flat arrays of numbers",
            lambda flat: {**flat, "entropy": flat["entropy"].astype(object)},
        ),
        ("not finite", lambda flat: {**flat, "entropy": flat["entropy"] * np.nan}),
        ("numbered in order", lambda flat: {**flat, "rollout": flat["rollout"][::-1]}),
        ("from 0", lambda flat: {**flat, "rollout": flat["rollout"] + 1}),
        (
            "without a gap",
            lambda flat: {**flat, "rollout": flat["rollout"] + (flat["rollout"] > 20)},
        ),
        (
            "than every completion",
            lambda flat: {name: values[flat["position"] < 5] for name, values in flat.items()},
        ),
    ],
)
def test_bad_arrays_are_refused_with_a_sentence(tmp_path, sentence: str, spoil) -> None:
    np.savez(tmp_path / "tokens.npz", **spoil(random_tokens()))
    assert sentence in refused("--tokens", tmp_path / "tokens.npz", "--W", 5)


@pytest.mark.parametrize("n", [3, 9, 10])
def test_deciles_of_a_few_tokens(tmp_path, n: int) -> None:
    """Below ten tokens some deciles are empty: none is the highest, and no trend is told."""
    flat = {}
    for name, kind in token_stats.MEASURED.items():
        flat[name] = np.zeros(n, kind)
    flat["position"] = np.arange(n, dtype=np.int32)
    flat["entropy"] = np.linspace(0, 1, n, dtype=np.float32)
    flat["student_logp"] = -flat["entropy"]  # the gap grows with the entropy
    flat["max_entropy"] += 1
    np.savez(tmp_path / "tokens.npz", **flat)
    derive = functools.partial(D.gate_quantities, s=parse_settings(["--W", "1"]))
    summary = token_stats.summarise_tokens(tmp_path / "tokens.npz", derive, {}, options(), 1)
    d = summary["decile"]
    filled = [g + 1 for g in range(10) if d["count"][g]]
    assert (d["highest"], d["monotone"], len(filled)) == (filled[-1], True, n)
    assert ("monotone" in pages.deciles_text(summary)) == (n == 10)


def test_a_zoom_without_a_lock_or_a_pivot_says_so() -> None:
    one = {"H_hat": np.full(40, 0.5), "H_hat_CL": np.full(40, 0.5), "text": ["x"] * 40}
    one["regime"] = np.full(40, token_stats.REGIMES.index("fork"))
    titles = [axis.get_title() for axis in figures.draw_trace(one, 0).axes[1:]]
    assert [title.split(":")[0] for title in titles] == ["no lock", "no pivot", "no pivot"]


def test_lines_of_the_dynamics_figure_are_the_logs(tmp_path) -> None:
    paths = []
    for name, limit in (("one", 0.1), ("two", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"max_grad_norm": limit}))
        paths.append(
            str(
                write_rows(
                    tmp_path / name / "log.jsonl",
                    [
                        {
                            "step": k,
                            "grad_norm": limit * k + 0.01,
                            "reward": k / 7,
                            "length": 9 - k,
                            "running_std": None,
                        }
                        for k in range(6)
                    ],
                )
            )
        )
    figure = figures.draw_dynamics([paths[0], str(tmp_path / "two")], 0.1)
    axes = figure.axes
    figure.canvas.draw()
    assert not any("$" in text.get_text() for text in axes[0].get_yticklabels(which="both"))
    drawn = {line.get_label(): line.get_ydata() for line in axes[0].lines}
    assert list(drawn["one"]) == [0.1 * k + 0.01 for k in range(6)]
    assert list(drawn["two"]) == [0.5 * k + 0.01 for k in range(6)]
    assert set(drawn["clipped to 0.1"]) == {0.1} and set(drawn["clipped to 0.5"]) == {0.5}
    assert list(axes[1].lines[0].get_ydata()) == [k / 7 for k in range(6)]
    assert list(axes[2].lines[0].get_ydata()) == [9 - k for k in range(6)]


def test_appendix_c_holds_and_the_check_can_fail(monkeypatch) -> None:
    assert len(D.selftest(2000)) == 8
    right = D.confidence_gate
    monkeypatch.setattr(
        D,
        "confidence_gate",
        lambda H, mask, gamma, W, top: right(H, mask, gamma, max(0, W - 1), top),
    )
    with pytest.raises(SystemExit, match="Proposition 1 fails"):
        D.selftest(2000)
    monkeypatch.setattr(
        D, "confidence_gate", lambda H, mask, gamma, W, top: right(H, mask, gamma, W, top) ** 3
    )
    with pytest.raises(SystemExit, match="Proposition 1|chord"):
        D.selftest(2000)


def test_import_does_no_work() -> None:
    heavy = "{'matplotlib', 'transformers', 'vllm', 'peft', 'datasets'}"
    code = f"import sys, diagnostics; print({heavy} & {{*sys.modules}})"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "set()\n"
    )


# --------------------------------------------------------------------------------------------------
# The microscope, in a browser


NASTY = [
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "a&lt;b",
    "\u2028",
    "\n\n",
    "",
    ' "quoted" \'',
    "\U0001f600",
    "\ufffd",
]


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory) -> tuple[Path, dict]:
    """A page whose tokens are HTML, scripts and worse."""
    return page_of(12, tmp_path_factory.mktemp("page"))


def page_of(number: int, folder: Path) -> tuple[Path, dict]:
    flat = random_tokens(seed=3)
    one = {name: values[flat["rollout"] == number] for name, values in flat.items()}
    one["text"] = [NASTY[k % len(NASTY)] for k in range(len(one["rollout"]))]
    path, s = folder / "microscope.html", parse_settings(["--gamma", "0.6", "--W", "3"])
    sliders = {
        "gamma": s.gamma,
        "W": s.W,
        "eps": s.eps,
        "tau_low": options().tau_low,
        "tau_high": options().tau_high,
    }
    path.write_text(pages.microscope(one, number, NASTY[0] + NASTY[1], sliders))
    return path, one


def browse(path: Path, fragment: str) -> str:
    """The document after its scripts ran."""
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync"
    quiet += " --disable-background-networking"
    with tempfile.TemporaryDirectory() as profile:
        command = [
            CHROMIUM,
            *quiet.split(),
            "--disable-component-update",
            f"--user-data-dir={profile}",
            "--dump-dom",
        ]
        command += [f"{path.as_uri()}#{fragment}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def numbers_of(dom: str, tag: str = "numbers") -> dict:
    return json.loads(
        html.unescape(re.search(rf'<pre id="{tag}"[^>]*>(.*?)</pre>', dom, re.DOTALL)[1])
    )


@needs_browser
@pytest.mark.parametrize(
    "gamma, W, eps", [(0.6, 3, 0.2), (0, 0, 0), (1.0, 5, 0.2), (1.7, 20, 0.95), (0.37, 1, 0.41)]
)
@pytest.mark.parametrize("number", [12, 25])  # of the second, the batch's maximum is below 1 nat
def test_the_pages_numbers_are_egrsds(
    tmp_path, number: int, gamma: float, W: int, eps: float
) -> None:
    path, one = page_of(number, tmp_path)
    assert (one["max_entropy"][0] < 1) == (number == 25) and len(one["text"]) > 20
    page = numbers_of(browse(path, f"gamma={gamma}&W={W}&eps={eps}&numbers"))
    ours = D.gate_quantities(
        one, parse_settings(["--gamma", str(gamma), "--W", str(W), "--eps", str(eps)])
    )
    for name, values in ours.items():
        np.testing.assert_allclose(page[name], values, rtol=3e-7, atol=1e-7, err_msg=name)
    H_hat_CL = ours["entropy_lookahead"] / np.maximum(one["max_entropy"], 1)
    np.testing.assert_allclose(page["H_hat_CL"], H_hat_CL, rtol=3e-7)


@needs_browser
def test_model_text_is_text(nasty_page) -> None:
    path, one = nasty_page
    dom = browse(path, "token=0")
    assert (
        "<title>The gate under the microscope</title>" in dom
        and "<img" not in dom.split("</script>")[-1]
    )
    shown = re.search(r'<div id="text".*?</div>', dom, re.DOTALL)[0]
    texts = [
        html.unescape(text) for text in re.findall(r"<span[^>]*>(.*?)</span>", shown, re.DOTALL)
    ]
    assert texts == [text.replace("\n", "\u23ce\n") or "\u2205" for text in one["text"]]
    assert (
        path.read_text().count("<script") == 2
        and "'sha256-" in path.read_text()
        and "DATA" not in path.read_text()
    )


@needs_browser
def test_pointer_keyboard_and_sliders(nasty_page, tmp_path) -> None:
    """A copy of the page in which a second script acts like a reader."""
    path, one = nasty_page
    act = """<pre id="seen"></pre><script>
      const seen = {}, $2 = id => document.getElementById(id), text = $2("text");
      const panel = () => $2("panel").textContent;
      const press = key => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      seen.stops = text.querySelectorAll('[tabindex="0"]').length;
      text.querySelector('[tabindex="0"]').focus(); seen.first = panel();
      press("ArrowRight"); press("ArrowRight"); press("ArrowLeft"); seen.second = panel();
      press("End"); press("ArrowRight"); seen.last = panel();
      press("Home"); press("ArrowLeft"); seen.home = panel();
      text.children[4].dispatchEvent(new PointerEvent("pointerenter")); seen.pointed = panel();
      const slide = (id, value) => {
        $2(id).value = value; $2(id).dispatchEvent(new Event("input"));
      };
      for (const id of ["gamma", "eps", "W"]) { slide(id, "0"); seen[id] = panel(); }
      seen.colors = {};
      for (const option of $2("show").options) {
        slide("show", option.value);
        seen.colors[option.value] = [...text.children].map(span => span.style.backgroundColor);
      }
      seen.stops_after = text.querySelectorAll('[tabindex="0"]').length;
      seen.fits = document.documentElement.scrollWidth <= innerWidth;
      const all = [...document.querySelectorAll("body *")];
      const sizes = all.map(e => parseFloat(getComputedStyle(e).fontSize));
      seen.smallest = Math.min(...sizes);
      $2("seen").textContent = JSON.stringify(seen);</script></html>"""
    page = re.sub(r"'sha256-[^']+'", "'unsafe-inline'", path.read_text()).replace("</html>", act)
    (tmp_path / "page.html").write_text(page)
    seen = numbers_of(browse(tmp_path / "page.html", "gamma=0.6"), "seen")
    n = len(one["text"])
    assert seen["stops"] == seen["stops_after"] == 1, "Tab must stop once at the text"
    for key, t in {"first": 0, "second": 1, "last": n - 1, "home": 0, "pointed": 4}.items():
        assert seen[key].startswith(f"token {t} of {n}")
        assert all(f"Eq. {k}" in seen[key] for k in (2, 3, 4, 5, 6, 7, 8))
    assert "0.1, 1) = 1.0000" in seen["gamma"] and re.search(
        r"clip\([\d.]+, 1.00, 1.00\) = 1.0000", seen["eps"]
    )
    assert "tokens 4 to 4:" in seen["W"]
    assert list(seen["colors"]) == [
        "entropy",
        "gate",
        "gate_lookahead",
        "magnitude",
        "delta",
        "token_advantage",
    ]
    assert (
        len(set(seen["colors"]["entropy"])) > 3
        and seen["colors"]["entropy"] != seen["colors"]["delta"]
    )
    assert seen["fits"] and seen["smallest"] >= 16
