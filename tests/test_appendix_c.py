"""Appendix C: the linear gate as a chord, and the minimum as the extreme admissible filter."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd import confidence_gate, lookahead_min
from test_egrsd import INF, batches, entropies, gammas, pad, prop, same, slide, windows


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.3, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("top", [0.5, 1.0, 3.7])
def test_linear_gate_is_the_chord_above_the_shrinkage_curve(gamma: float, top: float) -> None:
    H = torch.linspace(0, top, 101)[None]
    x, a0 = H.double() / max(top, 1.0), gamma / (1 - gamma)  # Eq. 13
    gap = confidence_gate(H, torch.ones_like(H), gamma, 0).double() - 1 / (1 + a0 * x)  # Eq. 11
    assert gap.min() >= -1e-6 and abs(gap[0, 0]) < 1e-6
    if gamma > 0:
        assert gap[0, 5:95].min() > 1e-5
    if (
        gamma <= 0.9 and top >= 1
    ):  # above 0.9 the clip lifts the right end, below 1 nat H_hat never reaches 1
        assert abs(gap[0, -1]) < 1e-6


ADMISSIBLE = {
    "minimum": min,
    "current": lambda h: h[0],
    "sub-window": lambda h: min(h[0], *h[2:3], INF),
    "capped mean": lambda h: min(h[0], sum(h) / len(h)),
    "capped maximum of the rest": lambda h: min(h[0], max(h[1:], default=INF)),
    "capped power mean": lambda h: min(h[0], (sum(x**3 for x in h) / len(h)) ** (1 / 3)),
    "capped geometric mean": lambda h: min(h[0], math.prod(h) ** (1 / len(h))),
    "mix of current and minimum": lambda h: 0.3 * h[0] + 0.7 * min(h),
}
NOT_ADMISSIBLE = {
    "conservative": lambda h: sum(h) / len(h),
    "idempotent": lambda h: min(h) / 2,
    "monotone": lambda h: max(min(h), h[0] - sum(h[1:])),
}
windows_of_h = st.lists(entropies, min_size=2, max_size=6)


def violations(phi: Callable[[list[float]], float], h: list[float], j: int, up: float) -> set[str]:
    raised = [x + up * (i == j % len(h)) for i, x in enumerate(h)]
    found = {
        "monotone": phi(raised) < phi(h) - 1e-9,
        "conservative": phi(h) > h[0] + 1e-9,
        "idempotent": abs(phi([h[0]] * len(h)) - h[0]) > 1e-9,
    }
    return {name for name, broken in found.items() if broken}


@prop
@given(windows_of_h, st.integers(0, 5), st.floats(0, 5))
def test_lemma_1_no_admissible_filter_is_below_the_minimum(
    h: list[float], j: int, up: float
) -> None:
    for name, phi in ADMISSIBLE.items():
        assert not violations(phi, h, j, up), name
        assert phi(h) >= min(h) - 1e-9, name


def test_the_admissibility_check_refuses_filters_outside_the_family() -> None:
    for broken, phi in NOT_ADMISSIBLE.items():
        assert violations(phi, [2.0, 1.0, 5.0], 1, 2.0) | violations(
            phi, [5.0, 1.0, 1.0], 1, 2.0
        ) == {broken}


@prop
@given(windows_of_h, windows, st.floats(0, 12), st.integers(0, 5))
def test_lookahead_is_causal_with_a_window_of_w(
    row: list[float], W: int, other: float, t: int
) -> None:
    t %= len(row)
    changed = [x if t <= j <= t + W else other for j, x in enumerate(row)]
    for phi in ADMISSIBLE.values():
        assert slide(phi, row, W)[t] == slide(phi, changed, W)[t]
    assert lookahead_min(*pad([row], 6), W)[0, t] == lookahead_min(*pad([changed], 6), W)[0, t]


@prop
@given(batches(), gammas, windows)
def test_proposition_1_the_minimum_recovers_the_most_weight(
    batch: tuple, gamma: float, W: int
) -> None:
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
            same(
                recovered,
                [[scale * (h - f) for h, f in zip(row, slide(phi, row, W))] for row in rows],
            )
