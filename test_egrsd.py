"""The method, equation by equation, beside slow loops that say the same: read it beside egrsd.py.

Each function of egrsd.py that carries an equation is compared with something written independently:
a Python loop from the paper's formula, Python's statistics, a float64 softmax over the whole
vocabulary with autograd. At the end Algorithm 1 itself, lines 7 to 19, one token at a time.

    python -m pytest test_egrsd.py     # seconds, no vLLM, GPU or network; all else is in tests/
"""

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import egrsd
from egrsd import (
    RewardStats,
    confidence_gate,
    evidence_magnitude,
    logprob_and_entropy,
    logprob_and_gradient,
    lookahead_min,
    shaped_reward,
    token_advantages,
)

NAN = math.nan
INF = math.inf
# Derandomized: the same examples on every machine, so that a failure repeats.
prop = settings(max_examples=60, deadline=None, derandomize=True, database=None)
entropies = st.floats(0, 12, width=32, allow_subnormal=False)
gammas = st.floats(0, 1)
windows = st.integers(0, 12)


def pad(
    rows: list[list[float]], T: int, junk: float = NAN, dtype: torch.dtype = torch.bool
) -> tuple[Tensor, Tensor]:
    """Rows as a right-padded (B, T) tensor, with junk where a pad is, and its mask."""
    values = [row + [junk] * (T - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (T - len(row)) for row in rows]
    return torch.tensor(values, dtype=torch.float32), torch.tensor(mask).to(dtype)


def same(got: Tensor, rows: list[list[float]], atol: float = 1e-6) -> None:
    want, _ = pad(rows, got.shape[1], junk=0.0)  # 0 at the pads is part of the claim
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


@st.composite
def batches(draw: Callable, min_rows: int = 1) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Entropies of a few completions of different lengths: (B, T), mask, and the bare rows."""
    row = st.lists(entropies, min_size=1, max_size=9)
    rows = draw(st.lists(row, min_size=min_rows, max_size=4))
    T = max(map(len, rows)) + draw(st.integers(0, 3))
    junk = draw(st.sampled_from([NAN, INF, -INF, -7.0, 1e9, 0.0]))
    dtype = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    return *pad(rows, T, junk, dtype), rows


# --- Section 3: the reward ------------------------------------------------------------------------


def test_shaped_reward_is_one_at_the_cap_and_grows_to_one_plus_beta() -> None:
    assert shaped_reward(True, 1024, 1024) == 1.0
    assert shaped_reward(True, 512, 1024) == pytest.approx(1.25)
    assert shaped_reward(True, 0, 1024) == pytest.approx(1.5)
    assert shaped_reward(True, 300, 400, beta_L=0.2) == pytest.approx(1.05)
    assert shaped_reward(True, 7, 1024, beta_L=0.0) == 1.0
    assert shaped_reward(False, 1, 1024) == shaped_reward(False, 1024, 1024) == 0.0
    assert type(shaped_reward(True, 3, 9)) is float


# --- Eq. 9: the advantage, whitened by all earlier rewards ----------------------------------------


@prop
@given(st.lists(st.lists(st.floats(0, 1.5), min_size=1, max_size=6), min_size=2, max_size=6))
def test_running_statistics_equal_those_of_all_rewards(groups: list[list[float]]) -> None:
    stats = RewardStats()
    for group in groups:
        stats.update(group)
    rewards = sum(groups, [])
    assert stats.count == len(rewards)
    assert stats.mean == pytest.approx(statistics.mean(rewards), abs=1e-9)
    assert stats.std == pytest.approx(statistics.stdev(rewards), abs=1e-7)


def test_running_deviation_survives_a_large_mean_and_a_round_trip_through_json() -> None:
    torch.manual_seed(0)
    rewards = 1e6 + torch.rand(3200, dtype=torch.float64)  # E[r^2] - E[r]^2 would lose it
    stats = RewardStats()
    for group in rewards[:1600].split(32):
        stats.update(group)
    again = RewardStats()
    again.load_state_dict(json.loads(json.dumps(stats.state_dict())))
    for group in rewards[1600:].split(32):
        stats.update(group)
        again.update(group)
    assert stats.std == pytest.approx(float(torch.var(rewards, correction=1).sqrt()), rel=1e-7)
    assert (again.count, again.mean, again.std) == (stats.count, stats.mean, stats.std)
    assert again.count == 3200


def test_advantages_warm_up_for_ten_steps_then_whiten_by_earlier_rewards_only() -> None:
    torch.manual_seed(0)
    stats = RewardStats()
    seen = []
    for step in range(13):
        rewards = torch.rand(4, dtype=torch.float64) * 1.5
        before = stats.state_dict()
        got = stats.advantages(rewards, step)
        assert stats.state_dict() == before  # asking does not update
        mean = 0.5
        std = 1.0
        if step >= 10:
            mean = statistics.mean(seen)
            std = statistics.stdev(seen)
        want = [(r - mean) / std for r in rewards.tolist()]
        assert isinstance(got, Tensor) and got.shape == (4,)
        assert got.tolist() == pytest.approx(want, abs=1e-5)
        stats.update(rewards)  # the rewards of the warm-up enter too: D4
        seen += rewards.tolist()


@pytest.mark.parametrize(
    "history, divisor",
    [
        ([0.0] * 32, 1.0),
        ([1.25] * 32, 1.0),
        ([0.75], 1.0),
        ([0.0, 1e-6], 1.0),
        ([0.0, 2e-6], math.sqrt(2) * 1e-6),
    ],
)
def test_a_deviation_below_1e_6_divides_by_one(history: list[float], divisor: float) -> None:
    stats = RewardStats()
    stats.update(history)
    rewards = [history[0], 1.0]
    want = [(r - statistics.mean(history)) / divisor for r in rewards]
    assert stats.advantages(rewards, 10).tolist() == pytest.approx(want, rel=1e-5, abs=1e-9)


# --- Eq. 4: log-probability, entropy and gradient of the head, without its (N, V) logits ----------


def head_case(
    N: int, V: int, d: int, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows and head; the first targets are the ends of the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, d, generator=g) * scale
    head = torch.randn(V, d, generator=g) / d**0.5
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


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("V", [1, 2, 37, 20011])  # no multiple of a tile
def test_head_equals_the_full_float64_softmax_for_any_chunk(V: int, chunk: int) -> None:
    hidden, head, targets = torch.ones(2, 3), torch.ones(1, 3), torch.zeros(2, dtype=torch.long)
    if V > 1:
        hidden, head, targets = head_case(N=23, V=V, d=24, scale=3.0)
    logp, entropy, grad = full_softmax(hidden, head, targets)
    for function, other in ((logprob_and_entropy, entropy), (logprob_and_gradient, grad)):
        for mine, want in zip(function(hidden, head, targets, chunk), (logp, other)):
            assert mine.dtype == torch.float32 and mine.shape == want.shape
            torch.testing.assert_close(mine.double(), want, atol=1e-5, rtol=1e-6)


# --- Eq. 8: the lookahead -------------------------------------------------------------------------


def slide(phi: Callable[[list[float]], float], row: list[float], W: int) -> list[float]:
    """A causal filter at each position of one completion; the window ends with the completion."""
    return [phi(row[t : t + W + 1]) for t in range(len(row))]


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


# --- Eq. 5, 6, 8: the confidence gate -------------------------------------------------------------


def slow_gate(
    rows: list[list[float]], gamma: float, W: int, top: float | None = None
) -> list[list[float]]:
    if top is None:
        top = max(h for row in rows for h in row)  # of the raw entropies: D1
    gates = []
    for row in rows:
        lowest = slide(min, row, W)
        gates.append([min(1.0, max(0.1, 1 - gamma * h / max(top, 1.0))) for h in lowest])
    return gates


@prop
@given(batches(), gammas, windows, st.none() | st.floats(0, 5))
def test_gate_equals_the_slow_loop_within_its_range_and_pads_are_zero(
    batch: tuple, gamma: float, W: int, above: float | None
) -> None:
    H, mask, rows = batch
    top = None if above is None else max(map(max, rows)) + above
    gate = confidence_gate(H, mask, gamma, W, max_entropy=top)
    same(gate, slow_gate(rows, gamma, W, top))
    real = gate[mask.bool()]
    assert real.min() >= 0.1 - 1e-7 and real.max() <= 1
    assert (confidence_gate(H, mask, 0.0, W)[mask.bool()] == 1).all()  # gamma = 0 is RLSD


def test_denominator_is_the_raw_maximum_not_the_lookahead_maximum() -> None:
    H, mask = torch.tensor([[4.0, 2.0, 2.0]]), torch.ones(1, 3)
    # 0.5 if divided by the 2 that the lookahead leaves over: D1
    assert confidence_gate(H, mask, 0.5, 1).tolist() == [[0.75, 0.75, 0.75]]


def test_denominator_has_a_floor_of_one_nat_also_for_a_given_maximum() -> None:
    H, mask = torch.tensor([[0.25, 0.5]]), torch.ones(1, 2)
    for top in (None, 0.5, 1.0):
        assert confidence_gate(H, mask, 1.0, 0, max_entropy=top).tolist() == [[0.75, 0.5]]
    assert (confidence_gate(torch.zeros(1, 2), mask, 1.0, 0) == 1).all()  # and no 0 / 0


# --- Eq. 2: the magnitude -------------------------------------------------------------------------


@prop
@given(
    st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-0.5, 0.5)), min_size=1, max_size=8),
    st.floats(0, 0.9),
)
def test_magnitude_equals_the_slow_loop_for_each_direction(
    pairs: list[tuple[float, float]], eps: float
) -> None:
    student = torch.tensor([[s for s, _ in pairs]] * 3)
    teacher = torch.tensor([[s + d for s, d in pairs]] * 3)
    got = evidence_magnitude(teacher, student, torch.tensor([1.0, -1.0, 0.0]), eps)
    deltas = [t - s for t, s in zip(teacher[0].tolist(), student[0].tolist())]
    want = []
    for D in (1, -1, 0):
        want.append([min(1 + eps, max(1 - eps, math.exp(D * delta))) for delta in deltas])
    same(got, want)


def test_magnitude_clips_after_the_exponential_at_0_8_and_1_2() -> None:
    teacher = torch.tensor([[-1.0, -INF, 0.0, -1e30]] * 3)
    student = torch.tensor([[-1.1, -1.0, -9.0, -2.0]] * 3)
    up = math.exp(0.1)
    # -inf: the teacher rules the token out; 0 * -inf must not become NaN where D = 0: D5
    want = [[up, 0.8, 1.2, 0.8], [1 / up, 1.2, 0.8, 1.2], [1.0] * 4]
    same(evidence_magnitude(teacher, student, torch.tensor([1.0, -1.0, 0.0])), want)


# --- Eq. 7: direction x magnitude x confidence ----------------------------------------------------


@prop
@given(batches(), st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), gammas)
def test_token_advantage_is_the_product_of_three_signals(
    batch: tuple, A: list[float], gamma: float
) -> None:
    H, mask, rows = batch
    A = A[: len(rows)]
    weights = [[0.8 + 0.03 * h for h in row] for row in rows]
    gates = slow_gate(rows, gamma, 0)
    want = []
    for a, row_w, row_gate in zip(A, weights, gates):
        want.append([a * w * omega for w, omega in zip(row_w, row_gate)])
    w, _ = pad(weights, H.shape[1])  # NaN at the pads must not come through
    gate, _ = pad(gates, H.shape[1])
    same(token_advantages(torch.tensor(A), w, gate, mask), want)


def test_zero_advantage_gives_no_update_and_no_gradient_flows() -> None:
    A = torch.tensor([0.0, 1.5]).requires_grad_()
    student = (-torch.rand(2, 3)).requires_grad_()
    gate = torch.rand(2, 3).requires_grad_()
    w = evidence_magnitude(-torch.rand(2, 3), student, A.sign())
    got = token_advantages(A, w, gate, torch.ones(2, 3))
    assert not got.requires_grad and (got[0] == 0).all() and (got[1] > 0).all()


# --- Algorithm 1, lines 7 to 19: the whole step ---------------------------------------------------


def oracle_step(
    model, rollouts: list[dict], s: egrsd.Settings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One sequence at a time: full logits, plain loops, autograd through everything."""
    t = s.logit_temperature
    M = sum(len(r["completion_ids"]) for r in rollouts)

    # The teacher, who sees the reference: entropies, and log-probabilities of the student's tokens.
    H = []
    teacher = []
    for r in rollouts:
        ids = torch.tensor([r["teacher_prompt_ids"] + r["completion_ids"]])
        start = len(r["teacher_prompt_ids"]) - 1
        with torch.no_grad(), model.disable_adapter():
            z = model(input_ids=ids).logits[0, start:-1].double()  # (|y|, V)
        logp = (z / t).log_softmax(-1)
        H.append([-sum(math.exp(lp) * lp for lp in row) for row in logp.tolist()])
        teacher.append([logp[k, token].item() for k, token in enumerate(r["completion_ids"])])
    H_max = max(max(row) for row in H)

    # The student, and the loss, token by token.
    model.zero_grad()
    loss = 0.0
    gates = []
    weights = []
    canary = []
    for r, h, logp_T in zip(rollouts, H, teacher):
        ids = torch.tensor([r["prompt_ids"] + r["completion_ids"]])
        start = len(r["prompt_ids"]) - 1
        z = model(input_ids=ids).logits[0, start:-1].double()  # (|y|, V)
        logp = (z / t).log_softmax(-1)
        raw = z.log_softmax(-1)
        A = r["advantage"]
        D = (A > 0) - (A < 0)
        for k, token in enumerate(r["completion_ids"]):
            lowest = min(h[k : k + s.W + 1])
            omega = min(1.0, max(0.1, 1 - s.gamma * lowest / max(H_max, 1.0)))
            delta = logp_T[k] - logp[k, token].item()
            w = min(1 + s.eps, max(1 - s.eps, math.exp(D * delta)))
            loss = loss - A * w * omega * logp[k, token] / M
            gates.append(omega)
            weights.append(w)
            canary.append(abs(raw[k, token].item() - r["engine_logps"][k]))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in egrsd.trainable(model).items()}
    return grads, {
        "loss": loss.item(),
        "gate": statistics.fmean(gates),
        "magnitude": statistics.fmean(weights),
        "entropy": statistics.fmean(h for row in H for h in row),
        "entropy_max": H_max,
        "canary": statistics.fmean(canary),
        "clipped": statistics.fmean(abs(abs(w - 1) - s.eps) < 1e-9 for w in weights),
    }


