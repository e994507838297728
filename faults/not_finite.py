"""NaN and infinity put into one rank of two: who is named, and what is saved.

    python faults/not_finite.py                 # all kinds, NaN and infinity, on each of two ranks
    python faults/not_finite.py --kind reward gradient --rank 1

Each run is a real torchrun with two ranks, hurt in step 2, with a checkpoint after every step. What
must hold: nothing is updated with it; the message names kind and rank, and the rollout where one is
to blame; every checkpoint is that of the run that nothing happened to.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEP = 2
RUN = "--preset tiny --eval_data= --batch_size 8 --max_completion 24 --steps 4 --save_every 1"
KINDS = {  # -> what the message says of it
    "base weight": "base weights",
    "adapter": "adapter",
    "adapter while saving": "is not written",
    "teacher's hidden states": "teacher",
    "student's hidden states": "student",
    "reward": "the reward of",
    "statistics": "reward statistics",
    "advantage": "loss",
    "gradient": "gradient",
    "summed gradient": "the gradient",
    "exp_avg": "optimizer state",
    "exp_avg_sq": "optimizer state",
    "optimizer's step": "optimizer state",
}
OF_ROLLOUTS = ("teacher's hidden states", "student's hidden states", "reward", "advantage")


# --------------------------------------------------------------------------------------------------
# Inside a rank


def be_a_rank(argv: list[str]) -> None:
    """egrsd.py, hurt as HURT_* of the environment say."""
    import egrsd
    from support.shared import processes

    rank = processes.rank_and_world()[0]
    if rank == int(os.environ["HURT_RANK"]):
        hurt(egrsd, os.environ["HURT_KIND"], float(os.environ["HURT_VALUE"]))
    with processes.ending_together():
        egrsd.train(egrsd.parse_settings(argv))


def hurt(egrsd, kind: str, value: float) -> None:
    """Put the value where it belongs, once, in step 2."""
    from support.shared import processes

    kept = {}
    passed = {"rollout": 0, "passes": 0, "update": 0, "saving": 0}
    real_set_up = egrsd.set_up
    real_enter = processes.enter

    def set_up(run, s) -> None:
        real_set_up(run, s)
        kept["run"] = run

    def enter(phase: str) -> float:
        passed[phase] = passed.get(phase, 0) + 1
        if passed["rollout"] == STEP + 1 and "run" in kept:
            if phase == "passes":
                hurt_state(kept["run"], kind, value)
            if phase == "saving" and kind == "adapter while saving":
                hurt_state(kept["run"], "adapter", value)
        return real_enter(phase)

    def now() -> bool:
        return passed["rollout"] == STEP + 1

    egrsd.set_up = set_up
    processes.enter = enter
    hurt_functions(egrsd, kind, value, now)


def hurt_state(run, kind: str, value: float) -> None:
    parameters = dict(run.model.named_parameters())
    adapter = [p for p in parameters.values() if p.requires_grad]
    if kind == "base weight":
        base = [p for p in parameters.values() if not p.requires_grad]
        base[-1].data.view(-1)[0] = value
    if kind == "adapter":
        adapter[3].data.view(-1)[5] = value
    if kind == "statistics":
        run.stats.mean = value
    if kind in ("exp_avg", "exp_avg_sq"):
        run.optimizer.state[adapter[3]][kind].view(-1)[5] = value
    if kind == "optimizer's step":
        run.optimizer.state[adapter[3]]["step"].fill_(value)


def hurt_functions(egrsd, kind: str, value: float, now) -> None:
    real = {}
    for name in ("compute_rewards", "completion_hidden", "accumulate_gradient"):
        real[name] = getattr(egrsd, name)
    real["reduce_"] = egrsd.processes.reduce_
    real["deal_out"] = egrsd.deal_out

    def compute_rewards(rollouts: list[dict], s) -> list:
        rewards = real["compute_rewards"](rollouts, s)
        if now() and kind == "reward":
            rewards[0] = (value, rewards[0][1])
        return rewards

    def completion_hidden(model, rollouts: list[dict], prompts: str):
        hidden, y = real["completion_hidden"](model, rollouts, prompts)
        who = "teacher's" if prompts == "teacher_prompt_ids" else "student's"
        if now() and kind == f"{who} hidden states":
            hidden = hidden.clone()
            hidden[0] = value
        return hidden, y

    def deal_out(rollouts: list[dict]) -> list[dict]:
        mine = real["deal_out"](rollouts)
        if now() and kind == "advantage":
            mine = [{**mine[0], "advantage": value}, *mine[1:]]
        return mine

    def reduce_(tensor, op: str = "SUM"):
        large = tensor.numel() > 1_000
        if now() and large and kind == "gradient":
            egrsd.guards._own["norm"] = tensor.norm() * value
            tensor[7] = value
        real["reduce_"](tensor, op)
        if now() and large and kind == "summed gradient":
            tensor[7] = value
        return tensor

    egrsd.compute_rewards = compute_rewards
    egrsd.completion_hidden = completion_hidden
    egrsd.deal_out = deal_out
    egrsd.processes.reduce_ = reduce_


# --------------------------------------------------------------------------------------------------
# Outside


def run_ranks(out: Path, kind: str, value: float, rank: int) -> tuple[int, str]:
    """-> status and what was printed"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", __file__, "--as_rank"]
    env = {"HURT_KIND": kind, "HURT_VALUE": str(value), "HURT_RANK": str(rank)}
    done = subprocess.run(
        [*launch, *RUN.split(), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
        timeout=600,
    )
    return done.returncode, done.stdout


def state_of(folder: Path) -> list[bytes]:
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("adapter_model", "trainer")]


