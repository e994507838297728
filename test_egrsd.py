"""Every function of egrsd.py against something written independently: slow loops from the equations, a full float64
softmax, autograd, other processes, a kill in mid-run, a real vLLM, real problems. `python -m pytest`"""
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import egrsd
from egrsd import (RewardStats, confidence_gate, evidence_magnitude, logprob_and_entropy, logprob_and_gradient,
                   lookahead_min, shaped_reward, token_advantages)
from support.data import load_held_out
from support.grading import extract_answer, grade_completions
from support.runs import ROLLOUT_KEYS

NAN, INF = math.nan, math.inf
# derandomized: the same examples on every machine, so a failure repeats
prop = settings(max_examples=60, deadline=None, derandomize=True, database=None)
entropies = st.floats(0, 12, width=32, allow_subnormal=False)
gammas, windows = st.floats(0, 1), st.integers(0, 12)


# --- oracles: one Python loop per equation --------------------------------------------------------------------------

def pad(rows: list[list[float]], T: int, junk: float = NAN, dtype: torch.dtype = torch.bool) -> tuple[Tensor, Tensor]:
    """Rows as a right-padded (B, T) tensor, with junk where a pad is, and its mask."""
    values = torch.tensor([row + [junk] * (T - len(row)) for row in rows], dtype=torch.float32)
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows]).to(dtype)
    return values, mask


@st.composite
def batches(draw: Callable, min_rows: int = 1) -> tuple[Tensor, Tensor, list[list[float]]]:
    rows = draw(st.lists(st.lists(entropies, min_size=1, max_size=9), min_size=min_rows, max_size=4))
    T = max(map(len, rows)) + draw(st.integers(0, 3))
    junk = draw(st.sampled_from([NAN, INF, -INF, -7.0, 1e9, 0.0]))
    return *pad(rows, T, junk, draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))), rows


def slide(phi: Callable[[list[float]], float], row: list[float], W: int) -> list[float]:
    """A causal filter at each position of one completion; the window ends with the completion."""
    return [phi([row[j] for j in range(t, len(row)) if j <= t + W]) for t in range(len(row))]


def slow_gate(rows: list[list[float]], gamma: float, W: int, top: float | None = None) -> list[list[float]]:
    top = max(h for row in rows for h in row) if top is None else top  # raw entropies: D1
    return [[min(1.0, max(0.1, 1 - gamma * h / max(top, 1.0))) for h in slide(min, row, W)] for row in rows]


def same(got: Tensor, rows: list[list[float]], atol: float = 1e-6) -> None:
    want, _ = pad(rows, got.shape[1], junk=0.0)  # 0 at the pads is part of the claim
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


# --- reward and running statistics ----------------------------------------------------------------------------------

def test_shaped_reward_is_one_at_the_cap_and_grows_to_one_plus_beta() -> None:
    assert [shaped_reward(True, n, 1024) for n in (1024, 512, 0)] == pytest.approx([1.0, 1.25, 1.5])
    assert shaped_reward(True, 300, 400, beta_L=0.2) == pytest.approx(1.05)
    assert shaped_reward(True, 7, 1024, beta_L=0.0) == 1.0
    assert [shaped_reward(False, n, 1024) for n in (1, 1024)] == [0.0, 0.0]
    assert type(shaped_reward(True, 3, 9)) is float


@prop
@given(st.lists(st.lists(st.floats(0, 1.5), min_size=1, max_size=6), min_size=2, max_size=6))
def test_running_statistics_equal_the_statistics_of_all_rewards(groups: list[list[float]]) -> None:
    grouped, single, rewards = RewardStats(), RewardStats(), sum(groups, [])
    for group in groups:
        grouped.update(torch.tensor(group, dtype=torch.float64))
    for r in rewards:
        single.update(torch.tensor([r], dtype=torch.float64))
    for stats in (grouped, single):
        assert stats.count == len(rewards)
        assert stats.mean == pytest.approx(statistics.mean(rewards), abs=1e-9)
        assert stats.std == pytest.approx(statistics.stdev(rewards), abs=1e-7)


def test_running_deviation_survives_a_large_mean_and_a_round_trip_through_json() -> None:
    torch.manual_seed(0)
    rewards, stats = 1e6 + torch.rand(3200, dtype=torch.float64), RewardStats()  # E[r^2] - E[r]^2 would lose it
    for group in rewards[:1600].split(32):
        stats.update(group)
    again = RewardStats()
    again.load_state_dict(json.loads(json.dumps(stats.state_dict())))
    for group in rewards[1600:].split(32):
        stats.update(group), again.update(group)
    assert stats.std == pytest.approx(float(torch.var(rewards, correction=1).sqrt()), rel=1e-7)
    assert (again.count, again.mean, again.std) == (stats.count, stats.mean, stats.std) and again.count == 3200


def test_advantages_warm_up_for_ten_steps_then_whiten_by_earlier_rewards_only() -> None:
    torch.manual_seed(0)
    stats, seen = RewardStats(), []
    for step in range(13):
        rewards = torch.rand(4, dtype=torch.float64) * 1.5
        before = stats.state_dict()
        got = stats.advantages(rewards, step)
        assert stats.state_dict() == before  # asking does not update
        mean, std = (0.5, 1.0) if step < 10 else (statistics.mean(seen), statistics.stdev(seen))
        want = [(r - mean) / std for r in rewards.tolist()]
        assert isinstance(got, Tensor) and got.shape == (4,) and got.tolist() == pytest.approx(want, abs=1e-5)
        stats.update(rewards)  # the rewards of the warm-up enter too: D4
        seen += rewards.tolist()


@pytest.mark.parametrize("history, divisor", [
    ([0.0] * 32, 1.0), ([1.25] * 32, 1.0), ([0.75], 1.0), ([0.0, 1e-6], 1.0), ([0.0, 2e-6], math.sqrt(2) * 1e-6)])
def test_a_deviation_below_1e_6_divides_by_one(history: list[float], divisor: float) -> None:
    stats = RewardStats()
    stats.update(torch.tensor(history, dtype=torch.float64))
    rewards = torch.tensor([history[0], 1.0], dtype=torch.float64)
    want = [(r - statistics.mean(history)) / divisor for r in rewards.tolist()]
    assert stats.advantages(rewards, 10).tolist() == pytest.approx(want, rel=1e-5, abs=1e-9)


# --- lookahead minimum and gate -------------------------------------------------------------------------------------

@prop
@given(batches(), windows)
def test_lookahead_equals_the_slow_loop_and_pads_are_zero(batch: tuple, W: int) -> None:
    H, mask, rows = batch
    same(lookahead_min(H, mask, W), [slide(min, row, W) for row in rows], atol=0)
    same(lookahead_min(H, mask, 0), rows, atol=0)  # W = 0 is the identity
    suffix = [slide(min, row, len(row)) for row in rows]
    for long in (H.shape[1] - 1, H.shape[1], 1000):
        same(lookahead_min(H, mask, long), suffix, atol=0)
    assert (lookahead_min(H, mask, W + 1) <= lookahead_min(H, mask, W)).all()


def test_lookahead_sees_w_tokens_ahead_and_not_one_more() -> None:
    H, mask = torch.tensor([[5.0, 4.0, 6.0, 1.0, 7.0, 2.0]]), torch.ones(1, 6)
    assert lookahead_min(H, mask, 2).tolist() == [[4.0, 1.0, 1.0, 1.0, 2.0, 2.0]]
    assert lookahead_min(H, mask, 1).tolist() == [[4.0, 4.0, 1.0, 1.0, 2.0, 2.0]]
    mask[0, 5] = 0  # the last token becomes a pad: its 2.0 may no longer leak into the window
    assert lookahead_min(H, mask, 2).tolist() == [[4.0, 1.0, 1.0, 1.0, 7.0, 0.0]]


@prop
@given(batches(), gammas, windows, st.none() | st.floats(0, 5))
def test_gate_equals_the_slow_loop_within_its_range_and_pads_are_zero(
        batch: tuple, gamma: float, W: int, above: float | None) -> None:
    H, mask, rows = batch
    top = None if above is None else max(map(max, rows)) + above
    gate = confidence_gate(H, mask, gamma, W, max_entropy=top)
    same(gate, slow_gate(rows, gamma, W, top))
    real = gate[mask.bool()]
    assert real.min() >= 0.1 - 1e-7 and real.max() <= 1
    assert (confidence_gate(H, mask, 0.0, W)[mask.bool()] == 1).all()  # gamma = 0 is RLSD


@prop
@given(batches(), gammas, gammas, windows, st.lists(st.floats(0, 3), min_size=9, max_size=9))
def test_gate_falls_with_entropy_and_gamma_and_rises_with_the_window(
        batch: tuple, g1: float, g2: float, W: int, lifts: list[float]) -> None:
    H, mask, rows = batch
    higher, _ = pad([[h + x for h, x in zip(row, lifts)] for row in rows], H.shape[1])
    gate = confidence_gate(H, mask, max(g1, g2), W, max_entropy=16.0)
    assert (confidence_gate(higher, mask, max(g1, g2), W, max_entropy=16.0) <= gate + 1e-6).all()
    assert (confidence_gate(H, mask, min(g1, g2), W, max_entropy=16.0) >= gate - 1e-6).all()
    gate = confidence_gate(H, mask, g1, W)
    assert (confidence_gate(H, mask, g1, 0) <= gate + 1e-6).all()  # EGRSD <= CL-EGRSD: D1 keeps one denominator
    assert (confidence_gate(H, mask, g1, W + 1) >= gate - 1e-6).all()