def assert_same_gradient(
    got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 1e-5
) -> None:
    assert got.keys() == want.keys()
    ours = torch.cat([got[name].flatten().double() for name in want])
    theirs = torch.cat([want[name].flatten().double() for name in want])
    assert (ours - theirs).norm() <= rel * theirs.norm() and theirs.norm() > 1e-4


def tiny_model(*options: object):
    """The embedded model with an adapter whose B is random: student and teacher differ."""
    s = egrsd.parse_settings(["--preset", "tiny", *map(str, options)])
    base = egrsd.models.load_base(s.model, torch.device("cpu"))
    model = egrsd.add_adapter(base, s)
    noise = torch.Generator().manual_seed(1)
    for name, p in egrsd.trainable(model).items():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=noise)
    return model, s


@pytest.fixture(scope="module")
def rollouts() -> list[dict]:
    """Eight real rollouts of different lengths, with made-up advantages of both signs and 0."""
    model, s = tiny_model("--batch_size", 8)
    columns = {"problem": "problem", "solution": "solution", "answer": "answer"}
    problems = egrsd.data.load_problems(s.data, columns)
    tokenizer = egrsd.models.load_tokenizer(s.model)
    batch, _, _ = egrsd.next_problems(problems, tokenizer, s, 0)
    eos_ids = egrsd.engines.end_tokens(model, tokenizer)
    sample, _ = egrsd.start_engine(s, model, eos_ids, torch.device("cpu"), "hf", 1)
    sampling = {"temperature": 1.1, "top_p": 0.95, "top_k": 20}
    rows = egrsd.roll_out(sample, batch, tokenizer, eos_ids, 3, s, **sampling)
    for row, A in zip(rows, (1.5, -0.5, 0.0, 2.5, -1.0, 0.3, -0.2, 0.8)):
        row["advantage"] = A
    assert len({len(row["completion_ids"]) for row in rows}) > 3
    return rows


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--gamma", 0.3, "--W", 0),
        ("--logit_temperature", 1.1),
        ("--head_chunk", 7),
        ("--micro_batch_tokens", 1),
        ("--gradient_checkpointing",),
    ],
    ids=str,
)
def test_step_equals_the_slow_oracle_whatever_the_micro_batches(rollouts, options) -> None:
    model, s = tiny_model(*options)
    want_grads, want = oracle_step(model, rollouts, s)
    got = egrsd.journal.step_figures(*egrsd.accumulate_gradient(model, rollouts, s), s.eps)
    grads = {name: p.grad for name, p in egrsd.trainable(model).items()}
    assert_same_gradient(grads, want_grads)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
    deltas = {key: got[key] for key in ("delta_right", "delta_wrong")}
    again = egrsd.accumulate_gradient(model, rollouts[::-1], s)  # nor does their order matter
    again = egrsd.journal.step_figures(*again, s.eps)
    assert {key: again[key] for key in deltas} == pytest.approx(deltas, rel=1e-5, nan_ok=True)


def test_the_steps_flat_lines_are_the_padded_functions_of_the_equations(rollouts) -> None:
    model, s = tiny_model()
    mine, tokens = egrsd.accumulate_gradient(model, rollouts, s)
    sizes = [len(r["completion_ids"]) for r in mine]
    M = sum(sizes)
    A = torch.tensor([r["advantage"] for r in mine])

    def rows(flat: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(flat.split(sizes), batch_first=True)

    mask = rows(torch.ones(M)).bool()
    w = evidence_magnitude(rows(tokens["logp_T"]), rows(tokens["logp"]), A.sign(), s.eps)
    torch.testing.assert_close(tokens["w"], w[mask])
    A_hat = token_advantages(A, w, rows(tokens["omega"]), mask)
    torch.testing.assert_close(tokens["loss"], -A_hat[mask] * tokens["logp"] / M)


def test_each_line_of_algorithm_1_is_tagged_once_and_in_order() -> None:
    source = Path(egrsd.__file__).read_text()
    tags = []
    for numbers in re.findall(r"Alg\. 1, line ([\d, ]+)", source):
        tags += map(int, re.findall(r"\d+", numbers))
    assert tags == list(range(1, 22))
