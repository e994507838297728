"""Each compared method and control beside slow code: one sequence at a time, full logits, autograd.

The oracles were written from the definitions, not from baselines.py: a float64 softmax over the
whole vocabulary and plain loops; no tiles, no micro-batches, no gradient in closed form.
"""

import dataclasses
import functools
import json
import math
import operator
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, base_of, read_log, run
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import baselines
import egrsd
from support.comparison import exposure
from support.shared import data
from support.training import journal
from test_egrsd import assert_same_gradient, head_case, oracle_step, slow_gate

REVERSE = ("--divergence", "reverse")
TEACHERS = operator.itemgetter("teacher_prompt_ids")
JSD = ("--divergence", "jsd", "--jsd_beta")
DIVERGENCES = [(), REVERSE, (*JSD, 0.5), (*JSD, 0.1), (*JSD, 0.9)]
METHODS = [
    ("--method", "sft"),
    ("--method", "grpo", "--rollouts_per_prompt", 4),
    ("--method", "rlsd", "--rlsd_lambda", 0.5),
    ("--method", "opsd", "--kl_clamp", 0.05),
    ("--method", "crisp"),
    ("--method", "atesd"),
    ("--control", "shuffled"),
    ("--control", "inverted"),
    ("--control", "evidence"),
    ("--control", "student_entropy", "--teacher", "ema"),
    ("--control", "per_rank"),
]
SHARED = [METHODS[number] for number in (1, 3, 5, 6, 10)]  # by several processes
RUNS = [*METHODS[:6], ("--method", "none")]
GOES_ON = [("--teacher", "ema"), ("--method", "atesd")]


def settings_of(*args: object) -> baselines.ComparisonSettings:
    return baselines.parse_comparison(["--preset", "tiny", "--eval_data=", *map(str, args)])


def noise(like: Tensor, seed: int) -> Tensor:
    return 0.05 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def begin(tokenizer, *args: object, learned: bool = True) -> tuple[SimpleNamespace, object]:
    """A run, as egrsd.load_run makes it, with its method; then student and teacher have learned."""
    s = settings_of(*args)
    model = egrsd.add_adapter(base_of(s), s)
    run = SimpleNamespace(model=model, tokenizer=tokenizer, problems=[])
    run.roll_out, run.accumulate_gradient = egrsd.roll_out, egrsd.accumulate_gradient
    run.kept, run.figures = {}, {}
    run.roles = {"student": "prompt_ids", "teacher": "teacher_prompt_ids"}
    baselines.use_method(run, s)
    for name, p in egrsd.trainable(run.model).items():
        if learned and "lora_B" in name:
            p.data = noise(p, 1)
            if f"teacher/{name}" in run.kept:
                run.kept[f"teacher/{name}"] += noise(p, 2)
    return run, s


def rows_for(run, rollouts: list[dict], s, step: int = 3) -> list[dict]:
    """What the method trains on: SFT on the references, GRPO on rewards in groups."""
    if s.method == "sft":
        return run.roll_out(None, rollouts, run.tokenizer, [2], step, s)
    rewards = (1.3, 0.0, 0.0, 1.1, 0.0, 0.0, 0.0, 0.0)  # the last four earn nothing
    return [{**r, "reward": reward, "step": step} for r, reward in zip(rollouts, rewards)]


def step_of(run, rollouts: list[dict], s) -> SimpleNamespace:
    mine, tokens = run.accumulate_gradient(run.model, [{**r} for r in rollouts], s)
    gradient = {name: p.grad.clone() for name, p in egrsd.trainable(run.model).items()}
    figures = journal.step_figures(mine, tokens, s.eps)
    return SimpleNamespace(mine=mine, tokens=tokens, gradient=gradient, figures=figures)


def assert_step(got: SimpleNamespace, want: tuple[float, dict]) -> None:
    assert got.figures["loss"] == pytest.approx(want[0], rel=1e-5, abs=2e-6)
    assert_same_gradient(got.gradient, want[1])


# --- The slow parts -------------------------------------------------------------------------------


