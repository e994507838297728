"""Properties of the gate and of the running statistics, on generated batches."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd import RewardStats, confidence_gate, lookahead_min
from test_egrsd import batches, gammas, pad, prop, windows


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


@prop
@given(batches(), gammas, gammas, windows, st.lists(st.floats(0, 3), min_size=9, max_size=9))
def test_gate_falls_with_entropy_and_gamma_and_rises_with_the_window(
    batch: tuple, g1: float, g2: float, W: int, lifts: list[float]
) -> None:
    H, mask, rows = batch
    higher, _ = pad([[h + x for h, x in zip(row, lifts)] for row in rows], H.shape[1])
    gate = confidence_gate(H, mask, max(g1, g2), W, max_entropy=16.0)
    assert (confidence_gate(higher, mask, max(g1, g2), W, max_entropy=16.0) <= gate + 1e-6).all()
    assert (confidence_gate(H, mask, min(g1, g2), W, max_entropy=16.0) >= gate - 1e-6).all()
    gate = confidence_gate(H, mask, g1, W)
    assert (
        confidence_gate(H, mask, g1, 0) <= gate + 1e-6
    ).all()  # EGRSD <= CL-EGRSD: D1 keeps one denominator
    assert (confidence_gate(H, mask, g1, W + 1) >= gate - 1e-6).all()


@prop
@given(batches(min_rows=2), gammas, windows)
def test_rows_and_pads_matter_only_through_the_shared_maximum(
    batch: tuple, gamma: float, W: int
) -> None:
    H, mask, rows = batch
    top = max(map(max, rows))
    whole = confidence_gate(H, mask, gamma, W)
    halves = [
        confidence_gate(H[part], mask[part], gamma, W, max_entropy=top)
        for part in (slice(1), slice(1, None))
    ]
    torch.testing.assert_close(
        torch.cat(halves), whole, atol=1e-6, rtol=0
    )  # D2: the split changes nothing
    wider, wider_mask = pad(rows, H.shape[1] + 4, junk=99.0)
    torch.testing.assert_close(
        confidence_gate(wider, wider_mask, gamma, W)[:, : H.shape[1]], whole, atol=1e-6, rtol=0
    )
    for b, row in enumerate(rows):
        alone = lookahead_min(*pad([row], len(row)), W)
        assert torch.equal(alone[0], lookahead_min(H, mask, W)[b, : len(row)])


@prop
@given(batches(), st.floats(0, 1.5), windows)
def test_the_floor_of_the_gate_binds_only_above_gamma_0_9(
    batch: tuple, gamma: float, W: int
) -> None:
    H, mask, rows = batch
    linear = (1 - gamma * lookahead_min(H, mask, W).double() / max(1.0, *map(max, rows)))[
        mask.bool()
    ]
    gate = confidence_gate(H, mask, gamma, W)[mask.bool()].double()
    if gamma <= 0.9:
        torch.testing.assert_close(gate, linear, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        gate[linear < 0.1], torch.full_like(gate[linear < 0.1], 0.1), atol=1e-6, rtol=0
    )


def test_rounding_below_zero_entropy_cannot_lift_the_gate_above_one() -> None:
    gate = confidence_gate(torch.tensor([[-1e-3, 2.0]]), torch.ones(1, 2), 1.0, 0)
    assert gate[0, 0] == 1 and gate[0, 1] == pytest.approx(0.1)


def test_a_row_without_tokens_is_all_zero_and_disturbs_no_other_row() -> None:
    H, mask = pad([[], [3.0, 1.0]], 2, junk=50.0)
    assert lookahead_min(H, mask, 1).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert confidence_gate(H, mask, 0.75, 0).tolist() == [[0.0, 0.0], [0.25, 0.75]]
