"""README's forks: each patch of docs/forks/ applies to this version, runs, does what it says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
FORKS = ROOT / "docs" / "forks"
SMALL = "--preset tiny --eval_data= --batch_size 8 --max_completion 40".split()


def forked(name: str, folder: Path) -> Path:
    """A copy of what a run needs, with one patch applied."""
    for part in ("support", "tiny"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "egrsd.py", folder)
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    subprocess.run(["git", "apply", FORKS / f"{name}.patch"], cwd=folder, check=True)
    return folder


def run(folder: Path, *options: object, nproc: int = 0) -> str:
    launch = [sys.executable]
    if nproc:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [*launch, "egrsd.py", *SMALL, *map(str, options)]
    done = subprocess.run(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(folder: Path, program: str) -> object:
    """What a program prints as JSON, run inside the fork."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_fork_is_at_most_fifteen_new_lines_in_one_file() -> None:
    patches = sorted(FORKS.glob("*.patch"))
    assert len(patches) == 6
    for patch in patches:
        lines = patch.read_text().splitlines()
        assert [line for line in lines if line.startswith("+++ ")] == ["+++ b/egrsd.py"]
        added = [line for line in lines if line.startswith("+") and not line.startswith("+++ ")]
        assert len([line for line in added if line[1:].strip()]) <= 15, patch.name
        assert patch.name in (ROOT / "README.md").read_text()


def test_varentropy_is_the_variance_of_the_surprise(tmp_path) -> None:
    folder = forked("varentropy", tmp_path)
    program = """
import json, torch, egrsd
torch.manual_seed(0)
h, W, y = torch.randn(5, 8), torch.randn(20011, 8), torch.arange(5)
print(json.dumps([h.tolist(), W.tolist(), egrsd.logprob_and_entropy(h, W, y, 2)[1].tolist()]))
"""
    h, W, got = ask(folder, program)
    logp = (torch.tensor(h).double() @ torch.tensor(W).double().T).log_softmax(1)
    H = -(logp.exp() * logp).sum(1)
    want = (logp.exp() * (-logp - H[:, None]) ** 2).sum(1)
    assert got == pytest.approx(want.tolist(), rel=1e-4)
    run(folder, "--steps", 2, "--out", "run")
    assert len(rows(folder / "run" / "log.jsonl")) == 2


@pytest.mark.parametrize("name", ["ema_teacher", "full_finetuning"])
def test_a_fork_with_state_of_its_own_resumes_exactly(name, tmp_path) -> None:
    folder = forked(name, tmp_path)
    schedule = ("--save_every", 2, "--lr", 1e-3)
    run(folder, "--steps", 4, "--out", "whole", *schedule)
    run(folder, "--steps", 2, "--out", "halves", *schedule)
    run(folder, "--steps", 4, "--out", "halves", *schedule, "--resume")
    weights = "model.safetensors" if name == "full_finetuning" else "adapter_model.safetensors"
    for file in (weights, "trainer.safetensors"):
        whole = load_file(folder / "whole" / "step_4" / file)
        halves = load_file(folder / "halves" / "step_4" / file)
        assert whole.keys() == halves.keys()
        assert all(torch.equal(whole[key], halves[key]) for key in whole), file


def test_the_ema_teacher_is_the_average_of_the_students(tmp_path) -> None:
    folder = forked("ema_teacher", tmp_path)
    run(folder, "--steps", 3, "--out", "run", "--save_every", 1, "--lr", 1e-3)
    key = "layers.0.self_attn.q_proj.lora_B"
    average = 0.0
    for step in (1, 2, 3):
        adapter = load_file(folder / "run" / f"step_{step}" / "adapter_model.safetensors")
        student = next(value for name, value in adapter.items() if key in name)
        average = 0.99 * average + 0.01 * student
    trainer = load_file(folder / "run" / "step_3" / "trainer.safetensors")
    name = next(name for name in trainer if name.startswith("others/") and key in name)
    torch.testing.assert_close(trainer[name], average, rtol=1e-4, atol=1e-9)
    assert average.abs().max() > 0


def test_full_finetuning_moves_the_layers_and_leaves_teacher_and_head(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    folder = forked("full_finetuning", tmp_path)
    run(folder, "--steps", 2, "--out", "run", "--lr", 1e-3)
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(folder / "run" / "step_2").state_dict()
    for name, value in base.items():
        moved = not torch.equal(trained[name], value)
        assert moved == (".layers." in name), name
    # With the frozen base as teacher and no update yet, only the reference tells the two apart.
    log = rows(folder / "run" / "log.jsonl")
    assert all(row["canary"] < 1e-4 and row["grad_norm"] > 0 for row in log)


def test_the_maximum_of_each_rank_runs_on_two_processes(tmp_path) -> None:
    folder = forked("per_rank_maximum", tmp_path)
    run(folder, "--steps", 2, "--out", "one")
    run(folder, "--steps", 2, "--out", "two", nproc=2)
    one = rows(folder / "one" / "log.jsonl")[0]
    two = rows(folder / "two" / "log.jsonl")[0]
    assert two["entropy"] == pytest.approx(one["entropy"], rel=1e-5)
    assert two["gate"] < one["gate"] - 1e-7  # a rank's own maximum is at most the step's


def test_another_reward_is_what_the_run_earns(tmp_path) -> None:
    folder = forked("another_reward", tmp_path)
    run(folder, "--steps", 2, "--out", "run")
    for r in rows(folder / "run" / "rollouts.jsonl"):
        assert r["reward"] == r["correct"] - 0.5 * r["truncated"]


def test_unit_tests_reward_only_programs_that_reach_their_end(tmp_path) -> None:
    folder = forked("unit_tests", tmp_path)
    program = """
import json, egrsd
s = egrsd.parse_settings(["--preset", "tiny"])
tests = "assert double(2) == 4\\nassert double(-1) == -2"
codes = ["def double(x): return 2 * x", "def double(x): return x + 2", "raise SystemExit(0)",
         "print('all passed'); raise SystemExit(0)", "while True: pass", "no code at all"]
texts = [f"Like this:\\n```python\\n{code}\\n```" for code in codes[:-1]] + codes[-1:]
rollouts = [{"graded_text": t, "answer": tests, "completion_ids": [1]} for t in texts]
print(json.dumps([bool(r) for r, _ in egrsd.compute_rewards(rollouts, s)]))
"""
    assert ask(folder, program) == [True, False, False, False, False, False]


def test_a_column_of_lists_is_refused_as_text_of_lists_would_grade_every_program_alike(
    tmp_path,
) -> None:
    from support.shared.data import load_problems

    path = tmp_path / "code.jsonl"
    row = {"problem": "double it", "solution": "def f", "answer": ["assert f(1) == 2"]}
    path.write_text(json.dumps(row) + "\n")
    columns = {"problem": "problem", "solution": "solution", "answer": "answer"}
    with pytest.raises(SystemExit, match="row 0: the answer is .*, not text.*--answer_column"):
        load_problems(str(path), columns)
