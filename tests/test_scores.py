"""Standard errors, paired differences and tables, against numpy and a bootstrap."""

import csv
import math
import os
import random

import numpy as np
import pytest

from egrsd import ROOT
from support.evaluation import scores
from support.evaluation.scores import paired_difference

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = ["--preset", "tiny", "--limit", "8", "--K", "3"]


def fake_samples(
    problems: int, K: int, runs: int = 1, seed: int = 0, shift: float = 0.0
) -> list[dict]:
    """Problems of different difficulty, so that the samples of one are correlated."""
    rng = random.Random(seed)
    ease = [random.Random(f"ease {n}").random() for n in range(problems)]
    return [
        {
            "benchmark": "x",
            "id": str(n),
            "gold": "1",
            "run": run,
            "sample": k,
            "correct": rng.random() < ease[n] + shift,
            "tokens": rng.randrange(10, 90) + 50 * n,
            "finish": rng.choice(["stop", "stop", "length"]),
            "extracted": rng.choice([None, "1"]),
            "status": rng.choice(["ok", "timeout", "no_box"]),
        }
        for n in range(problems)
        for run in range(runs)
        for k in range(K)
    ]


def matrix(samples: list[dict], field: str, problems: int) -> np.ndarray:
    return np.array([float(row[field]) for row in samples]).reshape(
        problems, -1
    )  # (problems, runs * K)


@pytest.mark.parametrize("problems, K, runs", [(30, 4, 5), (17, 4, 1), (2, 1, 1)])
def test_scores_equal_numpy(problems: int, K: int, runs: int) -> None:
    samples = fake_samples(problems, K, runs)
    right, tokens = matrix(samples, "correct", problems), matrix(samples, "tokens", problems)
    random.Random(1).shuffle(samples)  # the order of the lines must not matter
    b = scores.benchmark_scores(samples)
    assert (b["problems"], b["samples"]) == (problems, problems * K * runs)
    assert b["accuracy"] == pytest.approx(100 * right.mean())
    assert b["se"] == pytest.approx(100 * np.sqrt(right.mean(1).var(ddof=1) / problems))
    assert b["length"] == pytest.approx(tokens.mean())
    assert b["length_se"] == pytest.approx(tokens.mean(1).std(ddof=1) / problems**0.5)
    assert b["pass_at_k"] == pytest.approx(100 * right.reshape(problems, runs, K).max(2).mean())
    by_run = 100 * right.reshape(problems, runs, K).mean((0, 2))
    assert b["run_accuracies"] == pytest.approx(by_run.tolist())
    assert b["run_sd"] == (pytest.approx(by_run.std(ddof=1)) if runs > 1 else None)
    assert b["truncated"] == pytest.approx(
        100 * np.mean([row["finish"] == "length" for row in samples])
    )
    assert b["unboxed"] == pytest.approx(
        100 * np.mean([row["extracted"] is None for row in samples])
    )
    assert b["timeouts"] == sum(row["status"] == "timeout" for row in samples)


def test_standard_error_is_that_of_a_bootstrap_over_problems() -> None:
    samples = fake_samples(40, 4)
    means = matrix(samples, "correct", 40).mean(1)
    draws = np.random.default_rng(0).integers(0, 40, (20_000, 40))
    bootstrap = (
        100 * means[draws].mean(1).std() * np.sqrt(40 / 39)
    )  # a bootstrap divides by n, the estimate by n - 1
    b = scores.benchmark_scores(samples)
    assert b["se"] == pytest.approx(bootstrap, rel=0.03)
    naive = 100 * np.sqrt(
        means.mean() * (1 - means.mean()) / 160
    )  # as if 160 samples were 160 problems
    assert b["se"] > 1.3 * naive


def test_paired_difference_equals_numpy_and_a_bootstrap() -> None:
    a, b = fake_samples(40, 4, seed=1, shift=0.1), fake_samples(40, 4, seed=2)
    d = 100 * (matrix(a, "correct", 40).mean(1) - matrix(b, "correct", 40).mean(1))
    mean, se, n = paired_difference(a, b)
    assert (mean, se, n) == (pytest.approx(d.mean()), pytest.approx(d.std(ddof=1) / 40**0.5), 40)
    draws = np.random.default_rng(0).integers(0, 40, (20_000, 40))
    assert se == pytest.approx(d[draws].mean(1).std() * np.sqrt(40 / 39), rel=0.03)
    separate = math.hypot(scores.benchmark_scores(a)["se"], scores.benchmark_scores(b)["se"])
    assert se < 0.8 * separate  # pairing takes the difficulty of the problems out
    assert paired_difference(a, a)[:2] == (0.0, 0.0)
    assert paired_difference(a, b, lambda row: row["tokens"])[0] == pytest.approx(
        matrix(a, "tokens", 40).mean() - matrix(b, "tokens", 40).mean()
    )


