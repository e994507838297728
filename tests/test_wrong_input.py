"""The mathematics refuses wrong input with a ValueError that names the argument."""

import math
from collections.abc import Callable

import pytest
import torch

from egrsd import (
    RewardStats,
    confidence_gate,
    evidence_magnitude,
    logprob_and_entropy,
    logprob_and_gradient,
    lookahead_min,
    token_advantages,
)
from test_egrsd import NAN

X, M, A = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
BAD, BAD_A, Y = (
    torch.tensor([[1.0, NAN, 1.0]] * 2),
    torch.tensor([1.0, NAN]),
    torch.zeros(2, dtype=torch.long),
)
HEAD = torch.ones(5, 3)


@pytest.mark.parametrize(
    "names, call",
    [
        # (2, 1), (3,) and (2, 1) would broadcast without a word
        ("entropy|mask", lambda: lookahead_min(X, M[:, :1], 1)),
        ("entropy|mask", lambda: confidence_gate(X, M[0], 0.3, 1)),
        ("entropy", lambda: lookahead_min(BAD, M, 1)),
        ("entropy", lambda: confidence_gate(BAD, M, 0.3, 1)),
        ("mask", lambda: lookahead_min(X, ~M, 1)),
        ("mask", lambda: confidence_gate(X, ~M, 0.3, 1)),
        (r"\bW\b", lambda: lookahead_min(X, M, -1)),
        (r"\bW\b", lambda: confidence_gate(X, M, 0.3, -1)),
        ("gamma", lambda: confidence_gate(X, M, -0.1, 1)),
        ("gamma", lambda: confidence_gate(X, M, NAN, 1)),
        ("max_entropy", lambda: confidence_gate(X, M, 0.3, 1, max_entropy=NAN)),
        ("teacher_logp|student_logp", lambda: evidence_magnitude(X, X[:, :1], A)),
        ("direction", lambda: evidence_magnitude(X, X, torch.ones(3))),
        ("teacher_logp", lambda: evidence_magnitude(BAD, X, A)),
        ("student_logp", lambda: evidence_magnitude(X, BAD, A)),
        ("direction", lambda: evidence_magnitude(X, X, BAD_A)),
        ("advantages", lambda: token_advantages(torch.ones(3), X, X, M)),
        ("advantages", lambda: token_advantages(BAD_A, X, X, M)),
        ("magnitude", lambda: token_advantages(A, BAD, X, M)),
        ("gate", lambda: token_advantages(A, X, BAD, M)),
        ("magnitude|gate|mask", lambda: token_advantages(A, X[:, :1], X, M)),
        ("magnitude|gate|mask", lambda: token_advantages(A, X, X[:, :1], M)),
        ("magnitude|gate|mask", lambda: token_advantages(A, X, X, M[0])),
        ("mask", lambda: token_advantages(A, X, X, ~M)),
        ("rewards", lambda: RewardStats().update(BAD_A)),
        ("rewards", lambda: RewardStats().advantages(BAD_A, 0)),
        (r"\bW\b", lambda: lookahead_min(X, M, math.inf)),
        (r"\bW\b", lambda: lookahead_min(X, M, NAN)),
        ("entropy", lambda: lookahead_min(X.long(), M, 1)),
        ("gamma", lambda: confidence_gate(X, M, math.inf, 1)),
        ("entropy", lambda: confidence_gate(X / 0, M, 0.3, 1)),
    ],
)
def test_wrong_input_is_a_value_error_that_names_the_argument(
    names: str, call: Callable[[], object]
) -> None:
    with pytest.raises(ValueError, match=names):
        call()


def test_rewards_that_are_refused_leave_the_statistics_as_they_were() -> None:
    stats = RewardStats()
    with pytest.raises(ValueError, match="rewards"):
        stats.update([1.0, NAN])
    assert stats.count == 0


@pytest.mark.parametrize("function", [logprob_and_entropy, logprob_and_gradient])
@pytest.mark.parametrize(
    "names, args",
    [
        ("hidden|head_weight", (X[:, :2], HEAD, Y, 4)),
        ("targets", (X, HEAD, Y[:1], 4)),
        ("hidden", (BAD, HEAD, Y, 4)),
        # negative indices wrap and a negative step loops zero times: both would be silent
        ("targets", (X, HEAD, Y - 1, 4)),
        ("targets", (X, HEAD, Y + 5, 4)),
        ("chunk", (X, HEAD, Y, 0)),
        ("chunk", (X, HEAD, Y, -1)),
        ("chunk", (X, HEAD, Y, 1.5)),
        ("targets", (X, HEAD, Y.float(), 4)),
    ],
)
def test_wrong_input_to_the_head_is_a_value_error_too(
    function: Callable, names: str, args: tuple
) -> None:
    with pytest.raises(ValueError, match=names):
        function(*args)