def slow_logps(model, ids: list[int], r: dict, s) -> Tensor:
    """(T, V) log-probabilities of a completion after the prompt `ids`, in float64."""
    z = model(input_ids=torch.tensor([ids + r["completion_ids"]])).logits[0].double()
    return (z / s.logit_temperature).log_softmax(-1)[len(ids) - 1 : -1]


@torch.no_grad()
def slow_teacher(run, rollouts: list[dict], s, prompt: Callable = TEACHERS) -> list[Tensor]:
    """(T, V) of each rollout, by a model of its own: the base, or with the kept weights."""
    teacher = egrsd.add_adapter(base_of(s), s)
    for name, p in egrsd.trainable(teacher).items():
        if s.teacher != "frozen":
            p.data = run.kept[f"teacher/{name}"].clone()
    return [slow_logps(teacher, prompt(r), r, s) for r in rollouts]


def slow_gradient(model, rollouts: list[dict], s, loss_of: Callable) -> tuple[float, dict]:
    """Mean over the step's tokens of loss_of(rollout i, token t, (V,) student), and gradient."""
    M = sum(len(r["completion_ids"]) for r in rollouts)
    model.zero_grad()
    total = 0.0
    for i, r in enumerate(rollouts):
        student = slow_logps(model, r["prompt_ids"], r, s)
        for t in range(len(r["completion_ids"])):
            total = total + loss_of(i, t, student[t]) / M
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in egrsd.trainable(model).items()}


def slow_divergence(logp_T: Tensor, logp_S: Tensor, s) -> Tensor:
    p, q = logp_T.exp(), logp_S.exp()
    terms = p * (logp_T - logp_S)
    if s.divergence == "reverse":
        terms = q * (logp_S - logp_T)
    elif s.divergence == "jsd":
        beta = s.jsd_beta
        logm = torch.logaddexp(logp_T + math.log(beta), logp_S + math.log(1 - beta))
        terms = beta * p * (logp_T - logm) + (1 - beta) * q * (logp_S - logm)
    return (terms.clamp(max=s.kl_clamp) if s.kl_clamp else terms).sum(-1)


def slow_distilled(run, rollouts: list[dict], s, prompt: Callable) -> tuple:
    p = slow_teacher(run, rollouts, s, prompt)
    return slow_gradient(run.model, rollouts, s, lambda i, t, q: slow_divergence(p[i][t], q, s))


def slow_likelihood(run, rollouts: list[dict], s, A: list[float]) -> tuple:
    ids = [r["completion_ids"] for r in rollouts]
    return slow_gradient(run.model, rollouts, s, lambda i, t, q: -A[i] * q[ids[i][t]])


def slow_entropies(rows: list[Tensor]) -> list[list[float]]:
    return [[-(p.exp() * p).sum().item() for p in row] for row in rows]


def product(A: float, w: float, omega: float) -> float:
    return A * w * omega


def slow_weighed(run, rollouts: list[dict], s, weigh=product, gamma=None, gates=None) -> tuple:
    """-1/M * sum of weigh(A, w, omega) * log p(y)."""
    teacher = judges = slow_teacher(run, rollouts, s)
    if s.control == "student_entropy":
        with torch.no_grad():
            judges = [slow_logps(run.model, r["prompt_ids"], r, s) for r in rollouts]
    gates = gates or slow_gate(slow_entropies(judges), s.gamma if gamma is None else gamma, s.W)

    def loss_of(i: int, t: int, student: Tensor) -> Tensor:
        A, y = rollouts[i]["advantage"], rollouts[i]["completion_ids"][t]
        delta = (teacher[i][t, y] - student[y]).item()
        w = min(1 + s.eps, max(1 - s.eps, math.exp(((A > 0) - (A < 0)) * delta)))
        return -weigh(A, w, gates[i][t]) * student[y]

    return slow_gradient(run.model, rollouts, s, loss_of)


# --- Divergences without an (N, V) tensor ---------------------------------------------------------