def test_only_common_problems_are_paired() -> None:
    a, b = fake_samples(10, 2), [row for row in fake_samples(12, 2, seed=3) if int(row["id"]) >= 4]
    mean, _, n = paired_difference(a, b)
    inner = ([row for row in rows if 4 <= int(row["id"]) < 10] for rows in (a, b))
    assert n == 6 and mean == pytest.approx(
        np.subtract(*(matrix(rows, "correct", 6).mean() for rows in inner)) * 100
    )
    with pytest.raises(SystemExit, match="no problem"):
        paired_difference(
            a, [{**row, "gold": "2"} for row in b]
        )  # an id alone does not make it the same problem


def test_macro_average_and_efficiency() -> None:
    samples = {name: fake_samples(n, 4, seed=n) for name, n in (("a", 9), ("b", 20), ("c", 30))}
    parts = [scores.benchmark_scores(rows) for rows in samples.values()]
    run = scores.run_scores(samples, samples)
    assert run["accuracy"] == pytest.approx(np.mean([b["accuracy"] for b in parts]))
    assert run["se"] == pytest.approx(np.linalg.norm([b["se"] for b in parts]) / 3)
    assert run["length"] == pytest.approx(np.mean([b["length"] for b in parts]))
    assert run["eff"] == pytest.approx(
        run["accuracy"] / np.mean([b["length"] for b in parts]) * 1000
    )
    one = scores.run_scores({"a": fake_samples(1, 4)}, ["a"])
    assert one["se"] is None and scores.show(
        one["accuracy"], one["se"]
    )  # a single problem: no error bar


def test_pareto_equals_a_slow_search() -> None:
    rng = random.Random(0)
    for _ in range(100):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 9))]
        want = [
            i
            for i, (x, y) in enumerate(points)
            if not any((u < x and v >= y) or (u <= x and v > y) for u, v in points)
        ]
        assert scores.pareto(points) == want


def test_published_figures_are_consistent() -> None:
    with open(ROOT / "support" / "evaluation" / "paper_tables.csv", newline="") as file:
        rows = {}
        for f in csv.DictReader(file):
            assert f["metric"] not in rows.setdefault(
                (f["table"], f["model"], f["method"], f["gamma"], f["W"]), {}
            )
            rows[f["table"], f["model"], f["method"], f["gamma"], f["W"]][f["metric"]] = float(
                f["value"]
            )
    assert {key[0] for key in rows} == {"2", "3", "4", "5", "6", "7", "A3", "A4", "A5", "A6"}
    assert sum(map(len, rows.values())) == 364
    six = ["aime24", "aime25", "hmmt25", "math500", "minerva", "gsm8k"]
    averaged = [v for v in rows.values() if "avg" in v and set(six) <= set(v)]
    assert len(averaged) == 7 + 7 + 5 + 4 + 6 + 6
    for v in averaged:
        assert v["avg"] == pytest.approx(np.mean([v[name] for name in six]), abs=0.0051)
    for v in rows.values():
        if "eff" in v:
            assert v["eff"] == pytest.approx(v["avg"] / v["length"] * 1000, abs=0.0051)
    assert rows["3", "qwen3-8b", "CL-EGRSD", "1.0", "5"]["hmmt25"] == 52.5
    assert (
        rows["4", "qwen3-8b", "EGRSD", "0.3", "0"]["S4"]
        == rows["3", "qwen3-8b", "EGRSD", "0.3", "0"]["avg"]
    )
    base = rows["A5", "olmo3-7b", "no-train", "", ""]["avg"]
    for (t, _, method, *_), v in rows.items():  # noqa: B007
        if "avg minus no-train" in v:
            assert v["avg minus no-train"] == pytest.approx(v["avg"] - base, abs=0.0051), method