def find_faults(
    kind: str, rank: int, status: int, text: str, out: Path, whole: Path
) -> tuple[str, list[str]]:
    """-> the sentence, and what is wrong about it or what it left"""
    wrong = []
    sentence = "NONE"
    for line in text.splitlines():
        _, mark, after = line.partition("not_finite.py: ")  # a progress bar may stand before it
        if mark and "not finite" in after:
            sentence = after
            break
    if not status:
        wrong.append("it went on")
    wanted = KINDS[kind]
    if kind == "adapter while saving" and rank == 1:
        wanted = KINDS["adapter"]  # it writes nothing: the next step finds it
    if wanted not in sentence:
        wrong.append(f"the kind is not named: {sentence[:200]}")
    if kind not in ("reward", "adapter while saving") and f"rank {rank}: " not in sentence:
        wrong.append("the rank is not named")
    if kind in OF_ROLLOUTS and "of problem" not in sentence:
        wrong.append("no rollout is named")
    last = STEP + (kind == "adapter while saving" and rank == 1)
    steps = sorted(int(path.name[5:]) for path in out.glob("step_*"))
    if steps[-1] != last:
        wrong.append(f"the last checkpoint is step_{steps[-1]}, not step_{last}")
    for step in steps:
        if step <= STEP and state_of(out / f"step_{step}") != state_of(whole / f"step_{step}"):
            wrong.append(f"step_{step} is not that of the whole run")
    return sentence, wrong


def main() -> None:
    if sys.argv[1:2] == ["--as_rank"]:
        be_a_rank(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=[*KINDS])
    parser.add_argument("--value", type=float, nargs="+", default=[math.nan, math.inf])
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    wrong = []
    rows = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        status, text = run_ranks(whole, "nothing", 0.0, 0)
        if status:
            raise SystemExit(text)
        for kind in given.kind:
            for value in given.value:
                for rank in given.rank:
                    out = Path(name) / f"run-{rows}"
                    status, text = run_ranks(out, kind, value, rank)
                    sentence, bad = find_faults(kind, rank, status, text, out, whole)
                    print(f"{kind:<25}{value} on rank {rank}: {'WRONG' if bad else 'ok'}")
                    print(f"    {sentence[:180]}", flush=True)
                    wrong += [f"{kind}, {value}, rank {rank}: {what}" for what in bad]
                    rows += 1
    print(f"{rows} hurt, {len(wrong)} wrong")
    for sentence in wrong:
        print(f"  {sentence}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
