"""What several GPUs add to one: the same step, spread layers, shared engines, a rank that dies.

`pytest -m gpu tests/test_gpus.py`. Below two GPUs all of it is skipped, but for EGRSD_REHEARSE=1,
with which two processes on a CPU stand for the GPUs, in float32: that shows that the tests
themselves work, and nothing about GPUs.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, figures_of, lines, read_log, run, start, wait_for
from safetensors.torch import load_file
from test_ranks import children

import egrsd

REHEARSE = os.environ.get("EGRSD_REHEARSE") == "1"
GPUS = torch.cuda.device_count()
ON_GPUS = GPUS > 1 and not REHEARSE
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (ON_GPUS or REHEARSE), reason="there is one GPU" if GPUS else "there is no GPU"
    ),
]
RANKS = (
    next(n for n in (8, 4, 2) if n <= GPUS) if ON_GPUS else 2
)  # of which 8 rollouts are a multiple
WHERE = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
if not ON_GPUS:
    WHERE["CUDA_VISIBLE_DEVICES"] = ""  # a rehearsal is one on a machine with a GPU too

# How far bfloat16 may lie apart where sums are taken in another order, and float32.
APART, NEAR = (0.05, {"rel": 0.05, "abs": 0.01}) if ON_GPUS else (1e-5, {"rel": 1e-5, "abs": 1e-6})

# One step of the tiny model on rollouts that are there: its gradient and the figures of the log.
STEP = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import egrsd
from helpers import tiny_settings
from support.shared import data, models, processes
from support.training import journal

run, out, *options = sys.argv[1:]
with processes.ending_together():
    s = tiny_settings(*options)
    device = processes.start_processes()
    tokenizer = models.load_tokenizer(s.model)
    base = models.load_base(s.model, device, s.attn, shard=s.shard)
    model = egrsd.add_adapter(base, s)
    noise = torch.Generator().manual_seed(1)  # B too: student and teacher differ
    for name, p in egrsd.trainable(model).items():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=noise).to(p.device)
    if s.shard:
        models.shard_layers(model, device)
    rollouts = [json.loads(line) for line in Path(run, "rollouts.jsonl").read_text().splitlines()]
    for r in rollouts:
        prompt = data.fill(s.teacher_prompt, r)
        r["teacher_prompt_ids"] = data.encode_prompt(tokenizer, prompt, s.thinking)
    mine, tokens = egrsd.accumulate_gradient(model, rollouts, s)
    figures = journal.step_figures(mine, tokens, s.eps)
    if processes.rank_and_world()[0] == 0:
        gradient = torch.cat([p.grad.flatten() for p in egrsd.trainable(model).values()])
        save_file({"gradient": gradient.cpu()}, out)
        print("FIGURES " + json.dumps(figures), flush=True)
"""


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """A run of one step, for its rollouts."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(*SMALL, "--steps", 1, "--engine", "hf", "--out", out, **WHERE)
    return out


def step_of(rollouts: Path, folder: Path, ranks: int, *options: str) -> tuple[torch.Tensor, dict]:
    """-> the gradient and the figures of that step, computed by so many processes"""
    script, out = folder / "step.py", folder / "gradient.safetensors"
    script.write_text(STEP)
    output = run(script, rollouts, out, *options, nproc=ranks, **WHERE)
    return load_file(out)["gradient"], json.loads(re.findall("FIGURES (.*)", output)[0])


@pytest.fixture(scope="module")
def step_of_one(rollouts, tmp_path_factory) -> tuple[torch.Tensor, dict]:
    return step_of(rollouts, tmp_path_factory.mktemp("step"), 0)


# Of a step with --shard each micro-batch gathers the layers: small ones, so that there are several.
@pytest.mark.parametrize(
    "options",
    [(), ("--shard",), ("--shard", "--micro_batch_tokens", "150")],
    ids=["whole", "spread", "spread, small micro-batches"],
)
def test_all_ranks_take_the_step_of_one(options, step_of_one, rollouts, tmp_path) -> None:
    want, wanted = step_of_one
    gradient, figures = step_of(rollouts, tmp_path, RANKS, *options)
    assert want.norm() > 0 and wanted["delta_off"] > 0
    assert (gradient - want).norm() / want.norm() < APART
    for name in ("loss", "entropy", "delta_off", "magnitude_off", "gate", "canary"):
        assert figures[name] == pytest.approx(wanted[name], **NEAR), name


@pytest.mark.parametrize("share", [1, 2])
def test_ranks_that_share_an_engine_and_that_do_not_reach_it(share, tmp_path) -> None:
    if not egrsd.console.installed("vllm"):
        pytest.skip("vLLM is not installed")
    options = ("--steps", 2, "--engine", "vllm", "--rollout_tp", share, "--out", tmp_path / "run")
    output = run(*SMALL, *options, nproc=RANKS, **WHERE)
    assert "a random adapter reached the engine" in output
    about = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert (about["processes"], about["tensor_parallel"]) == (RANKS, share)
    limit = 0.01 if ON_GPUS else 1e-4
    assert all(row["canary"] < limit for row in read_log(tmp_path / "run"))


def test_a_rank_that_is_killed_is_named_all_end_and_the_run_goes_on(tmp_path) -> None:
    """With vLLM where it is the default: the others may wait in its collectives, or in NCCL's."""
    out = tmp_path / "run"
    process = start(*SMALL, "--steps", 400, "--save_every", 2, "--out", out, nproc=RANKS, **WHERE)
    wait_for(lambda: lines(out / "log.jsonl") >= 3, process)
    for pid in children(process.pid):
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode, output
    assert re.search("rank 1 died in the phase '[a-z]+': killed", output), output
    steps = lines(out / "log.jsonl") + 2
    run("--resume", "--steps", steps, "--out", out, nproc=RANKS, **WHERE)
    assert [row["step"] for row in read_log(out)] == list(range(steps))


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    options = (*SMALL, "--steps", 6, "--engine", "hf")
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(*options, "--out", whole, nproc=RANKS, **WHERE)
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}  # for the step that is under way
    process = start(*options, "--out", out, nproc=RANKS, **WHERE, **patience)
    wait_for(lambda: lines(out / "log.jsonl") >= 1, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=400)[0]
    assert "stopped and saved after step" in output and lines(out / "log.jsonl") < 6, output
    run("--resume", "--out", out, nproc=RANKS, **WHERE)
    assert [row["step"] for row in read_log(out)] == list(range(6))
    for row, want in zip(read_log(out), read_log(whole)):
        if not ON_GPUS:  # there another rounding may draw another token
            assert figures_of(row) == pytest.approx(figures_of(want), rel=1e-5, abs=1e-6)
