"""Beyond one GPU and one machine: a sharded base, two groups of processes, the Slurm script."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, figures_of, read_log, run
from safetensors.torch import load_file
from test_rollouts import VLLM

# Small micro-batches: the ranks then have different numbers of them, unless they agree.
STEPS = (*SMALL, "--steps", 4, "--save_every", 2, "--micro_batch_tokens", 150)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path, steps: int = 4) -> None:
    for a, b in zip(read_log(one), read_log(other), strict=True):
        assert figures_of(a) == pytest.approx(figures_of(b), rel=1e-5, abs=1e-6)
    a, b = adapter(one / f"step_{steps}"), adapter(other / f"step_{steps}")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that all must equal: two processes of one machine, the base whole on each."""
    out = tmp_path_factory.mktemp("scale") / "whole"
    run(*STEPS, "--out", out, nproc=2)
    return out


def test_a_sharded_base_gives_the_same_run_and_goes_on_whole(whole, tmp_path) -> None:
    out = tmp_path / "run"
    run(*STEPS, "--steps", 2, "--shard", "--gradient_checkpointing", "--out", out, nproc=2)
    run("--preset", "tiny", "--resume", "--steps", 4, "--no-shard", "--out", out)
    assert_same_run(whole, out)


SHARDED = """
import torch
import egrsd
from helpers import tiny_settings
from support.shared import models, processes

s = tiny_settings()
device = processes.start_processes(1)
base = models.load_base(s.model, device, shard=True)
weights = sum(p.numel() for p in base.model.layers.parameters())
model = egrsd.add_adapter(base, s)
whole = model.get_base_model().model(torch.arange(9)[None]).last_hidden_state
models.shard_layers(model, device)
with torch.no_grad(), egrsd.as_teacher(model):
    hidden = egrsd.hidden_states(model, torch.arange(9)[None])
torch.testing.assert_close(hidden, whole, rtol=0, atol=1e-6)
held = 0
for name, p in base.model.layers.named_parameters():
    if "lora_" not in name:
        held += p.to_local().numel()
assert held <= 0.51 * weights, (held, weights)
assert models.head_of(model).shape == (72, 96)  # whole

# One rank has one long row, the other eight short ones: both go through the layers as often.
rank = processes.rank_and_world()[0]
rows = [{"prompt_ids": [5] * 4, "completion_ids": [6] * 4}] * 8
if rank == 0:
    rows = [{"prompt_ids": [5] * 40, "completion_ids": [6] * 40}] * 8
groups = egrsd.micro_batches(rows, "prompt_ids", 80)
assert [len(group) for group in groups] == [1] * 8, groups
for group in groups:
    egrsd.completion_hidden(model, group, "prompt_ids")[0].sum().backward()
processes.barrier()
"""


def test_each_rank_holds_its_part_of_the_layers_alone(tmp_path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    run(script, nproc=2, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")


@VLLM
def test_a_sharded_base_beside_vllm(tmp_path, one_shared_engine) -> None:
    options = ("--steps", 2, "--shard", "--engine", "vllm", "--out", tmp_path)
    output = run(*SMALL, *options, nproc=2)
    assert "a random adapter reached the engine" in output
    assert all(row["canary"] < 1e-5 for row in read_log(tmp_path))


# --------------------------------------------------------------------------------------------------
# Two machines: two groups of processes, each with a working directory of its own


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def on_two_machines(folders: list[Path], *args: object, each: int = 1, code: int = 0) -> str:
    """egrsd.py under two torchruns of `each` processes, --out seen from each folder. -> output"""
    port = str(free_port())
    groups = []
    for rank, folder in enumerate(folders):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc_per_node", str(each), "--node_rank", str(rank)]
        command += ["--master_addr", "127.0.0.1", "--master_port", port, str(ROOT / "egrsd.py")]
        groups.append(
            subprocess.Popen(
                [*command, *map(str, args)],
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    output = ""
    for group in groups:
        output += group.communicate(timeout=600)[0]
    assert {group.returncode for group in groups} == {code}, output
    return output


def test_two_machines_train_like_one_and_go_on_where_they_see_the_run(whole, tmp_path) -> None:
    machines = [tmp_path / "a", tmp_path / "b"]
    for folder in machines:
        folder.mkdir()
    on_two_machines(machines, *STEPS, "--steps", 2, "--out", "run")
    assert not (machines[1] / "run").exists()  # the first machine writes
    # No shared file system: the second machine does not know the run.
    output = on_two_machines(machines, *STEPS, "--resume", "--out", "run", code=1)
    assert re.search(r"rank 0 sees step_2 \(\w{8}\) in run, rank 1 no checkpoint", output)
    (machines[1] / "run").mkdir()
    shutil.copy(machines[0] / "run" / "settings.json", machines[1] / "run")
    shutil.copytree(machines[0] / "run" / "step_2", machines[1] / "run" / "step_2")
    on_two_machines(machines, "--preset", "tiny", "--resume", "--steps", 4, "--out", "run")
    assert_same_run(whole, machines[0] / "run")


def test_machines_that_shard_the_base_do_so_each_for_itself(whole, tmp_path) -> None:
    """Four processes: a mesh of two machines by two."""
    output = on_two_machines([tmp_path, tmp_path], *STEPS, "--shard", "--out", "run", each=2)
    assert "processes=4" in output
    assert_same_run(whole, tmp_path / "run")


@VLLM
def test_machines_have_an_engine_each_or_share_one(tmp_path, one_shared_engine) -> None:
    options = (*SMALL, "--steps", 2, "--engine", "vllm")
    run(*options, "--out", tmp_path / "one")
    wanted = read_log(tmp_path / "one")
    for tp in (1, 2):
        folders = [tmp_path / f"{tp}a", tmp_path / f"{tp}b"]
        for folder in folders:
            folder.mkdir()
        output = on_two_machines(folders, *options, "--rollout_tp", tp, "--out", "run")
        assert f"tensor_parallel={tp}" in output
        assert "a random adapter reached the engine" in output
        for row, want in zip(read_log(folders[0] / "run"), wanted, strict=True):
            assert figures_of(row) == pytest.approx(figures_of(want), rel=1e-4, abs=1e-5)


def test_the_slurm_script_trains_on_two_machines(whole, tmp_path) -> None:
    """With stand-ins for srun (runs its command twice, as two tasks) and scontrol."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")
    (tools / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        '"$@" & "$@"\nstatus=$?\nwait $! && exit $status\n'
    )
    (tools / "torchrun").write_text(
        f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": "7",
        "EGRSD_PORT": str(free_port()),
        "EGRSD_OUT": str(tmp_path / "run"),
    }
    script = ["bash", str(ROOT / "docs" / "train.sbatch")]
    for steps in ("2", "4"):  # the second job goes on with the first one's run
        options = [*map(str, STEPS), "--steps", steps]
        done = subprocess.run(
            [*script, *options],
            env={**os.environ, **slurm},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole, tmp_path / "run")
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["processes"] == 2