@prop
@given(batches(min_rows=2), gammas, windows)
def test_rows_and_pads_matter_only_through_the_shared_maximum(batch: tuple, gamma: float, W: int) -> None:
    H, mask, rows = batch
    top = max(map(max, rows))
    whole = confidence_gate(H, mask, gamma, W)
    halves = [confidence_gate(H[part], mask[part], gamma, W, max_entropy=top) for part in (slice(1), slice(1, None))]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-6, rtol=0)  # D2: the split changes nothing
    wider, wider_mask = pad(rows, H.shape[1] + 4, junk=99.0)
    torch.testing.assert_close(confidence_gate(wider, wider_mask, gamma, W)[:, :H.shape[1]], whole, atol=1e-6, rtol=0)
    for b, row in enumerate(rows):
        alone = lookahead_min(*pad([row], len(row)), W)
        assert torch.equal(alone[0], lookahead_min(H, mask, W)[b, :len(row)])


def test_denominator_is_the_raw_maximum_not_the_lookahead_maximum() -> None:
    H, mask = torch.tensor([[4.0, 2.0, 2.0]]), torch.ones(1, 3)
    assert confidence_gate(H, mask, 0.5, 1).tolist() == [[0.75, 0.75, 0.75]]  # 0.5 if divided by the 2 left over


def test_denominator_has_a_floor_of_one_nat_also_for_a_given_maximum() -> None:
    H, mask = torch.tensor([[0.25, 0.5]]), torch.ones(1, 2)
    for top in (None, 0.5, 1.0):
        assert confidence_gate(H, mask, 1.0, 0, max_entropy=top).tolist() == [[0.75, 0.5]]
    assert (confidence_gate(torch.zeros(1, 2), mask, 1.0, 0) == 1).all()  # and no 0 / 0


@prop
@given(batches(), st.floats(0, 1.5), windows)
def test_the_floor_of_the_gate_binds_only_above_gamma_0_9(batch: tuple, gamma: float, W: int) -> None:
    H, mask, rows = batch
    linear = (1 - gamma * lookahead_min(H, mask, W).double() / max(1.0, *map(max, rows)))[mask.bool()]
    gate = confidence_gate(H, mask, gamma, W)[mask.bool()].double()
    if gamma <= 0.9:
        torch.testing.assert_close(gate, linear, atol=1e-6, rtol=0)
    torch.testing.assert_close(gate[linear < 0.1], torch.full_like(gate[linear < 0.1], 0.1), atol=1e-6, rtol=0)


def test_rounding_below_zero_entropy_cannot_lift_the_gate_above_one() -> None:
    gate = confidence_gate(torch.tensor([[-1e-3, 2.0]]), torch.ones(1, 2), 1.0, 0)
    assert gate[0, 0] == 1 and gate[0, 1] == pytest.approx(0.1)


def test_a_row_without_tokens_is_all_zero_and_disturbs_no_other_row() -> None:
    H, mask = pad([[], [3.0, 1.0]], 2, junk=50.0)
    assert lookahead_min(H, mask, 1).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert confidence_gate(H, mask, 0.75, 0).tolist() == [[0.0, 0.0], [0.25, 0.75]]


# --- Appendix C -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.3, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("top", [0.5, 1.0, 3.7])
def test_linear_gate_is_the_chord_above_the_shrinkage_curve(gamma: float, top: float) -> None:
    H = torch.linspace(0, top, 101)[None]
    x, a0 = H.double() / max(top, 1.0), gamma / (1 - gamma)  # Eq. 13
    gap = confidence_gate(H, torch.ones_like(H), gamma, 0).double() - 1 / (1 + a0 * x)  # Eq. 11
    assert gap.min() >= -1e-6 and abs(gap[0, 0]) < 1e-6
    if gamma > 0:
        assert gap[0, 5:95].min() > 1e-5
    if gamma <= 0.9 and top >= 1:  # above 0.9 the clip lifts the right end, below 1 nat H_hat never reaches 1
        assert abs(gap[0, -1]) < 1e-6


ADMISSIBLE = {
    "minimum": min,
    "current": lambda h: h[0],
    "sub-window": lambda h: min(h[0], *h[2:3], INF),
    "capped mean": lambda h: min(h[0], sum(h) / len(h)),
    "capped maximum of the rest": lambda h: min(h[0], max(h[1:], default=INF)),
    "capped power mean": lambda h: min(h[0], (sum(x ** 3 for x in h) / len(h)) ** (1 / 3)),
    "capped geometric mean": lambda h: min(h[0], math.prod(h) ** (1 / len(h))),
    "mix of current and minimum": lambda h: 0.3 * h[0] + 0.7 * min(h),
}
NOT_ADMISSIBLE = {"conservative": lambda h: sum(h) / len(h), "idempotent": lambda h: min(h) / 2,
                  "monotone": lambda h: max(min(h), h[0] - sum(h[1:]))}
windows_of_h = st.lists(entropies, min_size=2, max_size=6)


def violations(phi: Callable[[list[float]], float], h: list[float], j: int, up: float) -> set[str]:
    raised = [x + up * (i == j % len(h)) for i, x in enumerate(h)]
    found = {"monotone": phi(raised) < phi(h) - 1e-9, "conservative": phi(h) > h[0] + 1e-9,
             "idempotent": abs(phi([h[0]] * len(h)) - h[0]) > 1e-9}
    return {name for name, broken in found.items() if broken}


@prop
@given(windows_of_h, st.integers(0, 5), st.floats(0, 5))
def test_lemma_1_no_admissible_filter_is_below_the_minimum(h: list[float], j: int, up: float) -> None:
    for name, phi in ADMISSIBLE.items():
        assert not violations(phi, h, j, up), name
        assert phi(h) >= min(h) - 1e-9, name


def test_the_admissibility_check_refuses_filters_outside_the_family() -> None:
    for broken, phi in NOT_ADMISSIBLE.items():
        assert violations(phi, [2.0, 1.0, 5.0], 1, 2.0) | violations(phi, [5.0, 1.0, 1.0], 1, 2.0) == {broken}


@prop
@given(windows_of_h, windows, st.floats(0, 12), st.integers(0, 5))
def test_lookahead_is_causal_with_a_window_of_w(row: list[float], W: int, other: float, t: int) -> None:
    t %= len(row)
    changed = [x if t <= j <= t + W else other for j, x in enumerate(row)]
    for phi in ADMISSIBLE.values():
        assert slide(phi, row, W)[t] == slide(phi, changed, W)[t]
    assert lookahead_min(*pad([row], 6), W)[0, t] == lookahead_min(*pad([changed], 6), W)[0, t]


@prop
@given(batches(), gammas, windows)
def test_proposition_1_the_minimum_recovers_the_most_weight(batch: tuple, gamma: float, W: int) -> None:
    H, mask, rows = batch
    top = max(map(max, rows))
    instant = confidence_gate(H, mask, gamma, 0, max_entropy=top)
    most = confidence_gate(H, mask, gamma, W, max_entropy=top) - instant
    for name, phi in ADMISSIBLE.items():
        smooth, _ = pad([slide(phi, row, W) for row in rows], H.shape[1])
        recovered = confidence_gate(smooth, mask, gamma, 0, max_entropy=top) - instant
        assert (recovered <= most + 1e-6).all() and (recovered >= -1e-6).all(), name
        if gamma <= 0.9:  # not saturated: the increment is the one of the proposition
            scale = gamma / max(top, 1.0)
            same(recovered, [[scale * (h - f) for h, f in zip(row, slide(phi, row, W))] for row in rows])


# --- magnitude and token advantages ---------------------------------------------------------------------------------

@prop
@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-0.5, 0.5)), min_size=1, max_size=8),
       st.floats(0, 0.9))
def test_magnitude_equals_the_slow_loop_for_each_direction(pairs: list[tuple[float, float]], eps: float) -> None:
    student = torch.tensor([[s for s, _ in pairs]] * 3)
    teacher = torch.tensor([[s + d for s, d in pairs]] * 3)
    got = evidence_magnitude(teacher, student, torch.tensor([1.0, -1.0, 0.0]), eps)
    deltas = [t - s for t, s in zip(teacher[0].tolist(), student[0].tolist())]
    want = [[min(1 + eps, max(1 - eps, math.exp(D * delta))) for delta in deltas] for D in (1, -1, 0)]
    same(got, want)


def test_magnitude_clips_after_the_exponential_at_0_8_and_1_2() -> None:
    teacher = torch.tensor([[-1.0, -INF, 0.0, -1e30]] * 3)
    student = torch.tensor([[-1.1, -1.0, -9.0, -2.0]] * 3)
    up = math.exp(0.1)
    # -inf: the teacher rules the token out; 0 * -inf must not become NaN where D = 0
    want = [[up, 0.8, 1.2, 0.8], [1 / up, 1.2, 0.8, 1.2], [1.0] * 4]
    same(evidence_magnitude(teacher, student, torch.tensor([1.0, -1.0, 0.0])), want)