def full_divergence(hidden_T: Tensor, hidden_S: Tensor, head: Tensor, s) -> tuple[Tensor, Tensor]:
    h = hidden_S.double().requires_grad_()
    logp_T = (hidden_T.double() @ head.double().T).log_softmax(-1)
    value = slow_divergence(logp_T, (h @ head.double().T).log_softmax(-1), s)
    value.sum().backward()
    return value.detach(), h.grad


@pytest.mark.parametrize("scale, clamp", [(3.0, 0.0), (3.0, 0.05), (50.0, 0.0)])
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_a_divergence_and_its_gradient_are_those_of_the_full_softmax(options, scale, clamp) -> None:
    s = settings_of("--method", "opsd", *options)
    hidden_S, head, y = head_case(N=11, V=20_011, d=16, scale=scale)
    hidden_T = head_case(N=11, V=20_011, d=16, seed=5, scale=scale)[0]
    hidden_T[5:] = hidden_S[5:] + 0.3 / scale * hidden_T[5:]  # near each other, as in training
    unclamped, _ = full_divergence(hidden_T, hidden_S, head, s)
    s.kl_clamp = clamp
    want = full_divergence(hidden_T, hidden_S, head, s)
    assert (unclamped - want[0]).max() > 0.01 or not clamp  # or it would not be tested
    terms = baselines.divergence_terms(s)
    for chunk in (1, 7, 10**6):
        got = baselines.divergence_and_gradient(hidden_T, hidden_S, head, y, chunk, terms)
        for mine, other in zip(got, want):
            # No nearer to float64 is float32 autograd over the full softmax.
            far, near = {3.0: (1e-4, 1e-5), 50.0: (5e-3, 3e-4)}[scale]
            torch.testing.assert_close(mine[:5].double(), other[:5], atol=far, rtol=0)
            torch.testing.assert_close(mine[5:].double(), other[5:], atol=near, rtol=0)
        for mine, h in zip(got[2:], (hidden_T, hidden_S)):
            logp = (h.double() @ head.double().T).log_softmax(-1)[range(11), y]
            torch.testing.assert_close(mine.double(), logp, atol=1e-5 * scale, rtol=1e-6)
    equal = baselines.divergence_and_gradient(hidden_S, hidden_S, head, y, 7, terms)
    assert equal[0].abs().max() < 1e-6 and equal[1].abs().max() < 1e-5 * scale


# g and p_S are rounded to bfloat16 one by one: were g -p_T, they would nearly cancel, with an error
# of 3 to 40 %. A multiple of p_S in g drops out of the gradient: g = p_S - p_T and g = f are exact.
@pytest.mark.parametrize("options", DIVERGENCES[:3], ids=str)
def test_a_bfloat16_gradient_is_right_where_teacher_and_student_nearly_agree(options) -> None:
    s = settings_of("--method", "opsd", *options)
    hidden_S, head, y = head_case(N=64, V=20_011, d=64, scale=4.0)
    hidden_T = hidden_S + 0.1 * head_case(N=64, V=20_011, d=64, seed=5)[0]
    hidden_T, hidden_S, head = (x.bfloat16() for x in (hidden_T, hidden_S, head))
    _, want = full_divergence(hidden_T, hidden_S, head, s)
    terms = baselines.divergence_terms(s)
    got = baselines.divergence_and_gradient(hidden_T, hidden_S, head, y, 64, terms)[1]
    assert ((got.double() - want).norm(dim=1) / want.norm(dim=1)).max() < 0.01


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_no_tensor_of_all_tokens_and_the_whole_vocabulary_is_made() -> None:
    N, V, d = 64, 151_936, 8
    hidden, head, y = head_case(N, V, d)
    terms = baselines.divergence_terms(settings_of("--method", "opsd", *JSD, 0.5))
    with Largest() as largest:
        baselines.divergence_and_gradient(hidden + 1, hidden, head, y, N, terms)
    assert largest.size <= max(V * d, N * egrsd.VOCAB_TILE["cpu"]) < N * V / 5


# --- A whole step of each method ------------------------------------------------------------------