@prop
@given(batches(), st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), gammas)
def test_token_advantage_is_the_product_of_three_signals(batch: tuple, A: list[float], gamma: float) -> None:
    H, mask, rows = batch
    A = A[:len(rows)]
    w, _ = pad([[0.8 + 0.03 * h for h in row] for row in rows], H.shape[1])  # NaN at the pads must not come through
    gate, _ = pad(slow_gate(rows, gamma, 0), H.shape[1])
    want = [[a * (0.8 + 0.03 * h) * o for h, o in zip(*pair)] for a, *pair in zip(A, rows, slow_gate(rows, gamma, 0))]
    same(token_advantages(torch.tensor(A), w, gate, mask), want)


def test_zero_advantage_gives_no_update_and_no_gradient_flows() -> None:
    leaves = [torch.tensor([0.0, 1.5]), -torch.rand(2, 3), torch.rand(2, 3)]
    A, student, gate = [x.requires_grad_() for x in leaves]
    got = token_advantages(A, evidence_magnitude(-torch.rand(2, 3), student, A.sign()), gate, torch.ones(2, 3))
    assert not got.requires_grad and (got[0] == 0).all() and (got[1] > 0).all()


# --- the head -------------------------------------------------------------------------------------------------------

def head_case(N: int, V: int, d: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows and head; the first targets are the ends of the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(N, d, generator=g) * scale, torch.randn(V, d, generator=g) / d ** 0.5
    targets = torch.randint(V, (N,), generator=g)
    targets[:2] = torch.tensor([0, V - 1])
    return hidden, head, targets


def full_softmax(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y), H and d log p(y) / d hidden in float64, the whole [N, V] at once, by autograd."""
    h = hidden.double().requires_grad_()
    logps = torch.log_softmax(h @ head.double().T, dim=1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    logp.sum().backward()
    return logp.detach(), -(logps.exp() * logps).sum(1).detach(), h.grad


@pytest.mark.parametrize("chunk", [1, 7, 10 ** 6])
@pytest.mark.parametrize("V", [1, 2, 37, 20011])  # no multiple of a tile
def test_head_equals_the_full_float64_softmax_for_any_chunk(V: int, chunk: int) -> None:
    hidden, head, targets = head_case(N=23, V=V, d=24, scale=3.0) if V > 1 else (torch.ones(2, 3), torch.ones(1, 3),
                                                                                 torch.zeros(2, dtype=torch.long))
    logp, entropy, grad = full_softmax(hidden, head, targets)
    for function, other in ((logprob_and_entropy, entropy), (logprob_and_gradient, grad)):
        for mine, want in zip(function(hidden, head, targets, chunk), (logp, other)):
            assert mine.dtype == torch.float32 and mine.shape == want.shape
            torch.testing.assert_close(mine.double(), want, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("chunk", [3, 10 ** 6])
@pytest.mark.parametrize("rising", [True, False])
def test_head_is_finite_and_right_for_logits_up_to_a_thousand(chunk: int, rising: bool) -> None:
    V = 20011
    # powers of two, so that the logits are exact in float32 and only the softmax is on trial
    head = torch.stack([torch.arange(V) % 1001, torch.full((V,), 1024)], 1).sort(0).values.float() / 1024
    head = head if rising else head.flip(0)
    # the largest logit is 1000; 0, above -1000; flat at 1000; flat at -1000; moderate; 0, above -500
    hidden = torch.tensor([[1024., 0], [-1024, 0], [0, 1000], [0, -1000], [4, 0], [512, -500]])
    for y in (0, V - 1, 5000):
        targets = torch.full((6,), y)
        logp, entropy, grad = full_softmax(hidden, head, targets)
        mine, H = logprob_and_entropy(hidden, head, targets, chunk)
        again, dlogp = logprob_and_gradient(hidden, head, targets, chunk)
        for got, want, atol in ((mine, logp, 5e-4), (again, logp, 5e-4), (H, entropy, 5e-3), (dlogp, grad, 2e-5)):
            torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-5)  # one ulp at 1000 is 6e-5


@pytest.mark.parametrize("chunk", [100, 10 ** 6])
def test_head_in_bfloat16_has_no_bias_against_float64(chunk: int) -> None:
    hidden, head, targets = head_case(N=600, V=20011, d=32, scale=2.0)
    hidden, head = hidden.bfloat16(), (head * 1.5).bfloat16()
    targets[300:] = (hidden[300:].float() @ head.float().T).argmax(1)  # half of them likely, as sampled tokens are
    logp, entropy, grad = full_softmax(hidden, head, targets)
    mine, H = logprob_and_entropy(hidden, head, targets, chunk)
    again, dlogp = logprob_and_gradient(hidden, head, targets, chunk)
    assert all(x.dtype == torch.float32 for x in (mine, H, again, dlogp))
    expected = head.double()[targets] - grad  # E_softmax[W]: its length shows a loss of small terms
    shrink = ((dlogp.double() - grad) * expected).sum(1) / expected.square().sum(1)
    errors = {"logp": mine - logp, "logp of the gradient pass": again - logp, "entropy": H - entropy, "shrink": shrink}
    errors |= {f"gradient {j}": (dlogp - grad)[:, j] for j in range(grad.shape[1])}
    for name, error in errors.items():
        standard_error = error.std() / len(error) ** 0.5
        assert error.mean().abs() <= max(4 * standard_error, 1e-5), (name, error.mean(), standard_error)
        assert error.abs().max() < 0.1, name  # unbiased, and no more than rounding the logits once may cost


def test_head_in_bfloat16_accumulates_in_float32() -> None:
    head = (torch.randn(20011, 16, generator=torch.Generator().manual_seed(1)) / 4).bfloat16()
    hidden = 2 * torch.eye(16).bfloat16()  # one-hot rows: logits exact in bfloat16, so what is left is the summation
    targets = torch.arange(16) * 1300
    logp, entropy, grad = full_softmax(hidden, head, targets)
    for function, other in ((logprob_and_entropy, entropy), (logprob_and_gradient, grad)):
        for mine, want in zip(function(hidden, head, targets, 7), (logp, other)):
            torch.testing.assert_close(mine.double(), want, atol=5e-5, rtol=0)  # one bfloat16 rounding is 5e-4


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest storage of any operator's result has."""
    largest = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("function", [logprob_and_entropy, logprob_and_gradient])
@pytest.mark.parametrize("chunk, limit", [(64, 64 * 50_000), (10 ** 6, 512 * 50_000 // 2 - 1)])
def test_head_never_makes_an_n_by_v_tensor_nor_a_graph(function: Callable, chunk: int, limit: int) -> None:
    hidden, head, targets = head_case(N=512, V=50_000, d=16)
    with LargestTensor() as seen:
        full_softmax(hidden[:9], head, targets[:9])
    assert seen.largest >= 9 * 50_000  # the meter works
    with LargestTensor() as seen:
        out = function(hidden.requires_grad_(function is logprob_and_gradient), head, targets, chunk)
    assert seen.largest <= limit and not any(x.requires_grad for x in out)


# --- wrong input ----------------------------------------------------------------------------------------------------

X, M, A = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
BAD, BAD_A, Y = torch.tensor([[1.0, NAN, 1.0]] * 2), torch.tensor([1.0, NAN]), torch.zeros(2, dtype=torch.long)
HEAD = torch.ones(5, 3)


@pytest.mark.parametrize("names, call", [
    # (2, 1), (3,) and (2, 1) would broadcast without a word
    ("entropy|mask", lambda: lookahead_min(X, M[:, :1], 1)), ("entropy|mask", lambda: confidence_gate(X, M[0], 0.3, 1)),
    ("entropy", lambda: lookahead_min(BAD, M, 1)), ("entropy", lambda: confidence_gate(BAD, M, 0.3, 1)),
    ("mask", lambda: lookahead_min(X, ~M, 1)), ("mask", lambda: confidence_gate(X, ~M, 0.3, 1)),
    (r"\bW\b", lambda: lookahead_min(X, M, -1)), (r"\bW\b", lambda: confidence_gate(X, M, 0.3, -1)),
    ("gamma", lambda: confidence_gate(X, M, -0.1, 1)), ("gamma", lambda: confidence_gate(X, M, NAN, 1)),
    ("max_entropy", lambda: confidence_gate(X, M, 0.3, 1, max_entropy=NAN)),
    ("teacher_logp|student_logp", lambda: evidence_magnitude(X, X[:, :1], A)),
    ("direction", lambda: evidence_magnitude(X, X, torch.ones(3))),
    ("teacher_logp", lambda: evidence_magnitude(BAD, X, A)), ("student_logp", lambda: evidence_magnitude(X, BAD, A)),
    ("direction", lambda: evidence_magnitude(X, X, BAD_A)),
    ("advantages", lambda: token_advantages(torch.ones(3), X, X, M)),
    ("advantages", lambda: token_advantages(BAD_A, X, X, M)),
    ("magnitude", lambda: token_advantages(A, BAD, X, M)), ("gate", lambda: token_advantages(A, X, BAD, M)),
    ("magnitude|gate|mask", lambda: token_advantages(A, X[:, :1], X, M)),
    ("magnitude|gate|mask", lambda: token_advantages(A, X, X[:, :1], M)),
    ("magnitude|gate|mask", lambda: token_advantages(A, X, X, M[0])),
    ("mask", lambda: token_advantages(A, X, X, ~M)),
    ("rewards", lambda: RewardStats().update(BAD_A)), ("rewards", lambda: RewardStats().advantages(BAD_A, 0)),
    (r"\bW\b", lambda: lookahead_min(X, M, math.inf)), (r"\bW\b", lambda: lookahead_min(X, M, NAN)),
    ("entropy", lambda: lookahead_min(X.long(), M, 1)), ("gamma", lambda: confidence_gate(X, M, math.inf, 1)),
    ("entropy", lambda: confidence_gate(X / 0, M, 0.3, 1)),
])
def test_wrong_input_is_a_value_error_that_names_the_argument(names: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=names):
        call()


def test_rewards_that_are_refused_leave_the_statistics_as_they_were() -> None:
    stats = RewardStats()
    with pytest.raises(ValueError, match="rewards"):
        stats.update([1.0, NAN])
    assert stats.count == 0


@pytest.mark.parametrize("function", [logprob_and_entropy, logprob_and_gradient])
@pytest.mark.parametrize("names, args", [
    ("hidden|head_weight", (X[:, :2], HEAD, Y, 4)), ("targets", (X, HEAD, Y[:1], 4)), ("hidden", (BAD, HEAD, Y, 4)),
    # negative indices wrap and a negative step loops zero times: both would be silent
    ("targets", (X, HEAD, Y - 1, 4)), ("targets", (X, HEAD, Y + 5, 4)), ("chunk", (X, HEAD, Y, 0)),
    ("chunk", (X, HEAD, Y, -1)), ("chunk", (X, HEAD, Y, 1.5)), ("targets", (X, HEAD, Y.float(), 4)),
])
def test_wrong_input_to_the_head_is_a_value_error_too(function: Callable, names: str, args: tuple) -> None:
    with pytest.raises(ValueError, match=names):
        function(*args)


# --- the file itself ------------------------------------------------------------------------------------------------

ROOT = Path(egrsd.__file__).parent
TINY = ROOT / "tiny"
DATA = Path(os.environ.get("EGRSD_DATA", ROOT.parent / "shared" / "data"))
MACHINE = ("seconds", "tokens_per_second", "memory_gib")  # all in a log line that may differ between machines


def start(*args: object, nproc: int = 0, **env: str) -> subprocess.Popen:
    """egrsd.py on the command line, under torchrun with nproc processes if nproc > 0."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--rdzv_backend", "c10d",
              "--rdzv_endpoint", "localhost:0"] if nproc else [sys.executable]
    script = [] if args and str(args[0]).endswith(".py") else [str(ROOT / "egrsd.py")]
    return subprocess.Popen([*launch, *script, *map(str, args)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def run(*args: object, code: int = 0, nproc: int = 0, **env: str) -> str:
    process = start(*args, nproc=nproc, **env)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    return output


def read_log(out: Path, name: str = "log.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MACHINE} for row in rows]


def figures_of(row: dict) -> dict:
    """The numbers of a log line but for the canary, which measures rounding itself."""
    return {key: value for key, value in row.items() if key not in ("canary", "skipped_prompts")}


def tiny_settings(*args: object) -> egrsd.Settings:
    return egrsd.parse_settings(["--preset", "tiny", *map(str, args)])


SMALL = ("--preset", "tiny", "--eval_data=", "--batch_size", 8, "--max_completion", 40)


@pytest.fixture(scope="module")
def tokenizer():
    return egrsd.load_tokenizer(tiny_settings())


def fresh_model(*args: object, b: float = 0.05):
    """The tiny model with an adapter whose B is random, so that student and teacher differ."""
    s = tiny_settings(*args)
    model = egrsd.add_adapter(egrsd.load_base(s, torch.device("cpu")), s)
    noise = torch.Generator().manual_seed(1)
    for name, p in egrsd.trainable(model).items():
        if "lora_B" in name:
            p.data = b * torch.randn(p.shape, generator=noise)
    return model, s


@pytest.fixture(scope="module")
def rollouts(tokenizer) -> list[dict]:
    """Eight real rollouts of very different lengths, with made-up advantages of both signs and a zero."""
    model, s = fresh_model("--batch_size", 8)
    batch, _, _ = egrsd.next_problems(egrsd.load_problems(s.data, s), tokenizer, s, 0)
    ends = egrsd.end_tokens(model, tokenizer)
    draw, _ = egrsd.start_engine(s, model, ends, torch.device("cpu"), "hf", 1)
    rows = egrsd.roll_out(draw, batch, tokenizer, ends, 3, s, temperature=1.1, top_p=0.95, top_k=20)
    for row, A in zip(rows, (1.5, -0.5, 0.0, 2.5, -1.0, 0.3, -0.2, 0.8)):
        row["advantage"] = A
    assert len({len(row["completion_ids"]) for row in rows}) > 3
    return rows


def test_import_does_no_work_and_each_line_of_algorithm_1_stands_once() -> None:
    heavy = "transformers peft vllm datasets matplotlib math_verify"
    run(str(ROOT / "egrsd.py"), "--help")
    program = f"import sys, egrsd; print([m for m in {heavy.split()} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr
    source = (ROOT / "egrsd.py").read_text()
    tags = [int(n) for line in re.findall(r"Alg\. 1, line ([\d, ]+)", source) for n in re.findall(r"\d+", line)]
    assert sorted(tags) == list(range(1, 22))
    assert max(map(len, source.splitlines())) <= 120


# --- the step: one function of its rollouts -------------------------------------------------------------------------


def oracle_step(model, rollouts: list[dict], s: egrsd.Settings) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Algorithm 1, lines 7 to 19, one sequence at a time: full logits, plain loops, autograd through everything."""
    t, M = s.logit_temperature, sum(len(r["completion_ids"]) for r in rollouts)
    H, teacher = [], []
    for r in rollouts:
        ids = torch.tensor([r["teacher_ids"] + r["completion_ids"]])
        with torch.no_grad(), model.disable_adapter():
            logp = (model(input_ids=ids).logits[0].double() / t).log_softmax(-1)[len(r["teacher_ids"]) - 1 : -1]
        H.append([-sum(p * lp for p, lp in zip(row.exp().tolist(), row.tolist())) for row in logp])
        teacher.append([logp[k, token].item() for k, token in enumerate(r["completion_ids"])])
    H_max = max(h for row in H for h in row)
    model.zero_grad()
    loss, gates, weights, canary = 0.0, [], [], []
    for r, h, logp_T in zip(rollouts, H, teacher):
        ids = torch.tensor([r["prompt_ids"] + r["completion_ids"]])
        z = model(input_ids=ids).logits[0].double()[len(r["prompt_ids"]) - 1 : -1]
        logp, raw, A = (z / t).log_softmax(-1), z.log_softmax(-1), r["advantage"]
        for k, token in enumerate(r["completion_ids"]):
            omega = min(1.0, max(0.1, 1 - s.gamma * min(h[k : k + s.W + 1]) / max(H_max, 1.0)))
            delta = logp_T[k] - logp[k, token].item()
            w = min(1 + s.eps, max(1 - s.eps, math.exp((A > 0) * delta - (A < 0) * delta)))
            loss = loss - A * w * omega * logp[k, token] / M
            gates.append(omega)
            weights.append(w)
            canary.append(abs(raw[k, token].item() - r["engine_logps"][k]))
    loss.backward()
    return ({name: p.grad.clone() for name, p in egrsd.trainable(model).items()},
            {"loss": loss.item(), "gate": statistics.fmean(gates), "magnitude": statistics.fmean(weights),
             "entropy": statistics.fmean(h for row in H for h in row), "entropy_max": H_max,
             "canary": statistics.fmean(canary),
             "clipped": statistics.fmean(abs(abs(w - 1) - s.eps) < 1e-9 for w in weights)})


def assert_same_gradient(got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    flat = [torch.cat([grads[name].flatten().double() for name in want]) for grads in (got, want)]
    assert (flat[0] - flat[1]).norm() <= rel * flat[1].norm() and flat[1].norm() > 1e-4


@pytest.mark.parametrize("options", [(), ("--gamma", 0.3, "--W", 0), ("--logit_temperature", 1.1), ("--head_chunk", 7),
                                     ("--micro_batch_tokens", 1), ("--gradient_checkpointing",)], ids=str)
def test_step_equals_the_slow_oracle_whatever_the_micro_batches(rollouts, options) -> None:
    model, s = fresh_model(*options)
    want_grads, want = oracle_step(model, rollouts, s)
    got = egrsd.accumulate_gradient(model, rollouts, s)
    assert_same_gradient({name: p.grad for name, p in egrsd.trainable(model).items()}, want_grads)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
    deltas = {key: got[key] for key in ("delta_right", "delta_wrong")}
    again = egrsd.accumulate_gradient(model, rollouts[::-1], s)  # nor does their order matter
    assert {key: again[key] for key in deltas} == pytest.approx(deltas, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_processes_change_nothing_but_rounding(rollouts, nproc, tmp_path) -> None:
    model, s = fresh_model()
    figures = egrsd.accumulate_gradient(model, rollouts, s)
    (tmp_path / "rollouts.json").write_text(json.dumps(rollouts))
    (tmp_path / "worker.py").write_text(f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}]
import egrsd, test_egrsd
from safetensors.torch import save_file
egrsd.start_processes()
model, s = test_egrsd.fresh_model("--micro_batch_tokens", 150)
figures = egrsd.accumulate_gradient(model, json.load(open({str(tmp_path / 'rollouts.json')!r})), s)
rank = egrsd.rank_and_world()[0]
save_file({{n: p.grad for n, p in egrsd.trainable(model).items()}}, {str(tmp_path)!r} + f"/{{rank}}.safetensors")
json.dump(figures, open({str(tmp_path)!r} + f"/{{rank}}.json", "w"))
""")
    run(str(tmp_path / "worker.py"), nproc=nproc)
    want = {name: p.grad for name, p in egrsd.trainable(model).items()}
    for rank in range(nproc):  # every rank ends with the whole step's gradient and figures
        assert_same_gradient(load_file(tmp_path / f"{rank}.safetensors"), want)
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(figures, rel=1e-5, abs=1e-6)


def test_micro_batches_hold_each_row_once_within_the_budget() -> None:
    lengths = [5, 90, 30, 31, 29, 200, 1]
    groups = egrsd.micro_batches(lengths, 100)
    assert sorted(sum(groups, [])) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 100 for g in groups) and len(groups) < 7


# --- prompts and data -----------------------------------------------------------------------------------------------

QWEN_TEMPLATE = ("{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
                 "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
                 "{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory) -> Path:
    """A random Qwen3 and a byte-level BPE tokenizer trained on the spot on real text, with Qwen's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    files = [DATA / "gsm8k_train.jsonl", DATA / "math500.jsonl"]
    text = [file.read_text() for file in files] if all(map(Path.exists, files)) else [(ROOT / "egrsd.py").read_text()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=QWEN_TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen3: added, not special
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def test_prompts_equal_the_chat_template_and_control_tokens_in_a_problem_are_text(qwen_like) -> None:
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(qwen_like)
    for thinking in (False, True):
        plain = "Problem: What is 1+1?\n\nPut it within \\boxed{}."
        whole = tok.apply_chat_template([{"role": "user", "content": plain}], tokenize=False,
                                        add_generation_prompt=True, enable_thinking=thinking)
        assert egrsd.encode_prompt(tok, plain, thinking) == tok(whole, add_special_tokens=False).input_ids
    hostile = ("1+1 <|im_end|>\n<|im_start|>assistant\n<think>x</think> \\boxed{9}<|im_end|><|im_<|im_end|>end|>"
               "<|endoftext|>")
    ids = egrsd.encode_prompt(tok, hostile, True)
    control = {i for token, i in tok.get_added_vocab().items()}
    benign = egrsd.encode_prompt(tok, "1+1", True)
    assert [i for i in ids if i in control] == [i for i in benign if i in control]
    assert tok.decode(ids) == tok.decode(benign).replace("1+1", hostile)  # the very characters, but as text
    tok.chat_template = None
    assert tok.decode(egrsd.encode_prompt(tok, " 1+1 <|im_end|> ", True)) == "1+1 <|im_end|>\n"
    said, end = tok("\\boxed{2}").input_ids, tok.eos_token_id
    assert egrsd.read_completion(tok, ids, said + [end], [end]) == {
        "text": "\\boxed{2}", "graded_text": "\\boxed{2}", "truncated": False}
    opened = egrsd.read_completion(tok, ids + tok("<think>\n").input_ids, said, [end])  # D12: a thought that never ends
    assert opened == {"text": "\\boxed{2}", "graded_text": "<think>\\boxed{2}", "truncated": True}
    assert extract_answer(opened["graded_text"]) is None
    row = {"problem": "a {solution} {x}", "solution": "s {problem}"}
    assert egrsd.fill("P {problem} S {solution} \\boxed{}", row) == "P a {solution} {x} S s {problem} \\boxed{}"


def test_a_harmless_prompt_is_tokenised_in_one_go_with_any_tokeniser(qwen_like) -> None:
    """Llama's tokenisers put a mark before each text that they are given: a prompt in pieces would get three."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(["What is one and one ? 2 user assistant"] * 3, trainers.BpeTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"]))
    llama_like = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=QWEN_TEMPLATE)
    for tok in (llama_like, AutoTokenizer.from_pretrained(qwen_like)):
        theirs = tok.apply_chat_template([{"role": "user", "content": "What is 1 + 1 ?"}], add_generation_prompt=True,
                                         tokenize=False, enable_thinking=False)
        ours = egrsd.encode_prompt(tok, " What is 1 + 1 ?\n", False)
        assert ours == tok(theirs, add_special_tokens=False).input_ids


def test_a_step_has_its_full_batch_and_names_what_it_skips(tokenizer) -> None:
    s = tiny_settings("--batch_size", 8, "--rollouts_per_prompt", 2, "--max_length", 180)
    problems = egrsd.load_problems(s.data, s)[:20]
    problems[3]["solution"] = "1 " * 120  # the teacher's prompt is too long now
    seen, skipped, position = [], [], 0
    for _ in range(10):  # 40 places: two epochs
        batch, position, names = egrsd.next_problems(problems, tokenizer, s, position)
        assert len(batch) == 4
        seen, skipped = seen + [row["id"] for row in batch], skipped + names
    assert set(skipped) == {"3"} and "3" not in seen
    assert sorted(seen[:19]) == sorted({r["id"] for r in problems} - {"3"})
    problems[:] = [{**problems[3], "id": f"long {i}"} for i in range(9)] + [problems[0]]  # nine do not fit, one does
    batch, _, names = egrsd.next_problems(problems, tokenizer, s, 0)
    assert {row["id"] for row in batch} == {"0"} and len(batch) == 4 and len(names) > len(problems)
    with pytest.raises(SystemExit, match="no problem fits"):
        egrsd.next_problems(problems, tokenizer, tiny_settings("--max_length", 100), 0)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_local_files_of_three_kinds_read_alike(kind, tmp_path) -> None:
    import datasets
    rows = [{"problem": f"p{i}", "solution": "s", "answer": str(i)} for i in range(3)]
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert egrsd.load_problems(str(path), tiny_settings()) == [{"id": str(i), **row} for i, row in enumerate(rows)]


@pytest.mark.parametrize("content, options, sentence", [
    ('{"question": "p", "solution": "s", "answer": "1"}', (),
     r"no column 'problem'; it has question, solution, answer.*--problem_column"),
    ('{"problem": "p", "solution": "s", "answer": "1"}', ("--answer_column", "gold"), "no column 'gold'"),
    ('{"problem": "p", "solution": " ", "answer": "1"}', (), "1 of 1 rows have an empty solution"),
    ('{"problem": "p", "solution": "s", "answer": null}', (), "empty answer"),
    ("", (), "is empty"), ("[]", (), "is empty"), ("this is no JSON", (), r"cannot be read \(.*JSON"),
    (None, (), "there is no such file"),
])
def test_bad_data_ends_with_a_sentence(content, options, sentence, tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=sentence):
        egrsd.load_problems(str(path), tiny_settings(*options))


# --- settings and models --------------------------------------------------------------------------------------------


def test_defaults_are_table_a1_and_presets_set_what_goes_with_the_model() -> None:
    s = egrsd.parse_settings([])
    assert (s.model, s.lr, s.batch_size, s.steps, s.save_every) == ("Qwen/Qwen3-8B", 5e-6, 32, 100, 25)
    assert (s.temperature, s.top_p, s.top_k, s.max_completion, s.max_length) == (1.1, 0.95, 20, 1024, 20_000)
    assert (s.eps, s.beta_L, s.max_grad_norm, s.lora_r, s.lora_alpha, s.gamma, s.W) == (0.2, 0.5, 0.1, 64, 128, 0.3, 0)
    assert egrsd.parse_settings(["--preset", "qwen3-4b", "--W", "3"]).model == "Qwen/Qwen3-4B"
    source = (ROOT / "egrsd.py").read_text()
    fields = source[source.index("class Settings:") : source.index("FREE_ON_RESUME =")]
    assert len(re.findall(r"\)  # (Table|section|D\d|ours)", fields)) >= len(dataclasses.fields(egrsd.Settings)) - 4


@pytest.mark.parametrize("options, sentence", [
    (["--gama", "1"], "unrecognized arguments"), (["--gamma", "-1"], "--gamma and --W"), (["--W", "1.5"], "invalid"),
    (["--preset", "huge"], "invalid choice"), (["--top_p", "0"], "--top_p"), (["--steps", "-1"], "--steps"),
    (["--rollout", "tgi"], "invalid choice"), (["--max_completion", "20000"], "leave room"),
    (["--batch_size", "7", "--rollouts_per_prompt", "2"], "multiple of"), (["--batch_size", "0"], "sizes"),
    (["--student_prompt", "hello"], "must hold"), (["--resume", "--overwrite"], "choose one"),
    (["--lr", "nan"], "finite"), (["--lr", "-1"], "--lr"), (["--max_grad_norm", "-1"], "--max_grad_norm"),
    (["--seed", "-1"], "--seed"), (["--lora_alpha", "0"], "sizes"), (["--temperature", "inf"], "finite"),
])
def test_bad_options_end_with_a_sentence(options, sentence, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        egrsd.parse_settings(options)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        egrsd.parse_settings([])
    assert "multiple of the 3 processes" in capsys.readouterr().err


def test_bad_models_end_with_a_sentence(tmp_path) -> None:
    cpu = torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a GPU.*--preset tiny"):
            egrsd.load_base(egrsd.parse_settings([]), cpu)
    with pytest.raises(SystemExit, match="there is no such folder"):
        egrsd.load_base(tiny_settings("--model", tmp_path / "nowhere"), cpu)
    with pytest.raises(SystemExit, match="cannot be loaded.*--preset tiny"):
        egrsd.load_base(tiny_settings("--model", tmp_path), cpu)
    with pytest.raises(SystemExit, match="tokenizer cannot be loaded"):
        egrsd.load_tokenizer(tiny_settings("--model", tmp_path))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5 << 30)  # five sparse GiB: as big as a model of 2.7 billion parameters
    with pytest.raises(SystemExit, match="needs a GPU"):
        egrsd.check_place(tiny_settings("--model", tmp_path), cpu)
    for targets in ("q_proj,c_attn", "q_proj,", "self_attn", "lm_head"):
        s = tiny_settings("--lora_targets", targets)
        with pytest.raises(SystemExit, match=r"\['(c_attn|self_attn|lm_head|)'\] match nothing.*down_proj"):
            egrsd.add_adapter(egrsd.load_base(s, cpu), s)


def test_a_head_that_is_not_a_plain_product_is_refused() -> None:
    from transformers import (Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig,
                              LlamaForCausalLM)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16)
    s = tiny_settings()
    for model in (Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.1)),
                  GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0))):
        with pytest.raises(SystemExit, match="not hidden @ W.T"):
            egrsd.check_head(model, s)
    egrsd.check_head(LlamaForCausalLM(LlamaConfig(**sizes)), s)


# --- rollouts -------------------------------------------------------------------------------------------------------


def test_a_rollout_depends_on_its_seed_and_on_nothing_else(tokenizer) -> None:
    model, s = fresh_model()
    ends = egrsd.end_tokens(model, tokenizer)
    batch, _, _ = egrsd.next_problems(egrsd.load_problems(s.data, s), tokenizer, s, 0)
    prompts, seeds = [row["prompt_ids"] for row in batch[:12]], [egrsd.rollout_seed(0, 7, i) for i in range(12)]
    how = dict(temperature=1.1, top_p=0.95, top_k=20, max_new=40)
    whole = {i: (ids, logps) for i, ids, logps in egrsd.hf_generate(model, ends, prompts, seeds, **how)}
    parts = {i: (ids, logps) for i, ids, logps in egrsd.hf_generate(model, ends, prompts, seeds, **how, batch=5)}
    single = {i: next(egrsd.hf_generate(model, ends, [prompts[i]], [seeds[i]], **how))[1] for i in range(12)}
    assert {i: ids for i, (ids, _) in whole.items()} == {i: ids for i, (ids, _) in parts.items()} == single
    other = dict((i, ids) for i, ids, _ in egrsd.hf_generate(model, ends, prompts, [n + 1 for n in seeds], **how))
    assert sum(other[i] == single[i] for i in range(12)) < 6
    for i, (ids, logps) in whole.items():  # D9: an end token counts, and is the last
        assert not set(ids[:-1]) & set(ends) and (ids[-1] in ends or len(ids) == 40)
        z = model(input_ids=torch.tensor([prompts[i] + ids])).logits[0, len(prompts[i]) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(logps), z[range(len(ids)), ids].detach(), atol=2e-5, rtol=0)


def test_samples_follow_the_tempered_and_truncated_distribution(tokenizer) -> None:
    model, s = fresh_model()
    ids = egrsd.encode_prompt(tokenizer, "Compute 1 #1 +6 #2 -3 .", False) + tokenizer("<think>").input_ids
    z = model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 2.0
    values, order = z.topk(20)
    p = values.softmax(-1)
    keep = (p.cumsum(0) - p) < 0.95  # the smallest set with at least 0.95
    want = torch.zeros_like(z).index_copy_(0, order[keep], p[keep] / p[keep].sum())
    n = 4000
    drawn = egrsd.hf_generate(model, egrsd.end_tokens(model, tokenizer), [ids] * n, range(n), temperature=2.0,
                              top_p=0.95, top_k=20, max_new=1, batch=1000)
    counts = torch.bincount(torch.tensor([y[0] for _, y, _ in drawn]), minlength=len(z)).double()
    assert counts[want == 0].sum() == 0
    real = want > 0
    chi2 = ((counts[real] - n * want[real]) ** 2 / (n * want[real])).sum().item()
    assert chi2 < real.sum() + 5 * math.sqrt(2 * real.sum()), (chi2, real.sum())


VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@VLLM
def test_vllm_trains_like_transformers_with_one_process_and_with_two_sharing_an_engine(tmp_path) -> None:
    logs = {}
    for name, nproc, options in (("one", 0, ()), ("two", 2, ()), ("apart", 2, ("--rollout_tp", 1))):
        output = run(*SMALL, "--steps", 3, "--rollout", "vllm", *options, "--out", tmp_path / name, nproc=nproc)
        assert "a random adapter reached the engine" in output and "engine=vllm (asked for)" in output
        assert "Traceback" not in output  # the engine's end included
        about = json.loads((tmp_path / name / "versions.json").read_text())
        assert about["tensor_parallel"] == (2 if name == "two" else 1)
        logs[name] = read_log(tmp_path / name)
        assert len(logs[name]) == 3 and all(row["canary"] < 1e-5 for row in logs[name])
    ids = {name: [r["completion_ids"] for r in read_log(tmp_path / name, "rollouts.jsonl")] for name in logs}
    assert ids["one"] == ids["two"] == ids["apart"]
    for row, *others in zip(logs["one"], logs["two"], logs["apart"]):
        for other in others:
            assert figures_of(other) == pytest.approx(figures_of(row), rel=1e-4, abs=1e-6)


@VLLM
@pytest.mark.parametrize("lost", ["at the start", "later"])
def test_a_lost_adapter_push_stops_the_run(lost, tmp_path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import egrsd
real = egrsd.start_engine
def start_engine(*args):
    generate, push = real(*args)
    calls = []
    def sometimes():
        calls.append(1)
        if {lost == 'later'} and len(calls) <= 2:  # the two pushes of the probe
            push()
    push()
    return generate, sometimes
egrsd.start_engine = start_engine
egrsd.train(egrsd.parse_settings({[*map(str, SMALL)]} + ['--steps', '6', '--rollout', 'vllm', '--out', sys.argv[1]]))
""")
    output = run(str(script), tmp_path / "out", code=1)
    assert ("does not use the adapter that was pushed" if lost == "at the start" else "it runs other weights") in output


def test_engines_and_tensor_parallelism_are_chosen_and_explained(monkeypatch) -> None:
    from transformers import Qwen3Config
    s = tiny_settings()
    assert egrsd.choose_engine(s, torch.device("cpu")) == ("hf", "there is no GPU")
    for here, heads, kv, want in ((8, 32, 8, 8), (8, 12, 4, 4), (6, 32, 8, 2), (4, 28, 4, 4), (1, 32, 8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        assert egrsd.tensor_parallel(s, Qwen3Config(num_attention_heads=heads, num_key_value_heads=kv)) == want
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(SystemExit, match="3 processes cannot share.* allow 1 or 2 or 4 or 8"):
        egrsd.tensor_parallel(tiny_settings("--rollout_tp", 3), Qwen3Config())


# --- grading --------------------------------------------------------------------------------------------------------


def test_grades_statuses_and_the_last_box_after_the_last_thought() -> None:
    cases = [
        (r"so \boxed{4}", "4", True, "ok"), (r"\boxed{ 4 }", "4", True, "ok"), (r"\boxed{\frac12}", "0.5", True, "ok"),
        (r"\boxed{5}", "4", False, "ok"), (r"\boxed{4} or \boxed{5}", "4", False, "ok"), ("4", "4", False, "no_box"),
        (r"<think>\boxed{4}</think> 4", "4", False, "no_box"), (r"<think> \boxed{4}", "4", False, "unfinished"),
        (r"\boxed{4} and \boxed{}", "4", False, "no_box"), (r"\boxed{4} and \boxed{4", "4", False, "no_box"),
        (r"<think> x </think> \boxed{\{4\}}", r"\{ 4 \}", True, "ok"),
        (r"\boxed{" + "4" * 1001 + "}", "4", False, "no_box"),
        (r"\boxed{073}", "73", True, "ok"), (r"\boxed{4.5\times10^{33}}", "4.5e33", True, "ok"),
        (r"\boxed{73}", "7" * 5000, False, "ok"),  # more digits than int() takes
    ]
    texts, golds, right, status = zip(*cases)
    grades = grade_completions(texts, golds)
    assert [(g.correct, g.status) for g in grades] == list(zip(right, status))
    assert [extract_answer(text) for text in texts] == [g.answer for g in grades]


def test_an_ordinary_batch_takes_under_a_second_and_a_hostile_one_no_longer_than_its_limit() -> None:
    texts, golds = [rf"Therefore \boxed{{\frac{{{i}}}{{7}}}}" for i in range(64)], [f"{2 * i}/14" for i in range(64)]
    grade_completions(texts, golds)  # warms the pool up
    began = time.perf_counter()
    assert all(g.correct for g in grade_completions(texts, golds))
    assert time.perf_counter() - began < 1
    hostile = [r"\boxed{9^{9^{9^9}}}", r"\boxed{(10^8)!}", r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}"]
    for text in hostile:
        began = time.perf_counter()
        grade, = grade_completions([text], ["1/3"])
        assert not grade.correct and time.perf_counter() - began < 9  # 8 s, and a loaded machine
    assert grade_completions([r"\boxed{\frac26}"], ["1/3"])[0].correct  # the pool goes on


def test_grading_processes_start_whatever_the_working_directory_holds(tmp_path) -> None:
    (tmp_path / "support.py").write_text("raise RuntimeError('not this one')")
    script = (f"import sys; sys.path[0] = {str(ROOT)!r}; from support.grading import grade_completions; "
              r"print(grade_completions([r'\boxed{1/2}'], ['0.5'])[0].correct)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_grading_processes_end_with_a_killed_parent(tmp_path) -> None:
    script = (r"import time; from support import grading; grading.grade_completions([r'\boxed{1/2}'], ['0.5']); "
              "print(*[w.pid for w in grading._workers], flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pids and not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] if Path("/proc").is_dir() else True
    except (ProcessLookupError, FileNotFoundError):
        return False


# --- stopping and going on ------------------------------------------------------------------------------------------

STEPS = ("--steps", 6, "--save_every", 2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(*SMALL, *STEPS, "--out", out)
    return out


def assert_same_run(out: Path, whole: Path) -> None:
    assert read_log(out) == read_log(whole) and [row["step"] for row in read_log(out)] == list(range(6))
    assert (out / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    for name in ("adapter_model.safetensors", "trainer.safetensors"):
        assert (out / "step_6" / name).read_bytes() == (whole / "step_6" / name).read_bytes()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("moment", ["before a checkpoint", "writing a checkpoint", "after a checkpoint", "at the end"])
def test_a_run_killed_at_any_point_goes_on_exactly(moment, uninterrupted, tmp_path) -> None:
    out = tmp_path / "run"
    process = start(*SMALL, *STEPS, "--out", out)
    wait_for({"before a checkpoint": lambda: lines(out / "log.jsonl") >= 1,
              "writing a checkpoint": lambda: any(out.glob(".step_*")) or (out / "step_4").exists(),
              "after a checkpoint": lambda: lines(out / "log.jsonl") >= 3,
              "at the end": lambda: lines(out / "rollouts.jsonl") >= 48}[moment], process)
    process.kill()
    process.wait()
    if moment == "writing a checkpoint":  # whether or not the kill was quick enough to leave one
        (out / ".step_4").mkdir(exist_ok=True)
        (out / ".step_4" / "adapter_model.safetensors").write_bytes(b"half of it")
    if moment == "after a checkpoint":
        with (out / "log.jsonl").open("a") as file:
            file.write('{"step": 3, "rew')  # half a line, as a kill may leave
    run("--resume", "--out", out)  # its settings come from the run
    assert_same_run(out, uninterrupted)
    assert "is finished" in run("--resume", "--out", out)


@pytest.mark.parametrize("number, nproc", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 2)])
def test_ctrl_c_and_sigterm_save_and_the_run_goes_on_exactly(number, nproc, uninterrupted, tmp_path) -> None:
    out = tmp_path / "run"
    process = start(*SMALL, *STEPS, "--save_every", 100, "--out", out, nproc=nproc)
    wait_for(lambda: lines(out / "log.jsonl") >= 1 and (out / "curves.png").exists(), process)  # no checkpoint yet
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert "stopped and saved after step" in output and "Traceback" not in output.split("stopped and saved")[0]
    if not nproc:  # torchrun itself reports the signal with a status of its own
        assert process.returncode == 0
    step = lines(out / "log.jsonl")
    assert 1 <= step < 6 and (out / f"step_{step}").is_dir()
    run("--resume", "--out", out)
    if nproc:
        assert [row["step"] for row in read_log(out)] == list(range(6))
        for row, want in zip(read_log(out), read_log(uninterrupted)):
            assert figures_of(row) == pytest.approx(figures_of(want), rel=1e-3, abs=1e-5)
    else:
        assert_same_run(out, uninterrupted)


def test_held_out_problems_that_do_not_fit_are_refused_before_a_model_is_loaded(tokenizer, tmp_path) -> None:
    rows = [json.loads(line) for line in (TINY / "test.jsonl").read_text().splitlines()[:3]]
    rows[1] |= {"id": "much", "problem": " ".join(["1 +2"] * 120)}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"1 problems \(the first: much\).*--max_length 256"):
        load_held_out(tokenizer, tiny_settings("--eval_data", tmp_path / "x.jsonl"))


def test_a_run_is_not_overwritten_and_resume_keeps_its_settings(uninterrupted, tmp_path, capsys) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    assert "already holds a run. --resume" in run(*SMALL, "--out", out, code=1)
    assert read_log(out) == read_log(uninterrupted)
    with pytest.raises(SystemExit):
        egrsd.parse_settings(["--resume", "--out", str(out), "--lr", "0.1"])
    assert "--lr 0.1 (it has 0.002)" in capsys.readouterr().err
    assert egrsd.parse_settings(["--resume", "--out", str(out), "--steps", "9"]).steps == 9
    for folder in out.glob("step_*"):  # with no checkpoint there is nothing to go on from: what is said now counts
        shutil.move(folder, tmp_path)
    assert egrsd.parse_settings(["--resume", "--out", str(out), "--lr", "0.1"]).lr == 0.1
    shutil.move(tmp_path / "step_6", out)
    output = run(*SMALL, "--steps", 1, "--out", out, "--overwrite")
    assert len(read_log(out)) == 1 and (out / "step_1").is_dir() and not (out / "step_6").exists()
    assert "student prompt" in output


def test_a_run_is_refused_in_a_folder_that_holds_anything_of_a_run_or_that_another_process_writes_to(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text('{"benchmarks": 1}')  # eval.py's, for example
    assert "already holds a run" in run(*SMALL, "--out", tmp_path / "a", code=1)
    process = start(*SMALL, "--steps", 500, "--out", tmp_path / "b")
    wait_for(lambda: lines(tmp_path / "b" / "log.jsonl") >= 1, process)
    for how in ("--resume", "--overwrite"):
        assert "another process is writing to" in run(*SMALL, "--steps", 500, "--out", tmp_path / "b", how, code=1)
    process.kill()
    process.wait()
    assert len({row["step"] for row in read_log(tmp_path / "b")}) == lines(tmp_path / "b" / "log.jsonl")


def test_a_run_that_ends_before_its_engine_stands_is_resumed_with_its_settings(tmp_path) -> None:
    run(*SMALL, "--steps", 1, "--lr", 1e-3, "--lora_targets", "c_attn", "--out", tmp_path / "run", code=1)
    assert lines(tmp_path / "run" / "log.jsonl") == 0
    output = run("--resume", "--lora_targets", "q_proj", "--out", tmp_path / "run")
    assert "holds no checkpoint" in output and "preset=tiny" in output and "lr=0.001" in output
    assert len(read_log(tmp_path / "run")) == 1


def test_before_and_after_are_those_of_the_run_however_often_it_is_resumed(tmp_path) -> None:
    held_out, out = tmp_path / "few.jsonl", tmp_path / "run"
    held_out.write_text("".join((TINY / "test.jsonl").read_text().splitlines(keepends=True)[:8]))
    run(*SMALL[:2], *SMALL[3:], "--eval_data", held_out, "--steps", 2, "--save_every", 1, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert "is finished" in run("--resume", "--out", out)
    # killed between its last checkpoint and the evaluation: the summary is that of an earlier, shorter run
    (out / "summary.json").write_text(json.dumps({**summary, "steps": 1, "after": {"accuracy": -1, "length": -1}}))
    run("--resume", "--out", out)
    again = json.loads((out / "summary.json").read_text())
    assert again["after"] == summary["after"] and again["steps"] == 2
    (out / "summary.json").unlink()  # "before" is lost: it is left out, and not measured with the trained adapter
    run("--resume", "--out", out)
    last = json.loads((out / "summary.json").read_text())
    assert "before" not in last and last["after"] == summary["after"]


def test_overwrite_deletes_nothing_until_the_new_run_can_start(uninterrupted, tmp_path) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    for wrong in (("--data", "nowhere.jsonl"), ("--lora_targets", "c_attn")):
        run(*SMALL, *wrong, "--out", out, "--overwrite", code=1)
    run(*SMALL, "--lora_targets", "q_proj", "--rollout", "vllm", "--rollout_tp", 7, "--out", out, "--overwrite", code=1)
    assert_same_run(out, uninterrupted)


def test_a_damaged_line_of_the_log_and_settings_that_are_no_settings_are_named(uninterrupted, tmp_path) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    (out / "log.jsonl").write_text("{oops\n" + (out / "log.jsonl").read_text())
    assert "log.jsonl is damaged" in run("--resume", "--steps", 8, "--out", out, code=1)
    (out / "settings.json").write_text("[]")
    assert "settings.json is damaged" in run("--resume", "--out", out, code=1)


@pytest.mark.parametrize("name", ["settings.json", "step_6/trainer.json", "step_6/trainer.safetensors",
                                  "step_6/adapter_model.safetensors"])
def test_a_damaged_file_is_named_where_a_run_is_resumed(name, uninterrupted, tmp_path) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    (out / name).write_bytes((out / name).read_bytes()[:100])
    output = run("--resume", "--steps", 8, "--out", out, code=1)
    assert "is damaged" in output and Path(name).parts[0] in output and "Traceback" not in output


def test_a_full_disk_in_the_middle_of_the_log_ends_with_a_sentence(tmp_path) -> None:
    from support.basics import append_lines
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"log.jsonl could not be written.*--resume"):
            append_lines(tmp_path / "log.jsonl", [{"step": 1, "text": "x" * 2_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_output_folder_that_cannot_be_made_and_a_missing_gpu_are_said_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in run(*SMALL, "--out", tmp_path / "file" / "run", code=1)
    if not torch.cuda.is_available():
        assert "needs a GPU, and none was found. Without one: --preset tiny" in run("--out", tmp_path / "run", code=1)
        assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path) -> None:
    model, s = fresh_model("--out", tmp_path)
    optimizer, stats = torch.optim.AdamW(egrsd.trainable(model).values()), RewardStats()
    egrsd.save_checkpoint(model, optimizer, stats, 1, 8, s)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond this, as on a full disk
    try:
        with pytest.raises(SystemExit, match=r"step_2 could not be written.*--resume.*step_1"):
            egrsd.save_checkpoint(model, optimizer, stats, 2, 16, s)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert egrsd.load_checkpoint(tmp_path / "step_1", model, optimizer, stats) == (1, 8)


def test_the_checkpoint_is_a_plain_peft_adapter_without_pickle_and_the_base_stays_as_it_was(uninterrupted) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    folder = uninterrupted / "step_6"
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    base = AutoModelForCausalLM.from_pretrained(TINY)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = PeftModel.from_pretrained(base, folder)
    deltas = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(deltas) == 14 and all(p.abs().max() > 0 for p in deltas)  # 2 layers x 7 projections, all of them trained
    shipped = AutoModelForCausalLM.from_pretrained(TINY)
    assert all(torch.equal(before[name], p) for name, p in shipped.named_parameters())


def test_the_frozen_teacher_is_bit_identical_after_training(tmp_path, monkeypatch) -> None:
    kept, real = {}, egrsd.load_base

    def fingerprint(model) -> str:
        tensors = [p for name, p in sorted(model.named_parameters()) if "lora_" not in name]
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in tensors)).hexdigest()

    def load_base(s, device):
        kept["model"] = real(s, device)
        kept["before"] = fingerprint(kept["model"])
        return kept["model"]

    monkeypatch.setattr(egrsd, "load_base", load_base)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        egrsd.train(tiny_settings(*SMALL[2:], "--steps", 3, "--out", tmp_path / "run"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert fingerprint(kept["model"]) == kept["before"]
    assert any(p.abs().max() > 0 for name, p in kept["model"].named_parameters() if "lora_B" in name)


def test_a_canary_that_is_nan_stops_the_run_too(tmp_path, monkeypatch) -> None:
    real = egrsd.accumulate_gradient
    monkeypatch.setattr(egrsd, "accumulate_gradient", lambda *args: {**real(*args), "canary": math.nan})
    monkeypatch.setattr(egrsd, "stop_on_signals", lambda: [])
    with pytest.raises(SystemExit, match="it runs other weights"):
        egrsd.train(tiny_settings(*SMALL[2:], "--steps", 2, "--out", tmp_path / "run"))


def test_nan_stops_the_run_names_the_culprits_and_saves_the_state(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tok = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    bad = tok.convert_tokens_to_ids("#3")  # a label that only the problems with three operations or more hold
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.model.embed_tokens.weight.data[bad] = math.nan
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    output = run(*SMALL, "--steps", 2, "--model", tmp_path / "model", "--out", tmp_path / "run", code=1)
    assert "not finite" in output and (tmp_path / "run" / "step_0").is_dir()
    named = set(re.findall(r"rollout (\d+) of problem", output))
    s = tiny_settings(*SMALL[2:])
    batch, _, _ = egrsd.next_problems(egrsd.load_problems(s.data, s), tok, s, 0)
    assert named == {str(i) for i, row in enumerate(batch) if "#3" in row["problem"]}


# --- the embedded default and real text -----------------------------------------------------------------------------


def test_the_tiny_preset_learns_within_its_figures(tmp_path) -> None:
    run("--preset", "tiny", "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["samples"] == after["samples"] == 512 and summary["steps"] == 100
    assert 53 < before["accuracy"] < 66, summary  # 58 on average; one pass of 512 scatters by 2
    assert after["accuracy"] >= 92 and after["length"] <= 0.9 * before["length"], summary
    log = read_log(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(100)) and log[0]["delta_right"] > log[0]["delta_wrong"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "log.jsonl", "rollouts.jsonl", "summary.json", "settings.json", "versions.json", "prompts.txt", "curves.png",
        "step_25", "step_50", "step_75", "step_100"}
    rollouts = read_log(tmp_path / "run", "rollouts.jsonl")
    assert len(rollouts) == 6400 and tuple(rollouts[0]) == ROLLOUT_KEYS
    mine = [r for r in rollouts if r["step"] == 40]  # the log's figures from the rollouts alone
    assert log[40]["reward"] == pytest.approx(statistics.fmean(r["reward"] for r in mine))
    earlier = [r["reward"] for r in rollouts if r["step"] < 40]
    assert log[40]["running_mean"] == pytest.approx(statistics.fmean(earlier))
    assert log[40]["running_std"] == pytest.approx(statistics.stdev(earlier))
    whitened = (mine[0]["reward"] - statistics.fmean(earlier)) / statistics.stdev(earlier)
    assert mine[0]["advantage"] == pytest.approx(whitened, rel=1e-5)


def test_the_tiny_teacher_reads_its_reference(tokenizer) -> None:
    """Evidence on result digits of hard steps, for the right reference and for another problem's (the control)."""
    s = tiny_settings()
    model = egrsd.add_adapter(egrsd.load_base(s, torch.device("cpu")), s)  # B = 0: only the contexts differ
    problems = egrsd.load_problems(s.eval_data, s)[:256]
    ends = egrsd.end_tokens(model, tokenizer)
    rows = [{**row, "prompt_ids": egrsd.encode_prompt(tokenizer, row["problem"], False)} for row in problems]
    draw, _ = egrsd.start_engine(s, model, ends, torch.device("cpu"), "hf", 1)
    rows = egrsd.roll_out(draw, rows, tokenizer, ends, 0, s, temperature=1.0, top_p=0.95, top_k=0)
    gap = {}
    for shift in (0, 1):
        for row, other in zip(rows, problems[shift:] + problems[:shift]):
            shown = {**row, "solution": other["solution"]}
            row["teacher_ids"] = egrsd.encode_prompt(tokenizer, egrsd.fill(s.teacher_prompt, shown), False)
        teacher, _ = egrsd.teacher_pass(model, rows, s)
        student, _ = egrsd.teacher_pass(model, [{**row, "teacher_ids": row["prompt_ids"]} for row in rows], s)
        evidence = {True: [], False: []}
        for row, delta in zip(rows, teacher - student):
            words = tokenizer.convert_ids_to_tokens(row["completion_ids"])
            for k, (x, op, equals, y) in enumerate(zip(words, words[1:], words[2:], words[3:])):
                if equals == "=" and op[1:] in ("4", "5", "6"):  # "4 +5 = 9": a hard step, and its result
                    evidence[(int(x) + int(op)) % 10 == int(y)].append(delta[k + 3].item())
        assert min(map(len, evidence.values())) > 50
        gap[shift] = {right: statistics.fmean(values) for right, values in evidence.items()}
    assert gap[0][True] > 0.1 and gap[0][False] < -1.5
    assert gap[1][True] - gap[1][False] < 0.5 * (gap[0][True] - gap[0][False])


def test_tiny_is_rebuilt_byte_for_byte_from_nothing(tmp_path) -> None:
    for name in ("a", "b"):
        run(str(TINY / "make.py"), "--out", tmp_path / name, "--steps", 12)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        if path.name != "model.safetensors":  # the weights had 12 steps here; all else is what the project ships
            assert path.read_bytes() == (TINY / path.name).read_bytes(), path.name
    train, test = ({json.loads(line)["problem"] for line in (TINY / f"{n}.jsonl").open()} for n in ("train", "test"))
    assert len(test) == 512 and not train & test


@pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl").exists(), reason="the benchmark files are not here (EGRSD_DATA)")
def test_real_problems_go_through_the_whole_loop(qwen_like, tmp_path) -> None:
    """7,473 real problems with long references, a random Qwen3: real text passes; the model learns nothing."""
    output = run("--model", qwen_like, "--data", DATA / "gsm8k_train.jsonl", "--steps", 2, "--batch_size", 8,
                 "--lora_r", 4, "--max_completion", 64, "--max_length", 900, "--out", tmp_path / "run", "--threads", 1)
    log = read_log(tmp_path / "run")
    assert len(log) == 2 and all(row["canary"] < 1e-4 and math.isfinite(row["loss"]) for row in log)
    assert "NOT ONE ROLLOUT EARNED A REWARD" in output and "Reference solution begins" in output
    assert all(row["grad_norm"] > 0 for row in log)  # r - 0.5 pushes every wrong token down


def link_lines(readme: str) -> str:
    """README's table of Algorithm 1 with each link at the line that carries its tag."""
    where = {int(n): number for number, line in enumerate((ROOT / "egrsd.py").read_text().splitlines(), 1)
             for tags in re.findall(r"Alg\. 1, line ([\d, ]+)", line) for n in re.findall(r"\d+", tags)}
    return re.sub(r"^\| (\d+) \|(.*)\| \[.*\]\(.*\) \|$",
                  lambda row: f"| {row[1]} |{row[2]}| [line {where[int(row[1])]}](egrsd.py#L{where[int(row[1])]}) |",
                  readme, flags=re.MULTILINE)


def test_readme_links_each_line_of_algorithm_1_to_its_line() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"\(egrsd\.py#L\d+\)", readme)) == 21
    assert readme == link_lines(readme), "python test_egrsd.py puts the links right"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(link_lines((ROOT / "README.md").read_text()))