def half_of_reference(solution: str) -> str:
    """Of the tiny model's: steps with ";" after each, and the box."""
    steps = solution.split(" ; ")
    return " ; ".join([*steps[: len(steps) // 2], steps[-1]])


@pytest.mark.parametrize(
    "options",
    [
        ("opsd",),
        ("opsd", *REVERSE, "--logit_temperature", 1.1),
        ("opsd", *JSD, 0.3),
        ("opsd", "--kl_clamp", 0.05),
        ("opsd", "--teacher", "ema"),
        ("crisp", "--teacher_prompt", "Compute your own way : {problem}"),
        ("atesd", "--exposure", 0.5),
    ],
    ids=str,
)
def test_distillation_is_the_mean_divergence_over_the_tokens(rollouts, tokenizer, options) -> None:
    run, s = begin(tokenizer, "--method", *options)

    def prompt(r: dict) -> list[int]:
        text, solution = s.teacher_prompt, r["solution"]
        if s.method == "atesd":
            solution = half_of_reference(solution)
        text = text.replace("{problem}", r["problem"]).replace("{solution}", solution)
        return data.encode_prompt(tokenizer, text, False)

    same = [prompt(r) == r["teacher_prompt_ids"] for r in rollouts]
    assert all(same) if s.method == "opsd" else not any(same)
    if s.method == "crisp":  # as next_problems has them, with this method's prompt
        rollouts = [{**r, "teacher_prompt_ids": prompt(r)} for r in rollouts]
    got = step_of(run, rollouts, s)  # first: it moves the teacher
    assert_step(got, slow_distilled(run, rollouts, s, prompt))


def test_atesds_controller_is_told_the_means_of_the_step(rollouts, tokenizer, monkeypatch) -> None:
    told = {}
    monkeypatch.setattr(exposure, "learn", lambda _, means, step: told.update(means))
    run, s = begin(tokenizer, "--method", "atesd")
    got = step_of(run, rows_for(run, rollouts, s, exposure.HOLD - 1), s)
    known = [{**r, "completion_ids": tokenizer(r["solution"]).input_ids} for r in got.mine]
    y = [token for r in known for token in r["completion_ids"]]
    with torch.no_grad():
        probe = [slow_logps(run.model, r["prompt_ids"], r, s) for r in known]
    teacher = slow_teacher(run, known, s)  # with what it was shown
    mean = {"loss": got.figures["loss"], "mismatch": got.figures["delta_off"]}
    mean["confidence"] = got.tokens["logp"].exp().mean().item()
    mean["teacher"] = torch.cat(teacher)[range(len(y)), y].mean().item()
    mean["probe"] = -torch.cat(probe)[range(len(y)), y].mean().item()
    assert told == pytest.approx(mean, rel=1e-4)


def test_atesds_references_all_have_their_box_before_problems_are_chosen(tokenizer) -> None:
    run, s = begin(tokenizer, "--method", "atesd")
    run.problems = [
        {"solution": "1 + 1 = 2. So it is 2.", "answer": "2"},
        {"solution": "It is \\boxed{3}.", "answer": "3"},
    ]
    baselines.use_method(run, s)
    solutions = [row["solution"] for row in run.problems]
    assert solutions == ["1 + 1 = 2. So it is 2. \\boxed{2}", "It is \\boxed{3}."]
    for share in (0, 0.4, 0.7, 1):  # nothing that is shown is longer than what was measured
        for row in run.problems:
            shown = exposure.expose(row["solution"], row["answer"], share)
            assert len(shown) <= len(row["solution"]) and "\\boxed" in shown


def test_crisp_takes_the_reverse_kl_to_a_copy_of_each_50_steps() -> None:
    s = settings_of("--method", "crisp")
    assert (s.divergence, s.teacher, s.teacher_every) == ("reverse", "copy", 50)


def test_grpo_weighs_a_rollout_by_its_advantage_in_its_group(rollouts, tokenizer) -> None:
    run, s = begin(tokenizer, "--method", "grpo", "--rollouts_per_prompt", 4)
    rows = rows_for(run, rollouts, s)
    A = []
    for start in (0, 4):
        group = [r["reward"] for r in rows[start : start + 4]]
        mean, std = statistics.mean(group), statistics.stdev(group)
        A += [(reward - mean) / (std + 1e-4) for reward in group]
    got = step_of(run, rows, s)
    assert_step(got, slow_likelihood(run, rows, s, A))
    assert [A[r["index"]] for r in got.mine] == pytest.approx([r["advantage"] for r in got.mine])


def test_sft_is_the_cross_entropy_of_the_reference_and_its_end(rollouts, tokenizer) -> None:
    run, s = begin(tokenizer, "--method", "sft")
    rows = rows_for(run, rollouts, s)
    for r, row in zip(rows, rollouts):
        assert r["completion_ids"] == [*tokenizer(row["solution"]).input_ids, 2]
        assert r["prompt_ids"] == row["prompt_ids"]
    assert_step(step_of(run, rows, s), slow_likelihood(run, rows, s, [1.0] * 8))


def test_rlsd_is_egrsd_with_gamma_0_step_for_step(rollouts, tokenizer) -> None:
    run, s = begin(tokenizer, "--method", "rlsd")
    assert run.accumulate_gradient is egrsd.accumulate_gradient and s.gamma == s.W == 0
    got = step_of(run, rollouts, s)
    gradient, figures = oracle_step(run.model, rollouts, s)
    assert_step(got, (figures["loss"], gradient))
    assert (got.tokens["omega"] == 1).all()
    run.accumulate_gradient = functools.partial(baselines.weigh_tokens, run)
    assert_same_gradient(step_of(run, rollouts, s).gradient, got.gradient, rel=1e-6)


@pytest.mark.parametrize("step, mix", [(0, 0.5), (3, 0.47), (49, 0.01), (80, 0.0)])
def test_rlsds_own_mixing_fades_in_50_steps(rollouts, tokenizer, step, mix) -> None:
    run, s = begin(tokenizer, "--method", "rlsd", "--rlsd_lambda", 0.5)
    rows = rows_for(run, rollouts, s, step)
    want = slow_weighed(run, rows, s, lambda A, w, omega: A * ((1 - mix) + mix * w))
    assert_step(step_of(run, rows, s), want)


@pytest.mark.parametrize(
    "options, weigh",
    [
        (("--control", "inverted"), lambda A, w, omega: A * w * (1.1 - omega)),
        (("--control", "evidence"), lambda A, w, omega: A * (1 + omega * (w - 1))),
        (("--control", "student_entropy"), product),
        (("--control", "per_rank"), product),  # one process: as EGRSD
        (("--teacher", "copy"), product),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_a_control_changes_one_thing_about_egrsd(rollouts, tokenizer, options, weigh) -> None:
    run, s = begin(tokenizer, *options, "--W", 2)
    assert_step(step_of(run, rollouts, s), slow_weighed(run, rollouts, s, weigh))


def test_a_rank_whose_entropy_is_nan_asks_the_others_nothing(monkeypatch) -> None:
    """With per_rank they would not answer, since each divides by its own maximum."""
    s = settings_of("--control", "per_rank")
    monkeypatch.setattr(egrsd.processes, "reduce_", None)
    H, lengths = torch.tensor([0.5, math.nan, 1.0]), torch.tensor([1, 2])
    assert baselines.gate_of_control(H, lengths, 1.0, s).isnan().all()
    assert baselines.gate_of_control(H.nan_to_num(0), lengths, 1.0, s).isfinite().all()


@pytest.mark.parametrize("schedule, shares", [("up", (0, 0.3, 1)), ("down", (1, 0.7, 0))])
def test_a_schedule_moves_gamma_in_a_straight_line(rollouts, tokenizer, schedule, shares) -> None:
    run, s = begin(tokenizer, "--gamma_schedule", schedule, "--gamma_steps", 11, "--gamma", 0.6)
    for step, share in zip((0, 3, 10), shares):
        rows = rows_for(run, rollouts[::3], s, step)
        assert_step(step_of(run, rows, s), slow_weighed(run, rows, s, gamma=0.6 * share))


def gates_of(got: SimpleNamespace) -> list[list[float]]:
    values = got.tokens["omega"].split([len(r["completion_ids"]) for r in got.mine])
    return [row.tolist() for _, row in sorted(zip([r["index"] for r in got.mine], values))]


def test_shuffled_deals_the_gates_values_over_the_step(rollouts, tokenizer) -> None:
    run, s = begin(tokenizer, "--control", "shuffled")
    got = step_of(run, rollouts, s)
    gates = gates_of(got)
    plain = gates_of(step_of(*begin(tokenizer)[:1], rollouts, s))
    flat = sum(gates, [])
    assert sorted(flat) == pytest.approx(sorted(sum(plain, [])), abs=1e-6)
    assert all(sorted(a) != sorted(b) for a, b in zip(gates, plain))  # not within a rollout
    assert_step(got, slow_weighed(run, rollouts, s, gates=gates))
    s.micro_batch_tokens = 1
    assert sum(gates_of(step_of(run, rollouts[::-1], s)), []) == pytest.approx(flat)
    later = sum(gates_of(step_of(run, rows_for(run, rollouts, s, 4), s)), [])
    assert later != pytest.approx(flat) and sorted(later) == pytest.approx(sorted(flat))


# --- Micro-batches, chunks, order and processes change nothing ------------------------------------


def test_resume_where_nothing_was_begun_keeps_the_methods_own_options(tmp_path) -> None:
    s = settings_of("--method", "crisp", "--resume", "--out", tmp_path / "run")
    assert s.teacher_prompt == baselines.CONCISE_PROMPT
    assert (s.divergence, s.teacher, s.teacher_every) == ("reverse", "copy", 50)
    s = settings_of("--method", "rlsd", "--resume", "--out", tmp_path / "run")
    assert (s.gamma, s.W) == (0, 0)
    for method, other in (("rlsd", "crisp"), ("crisp", "opsd")):
        s = settings_of("--method", method, "--out", tmp_path)
        (tmp_path / "settings.json").write_text(json.dumps(vars(s)))  # begun, no checkpoint yet
        assert settings_of("--resume", "--out", tmp_path) == dataclasses.replace(s, resume=True)
        with pytest.raises(SystemExit, match=f"was begun with --method {method}"):
            settings_of("--method", other, "--resume", "--out", tmp_path)


def test_atesd_learns_once_from_a_step_that_is_done_again() -> None:
    controller = exposure.new_controller(0)
    means = {"loss": 1.0, "mismatch": 0.5, "confidence": 0.5, "teacher": -0.1, "probe": 1.0}
    for step in range(5):
        exposure.choose(controller, 0, step)
        exposure.learn(controller, means, step)
    once = {name: value.clone() for name, value in controller.items()}
    exposure.learn(controller, {**means, "loss": 9.0}, 4)
    for name, value in once.items():
        torch.testing.assert_close(controller[name], value, rtol=0, atol=0, equal_nan=True)
    exposure.learn(controller, {**means, "loss": 9.0}, 5)
    assert not torch.equal(controller["exposure/losses"], once["exposure/losses"])


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_micro_batches_chunks_and_order_change_nothing(rollouts, tokenizer, options) -> None:
    run, s = begin(tokenizer, *options)
    rows = rows_for(run, rollouts, s)
    got = step_of(run, rows, s)
    run, s = begin(tokenizer, *options, "--micro_batch_tokens", 1, "--head_chunk", 7)
    again = step_of(run, rows[::-1], s)
    assert_same_gradient(again.gradient, got.gradient)
    want = {key: value for key, value in got.figures.items() if value is not None}
    assert {key: again.figures[key] for key in want} == pytest.approx(want, rel=1e-4, abs=2e-6)


def test_two_processes_change_nothing_but_rounding(rollouts, tokenizer, tmp_path) -> None:
    (tmp_path / "rollouts.json").write_text(json.dumps(rollouts))
    (tmp_path / "worker.py").write_text(f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_baselines as t
from safetensors.torch import save_file
from support.shared import models, processes
processes.start_processes()
rank = processes.rank_and_world()[0]
tokenizer = models.load_tokenizer({str(ROOT / "tiny")!r})
rollouts = json.load(open({str(tmp_path / "rollouts.json")!r}))
for number, options in enumerate(t.SHARED):
    run, s = t.begin(tokenizer, *options)
    got = t.step_of(run, t.rows_for(run, rollouts, s, t.exposure.HOLD - 1), s)
    tensors = {{**got.gradient, **{{"kept/" + name: value for name, value in run.kept.items()}}}}
    tensors["omega"] = got.tokens.get("omega", t.torch.zeros(1))
    tensors["index"] = t.torch.tensor([r["index"] for r in got.mine])
    save_file(tensors, {str(tmp_path)!r} + f"/{{number}}_{{rank}}.safetensors")
""")
    launch = run  # helpers.run
    launch(str(tmp_path / "worker.py"), nproc=2)
    for number, options in enumerate(SHARED):
        alone, s = begin(tokenizer, *options)
        got = step_of(alone, rows_for(alone, rollouts, s, exposure.HOLD - 1), s)
        for rank in (0, 1):
            theirs = load_file(tmp_path / f"{number}_{rank}.safetensors")
            omega, index = theirs.pop("omega"), theirs.pop("index").tolist()
            for name, value in alone.kept.items():  # ATESD's controller has learned
                torch.testing.assert_close(theirs.pop(f"kept/{name}"), value, equal_nan=True)
            if s.control != "per_rank":
                assert_same_gradient(theirs, got.gradient)
                continue
            H = slow_entropies(slow_teacher(alone, [rollouts[i] for i in index], s))
            want = sum(slow_gate(H, s.gamma, s.W), [])  # by the highest of this rank alone
            assert omega.tolist() == pytest.approx(want, abs=1e-5)


# --- Schedules of the teacher ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["opsd", "egrsd"])
def test_an_average_has_the_numbers_of_a_plain_loop(rollouts, tokenizer, method) -> None:
    options = ("--method", method, "--teacher", "ema", "--teacher_alpha", 0.9)
    run, s = begin(tokenizer, *options, learned=False)
    student = egrsd.trainable(run.model)
    average = {name: p.detach().double() for name, p in student.items()}
    before = -1
    for step in (0, 1, 2, 2, 3):  # step 2 is done again, as after a stop
        if step > max(before, 0):  # the update of the step before
            for number, (name, p) in enumerate(student.items()):
                p.data = p.data + noise(p, 100 * step + number)
                average[name] = 0.9 * average[name] + 0.1 * p.detach().double()
        before = step
        weights = {name: p.detach().clone() for name, p in student.items()}
        got = step_of(run, rows_for(run, rollouts[:2], s, step), s)
        for name, want in average.items():
            kept = run.kept[f"teacher/{name}"].double()
            torch.testing.assert_close(kept, want, atol=1e-7, rtol=1e-6)
            assert torch.equal(student[name], weights[name])  # the student is itself again
        if step == 0:
            base, plain = begin(tokenizer, "--method", method)
            want = step_of(base, rollouts[:2], plain).tokens["logp_T"]
            torch.testing.assert_close(got.tokens["logp_T"], want)  # the teacher is the base


@pytest.mark.parametrize("every", [1, 3, 20, 50])
def test_a_copy_is_of_the_student_before_each_kth_step(tokenizer, every) -> None:
    options = ("--method", "crisp") if every == 50 else ("--teacher", "copy")
    options += ("--teacher_every", every) if every < 20 else ()  # 20 is the default, CRISP's 50
    run, s = begin(tokenizer, *options, learned=False)
    p = next(iter(egrsd.trainable(run.model).values()))
    want = p.detach().clone()
    for step in range(2 * every + 3):
        if step and step % every == 0:
            want = p.detach().clone()
        for _ in range(2):  # a step may be done again
            with baselines.teaching(run, s, step):
                assert torch.equal(p, want), step
        p.data = p.data + 1.0


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--method grpo --rollouts_per_prompt 1", "rollouts_per_prompt must be at least 2"),
        ("--method sft --teacher ema", "sft has no teacher"),
        ("--method grpo --teacher ema", "grpo has no teacher"),
        ("--method none --teacher ema", "none has no teacher"),
        ("--method atesd --exposure 1.5", r"1.5 must be in \[0, 1\]"),
        ("--method opsd --exposure 0.5", "exposure is for --method atesd"),
        ("--method grpo --control shuffled", "grpo has none"),
        ("--method rlsd --gamma 0.3", "without its gate"),
        ("--method egrsd --rlsd_lambda 0.5", "rlsd_lambda is for --method rlsd"),
        ("--method opsd --gamma_schedule up", "opsd has no gamma"),
        ("--method opsd --divergence jsd --jsd_beta 1", "jsd_beta must be between 0 and 1"),
        ("--method rlsd --divergence reverse", "are for opsd, crisp, atesd"),
        ("--teacher copy --teacher_every 0", "teacher_every at least 1"),
        ("--method crisp --teacher_prompt {problem}{solution}", "must hold {problem} and not"),
        ("--method opsd --jsd_beta 0.3", "jsd_beta is for --divergence jsd"),
        ("--gamma_steps 40", "gamma_steps is for --gamma_schedule"),
        ("--teacher copy --teacher_alpha 0.9", "teacher_alpha is for --teacher ema"),
    ],
)
def test_what_makes_no_sense_ends_with_a_sentence(options, sentence) -> None:
    with pytest.raises(SystemExit, match=sentence):
        settings_of(*options.split())


# --- Real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each method for two steps. Some for four: whole, killed after two, asked for two at first."""
    out = tmp_path_factory.mktemp("methods")
    (out / "all.py").write_text(f"""
import shutil, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import helpers, test_baselines as t
t.journal.draw_curves = lambda *_: None  # most of the time of so short a run

def go(name, *options):
    out = {str(out)!r} + "/" + name
    settings = t.baselines.parse_comparison([*map(str, options), "--out", out])
    t.egrsd.train(settings, t.baselines.use_method)
    return out

for number, options in enumerate(t.RUNS):
    go(str(number), *helpers.SMALL, *([] if "none" in options else ["--steps", 2]), *options)
t.exposure.HOLD = 2
for number, options in enumerate(t.GOES_ON):
    whole = go(f"{{number}}_whole", *helpers.SMALL, "--steps", 4, "--save_every", 2, *options)
    killed = shutil.copytree(whole, whole.replace("whole", "killed"))
    shutil.rmtree(killed + "/step_4")
    go(f"{{number}}_killed", "--resume")
    go(f"{{number}}_longer", *helpers.SMALL, "--steps", 2, *options)
    go(f"{{number}}_longer", "--resume", "--steps", 4)
""")
    run(str(out / "all.py"))
    return out


@pytest.mark.parametrize("number", range(len(RUNS)), ids=lambda number: str(RUNS[number]))
def test_each_method_runs_and_logs(runs, number) -> None:
    shown = (runs / str(number) / "prompts.txt").read_text()
    teaches = not {"sft", "grpo", "none"} & {*RUNS[number]}
    assert ("--- teacher prompt" in shown) == teaches
    assert ("Reference :" in shown) == (teaches and "crisp" not in RUNS[number])
    if "none" in RUNS[number]:
        assert not list(runs.glob(f"{number}/log.jsonl")) or not read_log(runs / str(number))
        return
    rows = read_log(runs / str(number))
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["loss"]) for row in rows)
    weights = load_file(runs / str(number) / "step_2" / "adapter_model.safetensors")
    moved = any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert moved == any(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("how", ["killed", "longer"])
@pytest.mark.parametrize("number", range(len(GOES_ON)), ids=lambda number: str(GOES_ON[number]))
def test_a_run_that_was_stopped_goes_on_exactly(runs, number, how) -> None:
    whole, other = runs / f"{number}_whole", runs / f"{number}_{how}"
    assert read_log(other) == read_log(whole)
    for file in ("adapter_model.safetensors", "trainer.safetensors"):
        assert (other / "step_4" / file).read_bytes() == (whole / "step_4" / file).read_bytes()
